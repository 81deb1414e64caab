"""Answers as JSON text, in pieces: large parts are written a slice at a time, so that nothing else waits for long.

`encode` is one call of a C function that holds Python's lock, whatever it is given; a list of 40,000 objects takes it
a third of a second. So whoever writes a list without a bound encodes slices of it into a `ListText`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Piece = bytes | bytearray
"""Some JSON text in UTF-8."""

TURN_S = 0.004
"""Seconds that an answer is written without a pause."""

encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
"""A value as JSON text, as small as it gets."""


class ListText:
    """A JSON list that grows as text."""

    __slots__ = ("_items",)

    def __init__(self) -> None:
        self._items = bytearray()

    def extend(self, items: Sequence[Any]) -> None:
        """Appends some items."""
        if items:
            if self._items:
                self._items += b","
            self._items += encode(items)[1:-1].encode()

    @staticmethod
    def pieces(*parts: ListText) -> Iterator[Piece]:
        """One list of the items of several."""
        opening = b"["
        for part in parts:
            if part._items:
                yield opening
                yield part._items
                opening = b","
        yield b"]" if opening == b"," else b"[]"


def object_pieces(plain: Mapping[str, Any], large: Mapping[str, Iterable[Piece]]) -> Iterator[Piece]:
    """A JSON object of values to encode, then of values that are text already."""
    yield encode(plain)[:-1].encode()
    separator = "," if plain else ""
    for name, pieces in large.items():
        yield f"{separator}{encode(name)}:".encode()
        yield from pieces
        separator = ","
    yield b"}"


class Pace:
    """Long work on the event loop, with pauses in which others have their turn."""

    __slots__ = ("_since_s",)

    def __init__(self) -> None:
        self._since_s = time.perf_counter()

    async def pause_if_due(self) -> None:
        """Lets other tasks run if the work has gone on for `TURN_S`; to be called after each bounded part of it."""
        if time.perf_counter() - self._since_s >= TURN_S:
            await asyncio.sleep(0)
            self._since_s = time.perf_counter()
