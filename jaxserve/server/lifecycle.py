"""The life of a serving process: listen, start the engine, serve, drain on a signal, exit.

The socket listens before the engine exists, so that `/health` answers and `/ready` says 503 while programs compile. On
SIGTERM, SIGINT or SIGHUP the engine drains while the socket still listens: requests in flight are finished, new ones
and `/ready` get a 503, which tells load balancers to go elsewhere. What is not finished within the deadline is aborted.
A second signal aborts at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import os
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import uvicorn
import uvloop
from fastapi import FastAPI

from jaxserve.core.errors import ConfigError
from jaxserve.engine.api import Engine
from jaxserve.server.connection import Connection
from jaxserve.server.connections import Connections
from jaxserve.server.limits import LIMITS, ConnectionLimits
from jaxserve.server.listener import Listener

FLUSH_S = 5
"""Seconds that the engine has to abort what is left, then responses to leave, then the engine to end its last step."""

_LOG = logging.getLogger(__name__)
_BACKLOG = 2048


@dataclass(frozen=True, slots=True)
class StopSignal:
    """How a running server is told to end.

    Attributes:
        drain: Finish what is in flight, then end.
        abort: Do not wait for it any longer.
        failed: There is no engine, and nothing to drain.
    """

    drain: asyncio.Event = field(default_factory=asyncio.Event)
    abort: asyncio.Event = field(default_factory=asyncio.Event)
    failed: asyncio.Event = field(default_factory=asyncio.Event)

    def next(self) -> None:
        """Drain at the first call, abort at the second."""
        (self.abort if self.drain.is_set() else self.drain).set()

    def fail(self) -> None:
        """The engine did not start."""
        self.failed.set()
        self.drain.set()


class _Server(uvicorn.Server):
    """Uvicorn with our connections, and without its signal handling, which would end the process by the signal it got.

    Args:
        config: Uvicorn's.
        sock: Listening.
        limits: What connections may take.
        tls: Makes the connections secure.
    """

    def __init__(
        self, config: uvicorn.Config, sock: socket.socket, limits: ConnectionLimits, tls: ssl.SSLContext | None
    ) -> None:
        super().__init__(config)
        self._sock = sock
        self._limits = limits
        self._tls = tls

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accepts connections."""
        connections = Connections(self._limits, clock=asyncio.get_running_loop().time)
        listener = Listener(
            self._sock,
            lambda: Connection(self.config, self.server_state, connections),
            connections,
            tls=self._tls,
        )
        listener.start()
        self.servers = [listener]  # type: ignore[list-item]  # it has what uvicorn uses of a server
        self.started = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to `serve_app`."""
        yield


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Args:
        host: An address or name; with a colon it is IPv6.
        port: 0 takes a free one.

    Raises:
        ConfigError: The address cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        # `create_server` adds to the reason what it tried.
        reason = (error.strerror or str(error)).partition(" (while")[0]
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            param, advice = "--port", "choose another with --port"
        else:
            param, advice = "--host", "--host must be an address of this machine"
        raise ConfigError(f"Cannot listen on {host} port {port}: {reason}; {advice}.", param=param) from error


def serve_app(
    app: FastAPI,
    engine: Engine,
    *,
    host: str,
    port: int,
    drain_deadline_s: float = 30.0,
    start: Callable[[], None] | None = None,
    limits: ConnectionLimits = LIMITS,
    tls: ssl.SSLContext | None = None,
) -> None:
    """Serves until a signal comes, then drains and returns; to be called in the main thread.

    If a signal comes while `start` still runs, the process exits with 0 at once: a compilation cannot be interrupted.
    If the engine's last step does not end, it exits with 1.

    Args:
        app: From `create_app`.
        engine: The engine of the app, or its slot; it is drained and closed here.
        host: Address to listen on.
        port: Port to listen on.
        drain_deadline_s: Seconds that requests in flight have to finish after the first signal.
        start: Makes the engine and fills the slot; it runs in a thread of its own while the server already listens, and
            what it raises ends the server and is raised again here.
        limits: What connections may take.
        tls: Makes the connections secure; None leaves them plain.

    Raises:
        ConfigError: The address cannot be listened on.
    """
    sock = listen(host, port)
    _LOG.info("listening on %s port %d", host, sock.getsockname()[1])
    starting = _Starting(start)

    async def main() -> bool:
        stop = StopSignal()
        loop = asyncio.get_running_loop()
        for number in _stop_signals():
            loop.add_signal_handler(number, stop.next)
        starting.begin(lambda: loop.call_soon_threadsafe(stop.fail))
        return await serve(app, engine, sock, stop=stop, drain_deadline_s=drain_deadline_s, limits=limits, tls=tls)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        has_ended = runner.run(main())
    starting.end()
    if not has_ended:
        # JAX would wait for the step as the interpreter ends.
        logging.shutdown()
        os._exit(1)


async def serve(
    app: FastAPI,
    engine: Engine,
    sock: socket.socket,
    *,
    stop: StopSignal,
    drain_deadline_s: float,
    limits: ConnectionLimits = LIMITS,
    tls: ssl.SSLContext | None = None,
) -> bool:
    """Serves on a socket until told to stop, then drains; the engine is closed at the end.

    Args:
        app: From `create_app`.
        engine: The engine of the app, or its slot.
        sock: Listening; closed here.
        stop: Says when.
        drain_deadline_s: Seconds that requests in flight have to finish.
        limits: What connections may take.
        tls: Makes the connections secure; None leaves them plain.

    Returns:
        Whether the engine has ended; one whose last step takes too long is left behind.
    """
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        proxy_headers=False,  # whose headers are believed is `callers`' to decide
        log_config=None,
        log_level=logging.WARNING,  # what it tells of itself, this module tells of the server
        timeout_keep_alive=math.ceil(limits.keep_alive_s),
        timeout_graceful_shutdown=FLUSH_S,
    )
    server = _Server(config, sock, limits, tls)
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    stopping = asyncio.create_task(stop.drain.wait())
    try:
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not stop.failed.is_set():
            await _drain(engine, drain_deadline_s, stop.abort)
    finally:
        server.should_exit = True
        stopping.cancel()
        await asyncio.wait({serving})
        has_ended = await _close(engine)
    serving.result()
    return has_ended


def _stop_signals() -> list[signal.Signals]:
    """Signals that end the server; SIGHUP does not where it is ignored, as `nohup` has it."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if ignored else [signal.SIGHUP])]


async def _close(engine: Engine) -> bool:
    try:
        async with asyncio.timeout(FLUSH_S):
            await engine.close()
    except TimeoutError:
        _LOG.error("the engine did not end within %g s", FLUSH_S)
        return False
    return True


async def _drain(engine: Engine, deadline_s: float, abort: asyncio.Event) -> None:
    """Lets the engine finish, for so long; an engine that does not even abort is left behind."""
    _LOG.info("draining for at most %.0f s", deadline_s)
    draining = asyncio.create_task(engine.drain(deadline_s))
    aborting = asyncio.create_task(abort.wait())
    await asyncio.wait({draining, aborting}, timeout=deadline_s + FLUSH_S, return_when=asyncio.FIRST_COMPLETED)
    if not draining.done():
        draining.cancel()
        draining = asyncio.create_task(engine.drain(0.0))
        await asyncio.wait({draining}, timeout=FLUSH_S)
    aborting.cancel()
    if not draining.done():
        draining.cancel()
        _LOG.error("the engine did not stop in time")
    else:
        _LOG.info("drained" if draining.result() else "drained; requests past the deadline were aborted")


class _Starting:
    """The start hook in a thread that dies with the process."""

    def __init__(self, start: Callable[[], None] | None) -> None:
        self._start = start
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="jaxserve-start", daemon=True)
        self._on_error: Callable[[], object] = lambda: None

    def begin(self, on_error: Callable[[], object]) -> None:
        """Runs the hook; `on_error` is called in its thread if it raises."""
        self._on_error = on_error
        self._thread.start()

    def end(self) -> None:
        """Raises what the hook raised; leaves the process if the hook still runs."""
        if self._error is not None:
            raise self._error
        if self._thread.is_alive():
            _LOG.warning("leaving while the engine starts")
            logging.shutdown()
            os._exit(0)

    def _run(self) -> None:
        try:
            if self._start is not None:
                self._start()
        except BaseException as error:
            self._error = error
            self._on_error()
