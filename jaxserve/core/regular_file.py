"""Regular files, opened without waiting: a FIFO or a device in a file's place is refused, not read.

Opening a FIFO blocks until somebody writes to it, and reading a device may never end; a model's folder may hold either.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file, or a link to one, for reading.

    Raises:
        OSError: It is not there, cannot be opened, or is something else; `strerror` says what.
    """
    try:
        # Opening some devices has effects, so they are looked at first; the file that is open counts in the end.
        _require_regular(path, os.stat(path))
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    file = os.fdopen(descriptor, "rb")
    try:
        _require_regular(path, os.fstat(descriptor))
    except OSError:
        file.close()
        raise
    return file


def read_regular(path: Path, *, max_bytes: int) -> bytes:
    """The content of a regular file.

    Args:
        path: The file, or a link to it.
        max_bytes: Most bytes it may have.

    Raises:
        OSError: It cannot be opened or read, is not a regular file, or is larger; `strerror` says what.
    """
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"it has more than {max_bytes} bytes", str(path))
    return content


def read_optional(path: Path, *, max_bytes: int) -> bytes | None:
    """The content of a regular file; None if there is nothing of that name.

    Args:
        path: The file, or a link to it; a link that leads nowhere is an error.
        max_bytes: Most bytes it may have.

    Raises:
        OSError: As for `read_regular`.
    """
    return read_regular(path, max_bytes=max_bytes) if os.path.lexists(path) else None


def _require_regular(path: Path, found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
