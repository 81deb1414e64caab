"""Token events to text events: what stands between an engine and everything that shows text.

Each event of `Engine.stream` passes a sequence's detokeniser and then its stop-string matcher, token by token, so
that the result does not depend on how the engine groups tokens into events. A sequence whose text completes a stop
string ends there; when all sequences of the request have ended, the engine is told to abort what it still runs.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxserve.core.types import FinishReason, Request, SamplingParams, TokenEvent, TokenLogprobs
from jaxserve.engine.api import Engine
from jaxserve.sampling.stop import StopMatcher, StopTable
from jaxserve.text.detokenize import IncrementalDetokenizer
from jaxserve.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEvent:
    """News of one sequence as text: new text, its end, or both.

    Each sequence ends in exactly one event with a `finish_reason`; none follows it.

    Attributes:
        index: Which of the request's n sequences.
        text: New text; may be empty while a character or a possible stop string is unfinished.
        token_ids: New output tokens, a stop token included.
        logprobs: One entry a new token if the request asked for them.
        prompt_logprobs: As in `TokenEvent`.
        num_cached_tokens: As in `TokenEvent`.
        finish_reason: Set on the sequence's last event.
        stop_reason: The stop string that ended the sequence, or the token if it is one of the request's stop_token_ids.
        error: A sentence for the user when finish_reason is ERROR.
        queue_s: As in `TokenEvent`.
        prefill_s: As in `TokenEvent`.
    """

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None
    num_cached_tokens: int | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    queue_s: float | None = None
    prefill_s: float | None = None


@runtime_checkable
class _Closable(Protocol):
    async def aclose(self) -> None: ...


class _SequenceText:
    """Text of one sequence in flight."""

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams, stops: StopTable) -> None:
        self._sampling = sampling
        self._detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=sampling.skip_special_tokens)
        self._stops = StopMatcher(stops, include=sampling.include_stop_str_in_output)
        self._num_tokens = 0
        self.ended = False

    def take(self, event: TokenEvent) -> TextEvent:
        """The text event of a token event; sets `ended` if it is the sequence's last."""
        pieces: list[str] = []
        for position, token_id in enumerate(event.token_ids):
            is_last = event.finish_reason is not None and position == len(event.token_ids) - 1
            stops_here = is_last and event.stop_token_id is not None
            self._num_tokens += 1
            hidden = stops_here and not self._sampling.include_stop_str_in_output
            text = "" if hidden else self._detokenizer.push((token_id,))
            if (stop := self._push(text, pieces)) is not None:
                return self._end(event, pieces, stop, num_tokens=position + 1)
        if event.finish_reason is None:
            return _text_event(event, pieces, None, None, len(event.token_ids))
        if (stop := self._push(self._detokenizer.flush(), pieces)) is not None:
            return self._end(event, pieces, stop, num_tokens=len(event.token_ids))
        pieces.append(self._stops.flush())
        self.ended = True
        stop_id = event.stop_token_id if event.stop_token_id in self._sampling.stop_token_ids else None
        return _text_event(event, pieces, event.finish_reason, stop_id, len(event.token_ids))

    def _push(self, text: str, pieces: list[str]) -> str | None:
        result = self._stops.push(text, can_stop=self._num_tokens > self._sampling.min_tokens)
        pieces.append(result.text)
        return result.stop

    def _end(self, event: TokenEvent, pieces: list[str], stop: str, *, num_tokens: int) -> TextEvent:
        self.ended = True
        return _text_event(event, pieces, FinishReason.STOP, stop, num_tokens)


def _text_event(
    event: TokenEvent, pieces: list[str], reason: FinishReason | None, stop: int | str | None, num_tokens: int
) -> TextEvent:
    return TextEvent(
        index=event.index,
        text="".join(pieces),
        token_ids=event.token_ids[:num_tokens],
        logprobs=None if event.logprobs is None else event.logprobs[:num_tokens],
        prompt_logprobs=event.prompt_logprobs,
        num_cached_tokens=event.num_cached_tokens,
        finish_reason=reason,
        stop_reason=stop,
        error=event.error if reason is FinishReason.ERROR else None,
        queue_s=event.queue_s,
        prefill_s=event.prefill_s,
    )


class TextStream(AsyncIterator[TextEvent]):
    """Text events of one request; closing it early aborts the request.

    Args:
        engine: Runs the request; it is submitted at once.
        request: What to generate.
        tokenizer: Turns the tokens into text.
    """

    def __init__(self, engine: Engine, request: Request, tokenizer: Tokenizer) -> None:
        self._events = engine.stream(request)
        self._engine = engine
        self._request = request
        stops = StopTable(request.sampling.stop)
        self._sequences = [_SequenceText(tokenizer, request.sampling, stops) for _ in range(request.n)]
        self._num_live = request.n
        self._open = True

    def __aiter__(self) -> TextStream:
        """The stream itself."""
        return self

    async def __anext__(self) -> TextEvent:
        """The next event of a sequence that has not ended."""
        while self._open:
            if self._num_live == 0:
                await self.aclose()
                break
            try:
                event = await anext(self._events)
            except StopAsyncIteration:
                self._open = False
                break
            sequence = self._sequences[event.index]
            if not sequence.ended:
                taken = sequence.take(event)
                self._num_live -= sequence.ended
                return taken
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Aborts what the engine still runs of the request. Idempotent."""
        if not self._open:
            return
        self._open = False
        self._engine.abort(self._request.request_id)
        if isinstance(self._events, _Closable):
            await self._events.aclose()


def generate_text(engine: Engine, request: Request, tokenizer: Tokenizer) -> TextStream:
    """Submits a request at once and yields its text events.

    Args:
        engine: Runs the request.
        request: What to generate; its `stop` strings are applied here.
        tokenizer: Turns the tokens into text.

    Raises:
        InvalidRequestError: The request can never succeed.
        QueueFullError: The engine's queue is at its bound.
        UnavailableError: The engine is draining or dead.
    """
    return TextStream(engine, request, tokenizer)
