"""How far long work is: a bar on a terminal, a log line now and then elsewhere.

A `ProgressDisplay` is called with what is being done, how much of it is done and how much there is; work reports to it
without knowing where it is shown.
"""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

_LOGGER = logging.getLogger(__name__)


class ProgressDisplay:
    """Shows progress for as long as it is open.

    Args:
        shown: False shows nothing.
        log_interval_s: Least seconds between two log lines of unfinished work.
        console: Where bars go if it is a terminal; standard error by default.
    """

    def __init__(self, *, shown: bool = True, log_interval_s: float = 5.0, console: Console | None = None) -> None:
        self._shown = shown
        self._log_interval_s = log_interval_s
        self._last_log_s = time.monotonic()
        console = console or Console(stderr=True)
        self._bars: Progress | None = None
        if shown and console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._bars = Progress(*columns, console=console)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        """Opens the display."""
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes it; bars stay on the screen as they are."""
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, what: str, num_done: int, num_total: int) -> None:
        """Reports progress.

        Args:
            what: What is being done; each gets a bar of its own.
            num_done: How much of it is done.
            num_total: How much there is.
        """
        if self._bars is not None:
            if what not in self._tasks:
                self._tasks[what] = self._bars.add_task(what, total=num_total)
            self._bars.update(self._tasks[what], completed=num_done, total=num_total)
        elif self._shown:
            now = time.monotonic()
            if num_done >= num_total or now - self._last_log_s >= self._log_interval_s:
                self._last_log_s = now
                _LOGGER.info("%s: %d of %d", what, num_done, num_total)
