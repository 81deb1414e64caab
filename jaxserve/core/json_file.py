"""JSON objects on disk, read with errors a user can act on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxserve.core.errors import CheckpointError
from jaxserve.core.regular_file import read_optional, read_regular

MAX_BYTES = 64 << 20
"""Largest JSON file of a checkpoint that is read; indexes of the largest models have a few megabytes."""

MAX_DEPTH = 64
"""Deepest nesting that is read; code that walks or prints a value recurses once or more a level."""


def read_object(path: Path) -> dict[str, object]:
    """The JSON object in a file.

    Raises:
        CheckpointError: The file cannot be read or does not hold a JSON object.
    """
    try:
        data = read_regular(path, max_bytes=MAX_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    return parse_object(data, str(path))


def read_optional_object(path: Path) -> dict[str, object]:
    """The JSON object in a file; empty if there is no file of that name.

    Raises:
        CheckpointError: The file is there and cannot be read, or does not hold a JSON object.
    """
    try:
        data = read_optional(path, max_bytes=MAX_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    return {} if data is None else parse_object(data, str(path))


def parse_object(data: bytes, origin: str) -> dict[str, object]:
    """The JSON object in some bytes.

    Args:
        data: UTF-8 JSON.
        origin: Where it is from, for the error.

    Raises:
        CheckpointError: It is not a JSON object, or nested deeper than `MAX_DEPTH`.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{origin} is not valid JSON ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{origin} is not a JSON object; download it again.")
    if nested_deeper(value, MAX_DEPTH):
        raise CheckpointError(f"{origin} is nested deeper than {MAX_DEPTH} levels; download it again.")
    return value


def nested_deeper(value: object, max_depth: int) -> bool:
    """Whether lists and objects stand in each other in more than some levels; takes no recursion.

    Args:
        value: What `json.loads` made.
        max_depth: That many.
    """
    level: list[Any] = [value] if isinstance(value, dict | list) else []
    for _ in range(max_depth):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    return bool(level)
