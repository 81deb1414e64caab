"""Page copies in plain JAX: a loop over the pairs, each copying all layers of its page at once, in place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Shaped

from jaxserve.pallas.page_copy.moves import CopyLayout, PagePairs


def copy_xla(
    source: Shaped[Array, "A page_size K2 H"] | None,
    target: Shaped[Array, "B page_size K2 H"],
    pairs: PagePairs,
    *,
    layout: CopyLayout,
) -> Shaped[Array, "B page_size K2 H"]:
    """See `api`; `source` None reads from the target."""
    layers = jnp.arange(layout.num_layers, dtype=jnp.int32)

    def move(pair: Int32[Array, ""], target: Array) -> Array:
        read, written = pairs.sources[pair], pairs.targets[pair]
        from_rows = layers * layout.source.per_layer + read * layout.source.per_page
        to_rows = layers * layout.target.per_layer + written * layout.target.per_page
        # Padding goes to rows past the end, which the scatter drops.
        to_rows = jnp.where((read >= 0) & (written >= 0), to_rows, target.shape[0])
        pages = (target if source is None else source).at[from_rows].get(mode="clip")
        return target.at[to_rows].set(pages, mode="drop", unique_indices=True)

    copied: Array = jax.lax.fori_loop(0, pairs.sources.shape[0], move, target)
    return copied
