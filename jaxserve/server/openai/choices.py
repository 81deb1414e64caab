"""One choice of an answer: a sequence's events to the JSON of its chunks, or of the whole.

A `StreamedChoice` turns each event into the values of chunks. A `WholeChoice` gathers all events, log-probabilities as
the JSON text that they will be, so that little is left to do when the last one has come. What choices of the same
prompt say alike of it is in a `PromptText`, written once and shared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxserve.core.types import FinishReason, TokenLogprobs
from jaxserve.engine.generation import TextEvent
from jaxserve.server.openai.dialects import Dialect
from jaxserve.server.openai.json_text import ListText, Piece, encode, object_pieces
from jaxserve.server.openai.logprobs import LogprobsText, prompt_logprobs_json, slice_tokens
from jaxserve.server.openai.translate import Generation
from jaxserve.text.tokenizer import Tokenizer

PromptLogprobs = Sequence[TokenLogprobs | None]


class PromptText:
    """What an answer says of one of its prompts, as JSON text.

    Args:
        generation: What was asked for.
        dialect: The endpoint's names.
        tokenizer: The model's.
        position: Which of the generation's prompts.
    """

    def __init__(self, generation: Generation, dialect: Dialect, tokenizer: Tokenizer, *, position: int) -> None:
        request = generation.requests[position]
        self._generation = generation
        self._tokenizer = tokenizer
        self._prompt = request.prompt
        self._echo = generation.echoes[position]
        self._logprobs = dialect.logprob_writer(tokenizer, skip_special_tokens=request.sampling.skip_special_tokens)
        self._entries = ListText()
        self.echo_logprobs = LogprobsText()
        self.fields: Mapping[str, Sequence[Piece]] = {}

    def write(self, prompt_logprobs: PromptLogprobs) -> Iterator[None]:
        """Writes everything, and yields between bounded parts of the work."""
        generation, fields = self._generation, dict[str, Sequence[Piece]]()
        if generation.return_token_ids:
            fields["prompt_token_ids"] = (encode(self._prompt).encode(),)
            yield
        if (num_top := generation.prompt_logprobs) is not None:
            size = slice_tokens(num_top)
            for start in range(0, len(prompt_logprobs), size):
                part = prompt_logprobs[start : start + size]
                self._entries.extend(prompt_logprobs_json(part, num_top, self._tokenizer))
                yield
            fields["prompt_logprobs"] = tuple(ListText.pieces(self._entries))
        if generation.echo_logprobs:
            num_top = generation.logprobs or 0
            for start, stop, _ in self._echo.slices(slice_tokens(num_top)):
                entries = _entries(self._prompt[start:stop], prompt_logprobs[start:stop])
                self.echo_logprobs.add(self._logprobs.write(entries, num_top, self._echo.widths[start:stop]))
                yield
        self.fields = fields


class WholeChoice:
    """One choice of a whole answer.

    Args:
        generation: What was asked for.
        dialect: The endpoint's names.
        tokenizer: The model's.
        position: Which of the generation's prompts the choice belongs to.
    """

    def __init__(self, generation: Generation, dialect: Dialect, tokenizer: Tokenizer, *, position: int) -> None:
        self._generation = generation
        self._dialect = dialect
        self._echo = generation.echoes[position].text
        self._logprobs = dialect.logprob_writer(
            tokenizer,
            skip_special_tokens=generation.requests[position].sampling.skip_special_tokens,
            offset=len(self._echo),
        )
        self._logprobs_text = LogprobsText()
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._finish_reason: FinishReason | None = None
        self._stop_reason: int | str | None = None
        self._sum_logprobs = 0.0
        # Entries that are not text yet; at most a slice of them.
        self._entries: list[tuple[int, TokenLogprobs | None]] = []
        self._slice_tokens = slice_tokens(generation.logprobs or 0)

    def add(self, event: TextEvent) -> None:
        """Takes the sequence's next event."""
        self._finish_reason, self._stop_reason = event.finish_reason, event.stop_reason
        if self._generation.drop_output:
            self._finish_reason, self._stop_reason = FinishReason.LENGTH, None
            return
        self._texts.append(event.text)
        self._token_ids.extend(event.token_ids)
        if event.logprobs:
            self._sum_logprobs += sum(entry.logprob for entry in event.logprobs)
            self._entries += _entries(event.token_ids, event.logprobs)
            if len(self._entries) >= self._slice_tokens:
                self._write_entries()

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability of its tokens."""
        return self._sum_logprobs / max(1, len(self._token_ids))

    def pieces(self, number: int, prompt: PromptText) -> Iterator[Piece]:
        """The choice as JSON text.

        Args:
            number: The choice's index in the answer.
            prompt: What the answer says of its prompt; written.
        """
        generation = self._generation
        plain: dict[str, Any] = {
            "index": number,
            **self._dialect.whole(self._echo + "".join(self._texts)),
            "finish_reason": self._finish_reason,
            "stop_reason": self._stop_reason,
        }
        large: dict[str, Iterable[Piece]] = {}
        if generation.logprobs is None:
            plain["logprobs"] = None
        else:
            self._write_entries()
            parts = (prompt.echo_logprobs, self._logprobs_text) if generation.echo_logprobs else (self._logprobs_text,)
            large["logprobs"] = LogprobsText.pieces(*parts)
        if generation.return_token_ids:
            plain["token_ids"] = self._token_ids
        return object_pieces(plain, {**large, **prompt.fields})

    def _write_entries(self) -> None:
        if (num_top := self._generation.logprobs) is not None:
            self._logprobs_text.add(self._logprobs.write(self._entries, num_top))
        self._entries.clear()


class StreamedChoice:
    """One choice of a stream.

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
        self._prompt = request.prompt
        self._echo = generation.echoes[position]
        self._number = number
        # Text that is held back makes no chunk of its own unless something else is to be shown.
        self._shows_tokens = generation.logprobs is not None or generation.return_token_ids
        self._logprobs = dialect.logprob_writer(tokenizer, skip_special_tokens=request.sampling.skip_special_tokens)

    def opening(self, prompt_logprobs: PromptLogprobs) -> Iterator[dict[str, Any]]:
        """What is sent before the first token: the role, the echo, the prompt's ids; each chunk is bounded work."""
        chunks = self._opening(prompt_logprobs)
        if not self._generation.return_token_ids:
            yield from chunks
            return
        first = next(chunks, None) or self._chunk(self._dialect.piece(""))
        yield {**first, "prompt_token_ids": list(self._prompt)}
        yield from chunks

    def pieces(self, event: TextEvent) -> list[dict[str, Any]]:
        """What is sent for an event: the text, and after the last of it the reason why it ends."""
        generation = self._generation
        chunks: list[dict[str, Any]] = []
        if not generation.drop_output and (event.text or (self._shows_tokens and event.token_ids)):
            chunk = self._chunk(self._dialect.piece(event.text))
            if generation.logprobs is not None:
                entries = _entries(event.token_ids, event.logprobs or ())
                chunk["logprobs"] = self._logprobs.write(entries, generation.logprobs)
            if generation.return_token_ids:
                chunk["token_ids"] = list(event.token_ids)
            chunks.append(chunk)
        if event.finish_reason is not None:
            chunk = self._chunk(self._dialect.ending)
            dropped = generation.drop_output
            chunk["finish_reason"] = FinishReason.LENGTH if dropped else event.finish_reason
            chunk["stop_reason"] = None if dropped else event.stop_reason
            chunks.append(chunk)
        return chunks

    def _opening(self, prompt_logprobs: PromptLogprobs) -> Iterator[dict[str, Any]]:
        if self._dialect.opening is not None:
            yield self._chunk(self._dialect.opening)
        if self._generation.echo_logprobs:
            num_top = self._generation.logprobs or 0
            for start, stop, text in self._echo.slices(slice_tokens(num_top)):
                chunk = self._chunk(self._dialect.piece(text))
                entries = _entries(self._prompt[start:stop], prompt_logprobs[start:stop])
                chunk["logprobs"] = self._logprobs.write(entries, num_top, self._echo.widths[start:stop])
                yield chunk
        elif self._echo.text:
            yield self._chunk(self._dialect.piece(self._echo.text))

    def _chunk(self, payload: dict[str, Any]) -> dict[str, Any]:
        return {"index": self._number, **payload, "logprobs": None, "finish_reason": None}


def _entries(token_ids: Sequence[int], logprobs: PromptLogprobs) -> list[tuple[int, TokenLogprobs | None]]:
    return list(zip(token_ids, logprobs, strict=True))
