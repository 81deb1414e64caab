"""Page copies as plainly as they can be said: one page of one layer after another."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Shaped

from jaxserve.pallas.page_copy.moves import CopyLayout, PagePairs


def copy_reference(
    source: Shaped[Array, "A page_size K2 H"] | None,
    target: Shaped[Array, "B page_size K2 H"],
    pairs: PagePairs,
    *,
    layout: CopyLayout,
) -> Shaped[Array, "B page_size K2 H"]:
    """See `api`; `source` None reads from the target."""
    num_moves = pairs.sources.shape[0] * layout.num_layers

    def move(index: Int32[Array, ""], target: Array) -> Array:
        pair, layer = index // layout.num_layers, index % layout.num_layers
        read, written = pairs.sources[pair], pairs.targets[pair]
        from_row = layer * layout.source.per_layer + read * layout.source.per_page
        to_row = layer * layout.target.per_layer + written * layout.target.per_page
        page = (target if source is None else source)[from_row]
        moves = (read >= 0) & (written >= 0)
        return target.at[to_row].set(jnp.where(moves, page, target[to_row]))

    copied: Array = jax.lax.fori_loop(0, num_moves, move, target)
    return copied
