"""Processes that render chat templates, started on demand and killed where a template takes too long or too much.

A template is code from the network, and one C call of it (comparing lists that share their parts, a power, a format
width) can take for ever or fill the memory, which no check inside the interpreter can stop. So it runs in a
`template_worker`, which the parent kills at a deadline:

    render() -> take an idle worker, or start one, or wait -> frame -> frame -> give it back, or kill it

Workers have a session of their own, so that Ctrl-C of a terminal reaches only the server, which then drains. They
inherit neither descriptors nor the environment, in which there may be keys.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from enum import Enum, auto
from typing import Final

from jaxserve.core.environment import variables
from jaxserve.core.errors import OverloadedError, UnavailableError
from jaxserve.text.sandbox import MAX_TEXT
from jaxserve.text.template_worker import (
    ANSWER,
    COMPILE,
    ENCODING,
    FORBIDDEN,
    LENGTH,
    OK,
    OUT_OF_MEMORY,
    QUESTION,
    READY,
    RENDER,
)

LARGE_BYTES = 64 * 1024
"""Conversations above this may hold at most half of the processes: they are the ones that can take long, and short ones
must not wait for them."""

START_S = 60.0
"""Longest a worker may take to start; it takes 0.1 s where the machine is not overloaded."""

_LOG = logging.getLogger(__name__)
_CLOSED = "The chat template is closed, for the server is shutting down or the LLM has been closed."
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from jaxserve.text.template_worker import main; main()"
)
_ENVIRONMENT: Final = ("TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME")
_MAX_ANSWER_BYTES = ANSWER.size + 4 * MAX_TEXT
_STDERR_BYTES = 1 << 16


class Failure(Enum):
    """Why a template gave no text."""

    INVALID = auto()
    RAISED = auto()
    FORBIDDEN = auto()
    EXCEEDED = auto()


class TemplateFailedError(Exception):
    """A template cannot be compiled or rendered.

    Args:
        kind: INVALID: it does not compile. RAISED: it raises. FORBIDDEN: it reaches for what it may not have or writes
            too much. EXCEEDED: it takes too much time or memory, and its process is gone.
        reason: What happened, without an end mark.
    """

    def __init__(self, kind: Failure, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


class TemplatePool:
    """Renders templates in other processes; threads may share it.

    Args:
        max_workers: Most processes; they are started when all others are busy.
        patience_s: Longest a rendering waits for a process, in seconds.
    """

    def __init__(self, *, max_workers: int = 4, patience_s: float = 10.0) -> None:
        self._max_workers = max_workers
        self._patience_s = patience_s
        self._max_large = max(1, max_workers // 2)
        self._num_large = 0
        self._changed = threading.Condition()
        self._workers: set[_Worker] = set()
        self._idle: list[_Worker] = []
        self._closed = False
        self._finalizer = weakref.finalize(self, _end, self._workers, self._idle)

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes there are."""
        with self._changed:
            return tuple(worker.pid for worker in self._workers)

    def compile(self, source: str, *, timeout_s: float) -> None:
        """Finds out whether a template compiles.

        Args:
            source: The template.
            timeout_s: Longest it may take, in seconds.

        Raises:
            TemplateFailedError: It does not.
            UnavailableError: No process can be started, or all are busy.
        """
        self._ask(source, None, timeout_s)

    def render(self, source: str, data: bytes, *, timeout_s: float) -> str:
        """The text that a template writes.

        Args:
            source: The template.
            data: JSON of an object: the variables that the template sees.
            timeout_s: Longest it may take, in seconds.

        Raises:
            TemplateFailedError: It gives no text.
            UnavailableError: No process can be started, or all are busy.
        """
        return self._ask(source, data, timeout_s)

    def close(self) -> None:
        """Ends the processes; renderings in flight fail. Idempotent."""
        with self._changed:
            self._closed = True
            self._finalizer()
            self._changed.notify_all()

    def _ask(self, source: str, data: bytes | None, timeout_s: float) -> str:
        is_large = data is not None and len(data) > LARGE_BYTES
        worker = self._take(is_large=is_large)
        try:
            worker.begin()
            worker.compile(source, timeout_s)
            return "" if data is None else worker.render(source, data, timeout_s)
        except EOFError as error:
            raise self._death_of(worker) from error
        finally:
            self._give_back(worker, is_large=is_large)

    def _take(self, *, is_large: bool) -> _Worker:
        deadline = time.monotonic() + self._patience_s
        with self._changed:
            while True:
                if self._closed:
                    raise UnavailableError(_CLOSED)
                if not (is_large and self._num_large >= self._max_large) and (worker := self._free_worker()):
                    self._num_large += is_large
                    return worker
                left = deadline - time.monotonic()
                if left <= 0:
                    raise OverloadedError(
                        f"All processes that render chat templates have been busy for {self._patience_s:g} s; try "
                        "again later."
                    )
                self._changed.wait(left)

    def _free_worker(self) -> _Worker | None:
        """A worker that is idle, or a new one if there may be more."""
        while self._idle:
            worker = self._idle.pop()
            if not worker.has_ended:
                return worker
            # Somebody else killed it, the kernel for example.
            worker.end()
            self._workers.discard(worker)
        if len(self._workers) == self._max_workers:
            return None
        worker = _Worker()
        self._workers.add(worker)
        return worker

    def _give_back(self, worker: _Worker, *, is_large: bool) -> None:
        with self._changed:
            self._num_large -= is_large
            if worker.is_lost or self._closed:
                worker.end()
                self._workers.discard(worker)
            else:
                self._idle.append(worker)
            self._changed.notify_all()

    def _death_of(self, worker: _Worker) -> Exception:
        """What to raise for a worker that closed its end."""
        code, last_words = worker.end()
        if self._closed:
            return UnavailableError(_CLOSED)
        if not worker.has_begun:
            return UnavailableError(
                f"The process that renders chat templates did not start (exit code {code}): {last_words or 'no reason'}"
            )
        if code == -signal.SIGXCPU:
            return TemplateFailedError(Failure.EXCEEDED, "it takes too much CPU time")
        _LOG.warning("a process that renders chat templates ended with exit code %d: %s", code, last_words)
        return TemplateFailedError(Failure.EXCEEDED, f"its process ended with exit code {code}")


class _Worker:
    """One process, used by one thread at a time.

    Raises:
        UnavailableError: It cannot be started.
    """

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _BOOT, json.dumps([path or os.getcwd() for path in sys.path])],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    env={name: value for name, value in variables().items() if name in _ENVIRONMENT},
                    start_new_session=True,
                )
            except OSError as error:
                ours.close()
                raise UnavailableError(
                    f"No process can be started to render the chat template: {error.strerror or error}."
                ) from error
        self._channel = ours
        self._numbers: dict[str, int] = {}
        self.has_begun = False
        self.is_lost = True

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether there is no process any more."""
        return self._process.poll() is not None

    def begin(self) -> None:
        """Waits until a new process can be asked."""
        if not self.has_begun:
            try:
                answer = self._receive(time.monotonic() + START_S)
            except TimeoutError as error:
                raise UnavailableError(
                    f"The process that renders chat templates did not start within {START_S:g} s; try again later."
                ) from error
            if answer[:1] != READY:
                raise EOFError
            self.has_begun, self.is_lost = True, False

    def compile(self, source: str, timeout_s: float) -> None:
        """Makes sure that the process knows a template."""
        if source not in self._numbers:
            try:
                self._ask(COMPILE, 0, source.encode(*ENCODING), timeout_s)
            except TemplateFailedError as failure:
                kind = failure.kind if failure.kind is Failure.EXCEEDED else Failure.INVALID
                raise TemplateFailedError(kind, failure.reason) from failure
            self._numbers[source] = len(self._numbers)

    def render(self, source: str, data: bytes, timeout_s: float) -> str:
        """Renders a template that the process knows."""
        return self._ask(RENDER, self._numbers[source], data, timeout_s)

    def kill(self) -> None:
        """Ends the process; whoever waits for its answer finds the channel closed."""
        self._process.kill()
        self._process.wait()

    def end(self) -> tuple[int, str]:
        """Kills the process and closes what belongs to it; returns its exit code and the end of what it wrote."""
        self._channel.close()
        self.is_lost = True
        self.kill()
        stream = self._process.stderr
        assert stream is not None
        words = b"" if stream.closed else stream.read(_STDERR_BYTES)
        stream.close()
        return int(self._process.returncode), " ".join(words.decode(errors="replace").split())[-500:]

    def _ask(self, what: bytes, number: int, payload: bytes, timeout_s: float) -> str:
        question = QUESTION.pack(what, number, math.ceil(timeout_s)) + payload
        deadline = time.monotonic() + timeout_s
        # Until the whole answer is here, whatever is raised (KeyboardInterrupt, too) leaves a channel out of step.
        self.is_lost = True
        try:
            self._send(question, deadline)
            answer = self._receive(deadline)
        except TimeoutError as error:
            raise TemplateFailedError(Failure.EXCEEDED, f"it takes longer than {timeout_s:g} s") from error
        status, is_last = ANSWER.unpack_from(answer)
        self.is_lost = bool(is_last)
        if status == OUT_OF_MEMORY:
            raise TemplateFailedError(Failure.EXCEEDED, "it takes too much memory")
        text = str(memoryview(answer)[ANSWER.size :], *ENCODING)
        if status != OK:
            raise TemplateFailedError(Failure.FORBIDDEN if status == FORBIDDEN else Failure.RAISED, text)
        return text

    def _send(self, question: bytes, deadline: float) -> None:
        try:
            self._channel.settimeout(_left(deadline))
            self._channel.sendall(LENGTH.pack(len(question)) + question)
        except ConnectionError as error:
            raise EOFError from error

    def _receive(self, deadline: float) -> bytearray:
        (num_bytes,) = LENGTH.unpack(self._receive_exactly(LENGTH.size, deadline))
        if not ANSWER.size <= num_bytes <= _MAX_ANSWER_BYTES:
            raise EOFError
        return self._receive_exactly(num_bytes, deadline)

    def _receive_exactly(self, num_bytes: int, deadline: float) -> bytearray:
        data = bytearray(num_bytes)
        view = memoryview(data)
        while view:
            self._channel.settimeout(_left(deadline))
            try:
                num_read = self._channel.recv_into(view)
            except ConnectionError as error:
                raise EOFError from error
            if num_read == 0:
                raise EOFError
            view = view[num_read:]
        return data


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _end(workers: set[_Worker], idle: list[_Worker]) -> None:
    """Kills all; a worker that is busy is closed by the thread that waits for it."""
    for worker in tuple(workers):
        if worker in idle:
            worker.end()
            workers.discard(worker)
        else:
            worker.kill()
    idle.clear()
