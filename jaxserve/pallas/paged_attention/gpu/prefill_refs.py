"""What the prefill kernel touches: arrays in device memory, a thread block's shared memory, and its barriers."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.pallas.paged_attention.gpu.blocks import tiled
from jaxserve.pallas.paged_attention.gpu.prefill_tiles import WARPGROUPS, PrefillShape, PrefillTiles
from jaxserve.pallas.paged_attention.gpu.tiles import ROWS

Ref: TypeAlias = Any
"""A reference inside the kernel; Mosaic GPU's functions declare abstract ones, which is not what they are given."""


class Inputs(NamedTuple):
    """Arrays in device memory."""

    # [T, N, H]
    q: Ref
    # [P, page_size, 2 * K, H]
    kv: Ref
    # [max_tiles, 5], longest first: sequence, first row of q, its position, tokens, and the context's end
    tiles: Ref
    # [1]; tiles that there are
    num_tiles: Ref
    # [1]; the layer's first page
    page_offset: Ref
    # [S, pages_per_seq]
    table: Ref
    # [1]; of the pool
    k_scale: Ref
    v_scale: Ref
    # [N], or [1] if there are none
    sinks: Ref
    # [1, block_tokens]; 0, 1, 2 ...
    columns: Ref
    # [T, N, H]; rows of chunks are written
    out: Ref


class Memory(NamedTuple):
    """A thread block's shared memory and barriers."""

    # [query_buffers, 2, 64, H]; rows are (query head, token); results replace them
    queries: Ref
    # [stages, block_tokens, H]
    keys: Ref
    values: Ref
    # [2, 64, edge_pitch]
    edge: Ref
    query_ready: Ref
    query_free: Ref
    key_ready: Ref
    key_free: Ref
    value_ready: Ref
    value_free: Ref
    # the second warpgroup may use values that the first has cleared
    cleared: Ref
    # the warpgroups take turns
    turn: Ref
    # [narrow_entries, block_tokens, H], keys and values in turn as they are in the pool, and its barriers; else None
    narrow: Ref
    narrow_ready: Ref
    narrow_free: Ref
    # [2, 64, block_tokens], or None
    weights: Ref


def scratch(shape: PrefillShape, tiles: PrefillTiles, dtype: jnp.dtype, kv_dtype: jnp.dtype) -> Memory:
    """The types of shared memory and barriers.

    Args:
        shape: Sizes.
        tiles: How the work is cut.
        dtype: Of queries and output.
        kv_dtype: Of the pool.
    """
    ring = tiled((tiles.stages, tiles.block_tokens, shape.head_dim), dtype)
    copies = max(1, tiles.block_tokens // shape.page_size)
    # Blocks come by copies, or from the warpgroup that widens them.
    ready = plgpu.Barrier(num_arrivals=1 if shape.is_narrow else copies, num_barriers=tiles.stages)
    free = plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=tiles.stages)
    entries = tiles.narrow_entries
    return Memory(
        queries=tiled((tiles.query_buffers, WARPGROUPS, ROWS, shape.head_dim), dtype),
        keys=ring,
        values=ring,
        edge=plgpu.SMEM((WARPGROUPS, ROWS, shape.edge_pitch), dtype),
        query_ready=plgpu.Barrier(num_arrivals=WARPGROUPS * shape.own_heads, num_barriers=tiles.query_buffers),
        query_free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=tiles.query_buffers),
        key_ready=ready,
        key_free=free,
        value_ready=ready,
        value_free=free,
        cleared=plgpu.Barrier(),
        turn=plgpu.Barrier(num_arrivals=WARPGROUPS),
        narrow=tiled((entries, tiles.block_tokens, shape.head_dim), kv_dtype) if shape.is_narrow else None,
        narrow_ready=plgpu.Barrier(num_arrivals=copies, num_barriers=entries) if shape.is_narrow else None,
        narrow_free=plgpu.Barrier(num_barriers=entries) if shape.is_narrow else None,
        weights=tiled((WARPGROUPS, ROWS, tiles.block_tokens), dtype) if tiles.interpretable else None,
    )
