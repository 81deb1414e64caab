"""Many requests at once, each collected into one finished output: the work behind the offline API."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from jaxserve.core.errors import EngineError, QueueFullError, UnavailableError
from jaxserve.core.types import FinishReason, Request, TokenLogprobs
from jaxserve.engine.api import Engine
from jaxserve.engine.generation import TextEvent, TextStream, generate_text
from jaxserve.text.tokenizer import Tokenizer

_RETRY_S = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceOutput:
    """One finished generation.

    Attributes:
        index: Which of the n sequences.
        text: The output.
        token_ids: Its tokens, a stop token included.
        logprobs: One entry a token if asked for.
        finish_reason: STOP or LENGTH.
        stop_reason: The stop string, or the token of `stop_token_ids`, that ended it.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason
    stop_reason: int | str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationOutput:
    """What became of one prompt.

    Attributes:
        prompt: The prompt as text, or None if it came as token ids.
        prompt_token_ids: The prompt's tokens.
        prompt_logprobs: An entry a prompt token if asked for; the first is None.
        num_cached_tokens: Prompt tokens whose KV came from the prefix cache.
        outputs: The n sequences, in order.
    """

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None
    num_cached_tokens: int
    outputs: tuple[SequenceOutput, ...]

    @property
    def text(self) -> str:
        """The first sequence's text."""
        return self.outputs[0].text


@dataclass(kw_only=True, slots=True)
class _Collector:
    """What has come of one sequence so far."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    last: TextEvent | None = None

    def take(self, event: TextEvent) -> None:
        """Adds an event."""
        self.texts.append(event.text)
        self.token_ids.extend(event.token_ids)
        if event.logprobs is not None:
            self.logprobs = [*(self.logprobs or ()), *event.logprobs]
        if event.finish_reason is not None:
            self.last = event

    def output(self, index: int) -> SequenceOutput:
        """The finished generation."""
        if self.last is None or self.last.finish_reason is None:
            raise EngineError("The engine's stream ended before the generation did.")
        return SequenceOutput(
            index=index,
            text="".join(self.texts),
            token_ids=tuple(self.token_ids),
            logprobs=None if self.logprobs is None else tuple(self.logprobs),
            finish_reason=self.last.finish_reason,
            stop_reason=self.last.stop_reason,
        )


async def generate_all(
    engine: Engine,
    tokenizer: Tokenizer,
    texts: Sequence[str | None],
    requests: Sequence[Request],
    report: Callable[[str, int, int], None],
) -> list[GenerationOutput]:
    """Runs all requests, enough at a time to keep the engine's slots full and its queue short.

    Args:
        engine: Runs them.
        tokenizer: Turns tokens into text.
        texts: Each request's prompt as text, if it came as text.
        requests: What to generate.
        report: Told how many requests are done, of how many.

    Raises:
        JaxserveError: The first failure of a request; the others are aborted.
    """
    outputs: list[GenerationOutput | None] = [None] * len(requests)
    num_done = 0
    left = iter(enumerate(zip(texts, requests, strict=True)))

    async def work(left: Iterator[tuple[int, tuple[str | None, Request]]]) -> None:
        nonlocal num_done
        for position, (text, request) in left:
            outputs[position] = await _generate_one(engine, tokenizer, text, request)
            num_done += 1
            report("Generating", num_done, len(requests))

    most = max((request.n for request in requests), default=1)
    num_workers = min(len(requests), max(1, 2 * engine.info.max_num_seqs // most))
    workers = [asyncio.create_task(work(left)) for _ in range(num_workers)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return [output for output in outputs if output is not None]


async def _generate_one(engine: Engine, tokenizer: Tokenizer, prompt: str | None, request: Request) -> GenerationOutput:
    sequences = [_Collector() for _ in range(request.n)]
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None
    num_cached_tokens = 0
    stream = await _submit(engine, tokenizer, request)
    try:
        async for event in stream:
            if event.finish_reason is FinishReason.ERROR:
                raise EngineError(event.error or "A step failed on the device.")
            if event.finish_reason is FinishReason.ABORT:
                raise UnavailableError("The engine ended the request before it was complete.")
            sequences[event.index].take(event)
            prompt_logprobs = event.prompt_logprobs or prompt_logprobs
            if event.index == 0:
                num_cached_tokens += event.num_cached_tokens or 0
    finally:
        await stream.aclose()
    return GenerationOutput(
        prompt=prompt,
        prompt_token_ids=request.prompt,
        prompt_logprobs=None if prompt_logprobs is None else tuple(prompt_logprobs),
        num_cached_tokens=num_cached_tokens,
        outputs=tuple(sequence.output(index) for index, sequence in enumerate(sequences)),
    )


async def _submit(engine: Engine, tokenizer: Tokenizer, request: Request) -> TextStream:
    """Submits a request, waiting while the queue is full of others."""
    while True:
        try:
            return generate_text(engine, request, tokenizer)
        except QueueFullError:
            stats = engine.stats()
            if stats.num_running + stats.num_waiting == 0:
                raise
            await asyncio.sleep(_RETRY_S)
