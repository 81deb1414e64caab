"""Bytes to a server on this machine and what comes back, below any HTTP library, for none of them sends what is wrong.

An `Attack` is what one connection sends and how it ends; `deliver` sends it and says what came of it. Nothing waits
longer than it is told to.
"""

from __future__ import annotations

import ipaddress
import json
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import urlsplit

from jaxserve.core.errors import ConfigError

Address = tuple[str, int]

_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_READ_BYTES = 1 << 16


class Ending(StrEnum):
    """What a connection does once its bytes are sent."""

    READ = "read"
    """Reads the answer."""

    LEAVE = "leave"
    """Goes away at once."""

    PEEK = "peek"
    """Goes away after the first bytes of the answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attack:
    """What one connection sends.

    Attributes:
        kind: What is wrong with it, for the report.
        data: The bytes.
        ending: What happens then.
    """

    kind: str
    data: bytes
    ending: Ending = Ending.READ


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of an attack.

    Attributes:
        status: Of the answer, or "closed" (the server hung up without one), "left" (the client did), "silent" (no
            answer in time) or "refused" (no connection).
        seconds: From the connection to the end of it.
        body: What was read of the answer's body.
    """

    status: str
    seconds: float
    body: bytes = b""


def loopback_address(url: str) -> Address:
    """Host and port of a server on this machine.

    Raises:
        ConfigError: The URL is not plain HTTP, or its host is another machine: this is for servers of one's own.
    """
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme != "http" or not parts.hostname:
        raise ConfigError(f"{url} is not an http:// URL.", param="--url")
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{url} cannot be resolved: {error}.", param="--url") from error
    if not all(ipaddress.ip_address(each[4][0]).is_loopback for each in found):
        raise ConfigError(f"{url} is not on this machine, and abuse is for servers of your own.", param="--url")
    return str(found[0][4][0]), int(found[0][4][1])


def request(
    path: str, body: bytes | None = None, *, method: str = "POST", headers: Mapping[str, str] | None = None
) -> bytes:
    """A well-formed request that asks to close the connection; any part may be nonsense."""
    lines = {"Host": "127.0.0.1", "Connection": "close"}
    if body is not None:
        lines |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    lines |= headers or {}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("utf-8", "surrogatepass") + (body or b"")


def json_bytes(body: object) -> bytes:
    """A body in as few bytes as JSON takes."""
    return json.dumps(body, separators=(",", ":")).encode()


def deliver(address: Address, attack: Attack, *, timeout_s: float) -> Outcome:
    """Sends an attack on a connection of its own; an OSError of the connection is an outcome, not an error."""
    started = time.monotonic()

    def outcome(status: str, body: bytes = b"") -> Outcome:
        return Outcome(status=status, seconds=time.monotonic() - started, body=body)

    try:
        connection = socket.create_connection(address, timeout=timeout_s)
    except OSError:
        return outcome("refused")
    with connection:
        connection.settimeout(timeout_s)
        try:
            connection.sendall(attack.data)
        except TimeoutError:
            return outcome("silent")
        except OSError:
            # Hung up on before the end: there may be an answer that says why.
            return outcome(*_read(connection, started + timeout_s))
        if attack.ending is Ending.LEAVE:
            return outcome("left")
        return outcome(*_read(connection, started + timeout_s, peek=attack.ending is Ending.PEEK))


def _read(connection: socket.socket, deadline: float, *, peek: bool = False) -> tuple[str, bytes]:
    """The status of an answer, and its body as far as it is told how long it is, or until the connection ends."""
    data = bytearray()
    status, start, end = "", 0, None
    while end is None or len(data) < end:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            piece = connection.recv(_READ_BYTES)
        except TimeoutError:
            return status or "silent", bytes(data[start:])
        except OSError:
            return status or "closed", bytes(data[start:])
        if not piece:
            break
        data += piece
        if not status and (match := _STATUS.match(data)):
            status = match[1].decode()
        if not start and (place := data.find(b"\r\n\r\n")) >= 0:
            start = place + 4
            length = _LENGTH.search(data, 0, start)
            end = start + int(length[1]) if length else None
        if peek and status:
            break
    return status or "closed", bytes(data[start:])
