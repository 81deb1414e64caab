"""Blocks of keys and values in shared memory: how they lie there, and how those of a narrow pool are widened.

wgmma multiplies 8-bit elements with one another only, so a block of a narrow pool becomes one of the queries' dtype,
through registers. All values of the narrow formats are values of bfloat16 and of float16: nothing is lost, and the
pool's scales are applied to logits and results instead.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from jaxserve.pallas.paged_attention.gpu.tiles import swizzle_of

NO_INDEX: tuple[None, ...] = (None,) if jax.__version_info__ < (0, 11) else ()
"""What `plgpu.load` wants as an index to read all of a reference; newer ones take none."""

Ref: TypeAlias = Any
Layout: TypeAlias = Any


def tiled(shape: tuple[int, ...], dtype: jnp.dtype) -> pl.MemoryRef:
    """Shared memory in tiles of 8 rows, swizzled as far as a row allows, as wgmma and TMA want it.

    Args:
        shape: The last two dimensions are a block's rows and columns.
        dtype: Of its elements.
    """
    # Narrow blocks are read 64 columns at a time, which is then a tile's width; rows of no swizzle have no tiles.
    swizzle = min(swizzle_of(shape[-1] * dtype.itemsize), 64 * dtype.itemsize)
    if not swizzle:
        return plgpu.SMEM(shape, dtype)
    # Type checkers take JAX's classes for abstract: they inherit a method without a body.
    tiling: Any = plgpu.TilingTransform
    swizzling: Any = plgpu.SwizzleTransform
    return plgpu.SMEM(shape, dtype, transforms=(tiling((8, swizzle // dtype.itemsize)), swizzling(swizzle)))


def load(source: Ref, layout: Layout) -> Array:
    """Reads shared memory in a pattern that may have bank conflicts.

    Args:
        source: What to read.
        layout: How the array's elements are spread over threads.
    """
    loaded: Array = plgpu.load(source, *NO_INDEX, layout=layout, optimized=False)
    return loaded


def widen(narrow: Ref, entry: Array, wide: Ref, place: Array, columns: int) -> None:
    """Widens one block; `plgpu.commit_smem` comes before anybody is told.

    Args:
        narrow: [entries, tokens, H]; blocks as they are in the pool.
        entry: Which of them.
        wide: [places, tokens, H]; blocks in the queries' dtype.
        place: Where it goes.
        columns: Most columns that registers hold at a time.
    """
    head_dim = narrow.shape[-1]
    columns = math.gcd(head_dim, columns)
    is_swizzled = swizzle_of(head_dim * narrow.dtype.itemsize) > 0
    for c in range(0, head_dim, columns):
        part = pl.ds(c, columns)
        source, layout = narrow.at[entry, :, part], plgpu.Layout.WGMMA_UPCAST_2X
        held = plgpu.layout_cast(source[...], layout) if is_swizzled else load(source, layout)
        if narrow.dtype != jnp.int8:
            # There is no instruction from 8 bits to bfloat16, but float16 holds them all.
            held = held.astype(jnp.float16)
        wide[place, :, part] = plgpu.layout_cast(held.astype(wide.dtype), plgpu.Layout.WGMMA)
