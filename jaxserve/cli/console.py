"""Where the commands print their tables."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PIPED_WIDTH = 132
"""Columns of a table in a file or a pipe, of whose reader nothing is known."""


def console() -> Console:
    """A console as wide as the terminal, or as wide as tables need where there is none."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
