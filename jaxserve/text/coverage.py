"""How little a text can be tokenised to: a lower bound that takes no tokenisation.

The entries of a vocabulary are of bounded length, so a text that is many times longer than a context is known not to
fit it at the cost of a look at its length. That holds for tokenizers whose every step keeps the text: byte-level BPE,
and SentencePiece's with a token for each byte. Of others (that drop blanks, fold runs of unknown characters into one
token, let a token swallow the blanks around it) nothing is claimed.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import tokenizers

from jaxserve.text.token_bytes import byte_alphabet

_MOST_DECOMPOSED = 4
"""Characters that Unicode composes into one at most (UAX 15, table of worst-case expansion: NFD in UTF-32)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Coverage:
    """What a tokenizer's tokens can stand for.

    Attributes:
        chars_per_token: Most characters of a text that one token can stand for.
        traceless: Characters that have no token and leave none.
    """

    chars_per_token: int
    traceless: str

    def fewest_tokens(self, text: str) -> int:
        """A lower bound on the tokens of a text; takes microseconds a megabyte."""
        num_chars = len(text) - sum(text.count(char) for char in self.traceless)
        return -(-num_chars // self.chars_per_token)


def coverage_of(backend: tokenizers.Tokenizer, vocabulary: Mapping[str, int]) -> Coverage | None:
    """What the tokens of a backend can stand for; None if a step of it may make text disappear.

    Args:
        backend: The tokenizer.
        vocabulary: Its tokens, the added ones too, with their ids.
    """
    model = backend.model
    if not isinstance(model, tokenizers.models.BPE) or model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    normalizers = list(_steps(backend.normalizer, "normalizers"))
    cutters = list(_steps(backend.pre_tokenizer, "pretokenizers"))
    added = list(backend.get_added_tokens_decoder().values())
    swallows = any(token.lstrip or token.rstrip for token in added)
    if backend.truncation is not None or swallows or not all(map(_keeps_length, normalizers)):
        return None
    if not all(map(_keeps_text, cutters)):
        return None
    if not vocabulary:
        return None
    composes = any(step["type"] == "NFC" for step in normalizers)
    traceless = _traceless(vocabulary, byte_level=any(step["type"] == "ByteLevel" for step in cutters))
    if traceless is None or (composes and any(unicodedata.category(char) != "Cc" for char in traceless)):
        return None
    longest = max(map(len, vocabulary)) or 1
    if backend.normalizer is not None:
        found = (backend.normalizer.normalize_str(token.content) for token in added if token.normalized)
        longest = max(longest, *map(len, found), 1)
    return Coverage(chars_per_token=longest * (_MOST_DECOMPOSED if composes else 1), traceless=traceless)


def _steps(
    part: tokenizers.normalizers.Normalizer | tokenizers.pre_tokenizers.PreTokenizer | None, key: str
) -> Iterator[Mapping[str, object]]:
    """The steps of a part, those of sequences one by one, as tokenizer.json writes them."""
    if part is not None:
        yield from _flat(json.loads(part.__getstate__()), key)


def _flat(step: Mapping[str, object], key: str) -> Iterator[Mapping[str, object]]:
    match step:
        case {"type": "Sequence"}:
            inner = step[key]
            assert isinstance(inner, list)
            for each in inner:
                yield from _flat(each, key)
        case _:
            yield step


def _keeps_length(normalizer: Mapping[str, object]) -> bool:
    """Whether it leaves at least as many characters as it finds, composition of characters apart."""
    match normalizer:
        case {"type": "NFC" | "Prepend"}:
            return True
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
            return len(new) >= len(old)
        case _:
            return False


def _keeps_text(cutter: Mapping[str, object]) -> bool:
    """Whether the words it cuts a text into are all of the text."""
    match cutter:
        case {"type": "Split" | "Punctuation", "behavior": str(behavior)}:
            return behavior != "Removed"
        case {"type": "ByteLevel" | "Digits" | "Metaspace"}:
            return True
        case _:
            return False


def _traceless(vocabulary: Mapping[str, int], *, byte_level: bool) -> str | None:
    """Characters without a token; None if they are not a few of ASCII's."""
    if not byte_level:
        return "" if all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)) else None
    absent = {byte for letter, byte in byte_alphabet().items() if letter not in vocabulary}
    if any(0x80 <= byte < 0xC0 for byte in absent):
        return None  # bytes that every character beyond ASCII has
    return "".join(map(chr, sorted(byte for byte in absent if byte < 0x80)))
