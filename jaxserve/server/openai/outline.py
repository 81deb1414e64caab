"""How large a JSON text is as values, found before any value is built.

Decoding holds Python's lock until it ends, and a value takes twenty times the memory of the bytes it is written in. So
a body's values, depth and fields are counted first, on its bytes, a slice at a time: what lies within strings is left
out by the parity of the quotes before it, and the rest is brackets, commas and colons. The counts hold up to the place
where a text stops being JSON, which is as far as any decoder reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

MAX_DEPTH = 128
"""Deepest nesting of lists and objects."""

_SLICE_BYTES = 1 << 18
_QUOTE, _COMMA, _COLON = b'",:'
_STEP = np.zeros(256, np.int32)
_STEP[list(b"[{")] = 1
_STEP[list(b"]}")] = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class Outline:
    """The size of a JSON text.

    Attributes:
        num_values: At least as many as the values in it: one, and one for each comma and opening bracket.
        depth: Of the deepest list or object; that of `[]` is 1.
        num_fields: Of the outermost object, a field that stands twice counted twice.
    """

    num_values: int
    depth: int
    num_fields: int


def outline(data: bytes) -> Outline:
    """The size of a JSON text in UTF-8."""
    num_values, deepest, num_fields = 1, 0, 0
    depth, within = 0, 0
    for piece in _slices(data):
        # Escaped quotes delimit nothing; escaped backslashes first, for they may stand before a quote that does.
        plain = piece.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in piece else piece
        chars = np.frombuffer(plain, np.uint8)
        parity = np.cumsum(chars == _QUOTE, dtype=np.uint8) + np.uint8(within)
        chars = chars[(parity & 1) == 0]
        within = int(parity[-1]) & 1 if parity.size else within
        steps = _STEP[chars]
        depths = np.cumsum(steps, dtype=np.int32) + np.int32(depth)
        if depths.size:
            num_values += int(np.count_nonzero(chars == _COMMA)) + int(np.count_nonzero(steps > 0))
            num_fields += int(np.count_nonzero((chars == _COLON) & (depths == 1)))
            deepest = max(deepest, int(np.max(depths)))
            depth = int(depths[-1])
    return Outline(num_values=num_values, depth=deepest, num_fields=num_fields)


def _slices(data: bytes) -> Iterator[bytes]:
    """The text in slices, none of which ends within an escape."""
    start = 0
    while start < len(data):
        piece = data[start : start + _SLICE_BYTES]
        num_backslashes = len(piece) - len(piece.rstrip(b"\\"))
        if num_backslashes % 2:
            piece = data[start : start + len(piece) + 1]
        yield piece
        start += len(piece)
