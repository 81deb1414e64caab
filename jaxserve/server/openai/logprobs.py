"""Log-probabilities in the three forms clients read: chat's, text completions' and vLLM's for prompts.

A writer holds what one choice needs from token to token; it turns the entries of each event into JSON values.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any, Protocol

from jaxserve.core.types import TokenLogprobs
from jaxserve.text.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have (OpenAI's value)."""

Entries = Sequence[tuple[int, TokenLogprobs | None]]
"""A token at each position and its log-probabilities; None where nothing precedes it."""


class LogprobWriter(Protocol):
    """Writes one choice's log-probabilities, event by event."""

    def write(self, entries: Entries, num_top: int) -> dict[str, Any]:
        """The `logprobs` object for some tokens.

        Args:
            entries: The next tokens of the choice.
            num_top: Alternatives to show for each.
        """
        ...


class ChatLogprobWriter:
    """Chat's form: one object a token, with its bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def write(self, entries: Entries, num_top: int) -> dict[str, Any]:
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
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def write(self, entries: Entries, num_top: int) -> dict[str, Any]:
        """See `LogprobWriter.write`; as OpenAI does, the token itself is among the alternatives in any case."""
        tokens: list[str] = []
        token_logprobs: list[float | None] = []
        top_logprobs: list[dict[str, float] | None] = []
        text_offset: list[int] = []
        for token_id, entry in entries:
            name = self._name(token_id)
            tokens.append(name)
            text_offset.append(self._advance(token_id))
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

    def _advance(self, token_id: int) -> int:
        """Where the token's text begins."""
        start = self._offset
        if not (self._skip_special_tokens and self._tokenizer.is_special(token_id)):
            self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))
        return start


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
