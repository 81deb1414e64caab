"""Values to JSON text, piece by piece: no single C call walks a large value, so other threads keep running meanwhile.

It takes what Python programs pass for JSON (any mapping, any sequence, whole numbers of any size, NaN), where a
stricter encoder would refuse or change values that a chat template renders.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from json.encoder import encode_basestring
from typing import cast

from jaxserve.core.errors import InvalidRequestError


def plain_json(value: object, param: str) -> str:
    """JSON of a value.

    Args:
        value: Made of None, truth values, numbers, texts, mappings and sequences.
        param: The request field it comes from, for errors.

    Raises:
        InvalidRequestError: It holds something else, or is nested too deeply.
    """
    pieces: list[str] = []
    try:
        _write(value, param, pieces)
    except RecursionError as error:
        raise InvalidRequestError(f"{param} is nested too deeply.", param=param) from error
    except ValueError as error:
        raise InvalidRequestError(f"{param} holds a number with too many digits.", param=param) from error
    return "".join(pieces)


def _write(value: object, param: str, pieces: list[str]) -> None:
    kind = type(value)
    # Exact types first: to ask whether something is a Mapping takes longer than all else here.
    if kind is str or isinstance(value, str):
        pieces.append(encode_basestring(str.__str__(cast("str", value))))
    elif value is None:
        pieces.append("null")
    elif kind is bool:
        pieces.append("true" if value else "false")
    elif isinstance(value, int):
        pieces.append(int.__repr__(value))
    elif isinstance(value, float):
        pieces.append(_number(value))
    elif kind is dict or (kind is not list and isinstance(value, Mapping)):
        mark = "{"
        for key, item in cast("Mapping[object, object]", value).items():
            pieces.append(f"{mark}{encode_basestring(str(key))}:")
            _write(item, param, pieces)
            mark = ","
        pieces.append("{}" if mark == "{" else "}")
    elif kind is list or (isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, memoryview))):
        mark = "["
        for item in cast("Sequence[object]", value):
            pieces.append(mark)
            _write(item, param, pieces)
            mark = ","
        pieces.append("[]" if mark == "[" else "]")
    else:
        raise InvalidRequestError(f"{param} holds a {kind.__name__}, which is not a JSON value.", param=param)


def _number(value: float) -> str:
    if math.isfinite(value):
        return float.__repr__(value)
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"
