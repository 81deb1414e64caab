"""The open connections of a server: how many there may be, and which one goes when there are too many.

A connection waits (nothing of a request has come, or part of a head), uploads (its head has come, its body not yet),
or works (a whole request is being answered). When all places are taken, the one that has waited longest is closed; if
none waits, the upload that has been silent longest. A connection that works is never closed to make room. So that
probes find a place whatever others do, a few places are reserved: connections that work or upload may not take them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

from jaxserve.server.limits import ConnectionLimits

SILENT_UPLOAD_S = 5.0
"""Seconds of silence after which an upload may be closed to make room."""

_WARN_EVERY_S = 10.0
_LOG = logging.getLogger(__name__)


class Peer(Protocol):
    """One connection, or one that is still being set up."""

    def abort(self) -> None:
        """Closes it at once."""

    def check(self, now_s: float) -> None:
        """Closes it if its client has taken too long."""


class Connections:
    """The open connections of a server.

    Args:
        limits: How many there may be.
        clock: Seconds, monotonic; the event loop's.
    """

    def __init__(self, limits: ConnectionLimits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self._clock = clock
        self._open: set[Peer] = set()
        # Both in the order in which they would be closed, with the time of the last sign of life.
        self._waiting: dict[Peer, float] = {}
        self._uploading: dict[Peer, float] = {}
        self._num_closed = 0
        self._num_refused = 0
        self._warned_s = float("-inf")

    @property
    def num_open(self) -> int:
        """Connections that are open and not about to be closed."""
        return len(self._open)

    def waits(self, peer: Peer) -> None:
        """The connection is new, or is where the next request may begin."""
        self._place(peer, self._waiting)

    def uploads(self, peer: Peer) -> None:
        """A part of the connection's request body came, and more is to come."""
        self._place(peer, self._uploading)

    def works(self, peer: Peer) -> None:
        """The connection's request is there, and its answer is not finished."""
        self._place(peer, None)

    def closed(self, peer: Peer) -> None:
        """The connection has ended. Idempotent."""
        self._open.discard(peer)
        self._waiting.pop(peer, None)
        self._uploading.pop(peer, None)

    def has_room(self) -> bool:
        """Whether one more may open; one is closed for it if need be."""
        while self.num_open >= self.limits.max_connections + self.limits.num_reserved:
            if not self.make_room():
                self._refuse()
                return False
        return True

    def admits(self) -> bool:
        """Whether the last that `works` may ask for more than a probe; a silent upload is closed for it if need be."""
        while self.num_open - len(self._waiting) > self.limits.max_connections:
            if not self._close(self._silent_upload()):
                self._refuse()
                return False
        return True

    def make_room(self) -> bool:
        """Closes the connection that can best be spared; returns whether there was one."""
        return self._close(next(iter(self._waiting), None) or self._silent_upload())

    def sweep(self) -> None:
        """Closes connections whose clients have taken too long."""
        now_s = self._clock()
        for peer in list(self._open):
            peer.check(now_s)

    def _place(self, peer: Peer, line: dict[Peer, float] | None) -> None:
        self._open.add(peer)
        self._waiting.pop(peer, None)
        self._uploading.pop(peer, None)
        if line is not None:
            line[peer] = self._clock()

    def _silent_upload(self) -> Peer | None:
        peer, since_s = next(iter(self._uploading.items()), (None, 0.0))
        return peer if self._clock() - since_s >= SILENT_UPLOAD_S else None

    def _close(self, peer: Peer | None) -> bool:
        if peer is None:
            return False
        self.closed(peer)
        peer.abort()
        self._num_closed += 1
        self._warn()
        return True

    def _refuse(self) -> None:
        self._num_refused += 1
        self._warn()

    def _warn(self) -> None:
        """Says what has been done for want of room, once in a while."""
        if self._clock() - self._warned_s < _WARN_EVERY_S:
            return
        self._warned_s = self._clock()
        _LOG.warning(
            "all %d connections (max_connections) are taken: %d idle or silent ones closed, %d requests refused",
            self.limits.max_connections,
            self._num_closed,
            self._num_refused,
        )
        self._num_closed = self._num_refused = 0
