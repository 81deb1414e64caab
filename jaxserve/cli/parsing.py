"""What the commands' flags have in common: the type of the subcommand registry, and parsers of values."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxserve.core.setting import BOOLEAN_WORDS

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


MAX_PORT = 65535


class DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows a flag's default where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default else action.help


class Parser(argparse.ArgumentParser):
    """A parser that tells whoever gives a value to a switch how to write it.

    argparse itself would take `false` in `serve --offline false` for the model.
    """

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]  # noqa: ANN401 - argparse overloads it
        """Parses; see `argparse.ArgumentParser`."""
        if args is not None:
            self._refuse_valued_switches(args)
        return super().parse_known_args(args, namespace)

    def _refuse_valued_switches(self, args: Sequence[str]) -> None:
        for text, following in zip(args, [*args[1:], ""], strict=False):
            flag, equals, value = text.partition("=")
            action = self._option_string_actions.get(flag)
            if action is None or action.nargs != 0:
                continue
            value = value if equals else following
            if equals or value.lower() in BOOLEAN_WORDS:
                forms = " or ".join(action.option_strings)
                self.error(f"{flag} takes no value, but '{value}' follows it; write {forms}")


def add_switch(parser: argparse._ActionsContainer, flag: str, *, default: bool = False, help: str) -> None:  # noqa: A002 - argparse's name
    """Adds `--flag` and `--no-flag`."""
    action = parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=help)
    # Given here, Python 3.11 would write it into the help once more.
    action.default = default


def positive(text: str) -> int:
    """An integer of at least 1."""
    return _at_least(text, 1)


def natural(text: str) -> int:
    """An integer of at least 0."""
    return _at_least(text, 0)


def port(text: str) -> int:
    """A TCP port; 0 takes a free one."""
    value = natural(text)
    if value > MAX_PORT:
        raise argparse.ArgumentTypeError(f"{text} is beyond {MAX_PORT}, the last port")
    return value


def positives(text: str) -> tuple[int, ...]:
    """Comma-separated integers of at least 1."""
    return tuple(positive(part) for part in text.split(","))


def number(text: str) -> float:
    """A number."""
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from error


def above_zero(text: str) -> float:
    """A number greater than 0."""
    value = number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not greater than 0")
    return value


def _at_least(text: str, low: int) -> int:
    try:
        value = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from error
    if value < low:
        raise argparse.ArgumentTypeError(f"{text} is not at least {low}")
    return value
