"""The prompt as an answer repeats it: its tokens as text, and how much of the text belongs to each token.

The text is that of the tokens, not the text that came, so that every offset into it is true: tokenizers may bring a
text to a normal form (NFC), put a space before it and a token around it. Of a prompt that came as text, control tokens
that were written in it are shown, for they are part of it; those that the tokenizer put around it are shown only if
control tokens are. Of a prompt that came as ids, control tokens are shown or not like those of the output.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from jaxserve.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Echo:
    """What precedes the text of a choice.

    Attributes:
        text: Empty if nothing does.
        widths: For each token of the prompt, its characters in the text; empty if the text is not the prompt's. A
            character of several tokens belongs to the last of them.
    """

    text: str = ""
    widths: tuple[int, ...] = ()

    def slices(self, num_tokens: int) -> list[tuple[int, int, str]]:
        """The text in pieces of at most so many tokens, each with its first token and the one after its last."""
        found = []
        position = 0
        for start in range(0, len(self.widths), num_tokens):
            stop = min(start + num_tokens, len(self.widths))
            end = position + sum(self.widths[start:stop])
            found.append((start, stop, self.text[position:end]))
            position = end
        return found


def echo_of_text(
    tokenizer: Tokenizer,
    text: str,
    token_ids: Sequence[int],
    *,
    num_kept: int,
    add_special_tokens: bool,
    skip_special_tokens: bool,
) -> Echo:
    """The echo of a prompt that came as text.

    Args:
        tokenizer: The model's.
        text: The prompt as it came.
        token_ids: Its tokens, before any were cut off.
        num_kept: How many of them, from the end, the prompt has.
        add_special_tokens: Whether the tokenizer may have put tokens around it.
        skip_special_tokens: Hide those.
    """
    before, after = _num_added(tokenizer, text, token_ids) if add_special_tokens else (0, 0)
    first_kept = len(token_ids) - num_kept
    hidden = [
        skip_special_tokens and tokenizer.is_special(token_id) and not before <= i < len(token_ids) - after
        for i, token_id in enumerate(token_ids[first_kept:], start=first_kept)
    ]
    return _echo(tokenizer, token_ids[first_kept:], hidden, text)


def echo_of_ids(tokenizer: Tokenizer, token_ids: Sequence[int], *, skip_special_tokens: bool) -> Echo:
    """The echo of a prompt that came as token ids."""
    hidden = [skip_special_tokens and tokenizer.is_special(token_id) for token_id in token_ids]
    return _echo(tokenizer, token_ids, hidden, None)


def _num_added(tokenizer: Tokenizer, text: str, token_ids: Sequence[int]) -> tuple[int, int]:
    """How many tokens were put before a text, and after it."""
    own = tokenizer.encode(text, add_special_tokens=False)
    extra = len(token_ids) - len(own)
    for before in range(extra + 1):
        if list(token_ids[before : before + len(own)]) == own:
            return before, extra - before
    return 0, 0


def _echo(tokenizer: Tokenizer, token_ids: Sequence[int], hidden: Sequence[bool], given: str | None) -> Echo:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    shown = [token_id for token_id, hides in zip(token_ids, hidden, strict=True) if not hides]
    pieces = [
        "" if hides else decoder.decode(tokenizer.token_bytes(token_id))
        for token_id, hides in zip(token_ids, hidden, strict=True)
    ]
    if pieces:
        pieces[-1] += decoder.decode(b"", final=True)
    text = "".join(pieces)
    if text != given:
        # The space that SentencePiece puts before a text is none of it.
        decoded = tokenizer.decode(shown, skip_special_tokens=False)
        surplus = len(text) - len(decoded)
        for i, piece in enumerate(pieces):
            pieces[i] = piece[surplus:]
            surplus -= len(piece) - len(pieces[i])
        text = decoded
    return Echo(text=text, widths=tuple(map(len, pieces)))
