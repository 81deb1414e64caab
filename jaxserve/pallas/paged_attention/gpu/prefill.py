"""Prefill on Hopper: each chunk's new tokens attend causally to their sequence's pages, new tokens included.

Work items are (run of a chunk's tokens, KV head, some of its query heads); see `prefill_tiles`. Persistent thread
blocks take items from a list sorted by work, longest first, back and forth so that each gets its share. In a block, a
loading warpgroup brings queries, and keys and values page by page, into rings in shared memory with the tensor memory
accelerator. Two computing warpgroups of 64 rows each multiply (wgmma) and keep a running softmax in registers (online
normaliser, arXiv:1805.02867). They take turns: while one has the tensor cores, for the values of block i and the keys
of block i + 1 at once, the other takes its softmax (as in FlashAttention-3, arXiv:2407.08608).

Blocks lie at multiples of their size of the position, and what a row does not see changes nothing to the bit, so a
row's result is the same whatever else is in the batch. Only blocks at the diagonal, or at a window's edge, are masked.
Elements of the pool that may not be read can be NaN: they lie past the end of the context, where logits are masked and
values are cleared before they are multiplied; pages without a visible token are not read.

Whole tiles of the output leave by the accelerator; at a chunk's end, rows leave one by one, for what follows is not
this chunk's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32, Shaped

from jaxserve.pallas.paged_attention.gpu.prefill_kernel import LOG2E, Kernel
from jaxserve.pallas.paged_attention.gpu.prefill_tiles import WARPGROUPS, PrefillShape, PrefillTiles, prefill_tiles
from jaxserve.pallas.paged_attention.inputs import AttentionConfig, AttentionLayer, RaggedBatch

BLOCK_AXIS, THREAD_AXIS = "block", "warpgroup"
"""Names of the kernel's grid of thread blocks, and of a block's warpgroups."""


class Schedule(NamedTuple):
    """Tiles of a step, the same for all of its layers."""

    # [max_tiles, 5]; sequence, first row of q, its position, tokens, and the context's end; longest first
    tiles: Int32[Array, "M 5"]
    # scalar; how many there are
    num_tiles: Int32[Array, ""]


def prefill_schedule(batch: RaggedBatch, num_rows: int, tile_tokens: int, window: int | None) -> Schedule:
    """Cuts all chunks into tiles and sorts them by the context they read.

    Args:
        batch: Sequences, pages and positions.
        num_rows: Rows of q.
        tile_tokens: Tokens of a tile.
        window: Of the attention, or None.
    """
    num_seqs = batch.page_table.shape[0]
    seq = jnp.arange(num_seqs, dtype=jnp.int32)
    is_chunk = (seq >= batch.num_decodes) & (seq < batch.num_seqs)
    length = jnp.where(is_chunk, batch.query_starts[1:] - batch.query_starts[:-1], 0)
    count = (length + (tile_tokens - 1)) // tile_tokens
    ends = jnp.cumsum(count, dtype=jnp.int32)
    tile = jnp.arange(num_rows // tile_tokens + num_seqs, dtype=jnp.int32)
    owner = jnp.minimum(jnp.sum(ends[None, :] <= tile[:, None], axis=1, dtype=jnp.int32), num_seqs - 1)
    offset = (tile - (ends - count)[owner]) * tile_tokens
    position = batch.context_lens[owner] - length[owner] + offset
    tokens = jnp.minimum(length[owner] - offset, tile_tokens)
    work = position + tokens
    if window is not None:
        work = jnp.minimum(work, window + tokens)
    order = jnp.argsort(jnp.where(tile < ends[-1], -work, 1))
    columns = (owner, batch.query_starts[owner] + offset, position, tokens, batch.context_lens[owner])
    return Schedule(jnp.stack(columns, axis=1)[order], ends[-1])


def attend_chunks(
    q: Float[Array, "T N H"],
    kv_pages: Shaped[Array, "P page_size K2 H"],
    batch: RaggedBatch,
    layer: AttentionLayer,
    config: AttentionConfig,
    out: Float[Array, "T N H"],
    tiles: PrefillTiles | None = None,
) -> Float[Array, "T N H"]:
    """Attends for sequences [num_decodes, num_seqs) and puts their rows into the output.

    Args:
        q: [T, N, H].
        kv_pages: The pool, the new tokens already in it.
        batch: Sequences, pages and positions.
        layer: The layer's place in the pool, its sinks and its scales.
        config: Static facts.
        out: [T, N, H]; other rows stay as they are.
        tiles: How to cut the work; chosen from the shapes if None.

    Raises:
        NotImplementedError: The shapes or dtypes do not suit the chip.
    """
    shape = shape_of(q, kv_pages)
    tiles = tiles or prefill_tiles(shape)
    tiles.check(shape)
    kernel = Kernel(
        shape=shape,
        tiles=tiles,
        config=config,
        dtype=q.dtype,
        num_rows=q.shape[0],
        has_sinks=layer.sinks is not None,
    )
    schedule = prefill_schedule(batch, q.shape[0], shape.item_tokens, config.sliding_window)
    # A copy's box must fit the array; the hardware may reach past its end, the interpreter may not.
    margin = shape.item_tokens if tiles.interpretable else max(0, shape.own_tokens - q.shape[0])
    factor = jnp.float32(config.scale * (LOG2E if config.soft_cap is None else 2 * LOG2E / config.soft_cap))
    one = jnp.float32(1)
    factors = (factor if layer.k_scale is None else factor * layer.k_scale, layer.v_scale)
    written = jax.new_ref(out)
    mesh = plgpu.Mesh(
        grid=(tiles.num_blocks,), grid_names=(BLOCK_AXIS,), num_threads=WARPGROUPS + 1, thread_name=THREAD_AXIS
    )
    params = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
    run: Callable[..., None] = pl.kernel(kernel, mesh=mesh, compiler_params=params, name="paged_prefill")
    run(
        jnp.pad(q, ((0, margin), (0, 0), (0, 0))) if margin else q,
        kv_pages,
        schedule.tiles,
        jnp.stack([schedule.num_tiles, layer.page_offset]),
        batch.page_table,
        jnp.stack([factors[0], one if factors[1] is None else factors[1]]),
        one[None] if layer.sinks is None else layer.sinks.astype(jnp.float32),
        jnp.arange(tiles.block_tokens, dtype=jnp.int32),
        written,
    )
    attended: Array = jax.freeze(written)
    return attended


def shape_of(q: Float[Array, "T N H"], kv_pages: Shaped[Array, "P page_size K2 H"]) -> PrefillShape:
    """Static facts, if the kernel can do them.

    Raises:
        NotImplementedError: It cannot.
    """
    page_size, heads2, head_dim = kv_pages.shape[1:]
    shape = PrefillShape(
        num_kv_heads=heads2 // 2,
        group=q.shape[1] * 2 // heads2,
        head_dim=head_dim,
        page_size=page_size,
        itemsize=q.dtype.itemsize,
    )
    if q.dtype not in (jnp.bfloat16, jnp.float16) or kv_pages.dtype != q.dtype:
        raise NotImplementedError(f"q {q.dtype} with pages {kv_pages.dtype}: both must be bfloat16 or both float16")
    if not shape.swizzle or head_dim > 256:
        raise NotImplementedError(f"head dim {head_dim} is not a multiple of 16 up to 256")
    if page_size < 8 or page_size % 8:
        raise NotImplementedError(f"pages of {page_size} tokens are not a multiple of 8")
    return shape
