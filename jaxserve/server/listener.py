"""Accepts connections: the listening socket on one side, `Connections` on the other.

It stands where uvicorn has an asyncio server. Accepting is ours because asyncio's server and libuv's say nothing when
the process runs out of files, know no limit, and give a TLS handshake a minute.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
from collections.abc import Callable

from jaxserve.core.errors import OverloadedError
from jaxserve.server.connections import Connections
from jaxserve.server.refusal import refusal

SWEEP_S = 0.5
"""Seconds between looks at the connections' deadlines."""

_ACCEPTS = 16
"""Most connections accepted in a turn of the event loop; files of those closed for them are free in the next."""

_SHORT_PAUSE_S = 0.001
_PAUSE_S = 0.05
_WARN_EVERY_S = 10.0
_OUT_OF_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_LOG = logging.getLogger(__name__)


class Listener:
    """A listening socket at work.

    Args:
        sock: Listening; whoever made it closes it.
        make: Makes a connection's protocol.
        connections: Where connections are counted.
        tls: Makes the connections secure; None leaves them plain.
    """

    def __init__(
        self,
        sock: socket.socket,
        make: Callable[[], asyncio.Protocol],
        connections: Connections,
        *,
        tls: ssl.SSLContext | None,
    ) -> None:
        self._sock = sock
        self._make = make
        self._connections = connections
        self._tls = tls
        self._loop = asyncio.get_running_loop()
        self._opening: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._warned_s = float("-inf")

    def start(self) -> None:
        """Begins to accept."""
        self._sock.setblocking(False)
        self._loop.add_reader(self._sock, self._accept)
        self._sweep()

    def close(self) -> None:
        """Accepts no more; connections stay open."""
        self._loop.remove_reader(self._sock)
        if self._timer is not None:
            self._timer.cancel()

    async def wait_closed(self) -> None:
        """Waits for connections that were about to open."""
        if self._opening:
            await asyncio.wait(self._opening)

    def _sweep(self) -> None:
        self._timer = self._loop.call_later(SWEEP_S, self._sweep)
        self._connections.sweep()

    def _accept(self) -> None:
        for _ in range(_ACCEPTS):
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._failed(error)
                return
            self._take(sock)

    def _take(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        if not self._connections.has_room():
            self._send_away(sock)
            return
        handshake = _Handshake(sock)
        self._connections.waits(handshake)
        task = self._loop.create_task(self._open(sock, handshake))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    def _send_away(self, sock: socket.socket) -> None:
        """Closes a connection for which there is no room, with a word of why if it is plain."""
        with sock, contextlib.suppress(OSError):
            if self._tls is None:
                sock.send(refusal(OverloadedError("The server has no room for a connection; try again in a moment.")))

    async def _open(self, sock: socket.socket, handshake: _Handshake) -> None:
        timeout = {} if self._tls is None else {"ssl_handshake_timeout": self._connections.limits.head_s}
        try:
            await self._loop.connect_accepted_socket(self._make, sock, ssl=self._tls, **timeout)
        except OSError as error:
            _LOG.debug("a connection did not open: %s", error)
            sock.close()
        finally:
            self._connections.closed(handshake)

    def _failed(self, error: OSError) -> None:
        """The kernel gives no connection: one that waits may be in its way."""
        if error.errno not in _OUT_OF_FILES:
            _LOG.debug("a connection was gone before it was accepted: %s", error)
            return
        made_room = self._connections.make_room()
        if self._loop.time() - self._warned_s >= _WARN_EVERY_S:
            self._warned_s = self._loop.time()
            _LOG.error(
                "cannot accept connections: %s; %s",
                error.strerror,
                "closing one that waits" if made_room else "none can be closed; raise `ulimit -n`",
            )
        # The socket stays readable, so without a pause this would be called again at once. A file that was closed is
        # free in the next turn of the event loop.
        self._loop.remove_reader(self._sock)
        self._loop.call_later(_SHORT_PAUSE_S if made_room else _PAUSE_S, self._resume)

    def _resume(self) -> None:
        if self._sock.fileno() >= 0 and self._timer is not None and not self._timer.cancelled():
            self._loop.add_reader(self._sock, self._accept)


class _Handshake:
    """A connection that is still being set up."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def abort(self) -> None:
        """Makes the handshake fail."""
        if self._sock.fileno() >= 0:
            # The client may have gone already.
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)

    def check(self, now_s: float) -> None:
        """The event loop limits the handshake's time."""
