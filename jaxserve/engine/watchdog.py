"""Watches the engine's thread from outside: for how long has it been at the same step?

The thread says when it takes up a step and when it has come further; whoever asks compares that with the clock. Nothing
here waits or locks, so the answer comes even if the thread hangs in the device, whatever it holds. What counts as a
step is all that one takes: scheduling, dispatch, the wait for its tokens, and making the device's state anew after a
failure. Compiling before readiness is no step; a program compiled later is part of the step that needed it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

logger = logging.getLogger(__name__)

STEP_TIMEOUT_S = 300.0
"""Longest time of a step before the engine says that it is not ready, unless a setting says otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Overdue:
    """A step that takes too long.

    Attributes:
        lost: Whether it takes so long that the process should be restarted.
        reason: One sentence.
    """

    lost: bool
    reason: str


class Watchdog:
    """Knows since when the engine's thread has been at its oldest step.

    Args:
        step_timeout_s: A step of more seconds is overdue; of twice as many, and the device counts as lost.
        clock: Seconds, monotonic.
    """

    __slots__ = ("_clock", "_reported", "_since_s", "_timeout_s")

    def __init__(self, step_timeout_s: float = STEP_TIMEOUT_S, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout_s = step_timeout_s
        self._clock = clock
        self._since_s: float | None = None
        self._reported = False

    def step(self) -> None:
        """The thread has come one step further, and is busy with the next from now on."""
        late_s = self.age_s() if self._reported else 0.0
        self._since_s = self._clock()
        if late_s:
            self._reported = False
            logger.warning("A step that was overdue has come to its end after %.0f s.", late_s)

    def idle(self) -> None:
        """The thread has nothing to do."""
        if self._since_s is not None:
            self.step()
            self._since_s = None

    def age_s(self) -> float:
        """Seconds for which the thread has been at its oldest step; 0 while it has nothing to do."""
        since_s = self._since_s
        return 0.0 if since_s is None else max(0.0, self._clock() - since_s)

    def overdue(self) -> Overdue | None:
        """Whether a step is overdue; says so in the log, once."""
        age_s = self.age_s()
        if age_s <= self._timeout_s:
            return None
        reason = (
            f"A step has been running for {age_s:.0f} s, more than step_timeout_s={self._timeout_s:g}: "
            "the device may hang."
        )
        if not self._reported:
            self._reported = True
            logger.error("%s Not ready until it ends; lost at twice that time.", reason)
        return Overdue(lost=age_s > 2 * self._timeout_s, reason=reason)
