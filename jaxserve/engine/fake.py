"""An engine whose tokens a test can work out by hand.

It behaves like the real one at the `Engine` interface (validation at the call, bounded queue, slots, priorities, stop
tokens, n, log-probabilities, abort, drain) and has no model: the token after `t` is `(t + 1) % vocab_size`, or what the
given function says. A task steps all running sequences by one token at a time, puts the events of each request into its
stream, and ends when nothing is left to do. Faults (an error after k tokens, a slow step, a lost device) can be asked
for; an exception out of the given function fails the sequence it was called for, as a failing step does.

The made-up distribution over the next token: the token that follows has log-probability -1 and rank 1, the token d ids
after it (modulo the vocabulary) -(1 + d) and rank 1 + d. The most likely token is always taken, after logit_bias,
allowed_token_ids, bad_words and min_tokens were applied; temperature and the other samplers change nothing here.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from jaxserve.core.errors import ContextLengthError, InvalidRequestError, QueueFullError, UnavailableError
from jaxserve.core.types import FinishReason, Request, SamplingParams, TokenEvent, TokenLogprobs
from jaxserve.engine.api import EngineInfo, EngineStats, Health

NextToken = Callable[[Sequence[int]], int]
"""The most likely token after a non-empty sequence of token ids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FakeBehaviour:
    """How a fake engine deviates from an instant and flawless one.

    Attributes:
        start_delay_s: Seconds before a pause in work ends and the first step runs.
        step_delay_s: Seconds a step takes.
        error_after_tokens: Each sequence fails after this many tokens, unless it ended before.
        num_cached_tokens: Prompt tokens reported as found in the prefix cache (at most all but the last).
        max_num_waiting: Sequences that may wait for a slot beside those for whom one is free.
    """

    start_delay_s: float = 0.0
    step_delay_s: float = 0.0
    error_after_tokens: int | None = None
    num_cached_tokens: int = 0
    max_num_waiting: int = 1024


@dataclass(kw_only=True, slots=True, eq=False)
class _Stream(AsyncIterator[TokenEvent]):
    """The events of one request; closing it aborts the request."""

    request: Request
    abort: Callable[[str], None]
    num_open: int
    events: deque[TokenEvent] = field(default_factory=deque)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, event: TokenEvent) -> None:
        self.events.append(event)
        self.arrived.set()

    async def __anext__(self) -> TokenEvent:
        while not self.events:
            if self.num_open == 0:
                raise StopAsyncIteration
            self.arrived.clear()
            await self.arrived.wait()
        event = self.events.popleft()
        self.num_open -= event.finish_reason is not None
        return event

    async def aclose(self) -> None:
        if self.num_open:
            self.abort(self.request.request_id)
        self.num_open = 0
        self.events.clear()
        self.arrived.set()


@dataclass(kw_only=True, slots=True, eq=False)
class _Sequence:
    """One generation in flight."""

    stream: _Stream
    index: int
    token_ids: list[int]
    arrival_s: float
    started_s: float = 0.0
    done: bool = False

    @property
    def request(self) -> Request:
        return self.stream.request

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - len(self.request.prompt)


class FakeEngine:
    """Implements `Engine` with arithmetic.

    Args:
        info: The facts to report; vocabulary, context and slots are enforced.
        next_token: The most likely next token; by default the last token plus one, modulo the vocabulary.
        behaviour: Delays, faults and the queue's bound.
    """

    def __init__(
        self, info: EngineInfo, *, next_token: NextToken | None = None, behaviour: FakeBehaviour | None = None
    ) -> None:
        self._info = info
        self._next_token = next_token or (lambda token_ids: (token_ids[-1] + 1) % info.vocab_size)
        self.behaviour = behaviour or FakeBehaviour()
        self.submitted: deque[Request] = deque(maxlen=64)
        self._waiting: list[tuple[int, int, _Sequence]] = []
        self._running: list[_Sequence] = []
        self._streams: dict[str, _Stream] = {}
        self._order = itertools.count()
        self._num_steps = 0
        self._cache_tokens = (0, 0)
        self._pump: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._refusal = ""
        self._alive = True

    @property
    def info(self) -> EngineInfo:
        """Facts that never change."""
        return self._info

    def stream(self, request: Request) -> AsyncIterator[TokenEvent]:
        """Submits a request at once and yields its events; see `Engine.stream`."""
        if self._refusal:
            raise UnavailableError(self._refusal)
        self._validate(request)
        if len(self._sequences()) + request.n > self._capacity:
            raise QueueFullError(
                f"There are {self._capacity} sequences at most; try again later.", capacity=self._capacity
            )
        self.submitted.append(request)
        stream = _Stream(request=request, abort=self.abort, num_open=request.n)
        self._streams[request.request_id] = stream
        self._idle.clear()
        now = time.monotonic()
        for index in range(request.n):
            sequence = _Sequence(stream=stream, index=index, token_ids=list(request.prompt), arrival_s=now)
            heapq.heappush(self._waiting, (request.priority, next(self._order), sequence))
        queried, hit = self._cache_tokens
        self._cache_tokens = (queried + len(request.prompt), hit + self._num_cached(request))
        if self._pump is None or self._pump.done():
            self._pump = asyncio.get_running_loop().create_task(self._run())
        return stream

    def abort(self, request_id: str) -> None:
        """Ends a request wherever it is; unknown ids are ignored."""
        if request_id in self._streams:
            mine = [s for s in self._sequences() if s.request.request_id == request_id]
            self._end(mine, FinishReason.ABORT)

    def stats(self) -> EngineStats:
        """A snapshot of load and counters."""
        page_size = self._info.page_size
        pages = sum(-(-len(s.token_ids) // page_size) for s in self._running)
        return EngineStats(
            num_waiting=len(self._waiting),
            num_running=len(self._running),
            kv_cache_usage=min(1.0, pages / self._info.num_pages),
            prefix_cache_queries_tokens=self._cache_tokens[0],
            prefix_cache_hits_tokens=self._cache_tokens[1],
            num_steps=self._num_steps,
        )

    def health(self) -> Health:
        """Whether the engine can serve."""
        return Health(alive=self._alive, ready=not self._refusal, reason=self._refusal)

    async def drain(self, deadline_s: float) -> bool:
        """Refuses new requests and waits for those in flight; True if all ended by themselves."""
        self._refusal = self._refusal or "The engine is draining; send the request to another replica."
        try:
            await asyncio.wait_for(self._idle.wait(), deadline_s)
        except TimeoutError:
            self._end(self._sequences(), FinishReason.ABORT)
            return False
        return True

    async def close(self) -> None:
        """Aborts what is left and stops. Idempotent."""
        self._refusal = "The engine is closed."
        self._end(self._sequences(), FinishReason.ABORT)
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.gather(self._pump, return_exceptions=True)
            self._pump = None

    def kill(self, reason: str) -> None:
        """Plays a lost device: everything in flight fails, and the engine is neither alive nor ready from now on."""
        self._refusal, self._alive = reason, False
        self._end(self._sequences(), FinishReason.ERROR, error=reason)

    def _sequences(self) -> list[_Sequence]:
        return [sequence for *_, sequence in self._waiting] + self._running

    @property
    def _capacity(self) -> int:
        return self._info.max_num_seqs + self.behaviour.max_num_waiting

    def _num_cached(self, request: Request) -> int:
        return min(self.behaviour.num_cached_tokens, len(request.prompt) - 1)

    def _validate(self, request: Request) -> None:
        info, sampling = self._info, request.sampling
        if request.request_id in self._streams:
            raise InvalidRequestError(f"A request with id {request.request_id} is in flight.", param="request_id")
        if request.n < 1:
            raise InvalidRequestError("n must be at least 1.", param="n")
        if request.n > self._capacity:
            raise InvalidRequestError(f"n={request.n}: there are {self._capacity} sequences at most.", param="n")
        if not request.prompt:
            raise InvalidRequestError("The prompt is empty; give at least one token.", param="prompt")
        if not all(0 <= token_id < info.vocab_size for token_id in request.prompt):
            raise InvalidRequestError(f"Prompt token ids must be in [0, {info.vocab_size}).", param="prompt")
        if sampling.max_tokens is not None and sampling.max_tokens < 1:
            raise InvalidRequestError("max_tokens must be at least 1.", param="max_tokens")
        if len(request.prompt) + (sampling.max_tokens or 1) > info.max_model_len:
            raise ContextLengthError(
                f"The prompt's {len(request.prompt)} tokens and max_tokens={sampling.max_tokens or 1} do not fit the "
                f"context of {info.max_model_len}; shorten one of them.",
                param="prompt",
            )

    async def _run(self) -> None:
        await asyncio.sleep(self.behaviour.start_delay_s)
        while self._waiting or self._running:
            while self._waiting and len(self._running) < self._info.max_num_seqs:
                sequence = heapq.heappop(self._waiting)[2]
                sequence.started_s = time.monotonic()
                self._running.append(sequence)
            await asyncio.sleep(self.behaviour.step_delay_s)
            self._num_steps += 1
            for sequence in tuple(self._running):
                if not sequence.done:
                    self._step(sequence)

    def _step(self, sequence: _Sequence) -> None:
        try:
            self._advance(sequence)
        except Exception as error:
            self._end([sequence], FinishReason.ERROR, error=f"A step failed: {error}")

    def _advance(self, sequence: _Sequence) -> None:
        """Appends one token and reports it, or plays the fault that was asked for."""
        request, sampling = sequence.request, sequence.request.sampling
        if sequence.num_output == self.behaviour.error_after_tokens:
            self._end([sequence], FinishReason.ERROR, error="A step failed on the fake device.")
            return
        first = sequence.num_output == 0
        context = tuple(sequence.token_ids)
        token_id = self._choose(context, sequence.num_output, sampling)
        sequence.token_ids.append(token_id)
        finish, stop_token_id = self._finish(sequence, token_id)
        now = time.monotonic()
        event = TokenEvent(
            request_id=request.request_id,
            index=sequence.index,
            token_ids=(token_id,),
            logprobs=None if sampling.logprobs is None else (self._logprobs(context, token_id, sampling.logprobs),),
            prompt_logprobs=self._prompt_logprobs(request) if first and sequence.index == 0 else None,
            num_cached_tokens=self._num_cached(request) if first else None,
            finish_reason=finish,
            stop_token_id=stop_token_id,
            queue_s=sequence.started_s - sequence.arrival_s if first else None,
            prefill_s=now - sequence.started_s if first else None,
        )
        if finish is not None:
            self._forget([sequence])
        sequence.stream.put(event)

    def _finish(self, sequence: _Sequence, token_id: int) -> tuple[FinishReason | None, int | None]:
        sampling = sequence.request.sampling
        if sequence.num_output >= sampling.min_tokens and self._stops(token_id, sampling):
            return FinishReason.STOP, token_id
        if sequence.num_output == sampling.max_tokens or len(sequence.token_ids) == self._info.max_model_len:
            return FinishReason.LENGTH, None
        return None, None

    def _stops(self, token_id: int, sampling: SamplingParams) -> bool:
        ends_text = not sampling.ignore_eos and token_id in self._info.eos_token_ids
        return ends_text or token_id in sampling.stop_token_ids

    def _choose(self, context: Sequence[int], num_output: int, sampling: SamplingParams) -> int:
        best = self._next_token(context)
        constrained = sampling.logit_bias or sampling.bad_words or num_output < sampling.min_tokens
        if not constrained and sampling.allowed_token_ids is None:
            return best
        vocab_size = self._info.vocab_size
        banned = {word[-1] for word in sampling.bad_words if _ends_with(context, word[:-1])}
        if num_output < sampling.min_tokens:
            banned |= {token_id for token_id in range(vocab_size) if self._stops(token_id, sampling)}
        allowed = range(vocab_size) if sampling.allowed_token_ids is None else sampling.allowed_token_ids
        choices = [token_id for token_id in allowed if token_id not in banned] or [best]
        return max(choices, key=lambda t: sampling.logit_bias.get(t, 0.0) - (t - best) % vocab_size)

    def _logprobs(self, context: Sequence[int], token_id: int, num_top: int) -> TokenLogprobs:
        vocab_size = self._info.vocab_size
        best = self._next_token(context)
        rank = (token_id - best) % vocab_size + 1
        top = tuple(((best + i) % vocab_size, -1.0 - i) for i in range(min(num_top, vocab_size)))
        return TokenLogprobs(token_id=token_id, logprob=-float(rank), rank=rank, top=top)

    def _prompt_logprobs(self, request: Request) -> tuple[TokenLogprobs | None, ...] | None:
        num_top, prompt = request.sampling.prompt_logprobs, request.prompt
        if num_top is None:
            return None
        return (None, *(self._logprobs(prompt[:i], prompt[i], num_top) for i in range(1, len(prompt))))

    def _end(self, sequences: Sequence[_Sequence], reason: FinishReason, *, error: str | None = None) -> None:
        self._forget(sequences)
        for sequence in sequences:
            request_id = sequence.request.request_id
            sequence.stream.put(
                TokenEvent(request_id=request_id, index=sequence.index, finish_reason=reason, error=error)
            )

    def _forget(self, sequences: Sequence[_Sequence]) -> None:
        """Takes ended sequences out of every place that holds them."""
        for sequence in sequences:
            sequence.done = True
        self._running = [s for s in self._running if not s.done]
        if any(entry[2].done for entry in self._waiting):
            self._waiting = [entry for entry in self._waiting if not entry[2].done]
            heapq.heapify(self._waiting)
        live = {s.request.request_id for s in self._sequences()}
        for request_id in {s.request.request_id for s in sequences} - live:
            self._streams.pop(request_id, None)
        if not live:
            self._idle.set()


def _ends_with(context: Sequence[int], suffix: Sequence[int]) -> bool:
    return not suffix or tuple(context[-len(suffix) :]) == tuple(suffix)
