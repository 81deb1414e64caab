"""Threads for work that grows with a request's body, apart from the event loop and from each other.

What is small is done at once. What is large goes to a few threads, and what is very large to a single one, so that
neither takes all threads nor all memory: reading and tokenising a text may take hundreds of times its size.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from jaxserve.core.errors import QueueFullError

T = TypeVar("T")

LARGE_BYTES = 8 * 1024
"""Bodies above this are parsed and tokenised in a thread, so that they do not hold up other requests' tokens: this much
text takes some two milliseconds."""

HUGE_BYTES = 1 << 20
"""Bodies above this take turns."""

MAX_HUGE_WAITING = 16
"""Most of them at a time, the one at work among them; each is held in memory."""

RETRY_AFTER_S = 5
"""What a client is told whose body finds no place."""

_LARGE_THREADS = 4


class Offload:
    """Runs work by the size of what it works on."""

    def __init__(self) -> None:
        self._large = ThreadPoolExecutor(_LARGE_THREADS, thread_name_prefix="jaxserve-large-body")
        self._huge = ThreadPoolExecutor(1, thread_name_prefix="jaxserve-huge-body")
        self._num_huge = 0

    async def run(self, num_bytes: int, work: Callable[[], T]) -> T:
        """Does work: here if it is small, in a thread otherwise.

        Args:
            num_bytes: Size of what is worked on.
            work: Takes time that grows with it.

        Raises:
            QueueFullError: Too many huge bodies are here already.
        """
        if num_bytes <= LARGE_BYTES:
            return work()
        if num_bytes <= HUGE_BYTES:
            return await self._in_thread(self._large, work)
        if self._num_huge >= MAX_HUGE_WAITING:
            raise QueueFullError(
                f"{self._num_huge} bodies of more than {HUGE_BYTES} bytes are here already; try again later.",
                retry_after_s=RETRY_AFTER_S,
            )
        self._num_huge += 1
        try:
            return await self._in_thread(self._huge, work)
        finally:
            self._num_huge -= 1

    async def pieces(self, pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
        """Pieces of a long answer, each made in a thread when the one before has been taken.

        Args:
            pieces: Makes them.
        """
        while (piece := await self._in_thread(self._large, lambda: next(pieces, None))) is not None:
            yield piece

    async def _in_thread(self, pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(pool, lambda: context.run(work))
