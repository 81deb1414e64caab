"""How much longer a tokenizer may make a text: a few replacements in a row can double it each time.

tokenizer.json comes with the checkpoint, and a text of a request goes through its normalizer, a token through its
decoder; both are read before the first text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from jaxserve.core.errors import CheckpointError

MAX_GROWTH = 1024
"""Most characters that the replacements of one part may make of one."""


def require_bounded_growth(steps: Iterable[Mapping[str, object]], part: str) -> None:
    """Makes sure that a part's replacements do not make a text absurdly long.

    Args:
        steps: Steps of the normalizer or decoder as tokenizer.json writes them, sequences flattened.
        part: "normalizer" or "decoder", for the error.

    Raises:
        CheckpointError: They may make it more than `MAX_GROWTH` times as long.
    """
    growth = 1.0
    for step in steps:
        growth *= _growth(step)
        if growth > MAX_GROWTH:
            raise CheckpointError(
                f"The {part} of tokenizer.json can make a text more than {MAX_GROWTH} times as long; do not trust this "
                "checkpoint."
            )


def _growth(step: Mapping[str, object]) -> float:
    """Characters that a step makes of one, at most."""
    match step:
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if old:
            return max(1.0, len(new) / len(old))
        case {"type": "Replace", "content": str(new)}:
            return 1.0 + len(new)  # an expression may match between characters
        case {"type": "Prepend", "prepend": str(new)}:
            return 1.0 + len(new)
        case _:
            return 1.0
