"""Where a long text can be cut so that its parts are tokenised as the whole would be.

The `tokenizers` library takes some two hundred times a text's size to encode it, so long texts are encoded in parts. A
cut is exact where the words on both sides are words wherever they stand: between a letter and a space before another
letter, behind the line break that follows a line, and before the punctuation behind an ideograph. That holds for the
patterns by which byte-level models cut text into words, which are listed here; of other tokenizers nothing is claimed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping

import tokenizers

PART_CHARS = 1 << 16
"""Parts are about this long; encoding one takes some 16 MiB."""

MAX_UNCUT_CHARS = 1 << 17
"""Longest stretch without a cut that is encoded, by tokenizers whose texts can be cut. The library takes 75 bytes an
ASCII character and 440 an emoji meanwhile."""

MAX_WHOLE_CHARS = 1 << 19
"""Longest text that is encoded by tokenizers whose texts cannot be cut: contexts of 131,072 tokens of English."""

_CUT = re.compile(
    r"(?<=[A-Za-z])(?= [A-Za-z])"
    r"|(?<=\S\n)(?=\w)"
    r"|(?<=[\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff\uac00-\ud7a3])(?=[\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f])"
)
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CL100K_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS = frozenset(
    {
        _GPT2_WORDS,
        _GPT2_WORDS + r"|\s+",
        _CL100K_WORDS.format(digits=r"\p{N}{1,3}"),
        _CL100K_WORDS.format(digits=r"\p{N}"),
    }
)
_CLASSES = frozenset({r"\p{N}", r"\p{N}+", r"\p{N}{1,3}", r"[0-9][0-9][0-9]", r"[\p{P}\$\+<=>\^~\|]+"})
"""Patterns of digits and of punctuation, which match the same on both sides of a cut."""


def can_be_cut(backend: tokenizers.Tokenizer) -> bool:
    """Whether encoding the parts between cuts gives the tokens of the whole."""
    if backend.truncation is not None or backend.padding is not None:
        return False
    normalizer = None if backend.normalizer is None else json.loads(backend.normalizer.__getstate__())
    if normalizer is not None and normalizer.get("type") != "NFC":
        return False
    added = backend.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip or _spans_cut(token.content) for token in added):
        return False
    steps = [] if backend.pre_tokenizer is None else list(_flat(json.loads(backend.pre_tokenizer.__getstate__())))
    kinds = [_kind(step) for step in steps]
    return "other" not in kinds and "words" in kinds


def parts(text: str) -> Iterator[str]:
    """A text in parts of about `PART_CHARS`, each up to the first cut from there on.

    Args:
        text: To be encoded by a tokenizer that `can_be_cut`.
    """
    start = 0
    while start < len(text):
        # What has no cut for so long is refused, and looking on would take a second for a word of 8 MB.
        cut = _CUT.search(text, start + PART_CHARS, start + PART_CHARS + MAX_UNCUT_CHARS)
        end = len(text) if cut is None else cut.start()
        yield text[start:end]
        start = end


def _spans_cut(content: str) -> bool:
    """Whether a cut may fall within an added token, whatever stands around it."""
    return any(1 < cut.start() <= len(content) for cut in _CUT.finditer(f"x{content}x"))


def _flat(step: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    if step["type"] != "Sequence":
        yield step
        return
    inner = step["pretokenizers"]
    assert isinstance(inner, list)
    for each in inner:
        yield from _flat(each)


def _kind(step: Mapping[str, object]) -> str:
    """Whether a step cuts a text into words, or within words in a way that knows no neighbours."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(cuts)}:
            return "words" if cuts else "bytes"
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}:
            if pattern in _WORDS:
                return "words"
            return "class" if pattern in _CLASSES else "other"
        case {"type": "Digits"}:
            return "class"
        case _:
            return "other"
