"""Running work for a client that may go away: the work is cancelled when it does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxserve.server.openai.json_text import Piece

SEND_BYTES = 64 * 1024
"""Bytes of a large answer that are handed to the connection at once."""

T = TypeVar("T")


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Runs work to its end, or cancels it when the client goes away.

    Args:
        receive: The request's ASGI channel; its body has been read.
        work: What to run; it is cancelled and awaited before this returns early.

    Raises:
        ClientDisconnect: The client went away first.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class JSONText(Response):
    """A JSON answer that is text already, in pieces; a large one leaves as fast as the connection takes it.

    Args:
        pieces: The text.
    """

    media_type = "application/json"

    def __init__(self, pieces: Sequence[Piece]) -> None:
        super().__init__()
        self.headers["content-length"] = str(sum(map(len, pieces)))
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the answer."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        pending = bytearray()
        for piece in self._pieces:
            for start in range(0, len(piece), SEND_BYTES):
                pending += memoryview(piece)[start : start + SEND_BYTES]
                if len(pending) >= SEND_BYTES:
                    await send({"type": "http.response.body", "body": bytes(pending), "more_body": True})
                    pending.clear()
        await send({"type": "http.response.body", "body": bytes(pending), "more_body": False})


class EventStream(Response):
    """A `text/event-stream` response.

    Args:
        chunks: Events, already written; each is sent at once.
        on_end: Awaited when the stream has ended, however it did.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[bytes, None], on_end: Callable[[], Awaitable[None]]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the stream."""
        try:
            await until_disconnect(receive, self._send_all(send))
        except ClientDisconnect:
            return
        finally:
            await self._on_end()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._chunks) as chunks:
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
