"""Memory between start and service: what compiling took is given back, what stays is no concern of the collector."""

from __future__ import annotations

import ctypes
import gc
import sys


def release_free_memory() -> bool:
    """Returns freed heap pages to the system where the C library can (glibc's `malloc_trim`); says whether it could."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except AttributeError:
        return False
    return bool(trim(0))


def settle_heap() -> None:
    """Tells the garbage collector that what exists now stays: call it once all that serving needs is there.

    A full collection walks every container there is: modules, traced programs, compiled templates, some 200,000 of
    them. That takes a tenth of a second in which no step is scheduled, and finds nothing. Afterwards it walks only
    what requests have left.
    """
    gc.collect()
    gc.freeze()
