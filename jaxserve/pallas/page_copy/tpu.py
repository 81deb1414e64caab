"""Page copies on a TPU (Mosaic): the scalar core starts one DMA a page and layer, from HBM to HBM.

No byte passes through vector memory. All layers of a pair are in flight together, for they cannot touch each other, and
so are two pairs in a row, each counted by a semaphore of its own. Only where a pair meets the one before it - reads
what that writes, or writes what that reads or writes - is the earlier one waited for first.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Int32, Shaped

from jaxserve.pallas.page_copy.moves import CopyLayout, PagePairs

MAX_PAIRS = 32 * 1024
"""Most pairs of one call: their ids, 8 bytes a pair, must leave most of the scalar memory (1 MiB) free."""


def copy_tpu(
    source: Shaped[Array, "A page_size K2 H"] | None,
    target: Shaped[Array, "B page_size K2 H"],
    pairs: PagePairs,
    *,
    layout: CopyLayout,
) -> Shaped[Array, "B page_size K2 H"]:
    """See `api`; `source` None reads from the target."""
    num_pairs = pairs.sources.shape[0]
    if num_pairs > MAX_PAIRS:
        raise NotImplementedError(f"{num_pairs} pairs of pages do not fit into scalar memory, {MAX_PAIRS} do")
    arrays = (target,) if source is None else (source, target)
    scalars, hbm = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pltpu.HBM)
    copied: Array = pl.pallas_call(
        functools.partial(_kernel, layout=layout, num_pairs=num_pairs, within=source is None),
        in_specs=(scalars, scalars, *(hbm for _ in arrays)),
        out_specs=hbm,
        out_shape=jax.ShapeDtypeStruct(target.shape, target.dtype),
        input_output_aliases={1 + len(arrays): 0},
        scratch_shapes=(pltpu.SemaphoreType.DMA((2,)),),
        compiler_params=pltpu.CompilerParams(has_side_effects=True),
        name="page_copy",
    )(pairs.sources, pairs.targets, *arrays)
    return copied


def _kernel(
    sources: jax.Ref,
    targets: jax.Ref,
    *refs: jax.Ref,
    layout: CopyLayout,
    num_pairs: int,
    within: bool,
) -> None:
    """One call's pairs.

    Args:
        sources: [C] in SMEM.
        targets: [C] in SMEM.
        refs: The array to read unless the copy is `within` one; the target, twice (in and out, the same memory); two
            DMA semaphores.
        layout: How page ids become rows.
        num_pairs: C.
        within: Whether pages are read from the target.
    """
    written, semaphores = refs[-2:]
    read = written if within else refs[0]

    def moves(pair: Int32[Array, ""]) -> Bool[Array, ""]:
        both: Array = (sources[pair] >= 0) & (targets[pair] >= 0)
        return both

    def each_layer(pair: Int32[Array, ""], *, wait: bool) -> None:
        @pl.when(moves(pair))
        def _() -> None:
            first_read = sources[pair] * layout.source.per_page
            first_written = targets[pair] * layout.target.per_page

            @pl.loop(0, layout.num_layers)
            def _(layer: Int32[Array, ""]) -> None:
                copy = pltpu.make_async_copy(
                    read.at[first_read + layer * layout.source.per_layer],
                    written.at[first_written + layer * layout.target.per_layer],
                    semaphores.at[pair % 2],
                )
                if wait:
                    copy.wait()
                else:
                    copy.start()

    @pl.loop(0, num_pairs)
    def _(pair: Int32[Array, ""]) -> None:
        before = jnp.maximum(pair - 1, 0)
        meets = targets[pair] == targets[before]
        if within:
            meets |= (sources[pair] == targets[before]) | (targets[pair] == sources[before])
        is_later = pair > 0
        pl.when(is_later & meets)(lambda: each_layer(before, wait=True))
        each_layer(pair, wait=False)
        pl.when(is_later & ~meets)(lambda: each_layer(before, wait=True))

    each_layer(jnp.int32(num_pairs - 1), wait=True)
