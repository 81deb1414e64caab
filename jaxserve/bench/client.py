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

from jaxserve.bench.openai_url import error_of, error_text, sse_event
from jaxserve.bench.workload import Item


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What every request of a benchmark has in common.

    Attributes:
        model: Name of the model.
        temperature: 0 is greedy.
        ignore_eos: Ask for exactly as many tokens as `max_tokens`.
    """

    model: str
    temperature: float
    ignore_eos: bool

    def body(self, item: Item) -> dict[str, object]:
        """The request's JSON."""
        body: dict[str, object] = {
            "model": self.model,
            "prompt": item.prompt if isinstance(item.prompt, str) else list(item.prompt),
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
        prompt_tokens: As the server counts them.
        cached_tokens: Of those, taken from its prefix cache.
        output_tokens: As the server counts them.
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
            # A piece without text still carries a token: half a character, or a control token that is not shown.
            if choice.get("finish_reason") is None or choice.get("text"):
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


async def send(client: httpx.AsyncClient, target: Target, item: Item) -> Timing:
    """Sends a request and times its answer; failures are in the timing, never raised."""
    stream = _Stream()
    failure: str | None = None
    sent_s = time.perf_counter()
    try:
        async with client.stream("POST", "/v1/completions", json=target.body(item)) as response:
            if response.status_code == 200:
                async for line in response.aiter_lines():
                    if (event := sse_event(line)) is not None:
                        stream.take(event, time.perf_counter())
            else:
                await response.aread()
                failure = error_of(response)
    except httpx.HTTPError as error:
        failure = f"{type(error).__name__}: {error}".rstrip(": ")
    except ValueError:
        failure = "an event of the stream is not JSON"
    pieces = stream.piece_s
    details = stream.usage.get("prompt_tokens_details") or {}
    return Timing(
        sent_s=sent_s,
        first_s=pieces[0] if pieces else None,
        last_s=pieces[-1] if pieces else time.perf_counter(),
        gaps_s=tuple(after - before for before, after in itertools.pairwise(pieces)),
        prompt_tokens=stream.usage.get("prompt_tokens", 0),
        cached_tokens=details.get("cached_tokens") or 0,
        output_tokens=stream.usage.get("completion_tokens", len(pieces)),
        failure=failure or stream.failure(item, target),
    )
