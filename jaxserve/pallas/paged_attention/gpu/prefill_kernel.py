"""The prefill kernel's body: what a thread block's loading and computing warpgroups do; see `prefill`.

The loader fills rings of query tiles, keys and values, item after item, and waits where a ring is full. A computing
warpgroup carries, from block to block, the products of its queries with the next block's keys and a running softmax.
Both warpgroups go through the same blocks, one turn apart.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from jaxserve.pallas.paged_attention.gpu.prefill_tiles import REGISTERS, WARPGROUPS, PrefillShape, PrefillTiles
from jaxserve.pallas.paged_attention.gpu.tiles import ROWS
from jaxserve.pallas.paged_attention.inputs import AttentionConfig

Accumulator = plgpu.WGMMAAccumulatorRef

Ref: TypeAlias = Any
"""A reference inside the kernel; Mosaic GPU's functions declare abstract ones, which is not what they are given."""

LOADER_REGISTERS = 24
"""Registers a thread of the loading warpgroup; 65,536 are shared out among the three."""

LOG2E = math.log2(math.e)

LOWEST = -1e30
"""A running maximum before anything has been seen; finite, so that differences of maxima stay numbers."""

NO_INDEX: tuple[None, ...] = (None,) if jax.__version_info__ < (0, 11) else ()
"""What `plgpu.load` wants as an index to read all of a reference; newer ones take none."""


class Inputs(NamedTuple):
    """Arrays in device memory."""

    # [T, N, H]
    q: Ref
    # [P, page_size, 2 * K, H]
    kv: Ref
    # [max_tiles, 5]
    tiles: Ref
    # [2]; tiles that there are, and the layer's first page
    counts: Ref
    # [S, pages_per_seq]
    table: Ref
    # [2]; factors of the logits, to the base 2 after a soft cap's divisor, and of the values
    factors: Ref
    # [N], or [1] if there are none
    sinks: Ref
    # [block_tokens]; 0, 1, 2 ...
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
    # [2, 64, block_tokens], or None
    weights: Ref


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


class Softmax(NamedTuple):
    """A running softmax of 64 rows: largest logit to the base 2, sum of weights, weighted values."""

    peak: Array
    total: Array
    values: Array


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """Everything static about a call.

    Attributes:
        shape: Sizes.
        tiles: How the work is cut.
        config: The attention.
        dtype: Of queries, pages and output.
        num_rows: Rows of the output.
        has_sinks: Whether heads have sinks.
    """

    shape: PrefillShape
    tiles: PrefillTiles
    config: AttentionConfig
    dtype: jnp.dtype
    num_rows: int
    has_sinks: bool

    @property
    def copies(self) -> int:
        """Copies that bring a block of keys."""
        return max(1, self.tiles.block_tokens // self.shape.page_size)

    def __call__(self, *refs: Ref) -> None:
        """The kernel's body."""
        pl.run_scoped(functools.partial(self._run, Inputs(*refs)), *self._scratch(), collective_axes="warpgroup")

    def _run(self, arrays: Inputs, *scratch: Ref) -> None:
        memory = Memory(*scratch, *([None] * (len(Memory._fields) - len(scratch))))
        thread = lax.axis_index("warpgroup")
        block = lax.axis_index("block")

        @pl.when(thread == WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
            self._load(arrays, memory, block)

        @pl.when(thread < WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(REGISTERS, action="increase")
            self._compute(arrays, memory, block)

    def _place(self, turn: Array, block: Array) -> Array:
        """Which of a round's items a thread block takes: rounds go back and forth."""
        return jnp.where(lax.rem(turn, 2) == 0, block, self.tiles.num_blocks - 1 - block)

    def _num_own(self, arrays: Inputs, block: Array) -> Array:
        """How many items a thread block takes."""
        num_items = arrays.counts[0] * self.shape.items_per_tile
        rounds, rest = lax.div(num_items, self.tiles.num_blocks), lax.rem(num_items, self.tiles.num_blocks)
        return rounds + jnp.where(self._place(rounds, block) < rest, 1, 0)

    def _item(self, arrays: Inputs, block: Array, turn: Array) -> Item:
        """Reads a thread block's n-th item; past the last, anything."""
        index = turn * self.tiles.num_blocks + self._place(turn, block)
        tile = jnp.minimum(lax.div(index, self.shape.items_per_tile), arrays.tiles.shape[0] - 1)
        unit = lax.rem(index, self.shape.items_per_tile)
        parts = self.shape.group // self.shape.item_heads
        seq, row, position, tokens, end = (arrays.tiles[tile, column] for column in range(5))
        return Item(seq, row, position, tokens, end, lax.div(unit, parts), unit * self.shape.item_heads)

    def _blocks(self, item: Item) -> Blocks:
        size, window = self.tiles.block_tokens, self.config.sliding_window
        stop = lax.div(item.position + item.tokens - 1, size) + 1
        first = whole = jnp.int32(0)
        if window is not None:
            first = lax.div(jnp.maximum(item.position - (window - 1), 0), size)
            whole = lax.div(jnp.maximum(item.position + self.shape.item_tokens - window, 0) + (size - 1), size)
        # The last block is masked in any case.
        whole = jnp.minimum(jnp.maximum(whole, first), stop - 1)
        edge = jnp.minimum(jnp.maximum(lax.div(item.position + 1, size), whole), stop - 1)
        return Blocks(first, whole, edge, stop)

    def _load(self, arrays: Inputs, memory: Memory, block: Array) -> None:
        """The loading warpgroup."""
        shape, stages, buffers = self.shape, self.tiles.stages, self.tiles.query_buffers
        unit = self.tiles.block_tokens // self.copies
        page_size = jnp.int32(shape.page_size)
        page_offset = arrays.counts[1]

        def load_queries(turn: Array, item: Item) -> None:
            buffer = lax.rem(turn, buffers)

            @pl.when(turn >= buffers)
            def _() -> None:
                plgpu.barrier_wait(memory.query_free.at[buffer])

            for warpgroup in range(WARPGROUPS):
                row, head = self._corner(item, warpgroup)
                for i in range(shape.own_heads):
                    plgpu.copy_gmem_to_smem(
                        arrays.q.at[pl.ds(row, shape.own_tokens), head + i],
                        memory.queries.at[buffer, warpgroup, pl.ds(i * shape.own_tokens, shape.own_tokens)],
                        memory.query_ready.at[buffer],
                    )

        def load_item(turn: Array, count: Array) -> Array:
            item = self._item(arrays, block, turn)
            blocks = self._blocks(item)
            load_queries(turn, item)
            low = jnp.int32(0)
            if self.config.sliding_window is not None:
                low = lax.div(jnp.maximum(item.position - (self.config.sliding_window - 1), 0), page_size)
            high = lax.div(item.position + item.tokens - 1, page_size)

            def load_block(index: Array, count: Array) -> Array:
                stage = lax.rem(count, stages)
                position = index * self.tiles.block_tokens
                page = lax.div(position, page_size)
                # A page without a visible token may be anyone's: a visible one stands in for it.
                pages = [
                    page_offset + arrays.table[item.seq, jnp.minimum(jnp.maximum(page + i, low), high)]
                    for i in range(self.copies)
                ]
                place = lax.rem(position, page_size) if self.copies == 1 else 0
                rings = (
                    (memory.keys, memory.key_ready, memory.key_free),
                    (memory.values, memory.value_ready, memory.value_free),
                )
                for side, (ring, ready, free) in enumerate(rings):

                    @pl.when(count >= stages)
                    def _(free: Ref = free) -> None:
                        plgpu.barrier_wait(free.at[stage])

                    for i, held in enumerate(pages):
                        plgpu.copy_gmem_to_smem(
                            arrays.kv.at[held, pl.ds(place, unit), 2 * item.kv_head + side],
                            ring.at[stage, pl.ds(i * unit, unit)],
                            ready.at[stage],
                        )
                return count + 1

            loaded: Array = lax.fori_loop(blocks.first, blocks.stop, load_block, count)
            return loaded

        lax.fori_loop(0, self._num_own(arrays, block), load_item, jnp.int32(0))

    def _corner(self, item: Item, warpgroup: Array | int) -> tuple[Array, Array]:
        """First row of q and first query head of a warpgroup."""
        if self.shape.shares_tokens:
            return item.row, item.head + warpgroup * self.shape.own_heads
        return item.row + warpgroup * self.shape.own_tokens, item.head

    def _compute(self, arrays: Inputs, memory: Memory, block: Array) -> None:
        """A computing warpgroup."""
        me = lax.axis_index("warpgroup")
        buffers, stages = self.tiles.query_buffers, self.tiles.stages

        # The second warpgroup is always one turn behind.
        pl.when(me == 1)(functools.partial(self._take_turn, memory))

        def compute_item(turn: Array, carry: tuple[Array, Item]) -> tuple[Array, Item]:
            count, item = carry
            # Read long before it is needed.
            following = self._item(arrays, block, turn + 1)
            buffer = lax.rem(turn, buffers)
            blocks = self._blocks(item)
            plgpu.barrier_wait(memory.query_ready.at[buffer])
            queries = memory.queries.at[buffer, me]
            factor = arrays.factors[0]
            stage = lax.rem(count, stages)
            plgpu.barrier_wait(memory.key_ready.at[stage])
            logits = self._first_logits(memory, queries, stage)

            def step(index: Array, carry: tuple[Array, Array, Softmax], masked: bool) -> tuple[Array, Array, Softmax]:
                count, logits, state = carry
                logits = self._capped(logits, factor)
                if masked:
                    logits = jnp.where(self._visible(arrays, item, me, index), logits, -jnp.inf)
                weights, state = self._weigh(logits, factor, state)
                plgpu.barrier_arrive(memory.turn)
                stage, ahead = lax.rem(count, stages), lax.rem(count + 1, stages)
                plgpu.barrier_wait(memory.value_ready.at[stage])
                if masked:
                    self._clear(memory, item, me, index, stage)
                plgpu.barrier_wait(memory.key_ready.at[ahead])
                plgpu.barrier_wait(memory.turn)
                values, logits = self._multiply(memory, state.values, weights, queries, stage, ahead)
                plgpu.barrier_arrive(memory.value_free.at[stage])
                plgpu.barrier_arrive(memory.key_free.at[ahead])
                return count + 1, logits, state._replace(values=values)

            state = (count, logits, self._start(arrays, item, me))
            masked, plain = functools.partial(step, masked=True), functools.partial(step, masked=False)
            if self.config.sliding_window is not None:
                state = lax.fori_loop(blocks.first, blocks.whole, masked, state)
            state = lax.fori_loop(blocks.whole, blocks.edge, plain, state)
            if buffers > 1:
                self._release_query(memory, turn, turn - 1)
            count, logits, softmax = lax.fori_loop(blocks.edge, blocks.stop - 1, masked, state)
            logits = self._capped(logits, factor)
            logits = jnp.where(self._visible(arrays, item, me, blocks.stop - 1), logits, -jnp.inf)
            weights, softmax = self._weigh(logits, factor, softmax)
            softmax = self._last_values(memory, item, softmax, weights, count, blocks.stop - 1)
            self._store(arrays, memory, item, softmax, buffer)
            if buffers == 1:
                self._release_query(memory, turn + 1, turn)
            return count + 1, following

        lax.fori_loop(
            0, self._num_own(arrays, block), compute_item, (jnp.int32(0), self._item(arrays, block, jnp.int32(0)))
        )
        pl.when(me == 0)(functools.partial(self._take_turn, memory))
        plgpu.wait_smem_to_gmem(0)

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

    def _first_logits(self, memory: Memory, queries: Ref, stage: Array) -> Array:
        def multiply(acc: Ref) -> Array:
            plgpu.wgmma(acc, queries, memory.keys.at[stage].transpose((1, 0)))
            self._take_turn(memory)
            product: Array = acc[...]
            return product

        logits: Array = pl.run_scoped(multiply, Accumulator((ROWS, self.tiles.block_tokens), jnp.float32))
        plgpu.barrier_arrive(memory.key_free.at[stage])
        return logits

    def _multiply(
        self, memory: Memory, values: Array, weights: Array, queries: Ref, stage: Array, ahead: Array
    ) -> tuple[Array, Array]:
        """Adds a block's weighted values, and multiplies the next block's keys meanwhile."""
        keys, held = memory.keys.at[ahead].transpose((1, 0)), memory.values.at[stage]
        logits_shape = (ROWS, self.tiles.block_tokens)
        if self.tiles.interpretable:
            added = self._add_staged(memory, values, weights, held)

            def multiply(acc: Ref) -> Array:
                plgpu.wgmma(acc, queries, keys)
                self._take_turn(memory)
                product: Array = acc[...]
                return product

            return added, pl.run_scoped(multiply, Accumulator(logits_shape, jnp.float32))

        def both(accs: tuple[Ref, Ref]) -> None:
            plgpu.wgmma(accs[0], weights, held)
            plgpu.wgmma(accs[1], queries, keys)
            self._take_turn(memory)

        zeros = plgpu.layout_cast(jnp.zeros(logits_shape, jnp.float32), plgpu.Layout.WGMMA)
        added, logits = pl.run_state(both)((Accumulator.init(values), Accumulator.init(zeros)))
        return added, logits

    def _last_values(
        self, memory: Memory, item: Item, state: Softmax, weights: Array, count: Array, index: Array
    ) -> Softmax:
        """Adds the weighted values of an item's last block, which has no next one."""
        me = lax.axis_index("warpgroup")
        plgpu.barrier_arrive(memory.turn)
        stage = lax.rem(count, self.tiles.stages)
        plgpu.barrier_wait(memory.value_ready.at[stage])
        self._clear(memory, item, me, index, stage)
        plgpu.barrier_wait(memory.turn)
        held = memory.values.at[stage]
        if self.tiles.interpretable:
            values = self._add_staged(memory, state.values, weights, held)
            self._take_turn(memory)
        else:

            def multiply(acc: Ref) -> None:
                plgpu.wgmma(acc, weights, held)
                self._take_turn(memory)

            values = pl.run_state(multiply)(Accumulator.init(state.values))
        plgpu.barrier_arrive(memory.value_free.at[stage])
        return state._replace(values=values)

    def _add_staged(self, memory: Memory, values: Array, weights: Array, held: Ref) -> Array:
        staged = memory.weights.at[lax.axis_index("warpgroup")]
        staged[...] = weights
        plgpu.commit_smem()

        def multiply(acc: Ref) -> Array:
            plgpu.wgmma(acc, staged, held)
            product: Array = acc[...]
            return product

        added: Array = pl.run_scoped(multiply, Accumulator((ROWS, self.shape.head_dim), jnp.float32))
        return values + added

    def _start(self, arrays: Inputs, item: Item, me: Array) -> Softmax:
        by_row = plgpu.Layout.WGMMA.reduce(1)
        values = plgpu.layout_cast(jnp.zeros((ROWS, self.shape.head_dim), jnp.float32), plgpu.Layout.WGMMA)
        if not self.has_sinks:
            peak = plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), by_row)
            return Softmax(peak, plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), by_row), values)
        _, head = self._corner(item, me)
        of_row = lax.div(plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=by_row), self.shape.own_tokens)
        peak = plgpu.layout_cast(jnp.full((ROWS,), arrays.sinks[head] * LOG2E, jnp.float32), by_row)
        for i in range(1, self.shape.own_heads):
            peak = jnp.where(of_row == i, arrays.sinks[head + i] * LOG2E, peak)
        return Softmax(peak, plgpu.layout_cast(jnp.ones((ROWS,), jnp.float32), by_row), values)

    def _capped(self, logits: Array, factor: Array) -> Array:
        """Capped logits to the base 2; without a cap, products as they are, which `_weigh` scales."""
        cap = self.config.soft_cap
        if cap is None:
            return logits
        # tanh(x) is 1 - 2 / (1 + exp(2 x)); the hardware's own is too coarse.
        return (1.0 - 2.0 / (1.0 + jnp.exp2(logits * factor))) * (cap * LOG2E)

    def _weigh(self, logits: Array, factor: Array, state: Softmax) -> tuple[Array, Softmax]:
        """Weights of a block, and the softmax so far with its values faded to the new maximum."""
        highest = logits.max(axis=1)
        if self.config.soft_cap is None:
            # The weights' multiplication and subtraction become one instruction.
            highest, logits = highest * factor, logits * factor
        peak = jnp.maximum(state.peak, highest)
        fade = jnp.exp2(state.peak - peak)
        weights = jnp.exp2(logits - lax.broadcast_in_dim(peak, logits.shape, [0]))
        total = state.total * fade + weights.sum(axis=1)
        values = state.values * lax.broadcast_in_dim(fade, state.values.shape, [0])
        return weights.astype(self.dtype), Softmax(peak, total, values)

    def _visible(self, arrays: Inputs, item: Item, me: Array, index: Array) -> Array:
        """Which of a block's tokens each row sees."""
        shape, layout = (ROWS, self.tiles.block_tokens), plgpu.Layout.WGMMA
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=layout.reduce(1))
        token = lax.rem(row, self.shape.own_tokens)
        first = item.position if self.shape.shares_tokens else item.position + me * self.shape.own_tokens
        last = lax.broadcast_in_dim(token + (first - index * self.tiles.block_tokens), shape, [0])
        # Read anew, for indices made here would be kept in registers over all blocks.
        column = plgpu.load(arrays.columns, *NO_INDEX, layout=layout.reduce(0), optimized=False)
        column = lax.broadcast_in_dim(column, shape, [1])
        seen = column <= last
        if self.config.sliding_window is not None:
            seen &= column > last - self.config.sliding_window
        return seen

    def _clear(self, memory: Memory, item: Item, me: Array, index: Array, stage: Array) -> None:
        """Zeroes values past the context's end, once for both warpgroups: a weight of 0 times NaN is NaN."""
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
        row, head = self._corner(item, me)
        left = item.tokens if self.shape.shares_tokens else item.tokens - me * tokens
        factor = arrays.factors[1] / state.total
        result = (state.values * lax.broadcast_in_dim(factor, state.values.shape, [0])).astype(self.dtype)

        if self.num_rows >= tokens:

            @pl.when(left >= tokens)
            def store_tile() -> None:
                tile = memory.queries.at[buffer, me]
                tile[...] = result
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
                _store(memory.edge.at[me, :, pl.ds(0, width)], result[:, column : column + width])
                plgpu.commit_smem()
                for i in range(self.shape.own_heads):

                    @pl.loop(0, left)
                    def _(token: Array, i: int = i, column: int = column) -> None:
                        plgpu.copy_smem_to_gmem(
                            memory.edge.at[me, i * tokens + token, pl.ds(0, width)],
                            arrays.out.at[row + token, head + i, pl.ds(column, width)],
                        )

    def _scratch(self) -> tuple[Any, ...]:
        """Shared memory and barriers, in the order of `Memory`."""
        shape, tiles = self.shape, self.tiles
        elements = shape.swizzle // shape.itemsize
        tiled = (plgpu.TilingTransform((8, elements)), plgpu.SwizzleTransform(shape.swizzle))
        tile = functools.partial(plgpu.SMEM, dtype=self.dtype, transforms=tiled)
        ring = (tiles.stages, tiles.block_tokens, shape.head_dim)
        arrive = functools.partial(plgpu.Barrier, num_barriers=tiles.stages)
        return (
            tile((tiles.query_buffers, WARPGROUPS, ROWS, shape.head_dim)),
            tile(ring),
            tile(ring),
            plgpu.SMEM((WARPGROUPS, ROWS, shape.edge_pitch), self.dtype),
            plgpu.Barrier(num_arrivals=WARPGROUPS * shape.own_heads, num_barriers=tiles.query_buffers),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=tiles.query_buffers),
            arrive(num_arrivals=self.copies),
            arrive(num_arrivals=WARPGROUPS),
            arrive(num_arrivals=self.copies),
            arrive(num_arrivals=WARPGROUPS),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
            *([tile((WARPGROUPS, ROWS, tiles.block_tokens))] if tiles.interpretable else []),
        )


def _store(target: Ref, value: Array) -> None:
    """Writes to shared memory in whatever pattern; assigning insists on one without bank conflicts since JAX 0.12."""
    store = vars(plgpu).get("store")
    if store is None:
        target[...] = value
    else:
        store(target, value, optimized=False)
