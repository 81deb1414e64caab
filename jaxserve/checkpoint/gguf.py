"""GGUF files: header, metadata and tensors, dequantised slice by slice.

The `gguf` library knows the quantisation formats and dequantises them. The header is read here: the library's reader
builds several numpy views for each entry of a vocabulary, which costs two seconds and 120 MB for 50,000 tokens, and
it does not notice a truncated file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from jaxserve.checkpoint.tensors import MappedFile, Range
from jaxserve.core.errors import CheckpointError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FLOATS = {
    GGMLQuantizationType.F32: "float32",
    GGMLQuantizationType.F16: "float16",
    GGMLQuantizationType.BF16: "bfloat16",
}
_MAX_DIMS = 8


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
        return int(np.prod(self.shape[:-1], dtype=np.int64))

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
            header = _HeaderParser(self._file.array(0, self._file.size_bytes), path)
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
        largest = max(self.tensors.values(), key=lambda tensor: int(np.prod(tensor.shape)), default=None)
        return _FLOATS.get(largest.kind, "bfloat16") if largest else "bfloat16"

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


def _truncated(path: Path, what: str) -> CheckpointError:
    size = path.stat().st_size
    return CheckpointError(f"{path} is truncated or corrupt ({what}, the file has {size} bytes); download it again.")


class _HeaderParser:
    """Walks the header once from its first byte to its last."""

    def __init__(self, data: NDArray[np.uint8], path: Path) -> None:
        self._buffer = data.data
        self._path = path
        self._at = 0
        if bytes(self._buffer[:4]) != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file (it does not begin with the letters GGUF).")
        self._at = 4
        try:
            self._check_version()
            num_tensors, num_keys = self._unpack("QQ")
            self.metadata = dict(self._entry() for _ in range(num_keys))
            infos = [self._tensor() for _ in range(num_tensors)]
        except (struct.error, UnicodeDecodeError, ValueError, MemoryError, OverflowError) as error:
            raise _truncated(path, f"its header breaks off near byte {self._at}") from error
        finally:
            self._buffer.release()
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            raise _truncated(path, f"general.alignment is {alignment!r}")
        base = -(-self._at // alignment) * alignment
        self.tensors = {name: self._placed(name, dims, kind, base + offset) for name, dims, kind, offset in infos}

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self._buffer, self._at)
        self._at += struct.calcsize("<" + layout)
        return values

    def _check_version(self) -> None:
        (version,) = self._unpack("I")
        if version not in (2, 3):
            raise CheckpointError(f"{self._path} is GGUF version {version}; versions 2 and 3 are supported.")

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        if length > len(self._buffer) - self._at:
            raise ValueError("string runs past the end")
        start, self._at = self._at, self._at + length
        return str(self._buffer[start : self._at], "utf-8")

    def _entry(self) -> tuple[str, object]:
        key = self._string()
        (kind,) = self._unpack("I")
        return key, self._value(kind)

    def _value(self, kind: int) -> object:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            element, length = self._unpack("IQ")
            if length > len(self._buffer) - self._at:
                raise ValueError("array runs past the end")
            if element in (_STRING, _ARRAY):
                return [self._value(element) for _ in range(length)]
            return list(self._unpack(f"{length}{_scalar(element)}"))
        return self._unpack(_scalar(kind))[0]

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        (num_dims,) = self._unpack("I")
        if num_dims > _MAX_DIMS:
            raise ValueError("too many dimensions")
        dims = self._unpack(f"{num_dims}Q")
        kind, offset = self._unpack("IQ")
        return name, tuple(reversed(dims)), kind, offset

    def _placed(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GGUFTensor:
        if kind not in set(GGMLQuantizationType):
            raise CheckpointError(f"{self._path}: tensor {name} is stored in the unknown format {kind}.")
        fmt = GGMLQuantizationType(kind)
        block_len, block_bytes = gguf.GGML_QUANT_SIZES[fmt]
        row = shape[-1] if shape else 1
        if row % block_len:
            raise _truncated(self._path, f"rows of tensor {name} have {row} elements, not a multiple of {block_len}")
        return GGUFTensor(shape=shape or (1,), kind=fmt, offset=offset, row_bytes=row // block_len * block_bytes)


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"unknown value type {kind}")
    return _SCALARS[kind]
