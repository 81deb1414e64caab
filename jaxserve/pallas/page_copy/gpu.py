"""Page copies on a GPU (Mosaic GPU): each block of threads owns one piece of every page of one layer.

A block walks the pairs in order: it brings its piece of the page that is read into shared memory by TMA and stores it
from there by TMA. Pieces never touch each other, so blocks need not agree on anything, and pairs still take effect in
order. Many small blocks to a multiprocessor keep the memory busy.
"""

from __future__ import annotations

import functools
import math
from typing import Any, TypeAlias

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32, Shaped

from jaxserve.pallas.hopper import require_hopper
from jaxserve.pallas.page_copy.moves import CopyLayout, PagePairs

Ref: TypeAlias = Any
"""A reference inside the kernel; Mosaic GPU's functions declare abstract ones, which is not what they are given."""

MAX_BOX = 256
"""Most elements TMA copies along a dimension."""

PIECE_BYTES = 8192
"""Most bytes of a piece: small enough that the layers' pieces fill all multiprocessors several times over."""

GRID = ("layer", "piece")

TMA_BYTES = 16
"""TMA wants rows of a multiple of this."""


def copy_gpu(
    source: Shaped[Array, "A page_size K2 H"] | None,
    target: Shaped[Array, "B page_size K2 H"],
    pairs: PagePairs,
    *,
    layout: CopyLayout,
) -> Shaped[Array, "B page_size K2 H"]:
    """See `api`; `source` None reads from the target."""
    require_hopper()
    num_rows, width, piece = _pieces(math.prod(target.shape[1:]), target.dtype.itemsize)
    written = jax.new_ref(target.reshape(-1, num_rows, width))
    pages = (written,) if source is None else (source.reshape(-1, num_rows, width), written)
    mesh = plgpu.Mesh(grid=(layout.num_layers, num_rows // piece), grid_names=GRID)
    body = functools.partial(_kernel, layout=layout, piece=(piece, width))
    pl.kernel(body, mesh=mesh, name="page_copy")(pairs.sources, pairs.targets, *pages)
    copied: Array = jax.freeze(written)
    return copied.reshape(target.shape)


def _pieces(num_elements: int, itemsize: int) -> tuple[int, int, int]:
    """How a page is cut: rows, elements of a row, rows of a piece.

    Raises:
        NotImplementedError: No cut suits TMA.
    """
    widths = [w for w in range(1, MAX_BOX + 1) if num_elements % w == 0 and w * itemsize % TMA_BYTES == 0]
    if not widths:
        raise NotImplementedError(f"TMA cannot copy pages of {num_elements} elements of {itemsize} bytes")
    width = widths[-1]
    num_rows = num_elements // width
    most = min(MAX_BOX, max(1, PIECE_BYTES // (width * itemsize)))
    return num_rows, width, max(rows for rows in range(1, most + 1) if num_rows % rows == 0)


def _kernel(sources: jax.Ref, targets: jax.Ref, *pages: jax.Ref, layout: CopyLayout, piece: tuple[int, int]) -> None:
    """One piece of every pair's pages of one layer.

    Args:
        sources: [C].
        targets: [C].
        pages: The array to read and the array to write, or one that is both: [rows, rows of a page, width].
        layout: How page ids become rows.
        piece: Shape of a piece.
    """
    read, written = pages[0], pages[-1]
    layer, index = (jax.lax.axis_index(name) for name in GRID)
    rows = pl.ds(index * piece[0], piece[0])

    def walk(held: Ref, arrived: Ref) -> None:
        @pl.loop(0, sources.shape[0])
        def _(pair: Int32[Array, ""]) -> None:
            @pl.when((sources[pair] >= 0) & (targets[pair] >= 0))
            def _() -> None:
                from_row = sources[pair] * layout.source.per_page + layer * layout.source.per_layer
                to_row = targets[pair] * layout.target.per_page + layer * layout.target.per_layer
                plgpu.copy_gmem_to_smem(read.at[from_row, rows], held, arrived)
                plgpu.barrier_wait(arrived)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(held, written.at[to_row, rows])
                plgpu.wait_smem_to_gmem(0)

    pl.run_scoped(walk, plgpu.SMEM(piece, written.dtype), plgpu.Barrier())
