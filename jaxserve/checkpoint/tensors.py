"""What the loader needs from a file format: the shapes of the stored tensors, and any slice of one of them.

GGUF files and safetensors folders implement it over memory maps. A read touches only the bytes of its slice, and
`release` lets the operating system drop them again, so that loading does not keep a copy of the file in memory.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from jaxserve.core.errors import CheckpointError
from jaxserve.core.regular_file import open_regular

Range = tuple[int, int]
"""Half-open interval [start, stop) along one dimension."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many bytes of it are done, and how many there are."""


class TensorReader(Protocol):
    """Stored tensors by name."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every stored tensor, outermost dimension first."""
        ...

    def read(self, name: str, ranges: tuple[Range, ...]) -> NDArray[Any]:
        """A slice of a tensor in a floating-point type; it may be a view that is valid until `release`.

        Args:
            name: Stored name.
            ranges: One interval a stored dimension.

        Raises:
            CheckpointError: The stored type is not supported.
        """
        ...

    def release(self) -> None:
        """Forgets the file pages that reads brought into memory."""
        ...

    def close(self) -> None:
        """Unmaps the files; no view may be used afterwards."""
        ...


class MappedFile:
    """A file mapped read-only.

    Args:
        path: An existing file.

    Raises:
        CheckpointError: The file cannot be opened, is empty, or is a FIFO or a device.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_regular(path) as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as a checkpoint file: {error}.") from error
        self.size_bytes = len(self._map)
        self._bytes: NDArray[np.uint8] | None = np.frombuffer(self._map, np.uint8)

    def array(self, offset: int, num_bytes: int) -> NDArray[np.uint8]:
        """Bytes [offset, offset + num_bytes) as a view."""
        assert self._bytes is not None, "read after close"
        return self._bytes[offset : offset + num_bytes]

    def release(self) -> None:
        """Drops the mapped pages from this process's resident memory; they are read again when touched."""
        if sys.platform == "linux":
            self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Unmaps the file as soon as the last view of it is gone."""
        self.release()
        self._bytes = None
