"""How queries, keys and values get into a thread block's shared memory during a prefill.

A loading warpgroup asks the tensor memory accelerator for query tiles and for blocks of keys and values, page by page,
item after item, and waits where a ring is full. Blocks of a narrow pool come into a ring of their own first, keys and
values in turn, out of which another warpgroup widens them into those that are multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from jaxserve.pallas.paged_attention.gpu.blocks import widen
from jaxserve.pallas.paged_attention.gpu.prefill_refs import Inputs, Memory, Ref
from jaxserve.pallas.paged_attention.gpu.prefill_tiles import WARPGROUPS
from jaxserve.pallas.paged_attention.gpu.prefill_work import Item, Work

WIDENED_COLUMNS = 64
"""Columns of a block that are widened at a time, or fewer that divide a head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loader:
    """What the warpgroups do that do not compute.

    Attributes:
        work: What there is to do.
        arrays: Where it comes from.
        memory: Where it goes.
        block: This thread block.
    """

    work: Work
    arrays: Inputs
    memory: Memory
    block: Array

    def load(self) -> None:
        """The loading warpgroup."""

        def load_item(turn: Array, count: Array) -> Array:
            item = self.work.item(self.arrays, self.block, turn)
            blocks = self.work.blocks(item)
            self._load_queries(turn, item)

            def load_block(index: Array, count: Array) -> Array:
                self._load_block(item, index, count)
                return count + 1

            loaded: Array = lax.fori_loop(blocks.first, blocks.stop, load_block, count)
            return loaded

        lax.fori_loop(0, self.work.num_own(self.arrays, self.block), load_item, jnp.int32(0))

    def widen(self) -> None:
        """The warpgroup that widens what the loading one has brought from a narrow pool."""
        memory, stages, entries = self.memory, self.work.tiles.stages, self.work.tiles.narrow_entries
        rings = (
            (memory.keys, memory.key_ready, memory.key_free),
            (memory.values, memory.value_ready, memory.value_free),
        )

        def widen_block(_: Array, count: Array) -> Array:
            stage = lax.rem(count, stages)
            for side, (ring, ready, free) in enumerate(rings):
                entry = lax.rem(2 * count + side, entries)
                plgpu.barrier_wait(memory.narrow_ready.at[entry])
                _await_turn(free, stage, count, stages)
                widen(memory.narrow, entry, ring, stage, WIDENED_COLUMNS)
                plgpu.commit_smem()
                plgpu.barrier_arrive(memory.narrow_free.at[entry])
                plgpu.barrier_arrive(ready.at[stage])
            return count + 1

        def widen_item(turn: Array, count: Array) -> Array:
            blocks = self.work.blocks(self.work.item(self.arrays, self.block, turn))
            widened: Array = lax.fori_loop(blocks.first, blocks.stop, widen_block, count)
            return widened

        lax.fori_loop(0, self.work.num_own(self.arrays, self.block), widen_item, jnp.int32(0))

    def _load_queries(self, turn: Array, item: Item) -> None:
        shape, memory, buffers = self.work.shape, self.memory, self.work.tiles.query_buffers
        buffer = lax.rem(turn, buffers)
        _await_turn(memory.query_free, buffer, turn, buffers)
        for warpgroup in range(WARPGROUPS):
            row, head = self.work.corner(item, warpgroup)
            for i in range(shape.own_heads):
                plgpu.copy_gmem_to_smem(
                    self.arrays.q.at[pl.ds(row, shape.own_tokens), head + i],
                    memory.queries.at[buffer, warpgroup, pl.ds(i * shape.own_tokens, shape.own_tokens)],
                    memory.query_ready.at[buffer],
                )

    def _load_block(self, item: Item, index: Array, count: Array) -> None:
        """Asks for the keys and values of a block, the thread block's number `count`."""
        shape, tiles, memory = self.work.shape, self.work.tiles, self.memory
        page_size, copies = jnp.int32(shape.page_size), max(1, tiles.block_tokens // shape.page_size)
        unit = tiles.block_tokens // copies
        low = jnp.int32(0)
        if self.work.window is not None:
            low = lax.div(jnp.maximum(item.position - (self.work.window - 1), 0), page_size)
        high = lax.div(item.position + item.tokens - 1, page_size)
        position = index * tiles.block_tokens
        page = lax.div(position, page_size)
        # A page without a visible token may be anyone's: a visible one stands in for it.
        pages = [
            self.arrays.page_offset[0] + self.arrays.table[item.seq, jnp.minimum(jnp.maximum(page + i, low), high)]
            for i in range(copies)
        ]
        place = lax.rem(position, page_size) if copies == 1 else 0
        for side in range(2):
            if shape.is_narrow:
                turn, size = 2 * count + side, tiles.narrow_entries
                ring, ready, free = memory.narrow, memory.narrow_ready, memory.narrow_free
            else:
                turn, size = count, tiles.stages
                ring, ready, free = (memory.keys, memory.key_ready, memory.key_free)
                if side:
                    ring, ready, free = (memory.values, memory.value_ready, memory.value_free)
            slot = lax.rem(turn, size)
            _await_turn(free, slot, turn, size)
            for i, held in enumerate(pages):
                plgpu.copy_gmem_to_smem(
                    self.arrays.kv.at[held, pl.ds(place, unit), 2 * item.kv_head + side],
                    ring.at[slot, pl.ds(i * unit, unit)],
                    ready.at[slot],
                )


def _await_turn(free: Ref, slot: Array, turn: Array, size: int) -> None:
    """Waits until a slot of a ring is free for entry number `turn`; at first all are."""

    @pl.when(turn >= size)
    def _() -> None:
        plgpu.barrier_wait(free.at[slot])
