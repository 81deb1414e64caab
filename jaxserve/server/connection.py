"""One HTTP connection that trusts its client with little: bounded heads, one request at a time, deadlines.

Uvicorn's protocol parses whatever comes and queues it. Here bytes reach its parser in pieces that end where a head or
a body ends, as far as that can be told without parsing:

    read from the socket   | head | body ........ | head | head | ...
    given to the parser    | head | body |        and no more until that request has been answered

so a head is counted before anything is built from it, and pipelined requests wait as bytes, of which there are at most
`HIGH_WATER_LIMIT` and one read of the socket; then the socket is not read. Time is kept by one deadline a connection,
which `Connections.sweep` looks at: setting it costs nothing, and most are met.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque

from uvicorn import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from jaxserve.core.errors import (
    HeadTooLargeError,
    InvalidRequestError,
    JaxserveError,
    OverloadedError,
    SlowRequestError,
)
from jaxserve.server.connections import Connections
from jaxserve.server.openai.middleware import OPEN_PATHS
from jaxserve.server.refusal import refusal

_PIECE_BYTES = 4096
"""Most bytes given to the parser at once where it cannot be told what they are; whatever small requests hide in them
are queued parsed."""

_HEAD_END = b"\r\n\r\n"
_UPGRADE = re.compile(rb"\nupgrade:", re.IGNORECASE)


class Connection(HttpToolsProtocol):
    """A connection of a server.

    Args:
        config: Uvicorn's, loaded.
        state: Uvicorn's, of the server.
        connections: All of the server's connections.
    """

    flow: _Flow

    def __init__(self, config: Config, state: ServerState, connections: Connections) -> None:
        super().__init__(config=config, server_state=state, app_state={})
        self._connections = connections
        self._limits = connections.limits
        # Bytes that came while a request was being answered, each from a position on.
        self._held: deque[tuple[bytes, int]] = deque()
        self._num_held_bytes = 0
        self._in_head = True
        # Of the head so far; of a body, those since the last that were content (chunk sizes, trailers).
        self._num_overhead_bytes = 0
        self._chunks = bytearray()
        self._content_left: int | None = None
        self._refused = False
        self._deadline_s: float | None = None
        self._num_unsent_bytes = 0
        self._progress_s = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Starts the clock of the first head."""
        super().connection_made(transport)
        self.flow = _Flow(transport)
        self._deadline_s = self.loop.time() + self._limits.head_s
        self._connections.waits(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets the connection."""
        super().connection_lost(exc)
        self._held.clear()
        self._deadline_s = None
        self._connections.closed(self)

    def data_received(self, data: bytes) -> None:
        """Parses what came, or keeps it for later."""
        if self._refused:
            return
        if self._held or self._is_answering():
            self._hold(data, 0)
        else:
            self._feed(data, 0)

    def resume_writing(self) -> None:
        """The client has read much of what was sent."""
        self._progress_s = self.loop.time()
        super().resume_writing()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keeps a header; a trailer is dropped, for the headers have been acted on."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Starts the request, unless there are too many connections."""
        if self._refused:
            return
        self._in_head = False
        self._num_overhead_bytes = 0
        self._content_left = next((int(value) for name, value in self.headers if name == b"content-length"), None)
        self._deadline_s = None
        self._connections.works(self)
        if self.url.partition(b"?")[0].decode("latin-1") not in OPEN_PATHS and not self._connections.admits():
            self._refuse(OverloadedError("All of the server's connections are taken; try again in a moment."))
            return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Takes a part of the body."""
        self._num_overhead_bytes = 0
        if self._content_left is None:
            # Chunks may be of one byte, and the base class copies what it has for each part that it is given.
            self._chunks += body
            return
        self._content_left -= len(body)
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is there."""
        self._pass_chunks()
        self._in_head = True
        self._num_overhead_bytes = 0
        if self._refused:
            return
        super().on_message_complete()
        if self.cycle.response_complete:
            self._wait()
        else:
            self._connections.works(self)

    def on_response_complete(self) -> None:
        """Goes on with what came meanwhile."""
        super().on_response_complete()
        if self.transport.is_closing() or self._is_answering():
            return
        if self._refused:
            self.transport.close()
        elif self._in_head:
            self._wait()
            self.loop.call_soon(self._feed_held)
        else:
            self._deadline_s = self.loop.time() + self._limits.linger_s
            self._connections.waits(self)

    def send_400_response(self, msg: str) -> None:
        """Refuses what is not HTTP; uvicorn calls it so."""
        self._refuse(InvalidRequestError(msg))

    def abort(self) -> None:
        """Closes the connection at once."""
        self.transport.abort()

    def check(self, now_s: float) -> None:
        """Closes the connection if its client has taken too long."""
        num_bytes = self.transport.get_write_buffer_size()
        if num_bytes == 0 or self._num_unsent_bytes == 0 or num_bytes < self._num_unsent_bytes:
            self._progress_s = now_s
        self._num_unsent_bytes = num_bytes
        if now_s - self._progress_s > self._limits.stall_s:
            self.transport.abort()
        elif self._deadline_s is not None and now_s >= self._deadline_s:
            self._expire()

    def _is_answering(self) -> bool:
        """Whether a whole request waits for the end of its answer."""
        cycle = self.cycle
        return bool(self.pipeline) or (cycle is not None and not cycle.more_body and not cycle.response_complete)

    def _wait(self) -> None:
        """The next request may begin."""
        self._deadline_s = self.loop.time() + self._limits.keep_alive_s
        self._connections.waits(self)

    def _hold(self, data: bytes, position: int) -> None:
        """Keeps bytes for after the answer."""
        self._held.append((data, position))
        self._num_held_bytes += len(data) - position
        if self._num_held_bytes > HIGH_WATER_LIMIT:
            self.flow.hold_reading()

    def _feed_held(self) -> None:
        """Parses what was kept, as far as the next request's end."""
        while self._held and not (self._is_answering() or self._refused or self.transport.is_closing()):
            data, position = self._held.popleft()
            self._num_held_bytes -= len(data) - position
            self._feed(data, position)
        if self._num_held_bytes <= HIGH_WATER_LIMIT and not self.transport.is_closing():
            self.flow.release_reading()

    def _feed(self, data: bytes, position: int) -> None:
        """Parses bytes, piece by piece, as far as the end of a request that is not yet answered."""
        while position < len(data):
            if self._is_answering():
                self._held.appendleft((data, position))
                self._num_held_bytes += len(data) - position
                return
            size = self._piece_size(data, position)
            piece = data if size == len(data) else data[position : position + size]
            position += size
            if self._in_head and self._num_overhead_bytes == 0:
                piece = self._begin_head(piece)
            if self._in_head or self._content_left is None:
                self._num_overhead_bytes += size
            if self._num_overhead_bytes > self._limits.head_bytes:
                self._refuse(_too_large(self._limits.head_bytes))
                return
            super().data_received(piece)
            self._pass_chunks()
            if self._refused or self.transport.is_closing():
                return
        if not self._in_head and not self.cycle.response_complete:
            self._connections.uploads(self)

    def _pass_chunks(self) -> None:
        """Hands on what a piece has brought of a chunked body."""
        if self._chunks and not self._refused:
            super().on_body(bytes(self._chunks))
        self._chunks.clear()

    def _begin_head(self, piece: bytes) -> bytes:
        """Starts the clock of a head that is not the connection's first; returns what is to be parsed of it.

        The parser takes no body after a head that asks for another protocol, as Java's client does with every request
        (`Upgrade: h2c`). A server may ignore such headers, so they are hidden from it.
        """
        if self.cycle is not None:
            self._deadline_s = self.loop.time() + self._limits.head_s
        return _UPGRADE.sub(b"\nignored:", piece) if piece.endswith(_HEAD_END) else piece

    def _piece_size(self, data: bytes, position: int) -> int:
        if not self._in_head:
            left = len(data) - position
            return min(left, self._content_left or _PIECE_BYTES)
        end = data.find(_HEAD_END, position, position + _PIECE_BYTES)
        return min(len(data) - position, _PIECE_BYTES) if end < 0 else end + len(_HEAD_END) - position

    def _expire(self) -> None:
        self._deadline_s = None
        if self._refused:
            self.transport.abort()
        elif self._in_head and self._num_overhead_bytes:
            self._refuse(SlowRequestError(f"The request's head was not complete within {self._limits.head_s:g} s."))
        else:
            self.transport.close()

    def _refuse(self, error: JaxserveError) -> None:
        """Answers instead of the app, reads no request any more, and closes when the client has had time to read."""
        self._refused = True
        if self._is_answering():
            return
        cycle = self.cycle
        if not self._in_head and cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
            if cycle.response_started:
                self.transport.abort()
                return
        self.transport.write(refusal(error, self.server_state.default_headers))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.release_reading()
        self._deadline_s = self.loop.time() + self._limits.linger_s
        self._connections.waits(self)


def _too_large(max_bytes: int) -> HeadTooLargeError:
    return HeadTooLargeError(f"The request's line and headers are larger than the {max_bytes} bytes allowed.")


class _Flow(FlowControl):
    """Flow control that can be told not to read, whatever a request asks for meanwhile."""

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__(transport)
        self._holds = False

    def hold_reading(self) -> None:
        """Stops reading until told otherwise."""
        self._holds = True
        self.pause_reading()

    def release_reading(self) -> None:
        """Reads again."""
        self._holds = False
        self.resume_reading()

    def resume_reading(self) -> None:
        """Reads again, unless it is to hold."""
        if not self._holds:
            super().resume_reading()
