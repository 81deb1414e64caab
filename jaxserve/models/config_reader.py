"""Reads a flat configuration once, key by key, and reports everything wrong with it in one error.

A family file asks for each key it understands. `finish` then raises one `CheckpointError` that lists missing keys,
values of the wrong type, values whose mathematics is not implemented, and keys nobody asked for: a key that is
skipped in silence is how a checkpoint runs with the wrong rope. An operator may pass over such keys by name.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import TypeVar

from jaxserve.core.errors import CheckpointError

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_LARGEST_INTEGER = (1 << 31) - 1
_LARGEST_NUMBER = 3e38
"""What int32 and float32 can hold."""

IGNORE_FLAG = "--ignore-config-keys"
"""How an operator names keys to pass over."""


class ConfigReader:
    """One configuration being read; a JSON null counts as an absent key.

    Args:
        values: Keys and values as stored.
        origin: What is being read, for the error message ("config.json").
        passed_over: Keys that are no problem though nobody asks for them; those of a section as "section.key".
    """

    def __init__(self, values: Mapping[str, object], origin: str, passed_over: Collection[str] = ()) -> None:
        self.values = values
        self.origin = origin
        self.problems: list[str] = []
        self._unknown: list[str] = []
        self._seen: set[str] = set()
        self._passed_over = passed_over
        self._path = ""
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
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST_INTEGER:
            return value
        return self._refuse(key, value, "a positive integer", 1)

    def number(self, key: str, absent: float | None = None) -> float:
        """A number greater than zero; without `absent` it is required."""
        value = self.take(key)
        if value is None and absent is not None:
            return absent
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= _LARGEST_NUMBER:
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
        nested = ConfigReader(value, f"{self.origin} {key}", self._passed_over)
        nested.problems, nested._unknown, nested._seen = self.problems, self._unknown, self._seen
        nested._path = f"{self._path}{key}."
        return nested

    def fixed(self, key: str, *allowed: object) -> None:
        """A key that may be absent or hold one of `allowed`; anything else is mathematics we do not have."""
        value = self.take(key)
        if value is not None and value not in allowed:
            self.problems.append(f"{key} = {value!r} is not supported (only {' or '.join(map(repr, allowed))})")

    def close(self, ignored: Collection[str] = (), neutral: Mapping[str, Collection[object]] | None = None) -> None:
        """Notes every key that nobody asked for, unless it has no effect or the operator passes over it.

        Args:
            ignored: Keys known to have no effect on inference.
            neutral: Values of other keys with which they have none.
        """
        neutral = neutral or {}
        for key, value in self.values.items():
            path = self._path + key
            self._seen.add(path)
            if key in self._read:
                if path in self._passed_over:
                    self.problems.append(f"{IGNORE_FLAG} cannot pass over {path}, which jaxserve reads")
            elif value is None or key in ignored or value in neutral.get(key, ()):
                pass
            elif path in self._passed_over:
                logger.warning("%s: passing over %s = %s, as asked", self.origin, key, _short(value))
            else:
                self._unknown.append(path)
                self.problems.append(f"unknown key {key} = {_short(value)}")

    def finish(self, ignored: Collection[str] = (), neutral: Mapping[str, Collection[object]] | None = None) -> None:
        """Ends the reading.

        Args:
            ignored: As for `close`.
            neutral: As for `close`.

        Raises:
            CheckpointError: Anything was wrong; the message lists all of it.
        """
        self.close(ignored, neutral)
        if self.problems:
            message = (
                f"{self.origin} describes a model that jaxserve cannot run faithfully: {'; '.join(self.problems)}."
            )
            if self._unknown:
                message += f" Keys that do not change what it computes are passed over with {IGNORE_FLAG} "
                message += ",".join(self._unknown)
            raise CheckpointError(message)
        if absent := sorted(set(self._passed_over) - self._seen):
            logger.warning("%s has no %s to pass over", self.origin, ", ".join(absent))

    def _refuse(self, key: str, value: object, expected: str, stand_in: _T) -> _T:
        found = "missing" if value is None else f"{_short(value)}"
        self.wrong(f"{key} must be {expected} and is {found}", key)
        self._refused.add(key)
        return stand_in


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
