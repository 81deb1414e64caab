"""GGUF models in several files, as llama.cpp's `gguf-split` writes them: `NAME-00001-of-00003.gguf` and so on.

The first part has all metadata; each has some of the tensors and says which part of how many it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from jaxserve.checkpoint.gguf import GGUFFile, GGUFTensor, dtype_of
from jaxserve.checkpoint.tensors import Range
from jaxserve.core.errors import CheckpointError

_PART = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)


class GGUFParts:
    """A GGUF model in one file or several; a `TensorReader`.

    Args:
        path: The file, or any of its parts; the others lie in the same folder.

    Raises:
        CheckpointError: A part is missing, broken, or not of this model.
    """

    def __init__(self, path: Path) -> None:
        self._parts: list[GGUFFile] = []
        self._holders: dict[str, GGUFFile] = {}
        try:
            paths = part_paths(path)
            for number, part in enumerate(paths):
                file = GGUFFile(part)
                self._parts.append(file)
                _require_part(file, number, len(paths))
                for name in file.tensors:
                    if name in self._holders:
                        other = self._holders[name].path.name
                        raise CheckpointError(f"{path.parent}: tensor {name} is in both {other} and {part.name}.")
                    self._holders[name] = file
            self._require_all_tensors()
        except CheckpointError:
            self.close()
            raise

    @property
    def path(self) -> Path:
        """The file, the first if there are several."""
        return self._parts[0].path

    @property
    def metadata(self) -> Mapping[str, object]:
        """Metadata, key to plain Python value."""
        return self._parts[0].metadata

    @property
    def tensors(self) -> Mapping[str, GGUFTensor]:
        """Where and how each tensor is stored in its file."""
        return {name: file.tensors[name] for name, file in self._holders.items()}

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
        return self._holders[name].read(name, ranges)

    def release(self) -> None:
        """Forgets the file pages that reads brought into memory."""
        for part in self._parts:
            part.release()

    def close(self) -> None:
        """Unmaps the files."""
        for part in self._parts:
            part.close()

    def _require_all_tensors(self) -> None:
        """Makes sure that the parts have as many tensors as the first one says there are."""
        stated = self.metadata.get("split.tensors.count")
        if len(self._parts) > 1 and isinstance(stated, int) and stated != len(self._holders):
            raise CheckpointError(
                f"The parts of {self.path} have {len(self._holders)} tensors, not the {stated} that the model has; "
                "download them again."
            )


def model_name(path: Path) -> str:
    """A GGUF file's name without its ending and without the number of its part."""
    part = _PART.fullmatch(path.name)
    return path.stem if part is None else part["stem"]


def part_paths(path: Path) -> list[Path]:
    """The files that a GGUF model consists of, the first first.

    Args:
        path: The file, or any of its parts.

    Raises:
        CheckpointError: A part is not there.
    """
    part = _PART.fullmatch(path.name)
    if part is None:
        return [path]
    count = int(part["count"])
    if not 1 <= int(part["number"]) <= count:
        raise CheckpointError(f"{path} is named as part {int(part['number'])} of {count}; rename it as it was.")
    paths = [path.with_name(f"{part['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [each.name for each in paths if not each.is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{path.parent} lacks {len(missing)} of the {count} parts of {part['stem']} "
            f"({', '.join(missing[:3])}{more}); download them into this folder."
        )
    return paths


def _require_part(file: GGUFFile, number: int, count: int) -> None:
    """Makes sure that a file is the part that its name says."""
    stated = file.metadata.get("split.no", number), file.metadata.get("split.count", count)
    if stated == (number, count) or (count == 1 and stated == (0, 0)):
        return
    if count == 1:
        raise CheckpointError(
            f"{file.path} is one of {stated[1]!r:.20} parts of a model; name the parts as they were, "
            "NAME-00001-of-00002.gguf and so on, and put them into one folder."
        )
    raise CheckpointError(
        f"{file.path} is not part {number + 1} of {count} as its name says, but has split.no = {stated[0]!r:.20} and "
        f"split.count = {stated[1]!r:.20}; download it again."
    )
