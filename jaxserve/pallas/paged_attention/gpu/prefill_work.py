"""What a thread block of the prefill has to do: its items, as its warpgroups read them from the schedule.

Items are tiles of the schedule times heads. Thread blocks take them in rounds, back and forth, so that each gets its
share of the long ones, which come first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxserve.pallas.paged_attention.gpu.prefill_refs import Inputs
from jaxserve.pallas.paged_attention.gpu.prefill_tiles import PrefillShape, PrefillTiles


class Item(NamedTuple):
    """A work item as a warpgroup reads it."""

    seq: Array
    row: Array
    position: Array
    tokens: Array
    end: Array
    kv_head: Array
    # first query head
    head: Array


class Blocks(NamedTuple):
    """Blocks of an item: all are [first, stop), and those in [whole, edge) are seen in full by all rows."""

    first: Array
    whole: Array
    edge: Array
    stop: Array


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """How work is divided among thread blocks, and an item among warpgroups.

    Attributes:
        shape: Sizes.
        tiles: How the work is cut.
        window: Of the attention, or None.
    """

    shape: PrefillShape
    tiles: PrefillTiles
    window: int | None

    def _place(self, turn: Array, block: Array) -> Array:
        """Which of a round's items a thread block takes: rounds go back and forth."""
        return jnp.where(lax.rem(turn, 2) == 0, block, self.tiles.num_blocks - 1 - block)

    def num_own(self, arrays: Inputs, block: Array) -> Array:
        """How many items a thread block takes."""
        num_items = arrays.num_tiles[0] * self.shape.items_per_tile
        rounds, rest = lax.div(num_items, self.tiles.num_blocks), lax.rem(num_items, self.tiles.num_blocks)
        return rounds + jnp.where(self._place(rounds, block) < rest, 1, 0)

    def item(self, arrays: Inputs, block: Array, turn: Array) -> Item:
        """Reads a thread block's n-th item; past the last, anything."""
        index = turn * self.tiles.num_blocks + self._place(turn, block)
        tile = jnp.minimum(lax.div(index, self.shape.items_per_tile), arrays.tiles.shape[0] - 1)
        unit = lax.rem(index, self.shape.items_per_tile)
        parts = self.shape.group // self.shape.item_heads
        seq, row, position, tokens, end = (arrays.tiles[tile, column] for column in range(5))
        return Item(seq, row, position, tokens, end, lax.div(unit, parts), unit * self.shape.item_heads)

    def blocks(self, item: Item) -> Blocks:
        """Blocks of the context that an item reads."""
        size, window = self.tiles.block_tokens, self.window
        stop = lax.div(item.position + item.tokens - 1, size) + 1
        first = whole = jnp.int32(0)
        if window is not None:
            first = lax.div(jnp.maximum(item.position - (window - 1), 0), size)
            whole = lax.div(jnp.maximum(item.position + self.shape.item_tokens - window, 0) + (size - 1), size)
        # The last block is masked in any case.
        whole = jnp.minimum(jnp.maximum(whole, first), stop - 1)
        edge = jnp.minimum(jnp.maximum(lax.div(item.position + 1, size), whole), stop - 1)
        return Blocks(first, whole, edge, stop)

    def corner(self, item: Item, warpgroup: Array | int) -> tuple[Array, Array]:
        """First row of q and first query head of a warpgroup."""
        if self.shape.shares_tokens:
            return item.row, item.head + warpgroup * self.shape.own_heads
        return item.row + warpgroup * self.shape.own_tokens, item.head
