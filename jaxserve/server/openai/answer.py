"""Events of a generation to its answer, whole or as server-sent events.

Events come from `InFlight` with the index of their prompt. A `StreamedChoice` a choice turns them into chunks, small
dicts written by one encoder between constant texts, since this runs for every token. A `WholeChoice` gathers them. What
may be large is written in bounded parts, between which other tasks of the event loop have their turn.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from jaxserve.core.errors import JaxserveError
from jaxserve.engine.generation import TextEvent
from jaxserve.server.openai.choices import PromptLogprobs, PromptText, StreamedChoice, WholeChoice
from jaxserve.server.openai.dialects import Dialect
from jaxserve.server.openai.errors import error_body, internal_error
from jaxserve.server.openai.inflight import InFlight
from jaxserve.server.openai.json_text import Pace, Piece, encode, object_pieces
from jaxserve.server.openai.translate import Generation
from jaxserve.text.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)
_DONE = b"data: [DONE]\n\n"


class Answer:
    """Writes the answer of one generation.

    Args:
        generation: What was asked for.
        dialect: The endpoint's names.
        tokenizer: The model's.
        created: When the request came, in seconds since the epoch.
        fingerprint: The answer's `system_fingerprint`.
    """

    def __init__(
        self, generation: Generation, dialect: Dialect, tokenizer: Tokenizer, *, created: int, fingerprint: str
    ) -> None:
        self._generation = generation
        self._dialect = dialect
        self._tokenizer = tokenizer
        self._created = created
        self._fingerprint = fingerprint
        # What the engine said of each prompt's log-probabilities; it comes with the first event of the prompt.
        self._prompt_logprobs: dict[int, PromptLogprobs] = {}

    async def whole(self, inflight: InFlight) -> list[Piece]:
        """The answer's JSON text once everything has been generated.

        Raises:
            EngineError: A sequence failed.
            UnavailableError: The server ended a sequence.
        """
        generation, tokenizer = self._generation, self._tokenizer
        sequences = [
            [WholeChoice(generation, self._dialect, tokenizer, position=position) for _ in range(request.n)]
            for position, request in enumerate(generation.requests)
        ]
        async for position, event in inflight.events():
            self._keep_prompt(position, event)
            sequences[position][event.index].add(event)
        pace = Pace()
        prompts = [
            PromptText(generation, self._dialect, tokenizer, position=position) for position in range(len(sequences))
        ]
        for position, prompt in enumerate(prompts):
            for _ in prompt.write(self._prompt_logprobs.get(position, ())):
                await pace.pause_if_due()
        choices: list[Piece] = []
        pairs = zip(sequences, prompts, strict=True)
        shown = [(choice, prompt) for of_prompt, prompt in pairs for choice in self._best(of_prompt)]
        for number, (choice, prompt) in enumerate(shown):
            choices += (b"," if number else b"", *choice.pieces(number, prompt))
            await pace.pause_if_due()
        head = {**self._head(self._dialect.answer_object), "usage": inflight.usage.as_json()}
        at_top = prompts[0].fields if self._dialect.prompt_at_top else {}
        return list(object_pieces(head, {"choices": (b"[", *choices, b"]"), **at_top}))

    async def chunks(self, inflight: InFlight) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events, ending in `[DONE]` whatever happens on the way."""
        generation = self._generation
        head = "data: " + encode(self._head(self._dialect.chunk_object))[:-1] + ',"choices":['
        # OpenAI: with include_usage every chunk has a usage, null in all but the last.
        no_usage = ',"usage":null}\n\n' if generation.include_usage else "}\n\n"
        prompt = ""
        if generation.return_token_ids and self._dialect.prompt_at_top:
            prompt = f',"prompt_token_ids":{encode(generation.requests[0].prompt)}'
        try:
            async with aclosing(self._choices(inflight)) as events:
                async for choices in events:
                    chunks: list[str] = []
                    for choice, num_unsent in choices:
                        tail = self._usage_tail(inflight, num_unsent) if generation.continuous_usage else no_usage
                        chunks.append(f"{head}{encode(choice)}]{prompt}{tail}")
                        # Once for all choices, as in a whole answer.
                        prompt = ""
                    yield "".join(chunks).encode()
            if generation.include_usage:
                yield f"{head}]{self._usage_tail(inflight)}".encode()
        except JaxserveError as error:
            yield _error_event(error)
        except Exception:
            _LOG.exception("A stream failed.")
            yield _error_event(internal_error())
        yield _DONE

    async def _choices(self, inflight: InFlight) -> AsyncGenerator[list[tuple[dict[str, Any], int]], None]:
        """The choices to send at once, one a chunk, each with how many tokens are counted that come only after it."""
        generation = self._generation
        writers: dict[tuple[int, int], StreamedChoice] = {}
        async with aclosing(inflight.events()) as events:
            async for position, event in events:
                self._keep_prompt(position, event)
                choices: list[tuple[dict[str, Any], int]] = []
                writer = writers.get((position, event.index))
                if writer is None:
                    writer = writers[position, event.index] = self._writer(position, event.index)
                    num_unsent = 0 if generation.drop_output else len(event.token_ids)
                    pace = Pace()
                    for choice in writer.opening(self._prompt_logprobs.get(position, ())):
                        choices.append((choice, num_unsent))
                        if generation.echo_logprobs:
                            yield choices
                            choices = []
                            await pace.pause_if_due()
                choices += [(choice, 0) for choice in writer.pieces(event)]
                if choices:
                    yield choices

    def _best(self, sequences: Sequence[WholeChoice]) -> Sequence[WholeChoice]:
        """As many sequences as are to be shown; the most likely ones if there are more."""
        num_choices = self._generation.num_choices
        if len(sequences) == num_choices:
            return sequences
        return sorted(sequences, key=lambda sequence: -sequence.mean_logprob)[:num_choices]

    def _writer(self, position: int, index: int) -> StreamedChoice:
        number = position * self._generation.num_choices + index
        return StreamedChoice(self._generation, self._dialect, self._tokenizer, position=position, number=number)

    def _keep_prompt(self, position: int, event: TextEvent) -> None:
        if event.prompt_logprobs is not None:
            self._prompt_logprobs[position] = event.prompt_logprobs

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._generation.response_id,
            "object": kind,
            "created": self._created,
            "model": self._generation.model,
            "system_fingerprint": self._fingerprint,
        }

    def _usage_tail(self, inflight: InFlight, num_unsent: int = 0) -> str:
        return f',"usage":{encode(inflight.usage.as_json(num_unsent=num_unsent))}}}\n\n'


def _error_event(error: JaxserveError) -> bytes:
    return f"data: {encode(error_body(error))}\n\n".encode()
