"""How much a client may take before it has asked for anything: bytes of a head, seconds of silence, connections.

The kernel's limit on open files decides how many connections there can be. Each is a file, and so are the model's
shards, sockets to devices and pipes to worker processes, which need room beside them.
"""

from __future__ import annotations

import resource
from dataclasses import dataclass

from jaxserve.core.errors import ConfigError

MAX_HEAD_BYTES = 64 * 1024
"""Largest request line and headers together; a longer head is a 431."""

HEAD_S = 10.0
"""Seconds from a connection's start, or a later head's first byte, until the head must be complete; so long a TLS
handshake may take, too."""

KEEP_ALIVE_S = 75.0
"""Idle connections are kept this long: longer than load balancers do, so that they are the ones to close."""

LINGER_S = 5.0
"""Seconds that the rest of a request is read and dropped after its early answer. To close at once would send a reset,
and the client might lose the answer."""

STALL_S = 60.0
"""Seconds without any progress after which a client that does not read its answer is cut off."""

MAX_CONNECTIONS = 8192
"""Most connections that "auto" takes, whatever the limit on open files."""

_WANTED_FILES = 65536
_MIN_CONNECTIONS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectionLimits:
    """What connections of one server may take.

    Attributes:
        max_connections: Most connections that send or await something at a time, but for probes.
        num_reserved: Connections beyond those; for probes, and for new ones until they ask.
        head_bytes: Largest head.
        head_s: Seconds until a head must be complete.
        keep_alive_s: Seconds an idle connection is kept.
        linger_s: Seconds that what follows an early answer is read and dropped.
        stall_s: Seconds without progress until a client that does not read is cut off.
    """

    max_connections: int = MAX_CONNECTIONS
    num_reserved: int = 32
    head_bytes: int = MAX_HEAD_BYTES
    head_s: float = HEAD_S
    keep_alive_s: float = KEEP_ALIVE_S
    linger_s: float = LINGER_S
    stall_s: float = STALL_S


LIMITS = ConnectionLimits()
"""The limits of a server that is told nothing."""


def raise_open_files() -> int:
    """Raises the process's limit on open files as far as it may (at most to 65,536).

    Returns:
        The limit now.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED_FILES if hard == resource.RLIM_INFINITY else min(hard, _WANTED_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return _WANTED_FILES if soft == resource.RLIM_INFINITY else soft


def connection_limits(asked: int | None, *, open_files: int) -> ConnectionLimits:
    """The limits of a server whose process may have so many open files.

    Args:
        asked: Most connections that were asked for; None for as many as the files allow.
        open_files: The process's limit.

    Raises:
        ConfigError: There cannot be that many connections.
    """
    room = max(64, min(open_files // 4, 512))
    if asked is None:
        total = max(_MIN_CONNECTIONS, open_files - room)
        cap = max(_MIN_CONNECTIONS, min(total - _reserved(total), MAX_CONNECTIONS))
        return ConnectionLimits(max_connections=cap, num_reserved=_reserved(cap))
    if asked + _reserved(asked) + room > open_files:
        raise ConfigError(
            f"max_connections={asked} needs {asked + _reserved(asked) + room} open files and the process may have "
            f"{open_files}; raise the limit (ulimit -n) or lower max_connections.",
            param="max_connections",
        )
    return ConnectionLimits(max_connections=asked, num_reserved=_reserved(asked))


def _reserved(num_connections: int) -> int:
    return max(2, min(num_connections // 8, 32))
