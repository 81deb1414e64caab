"""Fills a model's parameters from stored tensors, straight into their sharding.

Each parameter's local shards are assembled in buffers of the serving dtype, a bounded slice at a time, and handed to
the devices; on the CPU the devices use the buffers themselves, so nothing is held twice. Parameters go largest first:
where a device copies one, into the form that programs take, that is while there is room. Quantised parameters are
quantised slice by slice on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from jaxserve.checkpoint.rules import Move, Sizes, fetch, match, moves_into, sizes_of
from jaxserve.checkpoint.tensors import Progress, Range, TensorReader
from jaxserve.checkpoint.tied import require_tied
from jaxserve.models.family import WeightRule, WeightTable
from jaxserve.models.params import Held, ParamInfo
from jaxserve.models.spec import ModelSpec
from jaxserve.quant.qtensor import quantize_channels
from jaxserve.sharding.rules import sharding_for

Hold: TypeAlias = Callable[[str, jax.Array], Held]
"""Gives a loaded parameter, by its path, the form that programs take."""

_THREADS = 4
_RELEASE_EVERY = 16
_ALIGNMENT_BYTES = 64
"""XLA's CPU client uses a host buffer in place only if it is aligned to this."""


def as_loaded(path: str, loaded: jax.Array) -> jax.Array:
    """Leaves a parameter as it is."""
    return loaded


def fill_params(
    reader: TensorReader,
    table: WeightTable,
    spec: ModelSpec,
    abstract: Mapping[str, ParamInfo],
    *,
    mesh: Mesh,
    hold: Hold = as_loaded,
    progress: Progress | None = None,
) -> dict[str, Held]:
    """Loads all parameters.

    Args:
        reader: The stored tensors.
        table: The family's weight names in this format.
        spec: The model.
        abstract: Every parameter to fill.
        mesh: Where they go.
        hold: What is done with each as soon as it is there.
        progress: Told about bytes of parameters as they are filled.

    Raises:
        CheckpointError: The tensors do not match the parameters one to one; all mismatches are listed.
    """
    scales = {scale_of(path): path for path in abstract if scale_of(path) in abstract}
    weights = [path for path in abstract if path not in scales]
    require_tied(spec, table, reader)
    rules = match(table, spec, weights, reader.shapes)
    sizes = sizes_of(spec, abstract["layers.attn.qkv.kernel"].shape[2])
    total = sum(info.num_bytes for info in abstract.values())
    params: dict[str, Held] = {}
    done = 0
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="load") as pool:
        for path in sorted(weights, key=lambda path: -abstract[path].num_bytes):
            scale = abstract.get(scale_of(path))
            filler = _Filler(reader, rules[path], sizes, abstract[path], scale, pool)
            params[path] = hold(path, filler.array(mesh))
            done += abstract[path].num_bytes
            if scale is not None:
                params[scale_of(path)] = hold(scale_of(path), filler.scale_array(scale, mesh))
                done += scale.num_bytes
            reader.release()
            if progress is not None:
                progress("load weights", done, total)
    return {path: params[path] for path in abstract}


def scale_of(path: str) -> str:
    """Where the scales of a quantised kernel or table are; a norm's own scale belongs to nothing."""
    stem, _, leaf = path.rpartition(".")
    return f"{stem}.scale" if leaf in ("kernel", "table") else ""


class _Filler:
    """Assembles the local shards of one parameter."""

    def __init__(
        self,
        reader: TensorReader,
        rules: list[WeightRule],
        sizes: Sizes,
        info: ParamInfo,
        scale: ParamInfo | None,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._reader = reader
        self._rules = rules
        self._sizes = sizes
        self._info = info
        self._pool = pool
        self._scales = np.ones(scale.shape, np.float32) if scale is not None else None

    def array(self, mesh: Mesh) -> jax.Array:
        """The parameter, its local shards filled."""
        info = self._info
        return jax.make_array_from_callback(info.shape, sharding_for(info.axes, info.shape, mesh), self._shard)

    def scale_array(self, info: ParamInfo, mesh: Mesh) -> jax.Array:
        """The scales that `array` computed on its way."""
        scales = self._scales
        assert scales is not None
        sharding = sharding_for(info.axes, info.shape, mesh)
        return jax.make_array_from_callback(info.shape, sharding, lambda index: scales[index])

    def _shard(self, index: tuple[slice, ...] | None) -> NDArray[Any]:
        assert index is not None, "the sharding has no index for a local device"
        shard = tuple(_interval(part, dim) for part, dim in zip(index, self._info.shape, strict=True))
        buffer = aligned_empty(tuple(stop - start for start, stop in shard), self._info.dtype)
        if self._scales is None:
            work = [self._pool.submit(self._copy, move, buffer) for move in self._moves(shard)]
        else:
            whole = self._widened(shard)
            work = [self._pool.submit(self._quantize, move, whole, shard, buffer) for move in self._moves(whole)]
        for num_done, future in enumerate(work, start=1):
            future.result()
            if num_done % _RELEASE_EVERY == 0:
                self._reader.release()
        return buffer

    def _moves(self, shard: tuple[Range, ...]) -> Iterator[Move]:
        return moves_into(self._rules, shard, self._sizes)

    def _copy(self, move: Move, buffer: NDArray[Any]) -> None:
        values = fetch(self._reader, move, self._sizes)
        # Cast before the transposed write: numpy casts contiguous bfloat16 several times faster than strided.
        buffer[move.target] = values.astype(buffer.dtype, copy=False)

    def _contracted(self, rule: WeightRule) -> tuple[int, ...]:
        """Dimensions of a layer's kernel that the matmul sums over: those stored after the output channels."""
        return tuple(axis for axis, letter in enumerate(rule.order) if letter in rule.stored[1])

    def _widened(self, shard: tuple[Range, ...]) -> tuple[Range, ...]:
        """The shard with every contracted dimension whole: a channel's scale needs all of its weights."""
        lead = len(shard) - len(self._rules[0].order)
        whole = {lead + axis for axis in self._contracted(self._rules[0])}
        return tuple((0, self._info.shape[dim]) if dim in whole else part for dim, part in enumerate(shard))

    def _quantize(self, move: Move, whole: tuple[Range, ...], shard: tuple[Range, ...], buffer: NDArray[Any]) -> None:
        assert self._scales is not None
        contracted = self._contracted(move.rule)
        values, scales = quantize_channels(fetch(self._reader, move, self._sizes), contracted)
        lead = len(shard) - len(move.rule.order)
        kept = tuple(
            slice(*shard[lead + axis]) if axis in contracted else slice(None) for axis in range(len(move.rule.order))
        )
        target = tuple(slice(None) if dim - lead in contracted else part for dim, part in enumerate(move.target))
        buffer[target] = values[kept]
        channels = tuple(
            _shifted(part, whole[dim][0]) for dim, part in enumerate(move.target) if dim - lead not in contracted
        )
        self._scales[channels] = scales


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An uninitialised host array that XLA's CPU client can use in place."""
    num_bytes = prod(shape) * dtype.itemsize
    raw = np.empty(num_bytes + _ALIGNMENT_BYTES, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT_BYTES
    return raw[start : start + num_bytes].view(dtype).reshape(shape)


def _interval(part: slice, dim: int) -> Range:
    start, stop, _ = part.indices(dim)
    return start, stop


def _shifted(part: slice | int, start: int) -> slice | int:
    return part + start if isinstance(part, int) else slice(part.start + start, part.stop + start)
