"""The type checker of the tests: shapes and dtypes of array functions' arguments and results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_CHECK = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks a function's calls. A pytree's `__init__` is left alone: JAX makes pytrees of tracers' stand-ins."""
    return function if function.__name__ == "__init__" else _CHECK(function)
