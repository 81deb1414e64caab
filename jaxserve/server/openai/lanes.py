"""Threads in which chats are read, rendered and tokenised, never on the event loop: a chat template may take seconds.

Long conversations have threads of their own, as they have processes of their own in the `TemplatePool`, so that those
which take long cannot hold up short ones. A conversation that has waited too long is refused, which bounds how long the
line can get.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from jaxserve.core.errors import UnavailableError
from jaxserve.text.template_pool import LARGE_BYTES

T = TypeVar("T")

_SHORT_THREADS, _LONG_THREADS = 4, 2


class ChatLanes:
    """Runs work on chats in threads, by the size of the chat.

    Args:
        patience_s: Longest a chat waits for a thread, in seconds.
    """

    def __init__(self, *, patience_s: float = 10.0) -> None:
        self._patience_s = patience_s
        self._short = ThreadPoolExecutor(_SHORT_THREADS, thread_name_prefix="jaxserve-short-chat")
        self._long = ThreadPoolExecutor(_LONG_THREADS, thread_name_prefix="jaxserve-long-chat")

    async def run(self, num_bytes: int, work: Callable[[], T]) -> T:
        """Does the work in a thread.

        Args:
            num_bytes: Size of the body.
            work: Reads, renders and tokenises it.

        Raises:
            UnavailableError: No thread came free in time.
        """
        deadline = time.monotonic() + self._patience_s
        context = contextvars.copy_context()

        def in_time() -> T:
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"Other chats have kept the chat template busy for {self._patience_s:g} s; try again later."
                )
            return context.run(work)

        lane = self._long if num_bytes > LARGE_BYTES else self._short
        return await asyncio.get_running_loop().run_in_executor(lane, in_time)
