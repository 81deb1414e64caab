"""JSON objects on disk, read with errors a user can act on."""

from __future__ import annotations

import json
from pathlib import Path

from jaxserve.core.errors import CheckpointError


def read_object(path: Path) -> dict[str, object]:
    """The JSON object in a file.

    Raises:
        CheckpointError: The file cannot be read or does not hold a JSON object.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    return parse_object(data, str(path))


def parse_object(data: bytes, origin: str) -> dict[str, object]:
    """The JSON object in some bytes.

    Args:
        data: UTF-8 JSON.
        origin: Where it is from, for the error.

    Raises:
        CheckpointError: It is not a JSON object.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{origin} is not valid JSON ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{origin} is not a JSON object; download it again.")
    return value
