"""How a setting is declared: a dataclass field that knows its default, its parser, and what --help says of it.

Parsers turn text, wherever it came from, into a value or raise a ValueError that names what was wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any, TypeVar

T = TypeVar("T")


def boolean(text: str) -> bool:
    """True or false, in the words YAML and shells use."""
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if text.lower() not in words:
        raise ValueError(f"'{text}' is not true or false")
    return words[text.lower()]


def choice(*choices: str) -> Callable[[str], str]:
    """A parser of one of some words."""
    return checked(str, lambda text: text in choices, f"one of {', '.join(choices)}")


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """A parser of a whole number in [low, high]."""
    wanted = f"at least {low}" if high is None else f"in [{low}, {high}]"
    return checked(int, lambda value: value >= low and (high is None or value <= high), wanted)


def number(low: float, high: float) -> Callable[[str], float]:
    """A parser of a number in [low, high]."""
    return checked(float, lambda value: low <= value <= high, f"in [{low}, {high}]")


def checked(read: Callable[[str], T], holds: Callable[[T], bool], wanted: str) -> Callable[[str], T]:
    """A parser that reads text as `read` does and refuses what does not hold."""

    def parse(text: str) -> T:
        value = read(text)
        if not holds(value):
            raise ValueError(f"'{text}' is not {wanted}")
        return value

    return parse


def names(text: str) -> tuple[str, ...]:
    """Words between commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def declare(default: object, parse: Callable[[str], object], what: str, *, none: str | None = None) -> Any:  # noqa: ANN401 - stands for any field's type
    """Declares a setting: its default, how text becomes a value, what --help says, and the word that means None."""
    return field(default=default, metadata={"parse": parse, "help": what, "none": none})
