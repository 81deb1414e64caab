"""One streamed completion, timed: when its first token came, when the others did, and whether it was as asked.

The clock of a request starts when it is sent. A request that the server refuses, that breaks off, or that ends
without a finish reason is a failure with a reason; nothing is retried.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from jaxserve.bench.openai_url import error_of, error_text, sse_events
from jaxserve.bench.workload import Item


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What every request of a benchmark has in common.

    Attributes:
        endpoint: "completions" or "chat".
        model: Name of the model.
        temperature: 0 is greedy.
        ignore_eos: Ask for exactly as many tokens as `max_tokens`.
    """

    endpoint: str
    model: str
    temperature: float
    ignore_eos: bool

    @property
    def path(self) -> str:
        """The endpoint's path."""
        return "/v1/chat/completions" if self.endpoint == "chat" else "/v1/completions"

    def body(self, item: Item) -> dict[str, object]:
        """The request's JSON."""
        prompt = item.prompt if isinstance(item.prompt, str) else list(item.prompt)
        asked = {"messages": [{"role": "user", "content": prompt}]} if self.endpoint == "chat" else {"prompt": prompt}
        body: dict[str, object] = {
            "model": self.model,
            **asked,
            "max_tokens": item.output_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return {**body, "ignore_eos": True} if self.ignore_eos else body


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """What happened to a request; times are seconds on one monotonic clock.

    Attributes:
        sent_s: When it was sent.
        first_s: When its first token came; None if none did.
        last_s: When its last token came, or when it failed.
        gaps_s: Time between pieces after the first.
        prompt_tokens: As the server counts them; if it does not, the token ids sent.
        cached_tokens: Of those, taken from its prefix cache.
        output_tokens: As the server counts them; if it does not, pieces.
        failure: Why it failed; None if it did not.
    """

    sent_s: float
    first_s: float | None
    last_s: float
    gaps_s: tuple[float, ...]
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    failure: str | None

    @property
    def ttft_s(self) -> float | None:
        """Time to first token."""
        return None if self.first_s is None else self.first_s - self.sent_s

    @property
    def e2e_s(self) -> float:
        """Time from sending to the last token."""
        return self.last_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None if there is only one."""
        if self.first_s is None or self.output_tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.output_tokens - 1)


@dataclass(kw_only=True)
class _Stream:
    """What came so far."""

    piece_s: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    def take(self, event: dict[str, Any], now_s: float) -> None:
        """Takes in an event."""
        if "error" in event:
            self.error = f"error in stream: {error_text(event['error'])}"
        self.usage = event.get("usage") or self.usage
        for choice in event.get("choices", ()):
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            if _carries_token(choice):
                self.piece_s.append(now_s)

    def failure(self, item: Item, target: Target) -> str | None:
        """What is wrong with the finished stream, if anything."""
        if self.error is not None:
            return self.error
        if self.finish_reason is None:
            return "stream ended without a finish reason"
        if not self.piece_s:
            return "no tokens"
        if target.ignore_eos and self.usage and self.usage.get("completion_tokens") != item.output_tokens:
            return f"{self.usage.get('completion_tokens')} tokens instead of {item.output_tokens}"
        return None


def _carries_token(choice: dict[str, Any]) -> bool:
    """Whether there is a token in a piece; without text it may be half a character, or a control token not shown."""
    delta = choice.get("delta", choice)
    if any(delta.get(name) for name in ("text", "content", "reasoning_content", "reasoning", "tool_calls")):
        return True
    # What only names the role comes before the first token; what only says the reason, after the last.
    return choice.get("finish_reason") is None and "role" not in delta


async def send(client: httpx.AsyncClient, target: Target, item: Item) -> Timing:
    """Sends a request and times its answer; failures are in the timing, never raised."""
    stream = _Stream()
    failure: str | None = None
    pending = b""
    sent_s = time.perf_counter()
    try:
        async with client.stream("POST", target.path, json=target.body(item)) as response:
            if response.status_code == 200:
                async for chunk in response.aiter_bytes():
                    now_s = time.perf_counter()
                    events, pending = sse_events(pending, chunk)
                    for event in events:
                        stream.take(event, now_s)
            else:
                await response.aread()
                failure = error_of(response)
    except httpx.HTTPError as error:
        failure = f"{type(error).__name__}: {error}".rstrip(": ")
    except ValueError:
        failure = "an event of the stream is not JSON"
    pieces = stream.piece_s
    details = stream.usage.get("prompt_tokens_details") or {}
    num_ids = 0 if isinstance(item.prompt, str) else len(item.prompt)
    return Timing(
        sent_s=sent_s,
        first_s=pieces[0] if pieces else None,
        last_s=pieces[-1] if pieces else time.perf_counter(),
        gaps_s=tuple(after - before for before, after in itertools.pairwise(pieces)),
        prompt_tokens=stream.usage.get("prompt_tokens", num_ids),
        cached_tokens=details.get("cached_tokens") or 0,
        output_tokens=stream.usage.get("completion_tokens", len(pieces)),
        failure=failure or stream.failure(item, target),
    )
