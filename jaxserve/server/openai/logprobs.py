"""Log-probabilities in the three forms clients read: chat's, text completions' and vLLM's for prompts.

A writer holds what one choice needs from token to token; it turns the entries of each event into JSON values. A
`LogprobsText` gathers those of a whole answer as text.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from jaxserve.core.types import TokenLogprobs
from jaxserve.server.openai.json_text import ListText, Piece, object_pieces
from jaxserve.text.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have (OpenAI's value)."""

SLICE_ALTERNATIVES = 512
"""Most alternatives that are written without a pause: some two milliseconds."""

Entries = Sequence[tuple[int, TokenLogprobs | None]]
"""A token at each position and its log-probabilities; None where nothing precedes it."""


def slice_tokens(num_top: int) -> int:
    """How many tokens are written without a pause if each has so many alternatives."""
    return max(1, SLICE_ALTERNATIVES // (num_top + 1))


class LogprobWriter(Protocol):
    """Writes one choice's log-probabilities, event by event."""

    def write(self, entries: Entries, num_top: int, widths: Sequence[int] | None = None) -> dict[str, Any]:
        """The `logprobs` object for some tokens.

        Args:
            entries: The next tokens of the choice.
            num_top: Alternatives to show for each.
            widths: For tokens of an echo, how many characters of it each has.
        """
        ...


class ChatLogprobWriter:
    """Chat's form: one object a token, with its bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def write(self, entries: Entries, num_top: int, widths: Sequence[int] | None = None) -> dict[str, Any]:
        """See `LogprobWriter.write`."""
        content = []
        for token_id, entry in entries:
            logprob = LOWEST_LOGPROB if entry is None else entry.logprob
            top = () if entry is None else entry.top[:num_top]
            alternatives = [self._token(alternative, value) for alternative, value in top]
            content.append({**self._token(token_id, logprob), "top_logprobs": alternatives})
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._tokenizer.token_text(token_id),
            "logprob": max(logprob, LOWEST_LOGPROB),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }


class CompletionLogprobWriter:
    r"""Text completions' form: parallel lists, with each token's offset in the choice's text.

    A token that is a part of a character is written as `bytes:\xe2\x96`, as OpenAI does, so that no two tokens share
    a name in `top_logprobs`.

    Args:
        tokenizer: The model's.
        skip_special_tokens: Whether control tokens are left out of the text, so that they take no room in it.
        offset: Characters of the choice's text before the first token.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool, offset: int = 0) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = offset

    def write(self, entries: Entries, num_top: int, widths: Sequence[int] | None = None) -> dict[str, Any]:
        """See `LogprobWriter.write`; as OpenAI does, the token itself is among the alternatives in any case."""
        tokens: list[str] = []
        token_logprobs: list[float | None] = []
        top_logprobs: list[dict[str, float] | None] = []
        text_offset: list[int] = []
        for i, (token_id, entry) in enumerate(entries):
            name = self._name(token_id)
            tokens.append(name)
            text_offset.append(self._offset)
            self._offset += self._width(token_id) if widths is None else widths[i]
            if entry is None:
                token_logprobs.append(None)
                top_logprobs.append(None)
                continue
            logprob = max(entry.logprob, LOWEST_LOGPROB)
            token_logprobs.append(logprob)
            top: dict[str, float] = {}
            for other, value in entry.top[:num_top]:
                top.setdefault(self._name(other), max(value, LOWEST_LOGPROB))
            top_logprobs.append(top | {name: logprob})
        return {
            "tokens": tokens,
            "token_logprobs": token_logprobs,
            "top_logprobs": top_logprobs,
            "text_offset": text_offset,
        }

    def _name(self, token_id: int) -> str:
        text = self._tokenizer.token_text(token_id)
        if "\ufffd" not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self._tokenizer.token_bytes(token_id))

    def _width(self, token_id: int) -> int:
        """How many characters an output token adds to the text."""
        if self._skip_special_tokens and self._tokenizer.is_special(token_id):
            return 0
        return len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))


class LogprobsText:
    """The `logprobs` object of a whole choice, gathered as JSON text."""

    def __init__(self) -> None:
        self._lists: dict[str, ListText] = {}
        self._others: dict[str, Any] = {}

    def add(self, written: dict[str, Any]) -> None:
        """Takes over what a `LogprobWriter` wrote of the next tokens; its lists are the tokens'."""
        for name, value in written.items():
            if isinstance(value, list):
                self._lists.setdefault(name, ListText()).extend(value)
            else:
                self._others[name] = value

    @staticmethod
    def pieces(*parts: LogprobsText) -> Iterator[Piece]:
        """One object of the tokens of several; all are of the same form."""
        last = parts[-1]
        lists = {name: [part._lists[name] for part in parts if name in part._lists] for name in last._lists}
        return object_pieces(last._others, {name: ListText.pieces(*of_name) for name, of_name in lists.items()})


def prompt_logprobs_json(
    entries: Sequence[TokenLogprobs | None], num_top: int, tokenizer: Tokenizer
) -> list[dict[str, Any] | None]:
    """The `prompt_logprobs` of vLLM: for each prompt token an object of token ids, its own and the alternatives'."""
    return [None if entry is None else _by_token_id(entry, num_top, tokenizer) for entry in entries]


def _by_token_id(entry: TokenLogprobs, num_top: int, tokenizer: Tokenizer) -> dict[str, Any]:
    ranked = {token_id: (value, rank) for rank, (token_id, value) in enumerate(entry.top[:num_top], 1)}
    ranked[entry.token_id] = (entry.logprob, entry.rank)
    return {
        str(token_id): {
            "logprob": max(value, LOWEST_LOGPROB),
            "rank": rank,
            "decoded_token": tokenizer.token_text(token_id),
        }
        for token_id, (value, rank) in ranked.items()
    }
