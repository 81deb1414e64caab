"""Output tokens to text while they arrive: each call costs the new tokens only, and no half character ever leaves.

Tokens become bytes one by one (`Tokenizer.token_bytes`), bytes go through an incremental UTF-8 decoder, and what it
cannot decide yet stays inside until later tokens or `flush` decide it. Ill-formed bytes become U+FFFD exactly as in a
whole decode.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from jaxserve.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Detokenises one sequence that continues a prompt.

    Since the text continues a prompt, a SentencePiece token's leading space is kept, where `Tokenizer.decode` of the
    same tokens drops the one at the start of a text. The concatenation of everything returned is otherwise
    `Tokenizer.decode` of all tokens.

    Args:
        tokenizer: Says what bytes a token stands for.
        skip_special_tokens: Leave control tokens out.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skips_special = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """Takes the next tokens and returns the characters they complete.

        Args:
            token_ids: New tokens, in order.
        """
        tokenizer = self._tokenizer
        pieces = [
            tokenizer.token_bytes(token_id)
            for token_id in token_ids
            if not (self._skips_special and tokenizer.is_special(token_id))
        ]
        return self._decoder.decode(b"".join(pieces))

    def flush(self) -> str:
        """Returns what the sequence's end leaves: U+FFFD for the bytes of an unfinished character, or nothing."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text
