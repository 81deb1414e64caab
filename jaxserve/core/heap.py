"""Freed memory back to the system: the C library keeps it for later, which after large work is a lot."""

from __future__ import annotations

import ctypes
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
