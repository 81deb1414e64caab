"""The prefill kernel's body: what a thread block's computing warpgroups do; see `prefill`.

Others fill rings of query tiles, keys and values for them; see `prefill_load`. A computing warpgroup carries, from
block to block, the products of its queries with the next block's keys and a running softmax. Both warpgroups go through
the same blocks, one turn apart.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from jaxserve.pallas.paged_attention.gpu.blocks import load
from jaxserve.pallas.paged_attention.gpu.prefill_load import Loader
from jaxserve.pallas.paged_attention.gpu.prefill_refs import Inputs, Memory, Ref, scratch
from jaxserve.pallas.paged_attention.gpu.prefill_tiles import (
    WARPGROUPS,
    PrefillShape,
    PrefillTiles,
)
from jaxserve.pallas.paged_attention.gpu.prefill_work import Item, Work
from jaxserve.pallas.paged_attention.gpu.tiles import ROWS
from jaxserve.pallas.paged_attention.inputs import AttentionConfig

Accumulator = plgpu.WGMMAAccumulatorRef

LOG2E = math.log2(math.e)

LOWEST = -1e30
"""A running maximum before anything has been seen; finite, so that differences of maxima stay numbers."""

Parts: TypeAlias = tuple[Array, ...]


class Softmax(NamedTuple):
    """A running softmax of 64 rows: largest logit to the base 2, sum of weights, weighted values."""

    peak: Array
    total: Array
    # columns of them that one instruction multiplies
    values: Parts


class View(NamedTuple):
    """What a computing warpgroup sees of an item."""

    arrays: Inputs
    memory: Memory
    item: Item
    # where its queries are
    buffer: Array
    # what products of queries and keys are multiplied by, to the base 2; with a soft cap, twice the capped argument
    factor: Array


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """Everything static about a call.

    Attributes:
        shape: Sizes.
        tiles: How the work is cut.
        config: The attention.
        dtype: Of queries and output.
        kv_dtype: Of the pool.
        num_rows: Rows of the output.
        has_sinks: Whether heads have sinks.
    """

    shape: PrefillShape
    tiles: PrefillTiles
    config: AttentionConfig
    dtype: jnp.dtype
    kv_dtype: jnp.dtype
    num_rows: int
    has_sinks: bool

    @property
    def factor(self) -> float:
        """What products of queries and unscaled keys are multiplied by: to the base 2, after a soft cap's divisor."""
        cap = self.config.soft_cap
        return self.config.scale * (LOG2E if cap is None else 2 * LOG2E / cap)

    @property
    def work(self) -> Work:
        """How work is divided."""
        return Work(shape=self.shape, tiles=self.tiles, window=self.config.sliding_window)

    def __call__(self, *refs: Ref) -> None:
        """The kernel's body."""
        types = scratch(self.shape, self.tiles, self.dtype, self.kv_dtype)
        pl.run_scoped(functools.partial(self._run, Inputs(*refs)), *types, collective_axes="warpgroup")

    def _run(self, arrays: Inputs, *held: Ref) -> None:
        memory = Memory(*held)
        thread = lax.axis_index("warpgroup")
        block = lax.axis_index("block")
        loader = Loader(work=self.work, arrays=arrays, memory=memory, block=block)
        registers = self.shape.registers

        @pl.when(thread < WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(registers.computing, action="increase")
            self._compute(arrays, memory, block)

        @pl.when(thread == WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(registers.loading, action="decrease")
            loader.load()

        if registers.widening:

            @pl.when(thread == WARPGROUPS + 1)
            def _() -> None:
                plgpu.set_max_registers(registers.widening, action="decrease")
                loader.widen()

    def _compute(self, arrays: Inputs, memory: Memory, block: Array) -> None:
        """A computing warpgroup."""
        me = lax.axis_index("warpgroup")
        buffers = self.tiles.query_buffers

        # The second warpgroup is always one turn behind; with one query buffer it catches up after each item, for the
        # first waits there for queries that do not come before both have given the buffer back.
        catches_up = buffers == 1
        falls_behind = pl.when(me == 1)
        if not catches_up:
            falls_behind(functools.partial(self._take_turn, memory))

        def compute_item(turn: Array, carry: tuple[Array, Item]) -> tuple[Array, Item]:
            count, item = carry
            # Read long before it is needed, if registers can hold it.
            following = self.work.item(arrays, block, turn + 1) if self.tiles.looks_ahead else item
            buffer = lax.rem(turn, buffers)
            plgpu.barrier_wait(memory.query_ready.at[buffer])
            view = View(arrays, memory, item, buffer, arrays.k_scale[0] * self.factor)
            if catches_up:
                falls_behind(functools.partial(self._take_turn, memory))
            if buffers > 1:
                release = functools.partial(self._release_query, memory, turn, turn - 1)
                count, softmax = self._attend_ahead(view, count, release)
            elif self.tiles.looks_ahead:
                count, softmax = self._attend_ahead(view, count, lambda: None)
            else:
                count, softmax = self._attend(view, count)
            if catches_up:
                pl.when(me == 0)(functools.partial(plgpu.barrier_arrive, memory.turn))
            self._store(arrays, memory, item, softmax, buffer)
            if catches_up:
                pl.when(me == 0)(functools.partial(plgpu.barrier_wait, memory.turn))
                self._release_query(memory, turn + 1, turn)
            return count, following if self.tiles.looks_ahead else self.work.item(arrays, block, turn + 1)

        lax.fori_loop(
            0,
            self.work.num_own(arrays, block),
            compute_item,
            (jnp.int32(0), self.work.item(arrays, block, jnp.int32(0))),
        )
        if not catches_up:
            pl.when(me == 0)(functools.partial(self._take_turn, memory))
        plgpu.wait_smem_to_gmem(0)

    def _attend_ahead(self, view: View, count: Array, halfway: Callable[[], None]) -> tuple[Array, Softmax]:
        """An item's blocks, each one's keys multiplied together with the values of the one before."""
        memory, stages, blocks = view.memory, self.tiles.stages, self.work.blocks(view.item)

        def step(index: Array, carry: tuple[Array, Array, Softmax], masked: bool) -> tuple[Array, Array, Softmax]:
            count, logits, state = carry
            weights, state = self._weigh(view, index, logits, state, masked)
            plgpu.barrier_arrive(memory.turn)
            stage, ahead = lax.rem(count, stages), lax.rem(count + 1, stages)
            plgpu.barrier_wait(memory.value_ready.at[stage])
            if masked:
                self._clear(view, index, stage)
            plgpu.barrier_wait(memory.key_ready.at[ahead])
            plgpu.barrier_wait(memory.turn)
            values, logits = self._multiply(view, state.values, weights, stage, ahead)
            plgpu.barrier_arrive(memory.value_free.at[stage])
            plgpu.barrier_arrive(memory.key_free.at[ahead])
            return count + 1, logits, state._replace(values=values)

        state = (count, self._logits(view, count), self._start(view))
        masked, plain = functools.partial(step, masked=True), functools.partial(step, masked=False)
        if self.config.sliding_window is not None:
            state = lax.fori_loop(blocks.first, blocks.whole, masked, state)
        state = lax.fori_loop(blocks.whole, blocks.edge, plain, state)
        halfway()
        count, logits, softmax = lax.fori_loop(blocks.edge, blocks.stop - 1, masked, state)
        weights, softmax = self._weigh(view, blocks.stop - 1, logits, softmax, masked=True)
        return count + 1, self._add_values(view, softmax, weights, count, blocks.stop - 1)

    def _attend(self, view: View, count: Array) -> tuple[Array, Softmax]:
        """An item's blocks one after another, for the registers would not hold two products."""
        blocks = self.work.blocks(view.item)

        def step(index: Array, carry: tuple[Array, Softmax]) -> tuple[Array, Softmax]:
            count, state = carry
            weights, state = self._weigh(view, index, self._logits(view, count), state, masked=True)
            return count + 1, self._add_values(view, state, weights, count, index)

        attended: tuple[Array, Softmax] = lax.fori_loop(blocks.first, blocks.stop, step, (count, self._start(view)))
        return attended

    def _take_turn(self, memory: Memory) -> None:
        """Lets the other warpgroup's matmuls go first, or goes first after the other's."""
        plgpu.barrier_arrive(memory.turn)
        plgpu.barrier_wait(memory.turn)

    def _release_query(self, memory: Memory, done: Array, turn: Array) -> None:
        """Gives the query buffer of an item back once its results have left it, if there was such an item."""

        @pl.when(done > 0)
        def _() -> None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(memory.query_free.at[lax.rem(turn, self.tiles.query_buffers)])

    def _logits(self, view: View, count: Array) -> Array:
        """Products of the queries with the keys of block number `count`."""
        memory, stage = view.memory, lax.rem(count, self.tiles.stages)
        plgpu.barrier_wait(memory.key_ready.at[stage])

        def multiply(acc: Ref) -> Array:
            me = lax.axis_index("warpgroup")
            if not self.tiles.looks_ahead:
                # Opaque, lest the descriptors of all of the queries' tiles be kept in registers over the loop.
                me = lax.optimization_barrier(me)
            plgpu.wgmma(acc, memory.queries.at[view.buffer, me], memory.keys.at[stage].transpose((1, 0)))
            self._take_turn(memory)
            product: Array = acc[...]
            return product

        logits: Array = pl.run_scoped(multiply, Accumulator((ROWS, self.tiles.block_tokens), jnp.float32))
        plgpu.barrier_arrive(memory.key_free.at[stage])
        return logits

    def _multiply(self, view: View, values: Parts, weights: Array, stage: Array, ahead: Array) -> tuple[Parts, Array]:
        """Adds a block's weighted values, and multiplies the next block's keys meanwhile."""
        memory = view.memory
        queries = memory.queries.at[view.buffer, lax.axis_index("warpgroup")]
        keys = memory.keys.at[ahead].transpose((1, 0))
        logits_shape = (ROWS, self.tiles.block_tokens)
        if self.tiles.interpretable:
            added = self._add_staged(memory, values, weights, stage)

            def multiply(acc: Ref) -> Array:
                plgpu.wgmma(acc, queries, keys)
                self._take_turn(memory)
                product: Array = acc[...]
                return product

            return added, pl.run_scoped(multiply, Accumulator(logits_shape, jnp.float32))

        def both(accs: tuple[Ref, ...]) -> None:
            for acc, part in zip(accs, self._parts(memory, stage), strict=False):
                plgpu.wgmma(acc, weights, part)
            plgpu.wgmma(accs[-1], queries, keys)
            self._take_turn(memory)

        zeros = plgpu.layout_cast(jnp.zeros(logits_shape, jnp.float32), plgpu.Layout.WGMMA)
        products = pl.run_state(both)(tuple(Accumulator.init(x) for x in (*values, zeros)))
        return products[:-1], products[-1]

    def _add_values(self, view: View, state: Softmax, weights: Array, count: Array, index: Array) -> Softmax:
        """Adds a block's weighted values, and multiplies nothing else meanwhile."""
        memory = view.memory
        plgpu.barrier_arrive(memory.turn)
        stage = lax.rem(count, self.tiles.stages)
        plgpu.barrier_wait(memory.value_ready.at[stage])
        self._clear(view, index, stage)
        plgpu.barrier_wait(memory.turn)
        if self.tiles.interpretable:
            values = self._add_staged(memory, state.values, weights, stage)
            self._take_turn(memory)
        else:

            def multiply(accs: tuple[Ref, ...]) -> None:
                for acc, part in zip(accs, self._parts(memory, stage), strict=True):
                    plgpu.wgmma(acc, weights, part)
                self._take_turn(memory)

            values = pl.run_state(multiply)(tuple(Accumulator.init(x) for x in state.values))
        plgpu.barrier_arrive(memory.value_free.at[stage])
        return state._replace(values=values)

    def _parts(self, memory: Memory, stage: Array) -> tuple[Ref, ...]:
        """A block of values, cut into the columns that an instruction takes."""
        columns = self.shape.value_columns
        return tuple(
            memory.values.at[stage, :, pl.ds(c, columns)] if columns < self.shape.head_dim else memory.values.at[stage]
            for c in range(0, self.shape.head_dim, columns)
        )

    def _add_staged(self, memory: Memory, values: Parts, weights: Array, stage: Array) -> Parts:
        staged = memory.weights.at[lax.axis_index("warpgroup")]
        staged[...] = weights
        plgpu.commit_smem()

        def multiplied(part: Ref) -> Array:
            def multiply(acc: Ref) -> Array:
                plgpu.wgmma(acc, staged, part)
                product: Array = acc[...]
                return product

            product: Array = pl.run_scoped(multiply, Accumulator((ROWS, self.shape.value_columns), jnp.float32))
            return product

        parts = self._parts(memory, stage)
        return tuple(value + multiplied(part) for value, part in zip(values, parts, strict=True))

    def _start(self, view: View) -> Softmax:
        by_row, columns = plgpu.Layout.WGMMA.reduce(1), self.shape.value_columns
        zeros = plgpu.layout_cast(jnp.zeros((ROWS, columns), jnp.float32), plgpu.Layout.WGMMA)
        values = (zeros,) * (self.shape.head_dim // columns)
        if not self.has_sinks:
            peak = plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), by_row)
            return Softmax(peak, plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), by_row), values)
        sinks = view.arrays.sinks
        _, head = self.work.corner(view.item, lax.axis_index("warpgroup"))
        of_row = lax.div(plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=by_row), self.shape.own_tokens)
        peak = plgpu.layout_cast(jnp.full((ROWS,), sinks[head] * LOG2E, jnp.float32), by_row)
        for i in range(1, self.shape.own_heads):
            peak = jnp.where(of_row == i, sinks[head + i] * LOG2E, peak)
        return Softmax(peak, plgpu.layout_cast(jnp.ones((ROWS,), jnp.float32), by_row), values)

    def _weigh(self, view: View, index: Array, logits: Array, state: Softmax, masked: bool) -> tuple[Array, Softmax]:
        """Weights of a block, and the softmax so far with its values faded to the new maximum."""
        factor, cap = view.factor, self.config.soft_cap
        if cap is not None:
            # tanh(x) is 1 - 2 / (1 + exp(2 x)); the hardware's own is too coarse.
            logits = (1.0 - 2.0 / (1.0 + jnp.exp2(logits * factor))) * (cap * LOG2E)
        if masked:
            logits = jnp.where(self._visible(view, index), logits, -jnp.inf)
        highest = logits.max(axis=1)
        if cap is None:
            # The weights' multiplication and subtraction become one instruction.
            highest, logits = highest * factor, logits * factor
        peak = jnp.maximum(state.peak, highest)
        fade = jnp.exp2(state.peak - peak)
        weights = jnp.exp2(logits - lax.broadcast_in_dim(peak, logits.shape, [0]))
        total = state.total * fade + weights.sum(axis=1)
        # In this order, for registers: weights are narrowed before the values are touched.
        narrowed, total, fade = lax.optimization_barrier((weights.astype(self.dtype), total, fade))
        values = tuple(part * lax.broadcast_in_dim(fade, part.shape, [0]) for part in state.values)
        return narrowed, Softmax(peak, total, values)

    def _visible(self, view: View, index: Array) -> Array:
        """Which of a block's tokens each row sees."""
        shape, layout = (ROWS, self.tiles.block_tokens), plgpu.Layout.WGMMA
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=layout.reduce(1))
        token = lax.rem(row, self.shape.own_tokens)
        first = view.item.position
        if not self.shape.shares_tokens:
            first += lax.axis_index("warpgroup") * self.shape.own_tokens
        last = lax.broadcast_in_dim(token + (first - index * self.tiles.block_tokens), shape, [0])
        # Read anew, for indices made here would be kept in registers over all blocks.
        column = load(view.arrays.columns.at[0], layout.reduce(0))
        column = lax.broadcast_in_dim(column, shape, [1])
        seen = column <= last
        if self.config.sliding_window is not None:
            seen &= column > last - self.config.sliding_window
        return seen

    def _clear(self, view: View, index: Array, stage: Array) -> None:
        """Zeroes values past the context's end, once for both warpgroups: a weight of 0 times NaN is NaN."""
        memory, item, me = view.memory, view.item, lax.axis_index("warpgroup")
        start = index * self.tiles.block_tokens
        end = item.end - start
        width = self.shape.swizzle // self.shape.itemsize

        @pl.when(end < self.tiles.block_tokens)
        def _() -> None:
            @pl.when(me == 0)
            def _() -> None:
                layout = plgpu.Layout.WGMMA
                for row in range(0, self.tiles.block_tokens, ROWS):
                    at = row + plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=layout.reduce(1))
                    owned = at < end
                    if self.config.sliding_window is not None:
                        # The context's last page may stand in for those before the window.
                        owned &= at > item.position - self.config.sliding_window - start
                    owned = lax.broadcast_in_dim(owned, (ROWS, width), [0])
                    for column in range(0, self.shape.head_dim, width):
                        held = memory.values.at[stage, pl.ds(row, ROWS), pl.ds(column, width)]
                        found = plgpu.layout_cast(held[...], layout)
                        held[...] = jnp.where(owned, found, jnp.zeros_like(found))
                plgpu.commit_smem()
                plgpu.barrier_arrive(memory.cleared)

            @pl.when(me == 1)
            def _() -> None:
                plgpu.barrier_wait(memory.cleared)

    def _store(self, arrays: Inputs, memory: Memory, item: Item, state: Softmax, buffer: Array) -> None:
        """Writes a warpgroup's results."""
        me, tokens = lax.axis_index("warpgroup"), self.shape.own_tokens
        row, head = self.work.corner(item, me)
        left = item.tokens if self.shape.shares_tokens else item.tokens - me * tokens
        factor = arrays.v_scale[0] / state.total
        columns = self.shape.value_columns
        results = {
            c * columns: (part * lax.broadcast_in_dim(factor, part.shape, [0])).astype(self.dtype)
            for c, part in enumerate(state.values)
        }

        if self.num_rows >= tokens:

            @pl.when(left >= tokens)
            def store_tile() -> None:
                for column, result in results.items():
                    memory.queries[buffer, me, :, pl.ds(column, columns)] = result
                plgpu.commit_smem()
                for i in range(self.shape.own_heads):
                    plgpu.copy_smem_to_gmem(
                        memory.queries.at[buffer, me, pl.ds(i * tokens, tokens)],
                        arrays.out.at[pl.ds(row, tokens), head + i],
                    )

        @pl.when((left > 0) & (left < tokens))
        def store_rows() -> None:
            width = self.shape.edge_columns
            for column in range(0, self.shape.head_dim, width):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                at = column % columns
                _store(memory.edge.at[me, :, pl.ds(0, width)], results[column - at][:, at : at + width])
                plgpu.commit_smem()
                for i in range(self.shape.own_heads):

                    @pl.loop(0, left)
                    def _(token: Array, i: int = i, column: int = column) -> None:
                        plgpu.copy_smem_to_gmem(
                            memory.edge.at[me, i * tokens + token, pl.ds(0, width)],
                            arrays.out.at[row + token, head + i, pl.ds(column, width)],
                        )


def _store(target: Ref, value: Array) -> None:
    """Writes to shared memory in whatever pattern; assigning insists on one without bank conflicts since JAX 0.12."""
    store = vars(plgpu).get("store")
    if store is None:
        target[...] = value
    else:
        store(target, value, optimized=False)
