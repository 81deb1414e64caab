"""Events of a generation to its answer, whole or as server-sent events.

Events come from `InFlight` with the index of their prompt; a `ChoiceWriter` a choice turns them into JSON values. A
stream's chunks are small dicts written by one encoder between constant texts, since this runs for every token.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from jaxserve.core.errors import JaxserveError
from jaxserve.engine.generation import TextEvent
from jaxserve.server.openai.choices import ChoiceWriter, Collected, PromptLogprobs
from jaxserve.server.openai.dialects import Dialect
from jaxserve.server.openai.errors import error_body, internal_error
from jaxserve.server.openai.inflight import InFlight
from jaxserve.server.openai.translate import Generation
from jaxserve.text.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)
_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
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

    async def whole(self, inflight: InFlight) -> dict[str, Any]:
        """The answer once everything has been generated.

        Raises:
            EngineError: A sequence failed.
            UnavailableError: The server ended a sequence.
        """
        requests = self._generation.requests
        collected = [[Collected() for _ in range(request.n)] for request in requests]
        async for position, event in inflight.events():
            self._keep_prompt(position, event)
            collected[position][event.index].add(event)
        choices = [
            self._writer(position, index).whole(sequence, self._prompt_logprobs.get(position, ()))
            for position, sequences in enumerate(collected)
            for index, sequence in enumerate(self._best(sequences))
        ]
        answer = {**self._head(self._dialect.answer_object), "choices": choices, "usage": inflight.usage.as_json()}
        if self._dialect.prompt_at_top:
            fields = ("prompt_token_ids", "prompt_logprobs")
            answer |= {field: choices[0][field] for field in fields if field in choices[0]}
        return answer

    async def chunks(self, inflight: InFlight) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events, ending in `[DONE]` whatever happens on the way."""
        generation = self._generation
        head = "data: " + _ENCODE(self._head(self._dialect.chunk_object))[:-1] + ',"choices":['
        # OpenAI: with include_usage every chunk has a usage, null in all but the last.
        no_usage = '],"usage":null}\n\n' if generation.include_usage else "]}\n\n"
        try:
            async with aclosing(self._choices(inflight)) as events:
                async for choices in events:
                    tail = self._usage_tail(inflight) if generation.continuous_usage else no_usage
                    yield "".join([f"{head}{_ENCODE(choice)}{tail}" for choice in choices]).encode()
            if generation.include_usage:
                yield f"{head}{self._usage_tail(inflight)}".encode()
        except JaxserveError as error:
            yield _error_event(error)
        except Exception:
            _LOG.exception("A stream failed.")
            yield _error_event(internal_error())
        yield _DONE

    async def _choices(self, inflight: InFlight) -> AsyncGenerator[list[dict[str, Any]], None]:
        """The choices to send for each event, one a chunk."""
        generation = self._generation
        # Text that is held back makes no chunk of its own unless something else is to be shown.
        shows_tokens = generation.logprobs is not None or generation.return_token_ids
        writers: dict[tuple[int, int], ChoiceWriter] = {}
        async with aclosing(inflight.events()) as events:
            async for position, event in events:
                self._keep_prompt(position, event)
                choices: list[dict[str, Any]] = []
                writer = writers.get((position, event.index))
                if writer is None:
                    writer = writers[position, event.index] = self._writer(position, event.index)
                    choices = writer.opening(self._prompt_logprobs.get(position, ()))
                if event.text or event.finish_reason is not None or (shows_tokens and event.token_ids):
                    choices.append(writer.piece(event))
                if choices:
                    yield choices

    def _best(self, sequences: Sequence[Collected]) -> Sequence[Collected]:
        """As many sequences as are to be shown; the most likely ones if there are more."""
        num_choices = self._generation.num_choices
        if len(sequences) == num_choices:
            return sequences
        return sorted(sequences, key=lambda sequence: -sequence.mean_logprob)[:num_choices]

    def _writer(self, position: int, index: int) -> ChoiceWriter:
        number = position * self._generation.num_choices + index
        return ChoiceWriter(self._generation, self._dialect, self._tokenizer, position=position, number=number)

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

    def _usage_tail(self, inflight: InFlight) -> str:
        return f'],"usage":{_ENCODE(inflight.usage.as_json())}}}\n\n'


def _error_event(error: JaxserveError) -> bytes:
    return f"data: {_ENCODE(error_body(error))}\n\n".encode()
