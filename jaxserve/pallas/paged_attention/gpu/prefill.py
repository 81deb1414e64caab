"""Prefill on Hopper: each chunk's new tokens attend causally to their sequence's pages, new tokens included.

Work items are (run of a chunk's tokens, KV head, some of its query heads); see `prefill_tiles`. Persistent thread
blocks take items from a list sorted by work, longest first, back and forth so that each gets its share. In a block, a
loading warpgroup brings queries, and keys and values page by page, into rings in shared memory with the tensor memory
accelerator. Two computing warpgroups of 64 rows each multiply (wgmma) and keep a running softmax in registers (online
normaliser, arXiv:1805.02867). They take turns: while one has the tensor cores, for the values of block i and the keys
of block i + 1 at once, the other takes its softmax (as in FlashAttention-3, arXiv:2407.08608). Blocks of a pool of 8
bits are widened on their way by a fourth warpgroup.

Blocks lie at multiples of their size of the position, and what a row does not see changes nothing to the bit, so a
row's result is the same whatever else is in the batch. Only blocks at the diagonal, or at a window's edge, are masked.
Elements of the pool that may not be read can be NaN: they lie past the end of the context, where logits are masked and
values are cleared before they are multiplied; pages without a visible token are not read.

Whole tiles of the output leave by the accelerator; at a chunk's end, rows leave one by one, for what follows is not
this chunk's.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Shaped

from jaxserve.pallas.paged_attention.gpu.prefill_kernel import Kernel
from jaxserve.pallas.paged_attention.gpu.prefill_schedule import prefill_schedule
from jaxserve.pallas.paged_attention.gpu.prefill_tiles import WARPGROUPS, PrefillShape, PrefillTiles, prefill_tiles
from jaxserve.pallas.paged_attention.gpu.support import check_support, num_blocks
from jaxserve.pallas.paged_attention.inputs import AttentionConfig, AttentionLayer, RaggedBatch

BLOCK_AXIS, THREAD_AXIS = "block", "warpgroup"
"""Names of the kernel's grid of thread blocks, and of a block's warpgroups."""


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
    shape = prefill_shape(q, kv_pages)
    tiles = tiles or prefill_tiles(shape, num_blocks=num_blocks())
    tiles.check(shape)
    kernel = Kernel(
        shape=shape,
        tiles=tiles,
        config=config,
        dtype=q.dtype,
        kv_dtype=kv_pages.dtype,
        num_rows=q.shape[0],
        has_sinks=layer.sinks is not None,
    )
    schedule = batch.prefill or prefill_schedule(batch, shape.item_tokens)
    # A copy's box must fit the array; the hardware may reach past its end, the interpreter may not.
    margin = shape.item_tokens if tiles.interpretable else max(0, shape.own_tokens - q.shape[0])
    one = np.ones(1, np.float32)
    written = jax.new_ref(out)
    mesh = plgpu.Mesh(
        grid=(tiles.num_blocks,),
        grid_names=(BLOCK_AXIS,),
        num_threads=WARPGROUPS + (2 if shape.registers.widening else 1),
        thread_name=THREAD_AXIS,
    )
    params = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
    run: Callable[..., None] = pl.kernel(kernel, mesh=mesh, compiler_params=params, name="paged_prefill")
    run(
        jnp.pad(q, ((0, margin), (0, 0), (0, 0))) if margin else q,
        kv_pages,
        schedule.tiles,
        schedule.num_tiles[None],
        layer.page_offset[None],
        batch.page_table,
        one if layer.k_scale is None else layer.k_scale[None],
        one if layer.v_scale is None else layer.v_scale[None],
        one if layer.sinks is None else layer.sinks.astype(jnp.float32),
        # A literal of two dimensions stays one; of one dimension, it becomes a kernel that counts.
        np.arange(tiles.block_tokens, dtype=np.int32)[None],
        written,
    )
    attended: Array = jax.freeze(written)
    return attended


def prefill_shape(q: Float[Array, "T N H"], kv_pages: Shaped[Array, "P page_size K2 H"]) -> PrefillShape:
    """Static facts, if the kernel can do them.

    Raises:
        NotImplementedError: It cannot.
    """
    check_support(q, kv_pages)
    page_size, heads2, head_dim = kv_pages.shape[1:]
    return PrefillShape(
        num_kv_heads=heads2 // 2,
        group=q.shape[1] * 2 // heads2,
        head_dim=head_dim,
        page_size=page_size,
        itemsize=q.dtype.itemsize,
        kv_itemsize=kv_pages.dtype.itemsize,
    )
