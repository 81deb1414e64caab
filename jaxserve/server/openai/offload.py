"""Threads for work that grows with a request's body, apart from the event loop and from each other.

What is small is done at once. What is large goes to a few threads, and what is very large to a single one, so that
neither takes all threads nor all memory: reading and tokenising a text may take hundreds of times its size.

Chats wait for a process that renders them, so even small ones go to threads. Long ones have threads of their own, as
they have processes of their own in the `TemplatePool`: those that take long cannot hold up short ones. A chat that has
waited too long for a thread is refused, which bounds the line.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from jaxserve.core.errors import OverloadedError, QueueFullError
from jaxserve.core.heap import release_free_memory
from jaxserve.text.template_pool import LARGE_BYTES as LONG_CHAT_BYTES

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

CHAT_PATIENCE_S = 10.0
"""Seconds that a chat waits for a thread."""

_LARGE_THREADS, _CHAT_THREADS, _LONG_CHAT_THREADS = 4, 4, 2


class Offload:
    """Runs work by the size of what it works on.

    Args:
        patience_s: Longest a chat waits for a thread, in seconds.
    """

    def __init__(self, *, patience_s: float = CHAT_PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._chats = ThreadPoolExecutor(_CHAT_THREADS, thread_name_prefix="jaxserve-chat")
        self._long_chats = ThreadPoolExecutor(_LONG_CHAT_THREADS, thread_name_prefix="jaxserve-long-chat")
        self._large = ThreadPoolExecutor(_LARGE_THREADS, thread_name_prefix="jaxserve-large-body")
        self._huge = ThreadPoolExecutor(1, thread_name_prefix="jaxserve-huge-body")
        self._huge_chats = ThreadPoolExecutor(1, thread_name_prefix="jaxserve-huge-chat")
        self._num_huge = 0

    async def run(self, num_bytes: int, work: Callable[[], T], *, renders: bool = False) -> T:
        """Does work: here if it is small and renders no chat, in a thread otherwise.

        Args:
            num_bytes: Size of what is worked on.
            work: Takes time that grows with it.
            renders: Whether a chat template is rendered.

        Raises:
            QueueFullError: Too many huge bodies are here already.
            OverloadedError: No thread came free in time for a chat.
        """
        if num_bytes > HUGE_BYTES:
            return await self._huge_in_turn(self._in_time(work) if renders else work, renders=renders)
        if renders:
            pool = self._long_chats if num_bytes > LONG_CHAT_BYTES else self._chats
            return await self._in_thread(pool, self._in_time(work))
        return work() if num_bytes <= LARGE_BYTES else await self._in_thread(self._large, work)

    async def pieces(self, pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
        """Pieces of a long answer, each made in a thread when the one before has been taken.

        Args:
            pieces: Makes them.
        """
        while (piece := await self._in_thread(self._large, lambda: next(pieces, None))) is not None:
            yield piece

    async def _huge_in_turn(self, work: Callable[[], T], *, renders: bool) -> T:
        if self._num_huge >= MAX_HUGE_WAITING:
            raise QueueFullError(
                f"{self._num_huge} bodies of more than {HUGE_BYTES} bytes are here already; try again later.",
                retry_after_s=RETRY_AFTER_S,
            )
        self._num_huge += 1
        try:
            return await self._in_thread(self._huge_chats if renders else self._huge, work)
        finally:
            self._num_huge -= 1
            self._huge.submit(release_free_memory)

    def _in_time(self, work: Callable[[], T]) -> Callable[[], T]:
        deadline = time.monotonic() + self._patience_s

        def run() -> T:
            if time.monotonic() > deadline:
                raise OverloadedError(
                    f"Other chats have kept the chat template busy for {self._patience_s:g} s; try again later."
                )
            return work()

        return run

    async def _in_thread(self, pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(pool, lambda: context.run(work))
