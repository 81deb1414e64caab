"""A place for an engine that is still being made, so that the server can listen while programs compile.

Until `fill` is called every request is refused as unavailable, `health` says why, and afterwards everything goes to the
engine. The app holds the slot and cannot tell it from the engine.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from jaxserve.core.errors import UnavailableError
from jaxserve.core.types import Request, TokenEvent
from jaxserve.engine.api import Engine, EngineInfo, EngineStats, Health


class EngineSlot:
    """Implements `Engine` before there is one.

    Args:
        reason: What the engine waits for, as a sentence.
    """

    def __init__(self, reason: str = "The engine is starting.") -> None:
        self._reason = reason
        self._engine: Engine | None = None
        self._alive = True

    @property
    def filled(self) -> bool:
        """Whether the engine is there."""
        return self._engine is not None

    def fill(self, engine: Engine) -> None:
        """Puts the engine in; from now on it answers."""
        self._engine = engine

    def fail(self, reason: str) -> None:
        """Says that there will be no engine, and why."""
        self._reason, self._alive = reason, False

    @property
    def info(self) -> EngineInfo:
        """The engine's facts; raises UnavailableError while there is none."""
        return self._get().info

    def stream(self, request: Request) -> AsyncIterator[TokenEvent]:
        """See `Engine.stream`."""
        return self._get().stream(request)

    def abort(self, request_id: str) -> None:
        """See `Engine.abort`."""
        if self._engine is not None:
            self._engine.abort(request_id)

    def stats(self) -> EngineStats:
        """See `Engine.stats`; zeros while there is no engine."""
        return EngineStats() if self._engine is None else self._engine.stats()

    def health(self) -> Health:
        """See `Engine.health`; alive and not ready while there is no engine."""
        if self._engine is None:
            return Health(alive=self._alive, ready=False, reason=self._reason)
        return self._engine.health()

    async def drain(self, deadline_s: float) -> bool:
        """See `Engine.drain`."""
        if self._engine is None:
            self._reason = "The server is shutting down."
            return True
        return await self._engine.drain(deadline_s)

    async def close(self) -> None:
        """See `Engine.close`."""
        if self._engine is not None:
            await self._engine.close()

    def _get(self) -> Engine:
        if self._engine is None:
            raise UnavailableError(self._reason)
        return self._engine
