"""GGUF files: header, metadata and tensors, dequantised slice by slice.

The `gguf` library knows the quantisation formats and dequantises them. The header is read here: the library's reader
builds several numpy views for each entry of a vocabulary, which costs two seconds and 120 MB for 50,000 tokens, and
it does not notice a truncated file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import gguf
import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from jaxserve.checkpoint.tensors import MappedFile, Range
from jaxserve.core.errors import CheckpointError

_T = TypeVar("_T")

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FLOATS = {
    GGMLQuantizationType.F32: "float32",
    GGMLQuantizationType.F16: "float16",
    GGMLQuantizationType.BF16: "bfloat16",
}
_KINDS = frozenset(GGMLQuantizationType)
_MAX_DIMS = 8
MAX_HEADER_BYTES = 256 << 20
"""Longest header that is read; the vocabulary and merges of the largest models take less than 20 MB."""

MAX_ELEMENTS = 1 << 23
"""Most keys, tensors and array elements of a header together; a vocabulary of a million tokens needs half of that."""

_MAX_NESTING = 4
"""Most arrays in each other; llama.cpp reads none that are nested."""

_MAX_TENSOR_ELEMENTS = 1 << 60
"""Elements of a tensor, with dimensions of 0 counted as 1, that every size computed from a shape has room for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GGUFTensor:
    """Where and how one tensor is stored.

    Attributes:
        shape: Outermost dimension first.
        kind: Quantisation format.
        offset: First byte in the file.
        row_bytes: Bytes of one row (the innermost dimension), a whole number of blocks.
    """

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    row_bytes: int

    @property
    def num_rows(self) -> int:
        """Rows of all outer dimensions together."""
        return prod(self.shape[:-1])

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.num_rows * self.row_bytes


class GGUFFile:
    """A GGUF file whose header has been read and checked; a `TensorReader`.

    Args:
        path: The file.

    Raises:
        CheckpointError: Not a GGUF file, truncated, or of a version or format that is not supported.
    """

    def __init__(self, path: Path) -> None:
        self._file = MappedFile(path)
        try:
            header = _HeaderParser(self._file, path)
            self.metadata: Mapping[str, object] = header.metadata
            self.tensors: Mapping[str, GGUFTensor] = header.tensors
            for name, tensor in self.tensors.items():
                if tensor.offset + tensor.num_bytes > self._file.size_bytes:
                    raise _truncated(path, f"tensor {name} ends at byte {tensor.offset + tensor.num_bytes}")
        except CheckpointError:
            self._file.close()
            raise

    @property
    def path(self) -> Path:
        """The file."""
        return self._file.path

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every stored tensor, outermost dimension first."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def dtype(self) -> str:
        """Floating-point type that holds the largest tensor best; bfloat16 stands for quantised formats."""
        return dtype_of(self.tensors)

    def read(self, name: str, ranges: tuple[Range, ...]) -> NDArray[Any]:
        """A slice of a tensor, dequantised to float32; see `TensorReader.read`."""
        tensor = self.tensors[name]
        block_len, block_bytes = gguf.GGML_QUANT_SIZES[tensor.kind]
        stored = self._file.array(tensor.offset, tensor.num_bytes).reshape((*tensor.shape[:-1], tensor.row_bytes))
        rows = stored[tuple(slice(*interval) for interval in ranges[:-1])]
        start, stop = ranges[-1]
        first, last = start // block_len, -(-stop // block_len)
        blocks = rows[..., first * block_bytes : last * block_bytes]
        try:
            values = gguf.dequantize(np.ascontiguousarray(blocks), tensor.kind)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path.name}: tensor {name} is stored as {tensor.kind.name}, which is not supported."
            ) from error
        return values[..., start - first * block_len : stop - first * block_len]

    def release(self) -> None:
        """Forgets the file pages that reads brought into memory."""
        self._file.release()

    def close(self) -> None:
        """Unmaps the file."""
        self._file.close()


def dtype_of(tensors: Mapping[str, GGUFTensor]) -> str:
    """Floating-point type that holds the largest of some tensors best; bfloat16 stands for quantised formats."""
    largest = max(tensors.values(), key=lambda tensor: prod(tensor.shape), default=None)
    return _FLOATS.get(largest.kind, "bfloat16") if largest else "bfloat16"


def _truncated(path: Path, what: str) -> CheckpointError:
    size = path.stat().st_size
    return CheckpointError(f"{path} is truncated or corrupt ({what}, the file has {size} bytes); download it again.")


class _HeaderParser:
    """Walks the header once from its first byte to its last, in time and memory bounded by the limits above."""

    def __init__(self, file: MappedFile, path: Path) -> None:
        self._buffer = file.array(0, min(file.size_bytes, MAX_HEADER_BYTES)).data
        self._path = path
        self._at = 0
        self._num_elements = 0
        if bytes(self._buffer[:4]) != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file (it does not begin with the letters GGUF).")
        self._at = 4
        try:
            self._check_version()
            num_tensors, num_keys = self._unpack("QQ")
            self._count(num_tensors + num_keys)
            self.metadata = _unique("metadata key", (self._entry() for _ in range(num_keys)))
            infos = _unique("tensor name", (self._tensor() for _ in range(num_tensors)))
        except _HeaderError as error:
            raise _truncated(path, f"{error} near byte {self._at}") from error
        except (struct.error, UnicodeDecodeError) as error:
            raise _truncated(path, f"its header breaks off near byte {self._at}") from error
        finally:
            self._buffer.release()
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            raise _truncated(path, f"general.alignment is {alignment!r:.60}")
        base = -(-self._at // alignment) * alignment
        self.tensors = {
            name: self._placed(name, dims, kind, base + offset) for name, (dims, kind, offset) in infos.items()
        }

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self._buffer, self._at)
        self._at += struct.calcsize("<" + layout)
        return values

    def _count(self, num_elements: int) -> None:
        """Counts what is about to be read."""
        self._num_elements += num_elements
        if self._num_elements > MAX_ELEMENTS:
            raise _HeaderError(f"its header has more than {MAX_ELEMENTS} entries")

    def _check_version(self) -> None:
        (version,) = self._unpack("I")
        if version not in (2, 3):
            raise CheckpointError(f"{self._path} is GGUF version {version}; versions 2 and 3 are supported.")

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        if length > len(self._buffer) - self._at:
            raise _HeaderError("a text of its header runs past the end")
        start, self._at = self._at, self._at + length
        return str(self._buffer[start : self._at], "utf-8")

    def _entry(self) -> tuple[str, object]:
        key = self._string()
        (kind,) = self._unpack("I")
        return key, self._value(kind, nesting=0)

    def _value(self, kind: int, *, nesting: int) -> object:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            if nesting == _MAX_NESTING:
                raise _HeaderError(f"arrays of its header are nested deeper than {_MAX_NESTING} levels")
            element, length = self._unpack("IQ")
            self._count(length)
            if element in (_STRING, _ARRAY):
                return [self._value(element, nesting=nesting + 1) for _ in range(length)]
            return list(self._unpack(f"{length}{_scalar(element)}"))
        return self._unpack(_scalar(kind))[0]

    def _tensor(self) -> tuple[str, tuple[tuple[int, ...], int, int]]:
        name = self._string()
        (num_dims,) = self._unpack("I")
        if num_dims > _MAX_DIMS:
            raise _HeaderError(f"tensor {name:.60} has {num_dims} dimensions")
        dims = self._unpack(f"{num_dims}Q")
        kind, offset = self._unpack("IQ")
        return name, (tuple(reversed(dims)), kind, offset)

    def _placed(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GGUFTensor:
        if kind not in _KINDS:
            raise CheckpointError(f"{self._path}: tensor {name} is stored in the unknown format {kind}.")
        if prod(max(1, dim) for dim in shape) > _MAX_TENSOR_ELEMENTS:
            raise _truncated(self._path, f"tensor {name} has the shape {shape}")
        fmt = GGMLQuantizationType(kind)
        block_len, block_bytes = gguf.GGML_QUANT_SIZES[fmt]
        row = shape[-1] if shape else 1
        if row % block_len:
            raise _truncated(self._path, f"rows of tensor {name} have {row} elements, not a multiple of {block_len}")
        return GGUFTensor(shape=shape or (1,), kind=fmt, offset=offset, row_bytes=row // block_len * block_bytes)


class _HeaderError(Exception):
    """What is wrong with a header, as a clause."""


def _unique(what: str, entries: Iterable[tuple[str, _T]]) -> dict[str, _T]:
    """Entries by name, of which none may be there twice."""
    found: dict[str, _T] = {}
    for name, value in entries:
        if name in found:
            raise _HeaderError(f"its header has the {what} {name:.60} twice")
        found[name] = value
    return found


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise _HeaderError(f"its header has a value of the unknown type {kind}")
    return _SCALARS[kind]
