"""What the commands' flags have in common: the type of the subcommand registry, and parsers of values."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


class DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows a flag's default where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default else action.help


def positive(text: str) -> int:
    """An integer of at least 1."""
    return _at_least(text, 1)


def natural(text: str) -> int:
    """An integer of at least 0."""
    return _at_least(text, 0)


def positives(text: str) -> tuple[int, ...]:
    """Comma-separated integers of at least 1."""
    return tuple(positive(part) for part in text.split(","))


def above_zero(text: str) -> float:
    """A number greater than 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not greater than 0")
    return value


def _at_least(text: str, low: int) -> int:
    value = int(text)
    if value < low:
        raise argparse.ArgumentTypeError(f"{text} is not at least {low}")
    return value
