"""The Engine protocol: what a server needs from whatever generates tokens.

`LocalEngine` (the device loop in this process) and `FakeEngine` (arithmetic a test can do by hand) implement it now;
remote and disaggregated engines implement it behind gRPC. The HTTP app takes an `Engine` and cannot tell them apart.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxserve.core.types import Request, TokenEvent


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineInfo:
    """Facts about an engine that never change while it lives.

    Attributes:
        model: The name the model is served under.
        max_model_len: Most tokens of prompt and output together.
        vocab_size: Token ids are in [0, vocab_size).
        page_size: Tokens a KV page holds.
        num_pages: Pages in the KV pool.
        eos_token_ids: Tokens that end a sequence unless it ignores them.
        max_num_seqs: Most sequences that run at once.
    """

    model: str
    max_model_len: int
    vocab_size: int
    page_size: int
    num_pages: int
    eos_token_ids: tuple[int, ...]
    max_num_seqs: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """A snapshot of an engine's load and its counters since start.

    Attributes:
        num_waiting: Sequences that wait for their first step.
        num_running: Sequences that hold pages.
        kv_cache_usage: Share of the KV pool owned by running sequences, 0 to 1.
        prefix_cache_queries_tokens: Prompt tokens looked up in the prefix cache.
        prefix_cache_hits_tokens: Of those, tokens found.
        num_preemptions: Times a sequence gave its pages back and started over.
        num_compiles_after_ready: Programs compiled after the engine said it was ready; must stay 0.
        num_steps: Steps executed.
        step_age_s: Seconds since the oldest step under way was taken up; 0 when nothing runs.
    """

    num_waiting: int = 0
    num_running: int = 0
    kv_cache_usage: float = 0.0
    prefix_cache_queries_tokens: int = 0
    prefix_cache_hits_tokens: int = 0
    num_preemptions: int = 0
    num_compiles_after_ready: int = 0
    num_steps: int = 0
    step_age_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    """Whether an engine can serve.

    Attributes:
        alive: False once the device is lost, or has not answered for long; the process should be restarted.
        ready: True when every program is compiled, requests are accepted and no step is overdue.
        reason: One sentence when either is False.
    """

    alive: bool
    ready: bool
    reason: str = ""


@runtime_checkable
class Engine(Protocol):
    """One replica that turns requests into token events."""

    @property
    def info(self) -> EngineInfo:
        """Facts that never change."""
        ...

    def stream(self, request: Request) -> AsyncIterator[TokenEvent]:
        """Submits a request at once and yields its events.

        The request is validated and queued when `stream` is called, before the first `__anext__`. The iterator ends
        after the last of the request's n sequences has ended. Closing the iterator early (`aclose`) aborts the request.

        Raises:
            InvalidRequestError: The request can never succeed (too long, too many sequences, a bad parameter).
            QueueFullError: The slots are taken and the waiting queue is at its bound.
            UnavailableError: The engine is draining or dead.
        """
        ...

    def abort(self, request_id: str) -> None:
        """Ends a request wherever it is; its sequences finish with `FinishReason.ABORT`. Unknown ids are ignored."""
        ...

    def stats(self) -> EngineStats:
        """A snapshot of load and counters."""
        ...

    def health(self) -> Health:
        """Whether the engine can serve."""
        ...

    async def drain(self, deadline_s: float) -> bool:
        """Refuses new requests and waits for those in flight.

        Returns:
            True if all ended by themselves; False if the deadline passed and the rest were aborted.
        """
        ...

    async def close(self) -> None:
        """Frees threads and device memory. Idempotent."""
        ...
