"""What a field's value is not, in one sentence that names the field by its path."""

from __future__ import annotations

import re

import msgspec

from jaxserve.core.errors import InvalidRequestError
from jaxserve.server.openai.outline import MAX_DEPTH, outline

_SHOWN_CHARS = 100
_STEP = re.compile(r"[^.\[\]`]+")
_PART_TYPE = re.compile(r"content\.\d+\.type$")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`", re.DOTALL)


class WrongTypeError(InvalidRequestError):
    """A value is of another type than its field; unions of our own try the next."""


def check_values(field: bytes, path: str, max_values: int) -> None:
    """Refuses a field that holds more values than may be built in one call.

    Args:
        field: JSON in UTF-8.
        path: The field's.
        max_values: Most values, those of lists and objects included.

    Raises:
        InvalidRequestError: It holds more.
    """
    # A value takes a byte at least, and a text is one value however long it is.
    if len(field) > max_values and field[:1] != b'"' and outline(field).num_values > max_values:
        raise too_many(path, max_values)


def check_depth(depth: int, path: str) -> None:
    """Refuses what is nested too deeply.

    Args:
        depth: Of its deepest list or object.
        path: The field's.

    Raises:
        InvalidRequestError: It is more than `MAX_DEPTH`.
    """
    if depth > MAX_DEPTH:
        raise InvalidRequestError(f"{path} is nested more than {MAX_DEPTH} levels deep.", param=path)


def shown(name: str) -> str:
    """A name a client sent, short and on one line."""
    short = name if len(name) <= _SHOWN_CHARS else name[:_SHOWN_CHARS] + "..."
    return short if short.isprintable() and short else ascii(short)


def too_many(path: str, max_values: int) -> InvalidRequestError:
    """The error of a field with more values than may be built in one call."""
    return InvalidRequestError(f"{path} holds more than {max_values} values; send fewer.", param=path)


def has_unknown_field(error: msgspec.ValidationError) -> bool:
    """Whether the fault is a field that an object's type does not declare."""
    return _UNKNOWN.match(str(error)) is not None


def invalid(error: msgspec.ValidationError, path: str, *, num_before: int = 0) -> InvalidRequestError:
    """One sentence for what a field's value is not.

    Args:
        error: Its text ends in a path such as `$.content[0]`.
        path: Of the field.
        num_before: Items of the field's list that were decoded before, if it is decoded in pieces.
    """
    reason, _, within = str(error).partition(" - at `$")
    steps = _STEP.findall(within)
    if steps and steps[0].isdecimal():
        steps[0] = str(int(steps[0]) + num_before)
    path = ".".join([path, *steps])
    if found := _MISSING.match(reason):
        path = f"{path}.{found[1]}"
        return InvalidRequestError(f"{path} is missing.", param=path)
    if found := _UNKNOWN.match(reason):
        path = f"{path}.{shown(found[1])}"
        return InvalidRequestError(f"{path} is not a known field; remove it.", param=path)
    hint = "; only text is read" if _PART_TYPE.search(path) else ""
    kind = WrongTypeError if ", got " in reason else InvalidRequestError
    return kind(f"{path}: {_plain(reason)}{hint}.", param=path)


def _plain(reason: str) -> str:
    """A reason of the decoder as the end of a sentence."""
    text = (
        reason.replace("JSON is malformed: ", "")
        .replace("`", "")
        .replace(" | null", "")
        .replace("Invalid enum value", "unknown value")
    )
    return shown(text[:1].lower() + text[1:])


def reason_of(error: Exception) -> str:
    """Why a text is not JSON, as the end of a sentence."""
    return "it is nested too deeply" if isinstance(error, RecursionError) else _plain(str(error))
