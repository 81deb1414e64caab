"""Our TPU kernels with tile sizes of choice: lowered alone, and the work that one iteration of their KV loops is.

A `TiledKernel` says everything about a kernel that reading its schedule, timing it and tuning its tiles need. A third
kernel would be one more of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp

from jaxserve.bench.kernel_names import ARRAY_SIZE
from jaxserve.pallas.paged_attention.shapes import AttentionShape
from jaxserve.pallas.paged_attention.tpu import decode_tiles, prefill_tiles
from jaxserve.pallas.paged_attention.tpu.decode import decode
from jaxserve.pallas.paged_attention.tpu.decode_tiles import DecodeTiles
from jaxserve.pallas.paged_attention.tpu.prefill import prefill
from jaxserve.pallas.paged_attention.tpu.prefill_tiles import Core, PrefillTiles, Sizes
from jaxserve.sharding.chips import Chip


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one iteration of a kernel's KV loop does.

    Attributes:
        tile_bytes: Keys and values that it fetches.
        tile_dmas: DMAs it starts for that.
        tile_flops: Operations of its two matmuls that count, without padding.
        hot_trips: Iterations of the loop that multiplies matrices for one tile; 1 if that is the KV loop itself.
        unpack_trips: Iterations of the loop that puts a tile's keys and values in order, if there is one.
        tile_items: Iterations of the loop that looks after sequences' ends, in an iteration that has some.
        tile_ends: Sequences that end in it, on average.
    """

    tile_bytes: int
    tile_dmas: int
    tile_flops: float
    hot_trips: int = 1
    unpack_trips: int = 0
    tile_items: int = 0
    tile_ends: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TiledKernel:
    """A kernel whose tiles can be chosen.

    Attributes:
        name: In tables of tuned tiles.
        compiled_name: Part of its name in compiled programs.
        run: The kernel, as `tpu.op` calls it, with `tiles`.
        tiles: Makes tile sizes of their fields.
        choose: Tiles that a call takes.
        heuristic: Tiles that it takes where none are tuned.
        fits: Whether tiles can be taken.
        work: What an iteration does.
        steps: Fields that a tuner changes and the values it tries, given the ones they have.
    """

    name: str
    compiled_name: str
    run: Callable[..., Any]
    tiles: Callable[..., Any]
    choose: Callable[[Sizes, Core], Any]
    heuristic: Callable[[Sizes, Core], Any]
    fits: Callable[[Sizes, Core, Any], bool]
    work: Callable[[AttentionShape, Any], Work]
    steps: Mapping[str, Callable[[int], tuple[int | bool, ...]]]

    def neighbours(self, sizes: Sizes, core: Core, tiles: Any) -> list[Any]:  # noqa: ANN401 - either kernel's tiles
        """Tiles that differ in one field and fit."""
        changed = [
            replace(tiles, **{field: value})
            for field, values in self.steps.items()
            for value in values(asdict(tiles)[field])
            if value != asdict(tiles)[field]
        ]
        return [each for each in changed if self.fits(sizes, core, each)]


def _around(value: int) -> tuple[int, ...]:
    return (value // 2, value * 2) if value > 1 else (2,)


def _below(value: int) -> tuple[int, ...]:
    """For sizes that may not grow beyond the heuristic's: a context that does not fill a tile pays for all of it."""
    return (value // 2,) if value > 1 else ()


def _decode_work(shape: AttentionShape, tiles: DecodeTiles) -> Work:
    tokens = tiles.items * tiles.pages * shape.page_size
    return Work(
        tile_bytes=tokens * 2 * shape.num_kv_heads * shape.head_dim * jnp.dtype(shape.kv_dtype).itemsize,
        tile_dmas=tiles.items * tiles.pages,
        tile_flops=4.0 * shape.num_heads * tokens * shape.head_dim,
        tile_items=tiles.items,
        tile_ends=tokens / shape.context,
    )


def _prefill_work(shape: AttentionShape, tiles: PrefillTiles) -> Work:
    cut = sizes_of(shape).cut(tiles)
    tokens = min(tiles.query_tokens, shape.query_tokens)
    units = -(-tokens // tiles.block_tokens) * shape.num_kv_heads
    return Work(
        tile_bytes=cut.tile_tokens * 2 * shape.num_kv_heads * shape.head_dim * cut.kv_dtype.itemsize,
        tile_dmas=tiles.pages,
        tile_flops=4.0 * tokens * shape.num_heads * cut.tile_tokens * shape.head_dim,
        hot_trips=-(-units // tiles.unroll),
        unpack_trips=cut.tile_tokens // 16,
    )


DECODE = TiledKernel(
    name=decode_tiles.KERNEL,
    compiled_name="paged_attention_decode",
    run=decode,
    tiles=DecodeTiles,
    choose=decode_tiles.choose_decode_tiles,
    heuristic=decode_tiles.heuristic_decode_tiles,
    fits=decode_tiles.decode_fits,
    work=_decode_work,
    steps=MappingProxyType(
        {
            "items": lambda items: tuple(n for n in (items // 2, items - 1, items + 1, items * 2) if n > 0),
            "pages": _below,
        }
    ),
)

PREFILL = TiledKernel(
    name=prefill_tiles.KERNEL,
    compiled_name="paged_attention_prefill",
    run=prefill,
    tiles=PrefillTiles,
    choose=prefill_tiles.choose_tiles,
    heuristic=prefill_tiles.heuristic_tiles,
    fits=prefill_tiles.fits,
    work=_prefill_work,
    # Not query_tokens and narrow_tokens: what they cost shows at borders, which schedules do not tell apart.
    steps=MappingProxyType(
        {
            "pages": _below,
            "block_tokens": _around,
            "unroll": lambda _: (2, 4, 8),
            "packed_rows": lambda _: (8, 16),
            "sum_by_matmul": lambda _: (False, True),
        }
    ),
)


def tiled_kernel(shape: AttentionShape) -> TiledKernel:
    """The kernel that a problem goes to."""
    return DECODE if shape.is_decode and decode_tiles.is_supported(sizes_of(shape)) else PREFILL


def sizes_of(shape: AttentionShape) -> Sizes:
    """Static sizes of a problem."""
    return Sizes(
        page_size=shape.page_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        query_dtype=jnp.dtype(shape.dtype),
        kv_dtype=jnp.dtype(shape.kv_dtype),
        max_tokens=shape.num_tokens,
        max_context=shape.pages_per_seq * shape.page_size,
        sliding_window=None,
    )


def core_of(chip: Chip) -> Core:
    """A chip's core, as the choice of tiles sees it."""
    wide = ARRAY_SIZE[chip.name] > ARRAY_SIZE["v5e"]
    return Core(wide_matmul=wide, vmem_bytes=chip.fast_bytes, chip=chip.name)
