"""One choice of an answer: a sequence's events to the JSON of its chunks, or of the whole.

A `ChoiceWriter` is made for each choice of each answer and holds what passes from one chunk to the next. Whether the
answer is streamed or not, text, log-probabilities, token ids and echo are written by the same methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxserve.core.types import FinishReason, TokenLogprobs
from jaxserve.engine.generation import TextEvent
from jaxserve.server.openai.dialects import Dialect
from jaxserve.server.openai.logprobs import Entries, prompt_logprobs_json
from jaxserve.server.openai.translate import Generation
from jaxserve.text.tokenizer import Tokenizer

PromptLogprobs = Sequence[TokenLogprobs | None]


@dataclass(kw_only=True, slots=True)
class Collected:
    """All events of one sequence, gathered for a whole answer."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def add(self, event: TextEvent) -> None:
        """Takes the sequence's next event."""
        self.texts.append(event.text)
        self.token_ids.extend(event.token_ids)
        self.logprobs.extend(event.logprobs or ())
        self.finish_reason = event.finish_reason
        self.stop_reason = event.stop_reason

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability of its tokens."""
        return sum(entry.logprob for entry in self.logprobs) / max(1, len(self.logprobs))


class ChoiceWriter:
    """Writes one choice.

    Args:
        generation: What was asked for.
        dialect: The endpoint's names.
        tokenizer: The model's.
        position: Which of the generation's prompts the choice belongs to.
        number: The choice's index in the answer.
    """

    def __init__(
        self, generation: Generation, dialect: Dialect, tokenizer: Tokenizer, *, position: int, number: int
    ) -> None:
        request = generation.requests[position]
        self._generation = generation
        self._dialect = dialect
        self._tokenizer = tokenizer
        self._prompt = request.prompt
        self._echo = generation.echoes[position]
        self._number = number
        self._logprobs = dialect.logprob_writer(tokenizer, skip_special_tokens=request.sampling.skip_special_tokens)

    def opening(self, prompt_logprobs: PromptLogprobs) -> list[dict[str, Any]]:
        """What a stream sends of the choice before its first token: the role, the echo, the prompt's ids."""
        generation = self._generation
        opened: list[dict[str, Any]] = []
        if self._dialect.opening is not None:
            opened.append(self._chunk(self._dialect.opening))
        if self._echo or generation.echo_logprobs:
            chunk = self._chunk(self._dialect.piece(self._echo))
            if generation.echo_logprobs:
                chunk["logprobs"] = self._logprobs_json(self._prompt_entries(prompt_logprobs))
            opened.append(chunk)
        if generation.return_token_ids:
            if not opened:
                opened.append(self._chunk(self._dialect.piece("")))
            opened[0]["prompt_token_ids"] = list(self._prompt)
        return opened

    def piece(self, event: TextEvent) -> dict[str, Any]:
        """What a stream sends for one event."""
        generation = self._generation
        if generation.drop_output:
            return self._chunk(self._dialect.piece(""), finish_reason=FinishReason.LENGTH)
        chunk = self._chunk(
            self._dialect.piece(event.text), finish_reason=event.finish_reason, stop_reason=event.stop_reason
        )
        if generation.logprobs is not None:
            chunk["logprobs"] = self._logprobs_json(_entries(event.token_ids, event.logprobs or ()))
        if generation.return_token_ids:
            chunk["token_ids"] = list(event.token_ids)
        return chunk

    def whole(self, collected: Collected, prompt_logprobs: PromptLogprobs) -> dict[str, Any]:
        """The choice of a whole answer."""
        generation = self._generation
        shown = Collected(finish_reason=FinishReason.LENGTH) if generation.drop_output else collected
        choice = {
            "index": self._number,
            **self._dialect.whole(self._echo + "".join(shown.texts)),
            "logprobs": None,
            "finish_reason": shown.finish_reason,
            "stop_reason": shown.stop_reason,
        }
        if generation.logprobs is not None:
            entries = list(self._prompt_entries(prompt_logprobs)) if generation.echo_logprobs else []
            entries += _entries(shown.token_ids, shown.logprobs)
            choice["logprobs"] = self._logprobs_json(entries)
        if generation.return_token_ids:
            choice["token_ids"] = shown.token_ids
            choice["prompt_token_ids"] = list(self._prompt)
        if generation.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs_json(
                prompt_logprobs, generation.prompt_logprobs, self._tokenizer
            )
        return choice

    def _chunk(
        self,
        payload: dict[str, Any],
        *,
        finish_reason: FinishReason | None = None,
        stop_reason: int | str | None = None,
    ) -> dict[str, Any]:
        chunk = {"index": self._number, **payload, "logprobs": None, "finish_reason": finish_reason}
        if finish_reason is not None:
            chunk["stop_reason"] = stop_reason
        return chunk

    def _prompt_entries(self, prompt_logprobs: PromptLogprobs) -> Entries:
        return list(zip(self._prompt, prompt_logprobs, strict=True))

    def _logprobs_json(self, entries: Entries) -> dict[str, Any]:
        return self._logprobs.write(entries, self._generation.logprobs or 0)


def _entries(token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> list[tuple[int, TokenLogprobs | None]]:
    return list(zip(token_ids, logprobs, strict=True))
