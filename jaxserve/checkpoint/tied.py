"""Tied embeddings as checkpoints hold them: the head may be missing, a copy, or another one than the config says.

What is stored decides, as in `transformers`: a head that repeats the embedding is the embedding, one that differs is
used though the config says "tied", and where only the head is stored it is the embedding too (`rules.match`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxserve.checkpoint.tensors import TensorReader
from jaxserve.core.errors import CheckpointError
from jaxserve.models.family import WeightTable
from jaxserve.models.spec import ModelSpec

_ROWS = 4096
"""Rows compared at once."""

EMBED, HEAD = "embed.table", "lm_head.table"


def tied_as_stored(spec: ModelSpec, table: WeightTable, reader: TensorReader) -> ModelSpec:
    """The spec with embeddings untied if the checkpoint has a head that is not its embedding.

    Args:
        spec: From the config.
        table: The family's weight names in this format.
        reader: The stored tensors.
    """
    own = spec.tie_embeddings and not _same(reader, tensor_of(table, EMBED), tensor_of(table, HEAD))
    return replace(spec, tie_embeddings=False) if own else spec


def require_tied(spec: ModelSpec, table: WeightTable, reader: TensorReader) -> None:
    """Makes sure that no head is left out that is not the embedding.

    Raises:
        CheckpointError: The spec ties embeddings that differ; the arguments are those of `tied_as_stored`.
    """
    if tied_as_stored(spec, table, reader) != spec:
        raise CheckpointError(
            f"{tensor_of(table, HEAD)} is not the embedding that the model ties it to; read the spec with the weights."
        )


def tensor_of(table: WeightTable, param: str) -> str:
    """The one tensor that fills a parameter."""
    (name,) = (rule.name for rule in table.rules if rule.param == param)
    return name


def _same(reader: TensorReader, one: str, other: str) -> bool:
    """Whether two tensors hold the same numbers; one that is not stored is the same as any."""
    shapes = reader.shapes
    if one not in shapes or other not in shapes:
        return True
    if shapes[one] != shapes[other]:
        return False
    rows, *rest = shapes[one] or (0,)
    for start in range(0, rows, _ROWS):
        ranges = ((start, min(start + _ROWS, rows)), *((0, size) for size in rest))
        left, right = reader.read(one, ranges), reader.read(other, ranges)
        same_dtype = left.dtype == right.dtype
        equal = np.array_equal(_bits(left), _bits(right)) if same_dtype else np.array_equal(_wide(left), _wide(right))
        reader.release()
        if not equal:
            return False
    return True


def _bits(array: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).view(np.uint8)


def _wide(array: NDArray[Any]) -> NDArray[np.float64]:
    return array.astype(np.float64)
