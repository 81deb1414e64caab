"""Reads a flat configuration once, key by key, and reports everything wrong with it in one error.

A family file asks for each key it understands. `finish` then raises one `CheckpointError` that lists missing keys,
values of the wrong type, values whose mathematics is not implemented, and keys nobody asked for: a key that is
skipped in silence is how a checkpoint runs with the wrong rope.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeVar

from jaxserve.core.errors import CheckpointError

_T = TypeVar("_T")


class ConfigReader:
    """One configuration being read; a JSON null counts as an absent key.

    Args:
        values: Keys and values as stored.
        origin: What is being read, for the error message ("config.json").
    """

    def __init__(self, values: Mapping[str, object], origin: str) -> None:
        self.values = values
        self.origin = origin
        self.problems: list[str] = []
        self._read: set[str] = set()
        self._refused: set[str] = set()

    def has(self, key: str) -> bool:
        """Whether the key is there with a value."""
        return self.values.get(key) is not None

    def take(self, key: str) -> object:
        """The raw value, None if absent; the key counts as understood."""
        self._read.add(key)
        return self.values.get(key)

    def wrong(self, problem: str, *keys: str) -> None:
        """Notes a problem for `finish`.

        Args:
            problem: What is wrong, as a clause.
            keys: Whose values it is about; if one of them was refused, that is the problem, and this one is not noted.
        """
        if not self._refused.intersection(keys):
            self.problems.append(problem)

    def integer(self, key: str, absent: int | None = None) -> int:
        """A positive integer; without `absent` it is required."""
        value = self.take(key)
        if value is None and absent is not None:
            return absent
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        return self._refuse(key, value, "a positive integer", 1)

    def number(self, key: str, absent: float | None = None) -> float:
        """A number greater than zero; without `absent` it is required."""
        value = self.take(key)
        if value is None and absent is not None:
            return absent
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            return float(value)
        return self._refuse(key, value, "a number above zero", 1.0)

    def boolean(self, key: str, absent: bool) -> bool:
        """True or false; `absent` is what the format says a missing key means."""
        value = self.take(key)
        if value is None:
            return absent
        if isinstance(value, bool):
            return value
        return self._refuse(key, value, "true or false", absent)

    def text(self, key: str, absent: str | None = None) -> str:
        """A string; without `absent` it is required."""
        value = self.take(key)
        if value is None and absent is not None:
            return absent
        if isinstance(value, str):
            return value
        return self._refuse(key, value, "a string", "")

    def token_ids(self, key: str) -> tuple[int, ...] | None:
        """One token id or a list of them; None if absent."""
        value = self.take(key)
        if value is None:
            return None
        ids = value if isinstance(value, list) else [value]
        if all(isinstance(token_id, int) and not isinstance(token_id, bool) and token_id >= 0 for token_id in ids):
            return tuple(ids)
        return self._refuse(key, value, "a token id or a list of token ids", ())

    def section(self, key: str) -> ConfigReader | None:
        """A nested object as a reader of its own that shares this one's problems; None if absent."""
        value = self.take(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            return self._refuse(key, value, "an object", None)
        nested = ConfigReader(value, f"{self.origin} {key}")
        nested.problems = self.problems
        return nested

    def fixed(self, key: str, *allowed: object) -> None:
        """A key that may be absent or hold one of `allowed`; anything else is mathematics we do not have."""
        value = self.take(key)
        if value is not None and value not in allowed:
            self.problems.append(f"{key} = {value!r} is not supported (only {' or '.join(map(repr, allowed))})")

    def close(self, ignored: Collection[str] = ()) -> None:
        """Notes every key that nobody asked for and that is not in `ignored`."""
        for key, value in self.values.items():
            if key not in self._read and key not in ignored and value is not None:
                self.problems.append(f"unknown key {key} = {_short(value)}")

    def finish(self, ignored: Collection[str] = ()) -> None:
        """Ends the reading.

        Args:
            ignored: Keys known to have no effect on inference.

        Raises:
            CheckpointError: Anything was wrong; the message lists all of it.
        """
        self.close(ignored)
        if self.problems:
            raise CheckpointError(
                f"{self.origin} describes a model that jaxserve cannot run faithfully: {'; '.join(self.problems)}."
            )

    def _refuse(self, key: str, value: object, expected: str, stand_in: _T) -> _T:
        found = "missing" if value is None else f"{_short(value)}"
        self.wrong(f"{key} must be {expected} and is {found}", key)
        self._refused.add(key)
        return stand_in


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
