"""Safetensors folders: one file, or several with an index, mapped and read slice by slice.

A file is eight bytes with the length of a JSON header, the header (dtype, shape and byte range of each tensor), and
the tensors. The header is checked in full before anything is read: a truncated download is found here, not in the
weights.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from jaxserve.checkpoint.tensors import MappedFile, Range
from jaxserve.core.errors import CheckpointError
from jaxserve.core.json_file import parse_object, read_object

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16}
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
"""The longest header that the format allows."""

_MAX_DIMS = 8
_MAX_DIM = 1 << 60
_MOST_NAMED = 8
"""Files named in an error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """Where one tensor is.

    Attributes:
        file: The mapped file.
        dtype: Its type as the header names it.
        shape: Outermost dimension first.
        offset: First byte in the file.
        num_bytes: Length.
    """

    file: MappedFile
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class SafetensorsFolder:
    """The safetensors files of a Hugging Face folder; a `TensorReader`.

    Args:
        folder: Holds `model.safetensors`, or shards with their index.

    Raises:
        CheckpointError: Files are missing, truncated or corrupt.
    """

    def __init__(self, folder: Path) -> None:
        self._files: list[MappedFile] = []
        self._tensors: dict[str, StoredTensor] = {}
        try:
            for path in weight_files(folder):
                file = MappedFile(path)
                self._files.append(file)
                for name, tensor in _read_header(file).items():
                    if name in self._tensors:
                        other = self._tensors[name].file.path.name
                        raise CheckpointError(f"{folder}: tensor {name} is in both {other} and {path.name}.")
                    self._tensors[name] = tensor
        except CheckpointError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise CheckpointError(f"{folder} cannot be read: {error.strerror}.") from error

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every stored tensor."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str, ranges: tuple[Range, ...]) -> NDArray[Any]:
        """A slice of a tensor as a view of the file; see `TensorReader.read`."""
        tensor = self._tensors[name]
        dtype = _DTYPES.get(tensor.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{tensor.file.path}: tensor {name} is stored as {tensor.dtype}; supported are {', '.join(_DTYPES)}."
            )
        stored = tensor.file.array(tensor.offset, tensor.num_bytes).view(dtype)
        return stored.reshape(tensor.shape)[tuple(slice(*interval) for interval in ranges)]

    def release(self) -> None:
        """Forgets the file pages that reads brought into memory."""
        for file in self._files:
            file.release()

    def close(self) -> None:
        """Unmaps the files."""
        for file in self._files:
            file.close()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up a folder's weights.

    As in `transformers`, a single file wins over an index that does not name it: the index is left from a time when
    the weights were split.

    Raises:
        CheckpointError: There are none, or the index names files that are not there.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        weight_map = read_object(index).get("weight_map")
        if not (isinstance(weight_map, dict) and weight_map and all(isinstance(v, str) for v in weight_map.values())):
            raise CheckpointError(f"{index} has no weight_map; download it again.")
        names = sorted(set(weight_map.values()))
        if any(Path(name).name != name for name in names):
            raise CheckpointError(f"{index} names files outside its folder; do not trust this checkpoint.")
        if SINGLE_NAME not in names and (folder / SINGLE_NAME).is_file():
            return [folder / SINGLE_NAME]
        missing = [name for name in names if not os.path.isfile(folder / name)]
        if missing:
            more = f" and {len(missing) - _MOST_NAMED} more" if len(missing) > _MOST_NAMED else ""
            raise CheckpointError(
                f"{folder} lacks {len(missing)} of its {len(names)} weight files "
                f"({', '.join(name[:80] for name in missing[:_MOST_NAMED])}{more}); download it again to fetch them."
            )
        return [folder / name for name in names]
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    hint = " (it has PyTorch .bin files, convert them to safetensors)" if list(folder.glob("*.bin")) else ""
    raise CheckpointError(f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}{hint}.")


def _read_header(file: MappedFile) -> dict[str, StoredTensor]:
    if file.size_bytes < _LENGTH_BYTES:
        raise _corrupt(file, "it is shorter than its header")
    length = int.from_bytes(file.array(0, _LENGTH_BYTES).tobytes(), "little")
    start = _LENGTH_BYTES + length
    if start > file.size_bytes:
        raise _corrupt(file, f"its header should end at byte {start} of {file.size_bytes}")
    if length > _MAX_HEADER_BYTES:
        raise _corrupt(file, f"its header has {length} bytes, more than the format allows")
    header = parse_object(file.array(_LENGTH_BYTES, length).tobytes(), f"the header of {file.path}")
    tensors = {name: _read_entry(file, name, entry, start) for name, entry in header.items() if name != "__metadata__"}
    _require_apart(file, tensors)
    return tensors


def _require_apart(file: MappedFile, tensors: Mapping[str, StoredTensor]) -> None:
    """Makes sure that no byte belongs to two tensors."""
    placed = sorted(
        (each.offset, each.offset + each.num_bytes, name) for name, each in tensors.items() if each.num_bytes
    )
    for (_, end, name), (start, _, other) in pairwise(placed):
        if start < end:
            raise _corrupt(file, f"tensors {name} and {other} overlap")


def _read_entry(file: MappedFile, name: str, entry: object, start: int) -> StoredTensor:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(first), int(last)]} if (
            all(isinstance(dim, int) and 0 <= dim <= _MAX_DIM for dim in shape) and len(shape) <= _MAX_DIMS
        ):
            bits = _BITS.get(dtype)
            name = name[:200]
            if not 0 <= first <= last or (bits and (last - first) * 8 != prod(shape) * bits):
                raise _corrupt(file, f"tensor {name} has {last - first} bytes for shape {shape} of {dtype}")
            if start + last > file.size_bytes:
                raise _corrupt(file, f"tensor {name} ends at byte {start + last} of {file.size_bytes}")
            return StoredTensor(
                file=file, dtype=dtype, shape=tuple(shape), offset=start + first, num_bytes=last - first
            )
    raise _corrupt(file, f"the header entry of tensor {name[:200]} is malformed")


def _corrupt(file: MappedFile, what: str) -> CheckpointError:
    return CheckpointError(f"{file.path} is truncated or corrupt ({what}); download it again.")
