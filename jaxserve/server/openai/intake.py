"""Reading bodies: how large one may be, how long it may take, and how much memory all of them may hold together.

Each body may be as large as the limit, and many clients may send one at once; half-sent ones would hold their memory
for as long as their clients like. So a body that falls silent is given up, and the memory of all bodies that are being
read or parsed has a bound: what would pass it is refused with a 503, unless another body has been silent for a while,
which is given up first.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve.core.errors import OverloadedError, PayloadTooLargeError, SlowRequestError
from jaxserve.server.openai.errors import error_response

SMALL_BODY_BYTES = 64 * 1024
"""So much of each body is free, so that small requests pass whatever large ones do; connections bound how many."""

BODIES_AT_ONCE = 16
"""So many of the largest bodies may be read at once."""

_KEY = "jaxserve.body"


@dataclass(frozen=True, kw_only=True, slots=True)
class BodyLimits:
    """What bodies may take.

    Attributes:
        max_bytes: Largest body.
        silence_s: Longest time without a byte of an unfinished body.
        total_s: Longest time for a whole body.
        spare_s: Silence after which a body is given up if another needs its memory.
    """

    max_bytes: int
    silence_s: float = 30.0
    total_s: float = 300.0
    spare_s: float = 5.0

    @property
    def all_bytes(self) -> int:
        """Most bytes beyond the free ones of all bodies that are being read or parsed."""
        return BODIES_AT_ONCE * max(0, self.max_bytes - SMALL_BODY_BYTES)


def body_is_parsed(scope: Scope) -> None:
    """Says that a request's body is no longer held, before its answer begins; `BodyLimit` counts on it.

    Args:
        scope: The request's.
    """
    if _KEY in scope:
        scope[_KEY].free()


class BodyLimit:
    """Refuses bodies that are too large, too slow, or too many.

    A declared length that is too large is refused at once.

    Args:
        app: The next layer.
        limits: What bodies may take.
    """

    def __init__(self, app: ASGIApp, *, limits: BodyLimits) -> None:
        self._app = app
        self._limits = limits
        self._budget = _Budget(limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self._limits.max_bytes:
            await error_response(_too_large(self._limits))(scope, receive, send)
            return
        body = _Body(receive, self._limits, self._budget)
        scope[_KEY] = body
        try:
            await self._app(scope, body.receive, send)
        finally:
            body.free()


class _Body:
    """A body on its way."""

    def __init__(self, receive: Receive, limits: BodyLimits, budget: _Budget) -> None:
        self._receive = receive
        self._limits = limits
        self._budget = budget
        self._clock = asyncio.get_running_loop().time
        self._end_s = self._clock() + limits.total_s
        self._is_complete = False
        self._timeout: asyncio.Timeout | None = None
        self._num_bytes = 0

    @property
    def num_held_bytes(self) -> int:
        """Bytes that count against the budget."""
        return max(0, self._num_bytes - SMALL_BODY_BYTES)

    async def receive(self) -> Message:
        """The next message; the part of a body that it brings has been counted."""
        if self._is_complete:
            return await self._receive()
        deadline_s = min(self._clock() + self._limits.silence_s, self._end_s)
        try:
            async with asyncio.timeout_at(deadline_s) as self._timeout:
                message = await self._receive()
        except TimeoutError:
            raise SlowRequestError(
                f"The body did not come; send it within {self._limits.total_s:g} s and without pauses of "
                f"{self._limits.silence_s:g} s."
            ) from None
        finally:
            self._timeout = None
        self._is_complete = message["type"] != "http.request" or not message.get("more_body", False)
        self._take(len(message.get("body", b"")))
        return message

    def give_up(self) -> bool:
        """Ends the wait for more of the body; returns whether there was one."""
        if self._timeout is None:
            return False
        self._timeout.reschedule(self._clock())
        return True

    def free(self) -> None:
        """The body is held no longer. Idempotent."""
        self._budget.remove(self)
        self._num_bytes = 0

    def _take(self, num_bytes: int) -> None:
        if self._num_bytes + num_bytes > self._limits.max_bytes:
            raise _too_large(self._limits)
        before = self.num_held_bytes
        self._num_bytes += num_bytes
        if grown := self.num_held_bytes - before:
            self._budget.grow(self, grown)


class _Budget:
    """The memory of all bodies beyond their free beginnings."""

    def __init__(self, limits: BodyLimits) -> None:
        self._limits = limits
        self._num_bytes = 0
        # In the order of the last byte that came, with its time.
        self._bodies: dict[_Body, tuple[int, float]] = {}

    def grow(self, body: _Body, num_bytes: int) -> None:
        """Counts more bytes of a body.

        Raises:
            OverloadedError: They would be too many.
        """
        now_s = asyncio.get_running_loop().time()
        held, _ = self._bodies.pop(body, (0, 0.0))
        self._bodies[body] = (held + num_bytes, now_s)
        self._num_bytes += num_bytes
        while self._num_bytes > self._limits.all_bytes:
            if not self._give_up_one(now_s):
                self.remove(body)
                raise OverloadedError("Too many large bodies are being sent; try again in a moment.")

    def remove(self, body: _Body) -> None:
        """Forgets a body. Idempotent."""
        self._num_bytes -= self._bodies.pop(body, (0, 0.0))[0]

    def _give_up_one(self, now_s: float) -> bool:
        """Gives up the body that has been silent longest, if any has been for long enough."""
        for body, (_, since_s) in self._bodies.items():
            if now_s - since_s < self._limits.spare_s:
                return False
            if body.give_up():
                self.remove(body)
                return True
        return False


def _too_large(limits: BodyLimits) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"The body is larger than the {limits.max_bytes} bytes allowed.", param="body")
