"""Attention kernels as programs to compile: ours, and the ones JAX ships, on the same problem.

Each comes with the work of one iteration of its KV loop. JAX's kernels take the tile sizes that their own tables hold
for the chip.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array

from jaxserve.bench.kernel_names import JAX_PAGED, JAX_RAGGED, OURS
from jaxserve.bench.tiled_kernels import Work, core_of, sizes_of, tiled_kernel
from jaxserve.pallas.paged_attention.inputs import AttentionLayer, RaggedBatch
from jaxserve.pallas.paged_attention.shapes import AttentionShape
from jaxserve.pallas.tuning import Tiles
from jaxserve.sharding.chips import Chip

UNTUNED = (128, 32)
"""What JAX's ragged kernel takes where its table has no entry: pages of a KV tile, query tokens of a tile."""

JAX_TITLES: Mapping[str, str] = MappingProxyType({"v5e": "TPU v5", "v5p": "TPU v5", "v6e": "TPU v6"})
"""What that table calls chips."""

PAGED_BLOCK_TOKENS = 512
"""Context an iteration of JAX's paged kernel takes; its caller chooses."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A kernel lowered for a device.

    Attributes:
        lowered: To be compiled.
        kernel: Part of the kernel's name in the compiled program.
        work: What one iteration of its KV loop does.
    """

    lowered: Any
    kernel: str
    work: Work


Lower = Callable[[AttentionShape, Chip, NamedSharding], Program]


def lower_jaxserve(shape: AttentionShape, chip: Chip, here: NamedSharding, tiles: Tiles | None = None) -> Program:
    """The one of our kernels that the problem goes to, alone as JAX's are.

    Args:
        shape: The problem.
        chip: What kind of device it is.
        here: Puts an argument on it.
        tiles: The kernel's tile sizes; those that a call takes if None.
    """
    ours = tiled_kernel(shape)
    cut = ours.choose(sizes_of(shape), core_of(chip)) if tiles is None else ours.tiles(**tiles)
    batch, layer = _abstract((shape.batch(np.random.default_rng(0)), shape.layer()), here)
    q, pool = (_on(shape.abstract_arrays()[name], here) for name in ("q", "kv_pages"))
    new = _on(jax.ShapeDtypeStruct((q.shape[0], *pool.shape[2:]), pool.dtype), here)

    def run(q: Array, new: Array, pool: Array, out: Array, batch: RaggedBatch, layer: AttentionLayer) -> Any:  # noqa: ANN401 - as the op
        return ours.run(q, new, pool, out, batch, layer, config=shape.config, tiles=cut)

    lowered = jax.jit(run, donate_argnums=(2, 3)).lower(q, new, pool, q, batch, layer)
    return Program(lowered=lowered, kernel=ours.compiled_name, work=ours.work(shape, cut))


def lower_jax_ragged(shape: AttentionShape, chip: Chip, here: NamedSharding) -> Program:
    """JAX's `ragged_paged_attention`."""
    function, pages, tokens = jax_ragged(shape, chip)
    arrays, batch = shape.abstract_arrays(), _abstract(shape.batch(np.random.default_rng(0)), here)
    q, pool = _on(arrays["q"], here), _on(arrays["kv_pages"], here)
    heads, kv_heads = _heads_at_once(shape)
    tile = pages * shape.page_size
    # A decode's token is one of the query tile's; only its rows count.
    useful = 1 if shape.is_decode else tokens
    return Program(
        lowered=jax.jit(function).lower(q, pool, batch),
        kernel="ragged_paged_attention",
        work=Work(
            tile_bytes=tile * 2 * kv_heads * shape.head_dim * jnp.dtype(shape.kv_dtype).itemsize,
            tile_dmas=pages,
            tile_flops=4.0 * useful * heads * tile * shape.head_dim,
        ),
    )


def jax_ragged(shape: AttentionShape, chip: Chip) -> tuple[Callable[..., Array], int, int]:
    """`jax.experimental.pallas.ops.tpu.ragged_paged_attention`: one program for chunks and decodes.

    Returns:
        A function of queries, pool and batch; pages of its KV tile, and query tokens of its tile.
    """
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel, tuned_block_sizes

    heads, kv_heads = _heads_at_once(shape)
    sizes = (heads, kv_heads, shape.head_dim, shape.page_size, shape.num_tokens, shape.pages_per_seq)
    key = tuned_block_sizes.simplify_key((shape.dtype, shape.kv_dtype, *sizes))
    table = tuned_block_sizes.TUNED_BLOCK_SIZES.get(JAX_TITLES.get(chip.name, chip.title), {})
    pages, tokens = table.get(key, UNTUNED)
    pages, tokens = min(pages, shape.pages_per_seq), min(tokens, shape.num_tokens)

    def run(q: Array, pool: Array, batch: RaggedBatch) -> Array:
        out: Array = kernel.ragged_paged_attention(
            q,
            pool,
            batch.context_lens,
            batch.page_table,
            batch.query_starts,
            batch.num_seqs[None],
            sm_scale=shape.config.scale,
            num_kv_pages_per_block=pages,
            num_queries_per_block=tokens,
            vmem_limit_bytes=chip.fast_bytes * 3 // 4,
        )
        return out

    return run, pages, tokens


def lower_jax_paged(shape: AttentionShape, chip: Chip, here: NamedSharding) -> Program:
    """JAX's `paged_attention`."""
    del chip
    batch = _abstract(shape.batch(np.random.default_rng(0)), here)
    dtype = jnp.dtype(shape.kv_dtype)
    pool = jax.ShapeDtypeStruct(split_pool(shape, 1), dtype, sharding=here)
    q = _on(shape.abstract_arrays()["q"], here)
    function, pages = jax_paged(shape)
    tile = pages * shape.page_size
    return Program(
        lowered=jax.jit(function).lower(q, pool, pool, batch),
        kernel="paged_attention",
        work=Work(
            tile_bytes=2 * tile * shape.head_dim * dtype.itemsize,
            tile_dmas=2 * pages,
            tile_flops=4.0 * (shape.num_heads // shape.num_kv_heads) * tile * shape.head_dim,
        ),
    )


def jax_paged(shape: AttentionShape) -> tuple[Callable[..., Array], int]:
    """`jax.experimental.pallas.ops.tpu.paged_attention`: decodes, a KV head at a time, keys and values apart.

    Returns:
        A function of queries, pools of keys and of values, and batch; and pages of its KV tile.

    Raises:
        NotImplementedError: The problem is no decode.
    """
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention as kernel

    if not shape.is_decode:
        raise NotImplementedError("it decodes only")
    pages = min(shape.pages_per_seq, max(1, PAGED_BLOCK_TOKENS // shape.page_size))

    def run(q: Array, k_pool: Array, v_pool: Array, batch: RaggedBatch) -> Array:
        scaled = q * jnp.asarray(shape.config.scale, q.dtype)
        out: Array = kernel(scaled, k_pool, v_pool, batch.context_lens, batch.page_table, pages_per_compute_block=pages)
        return out

    return run, pages


def split_pool(shape: AttentionShape, num_sets: int) -> tuple[int, int, int, int]:
    """The shape of a pool that keeps keys, or values, apart and a head's pages together."""
    return (shape.num_kv_heads, num_sets * shape.num_pages, shape.page_size, shape.head_dim)


def _heads_at_once(shape: AttentionShape) -> tuple[int, int]:
    """Query heads and KV heads that JAX's ragged kernel works on at a time."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

    heads, combined = kernel.get_min_heads_per_blk(
        shape.num_heads, 2 * shape.num_kv_heads, jnp.dtype(shape.dtype), jnp.dtype(shape.kv_dtype)
    )
    return int(heads), int(combined) // 2


LOWERINGS: Mapping[str, Lower] = MappingProxyType(
    {OURS: lower_jaxserve, JAX_RAGGED: lower_jax_ragged, JAX_PAGED: lower_jax_paged}
)
"""Kernels by name."""


def lower(kernel: str, shape: AttentionShape, chip: Chip, here: NamedSharding, tiles: Tiles | None = None) -> Program:
    """Lowers a kernel for a device.

    Args:
        kernel: One of `LOWERINGS`.
        shape: The problem.
        chip: What kind of device it is.
        here: Puts an argument on it; its mesh must be JAX's current one.
        tiles: Tile sizes of ours; None for those that a call takes.

    Raises:
        NotImplementedError: It cannot do this.
        ValueError: JAX's kernels have tiles of their own.
    """
    if tiles is None:
        return LOWERINGS[kernel](shape, chip, here)
    if kernel != OURS:
        raise ValueError(f"{kernel} is not cut by our tiles")
    return lower_jaxserve(shape, chip, here, tiles)


def _on(struct: jax.ShapeDtypeStruct, here: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=here)


def _abstract(tree: Any, here: NamedSharding) -> Any:  # noqa: ANN401 - any pytree of arrays
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), tree)
