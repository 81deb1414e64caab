"""The stream of one request's events: an engine fills it, one coroutine reads it, closing it early aborts it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable

from jaxserve.core.types import TokenEvent


class EventStream(AsyncIterator[TokenEvent]):
    """Events of one request, in order; ends after the last of its n sequences has ended.

    Make it and read it in one event loop. `put` belongs to that loop too; an engine's thread goes through `deliver`.

    Args:
        request_id: The request.
        num_sequences: How many ends to expect.
        abort: Called with the request id if the stream is closed before they came.
    """

    __slots__ = ("_abort", "_arrived", "_events", "_num_open", "live", "loop", "request_id")

    def __init__(self, request_id: str, num_sequences: int, abort: Callable[[str], None]) -> None:
        self.request_id = request_id
        self.loop = asyncio.get_running_loop()
        self.live = set(range(num_sequences))
        self._num_open = num_sequences
        self._abort = abort
        self._events: deque[TokenEvent] = deque()
        self._arrived = asyncio.Event()

    def put(self, event: TokenEvent) -> None:
        """Adds an event and wakes the reader."""
        self._events.append(event)
        self._arrived.set()

    async def __anext__(self) -> TokenEvent:
        while not self._events:
            if self._num_open == 0:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        event = self._events.popleft()
        if event.finish_reason is not None:
            self._num_open -= 1
        return event

    async def aclose(self) -> None:
        """Aborts the request unless it has ended, and ends the stream."""
        if self._num_open:
            self._abort(self.request_id)
        self._num_open = 0
        self._events.clear()
        self._arrived.set()


def put_all(deliveries: Iterable[tuple[EventStream, TokenEvent]]) -> None:
    """Puts many events at once: one wake-up of the event loop a step, however many sequences it ran."""
    for stream, event in deliveries:
        stream.put(event)
