"""How a setting is declared: a dataclass field that knows its default, its parser, and what --help says of it.

Parsers turn text, wherever it came from, into a value or raise a ValueError that names what was wanted.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

T = TypeVar("T")

_HOST = re.compile(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@]+")


BOOLEAN_WORDS = MappingProxyType(
    {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
)
"""The words that YAML and shells use for true and false."""


def boolean(text: str) -> bool:
    """True or false, in one of `BOOLEAN_WORDS`."""
    if text.lower() not in BOOLEAN_WORDS:
        raise ValueError(f"'{text}' is not true or false")
    return BOOLEAN_WORDS[text.lower()]


@dataclass(frozen=True, slots=True)
class Choice:
    """A parser of one of some words.

    Attributes:
        words: The words.
    """

    words: tuple[str, ...]

    def __call__(self, text: str) -> str:
        """The text if it is one of the words."""
        if text not in self.words:
            raise ValueError(f"'{text}' is not one of {', '.join(self.words)}")
        return text


def choice(*words: str) -> Choice:
    """A parser of one of some words; `declare` lists them in --help."""
    return Choice(words)


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """A parser of a whole number in [low, high]."""
    wanted = f"a whole number of at least {low}" if high is None else f"a whole number in [{low}, {high}]"
    return checked(int, lambda value: value >= low and (high is None or value <= high), wanted)


def number(low: float, high: float) -> Callable[[str], float]:
    """A parser of a number in [low, high]."""
    return checked(float, lambda value: low <= value <= high, f"a number in [{low:g}, {high:g}]")


def checked(read: Callable[[str], T], holds: Callable[[T], bool], wanted: str) -> Callable[[str], T]:
    """A parser that reads text as `read` does and refuses what it cannot read and what does not hold."""

    def parse(text: str) -> T:
        refusal = ValueError(f"'{text}' is not {wanted}")
        try:
            value = read(text)
        except ValueError as error:
            raise refusal from error
        if not holds(value):
            raise refusal
        return value

    return parse


def names(text: str) -> tuple[str, ...]:
    """Words between commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def networks(text: str) -> tuple[str, ...]:
    """IP addresses and networks between commas, such as `127.0.0.1,10.0.0.0/8`."""
    for part in names(text):
        ipaddress.ip_network(part, strict=False)
    return names(text)


def hosts(text: str) -> tuple[str, ...]:
    """Hosts between commas: names, `*.example.com`, addresses, networks, or `*` for all."""
    found = tuple(host.lower().removesuffix(".") for host in names(text))
    if not found:
        raise ValueError("there is no host; `*` allows all")
    for host in found:
        if host != "*" and not _HOST.fullmatch(host) and not _is_network(host):
            raise ValueError(f"'{host}' is not a host name, an address or a network; leave scheme and port away")
    return found


def origins(text: str) -> tuple[str, ...]:
    """Origins between commas, such as `https://example.com`, or `*` for all; as browsers write them."""
    return tuple(_origin(origin) for origin in names(text))


def _origin(text: str) -> str:
    origin = text.lower().removesuffix("/")
    if origin != "*" and not _ORIGIN.fullmatch(origin):
        raise ValueError(f"'{text}' is not an origin such as https://example.com, nor `*`")
    for scheme, port in (("http", ":80"), ("https", ":443")):
        if origin.startswith(f"{scheme}://"):
            origin = origin.removesuffix(port)
    return origin


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text.removeprefix("[").removesuffix("]"), strict=False)
    except ValueError:
        return False
    return True


def declare(
    default: object, parse: Callable[[str], object], what: str, *, none: str | None = None, secret: bool = False
) -> Any:  # noqa: ANN401 - stands for any field's type
    """Declares a setting: its default, how text becomes a value, what --help says, and the word that means None.

    Where text must be one of some words, --help lists them, with the one that means None. A secret is left out where
    the configuration is shown.
    """
    if isinstance(parse, Choice):
        words = parse.words if none is None else (none, *parse.words)
        what = f"{what}; one of: {', '.join(words)}"
    return field(default=default, metadata={"parse": parse, "help": what, "none": none}, repr=not secret)
