"""SIGTERM for commands that work through: they leave as on an interrupt, by way of what cleans up after them.

By itself the signal would end the process where it stands, and leave its temporary folders behind.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

TERMINATED = 143
"""What a shell reports for a command ended by SIGTERM."""


@contextmanager
def terminable() -> Iterator[None]:
    """Makes SIGTERM raise SystemExit in the main thread, where this must be entered."""

    def leave(*_: object) -> None:
        sys.exit(TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
