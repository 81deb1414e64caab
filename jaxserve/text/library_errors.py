"""What the `tokenizers` library raises, made into errors of ours.

It raises bare `Exception` for whatever it does not like. Where its Rust code panics, Python sees a
`pyo3_runtime.PanicException`, which derives from `BaseException` so that nobody catches it by accident, and which no
module exports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jaxserve.core.errors import JaxserveError


@contextmanager
def library_errors(make: Callable[[str], JaxserveError]) -> Iterator[None]:
    """Where the library is called: what it raises becomes an error of ours, which passes as it is.

    Args:
        make: Makes the error from the library's reason, which is one line.
    """
    try:
        yield
    except JaxserveError:
        raise
    except Exception as error:
        raise make(_reason(error)) from error
    except BaseException as error:
        if not is_panic(error):
            raise
        raise make(_reason(error)) from error


def is_panic(error: BaseException) -> bool:
    """Whether an exception is a panic of Rust code."""
    return type(error).__module__ == "pyo3_runtime" and type(error).__name__ == "PanicException"


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
