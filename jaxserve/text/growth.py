"""How much longer a tokenizer may make a text: a few replacements in a row can double it each time.

tokenizer.json comes with the checkpoint, and a text of a request goes through its normalizer, a token through its
decoder. Both are read before the library is given the file: loading it normalises the added tokens.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping

from jaxserve.core.errors import CheckpointError

MAX_GROWTH = 1024
"""Most characters that the replacements of one part may make of one."""


def require_bounded_growth(part: object, name: str) -> None:
    """Makes sure that a part's replacements do not make a text absurdly long.

    Args:
        part: The normalizer or decoder as tokenizer.json writes it; what is malformed in it is left to the library.
        name: "normalizer" or "decoder", for the error.

    Raises:
        CheckpointError: They may make it more than `MAX_GROWTH` times as long.
    """
    growth = 1.0
    for step in _flat(part):
        growth *= _growth(step)
        if growth > MAX_GROWTH:
            raise CheckpointError(
                f"The {name} of tokenizer.json can make a text more than {MAX_GROWTH} times as long; do not trust this "
                "checkpoint."
            )


def _flat(part: object) -> Iterator[Mapping[str, object]]:
    """The steps of a part, those of sequences one by one."""
    match part:
        case {"normalizers": list(steps)} | {"decoders": list(steps)}:
            yield from (each for step in steps for each in _flat(step))
        case dict(step):
            yield step


def _growth(step: Mapping[str, object]) -> float:
    """Characters that a step makes of one, at most."""
    match step:
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if old:
            return max(1.0, len(new) / len(old))
        case {"type": "Replace", "content": str(new)}:
            return 1.0 + len(new)  # an expression may match between characters
        case {"type": "Prepend", "prepend": str(new)}:
            return 1.0 + len(new)
        case {"type": "Precompiled", "precompiled_charsmap": str(text)}:
            # After a table there are the texts that characters become, each ended by a zero byte.
            return max(1.0, *map(len, base64.b64decode(text).split(b"\0")))
        case _:
            return 1.0
