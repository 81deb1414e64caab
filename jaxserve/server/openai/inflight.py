"""A generation at work: its engine requests submitted together, their events as one stream.

Events pass a timer on their way and a failed sequence ends the whole generation with a typed error. Closing aborts
whatever still runs; nothing is left in the engine when a client goes away.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from jaxserve.core.errors import (
    DeadlineError,
    EngineError,
    InvalidRequestError,
    JaxserveError,
    QueueFullError,
    UnavailableError,
)
from jaxserve.core.types import FinishReason
from jaxserve.engine.api import Engine
from jaxserve.engine.generation import TextEvent, TextStream, generate_text
from jaxserve.server.openai.translate import Generation
from jaxserve.telemetry.metrics import RequestTimer, ServerMetrics
from jaxserve.telemetry.tracing import RequestSpan, SequencePhases
from jaxserve.text.tokenizer import Tokenizer

COMPLETE = "complete"
"""Outcome of a generation that ran to its end."""

ABANDONED = "abandoned by the client"
"""Outcome of a generation that nobody waited for."""


@dataclass(kw_only=True, slots=True)
class Usage:
    """Tokens of a generation so far.

    Attributes:
        prompt_tokens: Of all prompts; each counts once.
        completion_tokens: Generated, over all sequences.
        cached_tokens: Prompt tokens found in the prefix cache.
    """

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0

    def as_json(self, *, num_unsent: int = 0) -> dict[str, object]:
        """OpenAI's `usage` object, without the last so many tokens."""
        completion_tokens = self.completion_tokens - num_unsent
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class InFlight:
    """The engine requests of one generation.

    All are submitted when this is made, or none.

    Args:
        engine: Runs them.
        generation: What to run.
        tokenizer: Turns tokens into text.
        metrics: Where latencies go.
        span: The request's span.
        timeout_s: Seconds after which the requests are ended; None means never.

    Raises:
        InvalidRequestError: A request can never succeed.
        QueueFullError: The engine's queue is at its bound.
        UnavailableError: The engine is not ready, draining or dead.
    """

    def __init__(
        self,
        engine: Engine,
        generation: Generation,
        tokenizer: Tokenizer,
        metrics: ServerMetrics,
        *,
        span: RequestSpan,
        timeout_s: float | None,
    ) -> None:
        self._engine = engine
        self._requests = generation.requests
        try:
            self._streams = self._submit(tokenizer)
        except (InvalidRequestError, QueueFullError) as error:
            raise _of_the_body(error, generation) from error
        self._timers = [
            RequestTimer(metrics, num_prompt_tokens=len(request.prompt), num_sequences=request.n)
            for request in generation.requests
        ]
        self._phases = [SequencePhases(span) for _ in generation.requests] if span.recording else []
        self._drop_output = generation.drop_output
        self._expired = False
        self._expiry = None if timeout_s is None else asyncio.get_running_loop().call_later(timeout_s, self._expire)
        self.usage = Usage(prompt_tokens=sum(len(request.prompt) for request in generation.requests))
        self.outcome = ABANDONED

    async def events(self) -> AsyncGenerator[tuple[int, TextEvent], None]:
        """Events of all requests as they come, each with its request's index.

        Raises:
            EngineError: A sequence failed.
            DeadlineError: The time limit passed.
            UnavailableError: The server ended a sequence.
        """
        merged = _single(self._streams[0]) if len(self._streams) == 1 else _merged(self._streams)
        async with aclosing(merged):
            async for position, event in merged:
                self._observe(position, event)
                if event.finish_reason is FinishReason.ERROR:
                    self.outcome = "error"
                    raise EngineError(event.error or "The engine failed.")
                if event.finish_reason is FinishReason.ABORT:
                    self.outcome = "timeout" if self._expired else "ended by the server"
                    if self._expired:
                        raise DeadlineError("The request took longer than the server allows; ask for fewer tokens.")
                    raise UnavailableError("The server ended the request before it was complete; send it again.")
                yield position, event
        self.outcome = COMPLETE

    async def aclose(self) -> None:
        """Aborts what still runs. Idempotent."""
        if self._expiry is not None:
            self._expiry.cancel()
        for timer in self._timers:
            timer.close()
        for stream in self._streams:
            await stream.aclose()

    def _submit(self, tokenizer: Tokenizer) -> list[TextStream]:
        streams: list[TextStream] = []
        try:
            for request in self._requests:
                streams.append(generate_text(self._engine, request, tokenizer))
        except BaseException:
            for request in self._requests[: len(streams)]:
                self._engine.abort(request.request_id)
            raise
        return streams

    def _expire(self) -> None:
        """Ends what runs; its last events say so to whoever waits for them."""
        self._expired = True
        for request in self._requests:
            self._engine.abort(request.request_id)

    def _observe(self, position: int, event: TextEvent) -> None:
        timer = self._timers[position]
        if event.token_ids:
            timer.on_tokens(event.index, len(event.token_ids))
            if not self._drop_output:
                self.usage.completion_tokens += len(event.token_ids)
        if event.queue_s is not None and event.prefill_s is not None:
            timer.on_started(event.queue_s, event.prefill_s)
            for phases in self._phases[position : position + 1]:
                phases.on_started(event.index, event.queue_s, event.prefill_s)
        if event.num_cached_tokens is not None and event.index == 0:
            self.usage.cached_tokens += event.num_cached_tokens
        if event.finish_reason is not None:
            timer.on_finished(event.index, event.finish_reason.value)
            for phases in self._phases[position : position + 1]:
                phases.on_finished(event.index)


def _of_the_body(error: InvalidRequestError | QueueFullError, generation: Generation) -> JaxserveError:
    """An engine's refusal of one request, in terms of the body that asked for all of them."""
    requests = generation.requests
    num_sequences = sum(request.n for request in requests)
    match error:
        case QueueFullError(capacity=int(capacity)) if num_sequences > capacity:
            return InvalidRequestError(
                f"prompt: {len(requests)} prompts make {num_sequences} sequences, more than the {capacity} that this "
                "server runs and lets wait for one client; send fewer prompts a request.",
                param="prompt",
            )
        case InvalidRequestError(param="n") if requests[0].n != generation.num_choices:
            # The engine knows n alone.
            asked = requests[0].n
            return InvalidRequestError(f"best_of={asked}{error.message.removeprefix(f'n={asked}')}", param="best_of")
    return error


async def _single(stream: TextStream) -> AsyncGenerator[tuple[int, TextEvent], None]:
    async for event in stream:
        yield 0, event


async def _merged(streams: Sequence[TextStream]) -> AsyncGenerator[tuple[int, TextEvent], None]:
    """Events of several streams in the order they come."""
    queue: asyncio.Queue[tuple[int, TextEvent | None]] = asyncio.Queue()

    async def pump(position: int, stream: TextStream) -> None:
        try:
            async for event in stream:
                queue.put_nowait((position, event))
        finally:
            queue.put_nowait((position, None))

    tasks = [asyncio.create_task(pump(position, stream)) for position, stream in enumerate(streams)]
    try:
        num_open = len(tasks)
        while num_open:
            position, event = await queue.get()
            if event is None:
                num_open -= 1
                await tasks[position]
            else:
                yield position, event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
