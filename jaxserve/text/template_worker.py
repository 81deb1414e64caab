"""The process that compiles and renders chat templates, one at a time; `template_pool` starts it, asks it and kills it.

It reads frames from the socket that is its standard input and answers each with one frame. A frame is its length (eight
bytes, big-endian) and that many bytes. A question is a `QUESTION` header and

    COMPILE   the template in UTF-8: the answer is OK, and the template gets the next number, from 0
    RENDER    JSON of the variables: the answer is OK and the text

and an answer is an `ANSWER` header (status, whether the process ends now) and a text in UTF-8. Nothing is unpickled.
Limits on CPU time and, on Linux, on address space are set anew for each question by the process itself, so they hold
even if the parent is gone; macOS enforces no limit on address space, there the parent's deadline is the only bound on
memory. The process ends with its input, when it ran out of memory, and when memory that it freed stays with it.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import socket
import struct
import sys
import time

import jinja2
from jinja2.exceptions import SecurityError

from jaxserve.text.sandbox import ChatEnvironment

LENGTH = struct.Struct(">Q")
QUESTION = struct.Struct(">cII")
"""What is asked, the template's number, and the seconds of CPU time it may take."""

COMPILE, RENDER = b"C", b"R"
ANSWER = struct.Struct(">c?")
"""Status, and whether the process ends after this answer."""

READY, OK, RAISED, FORBIDDEN, OUT_OF_MEMORY = b"!", b"O", b"E", b"S", b"M"

MEMORY_BYTES = 512 << 20
"""What a template may take above what the process has when it starts."""

MEMORY_PER_INPUT_BYTE = 32
"""What it may take besides for each byte of its input: a value of two bytes, `[]`, is an object of 56."""

ENCODING = ("utf-8", "surrogatepass")


def main() -> None:
    """Answers questions until the input ends."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    # Descriptor 0 stays open to the end of the process, so that its parent sees the end of it and nothing earlier.
    with socket.socket(fileno=os.dup(0)) as channel:
        worker = _Worker(channel)
        worker.greet()
        while worker.answer_next():
            pass


class _Worker:
    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._environment = ChatEnvironment()
        self._templates: list[jinja2.Template] = []
        self._memory = _Memory()

    def greet(self) -> None:
        """Says that questions may come."""
        self._send(READY, b"", is_last=False)

    def answer_next(self) -> bool:
        """Answers one question; returns whether there may be another."""
        head = self._receive(LENGTH.size)
        if head is None:
            return False
        (num_bytes,) = LENGTH.unpack(head)
        self._memory.limit(MEMORY_BYTES + MEMORY_PER_INPUT_BYTE * num_bytes)
        try:
            question = self._receive(num_bytes)
            if question is None:
                return False
            # Of millions of lists, collections in between would visit each again and again.
            gc.disable()
            status, text = self._answer(question)
            gc.enable()
            del question
            is_last = self._memory.grown_bytes() > MEMORY_BYTES // 2
            self._send(status, text, is_last=is_last)
        except MemoryError:
            self._send(OUT_OF_MEMORY, b"", is_last=True)
            return False
        return not is_last

    def _answer(self, question: bytearray) -> tuple[bytes, bytes]:
        what, number, cpu_s = QUESTION.unpack_from(question)
        _limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + cpu_s)
        text = str(memoryview(question)[QUESTION.size :], *ENCODING)
        try:
            if what == COMPILE:
                self._templates.append(self._environment.from_string(text))
                return OK, b""
            written = self._environment.render_chat(self._templates[number], json.loads(text))
            return OK, written.encode(*ENCODING)
        except MemoryError:
            raise
        except SecurityError as error:
            return FORBIDDEN, _reason(error)
        except Exception as error:  # A template is code: it can raise whatever Python raises.
            return RAISED, _reason(error)

    def _send(self, status: bytes, text: bytes, *, is_last: bool) -> None:
        self._channel.sendall(LENGTH.pack(ANSWER.size + len(text)) + ANSWER.pack(status, is_last) + text)

    def _receive(self, num_bytes: int) -> bytearray | None:
        """The next bytes; None if the input ends before them."""
        data = bytearray(num_bytes)
        view = memoryview(data)
        while view:
            num_read = self._channel.recv_into(view)
            if num_read == 0:
                return None
            view = view[num_read:]
        return data


class _Memory:
    """The process's address space, as Linux counts and limits it; elsewhere it is neither counted nor limited."""

    def __init__(self) -> None:
        self._file = os.open("/proc/self/statm", os.O_RDONLY) if sys.platform == "linux" else None
        self._base_bytes = self._bytes()

    def limit(self, num_bytes: int) -> None:
        """Limits what the process may take above what it had at first."""
        if self._file is not None:
            _limit(resource.RLIMIT_AS, self._base_bytes + num_bytes)

    def grown_bytes(self) -> int:
        """What it has above what it had at first."""
        return self._bytes() - self._base_bytes

    def _bytes(self) -> int:
        return 0 if self._file is None else int(os.pread(self._file, 64, 0).split()[0]) * resource.getpagesize()


def _reason(error: Exception) -> bytes:
    reason = " ".join(str(error)[:10_000].split())[:1000] or type(error).__name__
    return reason.encode(*ENCODING)


def _limit(which: int, most: int) -> None:
    hard = resource.getrlimit(which)[1]
    resource.setrlimit(which, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
