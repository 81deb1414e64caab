"""Decode on Hopper: each sequence's one query row a head attends to its pages, split along the context.

Work items are (sequence, split of its context, KV head). Persistent workers, two to a thread block, each a loading and
a computing warpgroup, take every n-th item:

    pages (GMEM)    --TMA-->  ring of blocks of keys and of values (SMEM)     loading warpgroup, up to a ring ahead
    queries (GMEM)  --TMA-->  64-row tile (SMEM)                              an item ahead
    wgmma, running softmax (registers, float32; arXiv:1805.02867)
    sums, peaks, totals       --SMEM, TMA-->  partial results (GMEM)

`combine` then adds a sequence's partial results up in order of position (split KV, as in Flash-Decoding). Splits and
their order depend on positions alone, so a sequence's result is the same to the bit whatever else is in the batch.

Query heads of a KV head are rows of a 64-row tile, the least wgmma takes; the others are computed and dropped, which
costs nothing where memory is the bound. Pools of 8 bits are widened block by block in shared memory. Elements of the
pool that may not be read can be NaN: logits are masked, and a block of values that is not visible in full has the
others cleared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32, Shaped

from jaxserve.pallas.paged_attention.gpu.agenda import Agenda, Item, Splits, agenda_size, decode_splits
from jaxserve.pallas.paged_attention.gpu.blocks import tiled, widen
from jaxserve.pallas.paged_attention.gpu.combine import Partials, combine
from jaxserve.pallas.paged_attention.gpu.support import check_support, num_blocks
from jaxserve.pallas.paged_attention.gpu.tiles import (
    BLOCK_TOKENS,
    ROWS,
    DecodeShape,
    DecodeTiles,
    decode_tiles,
)
from jaxserve.pallas.paged_attention.inputs import AttentionConfig, AttentionLayer, RaggedBatch

LOG2E = math.log2(math.e)

WIDENED_COLUMNS = 128
"""Columns that are widened at a time, or fewer that divide a head."""

COMPUTE_REGISTERS = (256, 208)
LOAD_REGISTERS = 40
"""Registers a thread, with one worker or two, after the warpgroups have shared out a multiprocessor's 64 Ki."""

Ref: TypeAlias = Any
Scalar: TypeAlias = Int32[Array, ""]
Block: TypeAlias = Float[Array, "rows columns"]


def attend_decodes(
    q: Float[Array, "T N H"],
    kv_pages: Shaped[Array, "P page_size K2 H"],
    batch: RaggedBatch,
    layer: AttentionLayer,
    config: AttentionConfig,
    tiles: DecodeTiles | None = None,
) -> Float[Array, "D N H"]:
    """Attends for sequences [0, num_decodes), whose rows of q are the first ones.

    Args:
        q: [T, N, H].
        kv_pages: The pool, the new tokens already in it.
        batch: Sequences, pages and positions.
        layer: The layer's place in the pool, its sinks and its scales.
        config: Static facts.
        tiles: How to cut the work; the heuristic's choice if None.

    Returns:
        Rows [0, min(S, T)) of the output; those that are not decodes are zeros.

    Raises:
        NotImplementedError: The shapes or dtypes do not suit the chip.
    """
    shape = decode_shape(q, kv_pages, batch)
    tiles = tiles or decode_tiles(shape, num_blocks=num_blocks())
    tiles.check(shape)
    splits = decode_splits(tiles.split_tokens, config.sliding_window, shape.page_size * shape.pages_per_seq)
    plan = Plan(
        shape=shape, tiles=tiles, splits=splits, soft_cap=config.soft_cap, dtype=q.dtype, kv_dtype=kv_pages.dtype
    )
    partials = _attend(plan, q, kv_pages, batch, layer, config.scale)
    return combine(partials, batch, layer, shape, splits, q)


def decode_shape(q: Array, kv_pages: Array, batch: RaggedBatch) -> DecodeShape:
    """Static facts about a decode that the chip and the kernel can do.

    Args:
        q: [T, N, H].
        kv_pages: The pool.
        batch: Sequences, pages and positions.

    Raises:
        NotImplementedError: They cannot.
    """
    check_support(q, kv_pages)
    page_size, heads2, head_dim = kv_pages.shape[1:]
    return DecodeShape(
        num_seqs=batch.page_table.shape[0],
        num_kv_heads=heads2 // 2,
        group=q.shape[1] * 2 // heads2,
        head_dim=head_dim,
        page_size=page_size,
        pages_per_seq=batch.page_table.shape[1],
        itemsize=q.dtype.itemsize,
        kv_itemsize=kv_pages.dtype.itemsize,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything static that the kernel knows."""

    shape: DecodeShape
    tiles: DecodeTiles
    splits: Splits
    soft_cap: float | None
    dtype: jnp.dtype
    kv_dtype: jnp.dtype

    @property
    def copies(self) -> int:
        """Copies that fill an entry of the ring: one a page."""
        return max(1, BLOCK_TOKENS // self.shape.page_size)

    @property
    def stride(self) -> int:
        """Workers on the chip."""
        return self.tiles.num_blocks * self.tiles.workers

    def slot(self, worker: Scalar, count: Scalar) -> Scalar:
        """The place in the ring of a worker's entry number `count`."""
        return worker * self.tiles.entries + lax.rem(count, jnp.int32(self.tiles.entries))


class Refs(NamedTuple):
    """Everything the kernel touches."""

    # GMEM: [T * N, H]; the pool; [S]; [1]; [S, pages_per_seq]; [1]; [1]
    q: Ref
    kv: Ref
    lens: Ref
    num_decodes: Ref
    table: Ref
    page_offset: Ref
    scale: Ref
    # GMEM: results
    partials: Partials
    # SMEM, a worker's one after another: entries of the rings; queries; columns and statistics on their way out
    ring: Ref
    queries: Ref
    outgoing: Ref
    rows: Ref
    # SMEM, a warpgroup's one after another: agendas
    begins: Ref
    # barriers: an entry is full, is empty again; a worker's queries have come
    full: Ref
    empty: Ref
    asked: Ref
    # SMEM: a worker's block of keys or values in the queries' dtype, if the pool has another, else None
    wide: Ref
    # SMEM: weights, if the interpreter is to run this, else None
    weights: Ref


class Worker(NamedTuple):
    """One of the chip's workers, as one of its two warpgroups sees it."""

    agenda: Agenda
    # place in the thread block; first item; how many items it has
    place: Scalar
    first: Scalar
    num_items: Scalar
    # the pool's page at which the layer begins; what logits are multiplied by
    page_offset: Scalar
    scale: Float[Array, ""]


def _kernel(plan: Plan, *arguments: Ref) -> None:
    given, (values, peaks, totals), scratch = arguments[:7], arguments[7:10], arguments[10:]
    refs = Refs._make((*given, Partials(values, peaks, totals), *scratch))
    workers = plan.tiles.workers
    thread = lax.axis_index("warpgroup")
    agenda = Agenda(refs.begins.at[thread], refs.lens, plan.splits, plan.shape.num_seqs, plan.shape.num_kv_heads)
    total = agenda.write(refs.num_decodes[0])
    index = lax.rem(thread, jnp.int32(workers))
    first = lax.axis_index("block") * workers + index
    num_items = lax.div(total - first + (plan.stride - 1), jnp.int32(plan.stride))
    worker = Worker(agenda, index, first, num_items, refs.page_offset[0], refs.scale[0])

    @pl.when(thread >= workers)
    def _() -> None:
        plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")
        lax.fori_loop(0, num_items, lambda i, count: _load(plan, refs, worker, i, count), jnp.int32(0))

    @pl.when(thread < workers)
    def _() -> None:
        plgpu.set_max_registers(COMPUTE_REGISTERS[workers - 1], action="increase")
        _start_queries(plan, refs, worker)
        lax.fori_loop(0, num_items, lambda i, count: _compute(plan, refs, worker, i, count), jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def _load(plan: Plan, refs: Refs, worker: Worker, i: Scalar, count: Scalar) -> Scalar:
    """Gathers an item's blocks into the ring; returns how many entries this worker has filled by then."""
    item = worker.agenda.item(worker.first + i * plan.stride)
    size = plan.shape.page_size
    unit = BLOCK_TOKENS // plan.copies
    low, high = lax.div(item.start, jnp.int32(size)), lax.div(item.stop - 1, jnp.int32(size))

    def fill(count: Scalar, pages: list[Scalar], place: Scalar | int, row: Scalar) -> Scalar:
        slot = plan.slot(worker.place, count)

        @pl.when(count >= plan.tiles.entries)
        def _() -> None:
            plgpu.barrier_wait(refs.empty.at[slot])

        for u, page in enumerate(pages):
            source = refs.kv.at[page, pl.ds(place, unit), row]
            plgpu.copy_gmem_to_smem(source, refs.ring.at[slot, pl.ds(u * unit, unit)], refs.full.at[slot])
        return count + 1

    def block(j: Scalar, count: Scalar) -> Scalar:
        position = (item.first_block + j) * BLOCK_TOKENS
        page = lax.div(position, jnp.int32(size))
        # Pages without a visible position need not be this sequence's: one that has one stands in for them.
        owned = [jnp.minimum(jnp.maximum(page + u, low), high) for u in range(plan.copies)]
        pages = [worker.page_offset + refs.table[item.seq, index] for index in owned]
        place = lax.rem(position, jnp.int32(size)) if size > BLOCK_TOKENS else 0
        count = fill(count, pages, place, 2 * item.head)
        return fill(count, pages, place, 2 * item.head + 1)

    filled: Scalar = lax.fori_loop(0, item.num_blocks, block, count)
    return filled


def _start_queries(plan: Plan, refs: Refs, worker: Worker) -> None:
    """Clears the rows that no query fills, and asks for the first item's queries."""
    zeros = jnp.zeros((ROWS, plan.shape.head_dim), plan.dtype)
    refs.queries[worker.place] = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
    plgpu.commit_smem()
    _fetch_queries(plan, refs, worker, jnp.int32(0))


def _fetch_queries(plan: Plan, refs: Refs, worker: Worker, i: Scalar) -> None:
    """Asks for an item's queries, if there is such an item; rows past the group's are some other heads'."""

    @pl.when(i < worker.num_items)
    def _() -> None:
        item = worker.agenda.item(worker.first + i * plan.stride)
        rows = plan.shape.padded_group
        source = refs.q.at[pl.ds((item.seq * plan.shape.num_kv_heads + item.head) * plan.shape.group, rows)]
        target = refs.queries.at[worker.place, pl.ds(0, rows)]
        plgpu.copy_gmem_to_smem(source, target, refs.asked.at[worker.place])


class Sums(NamedTuple):
    """A running softmax: weighted sum of values; largest logit, in base 2; sum of weights."""

    values: Float[Array, "rows H"]
    peak: Float[Array, " rows"]
    total: Float[Array, " rows"]


def _compute(plan: Plan, refs: Refs, worker: Worker, i: Scalar, count: Scalar) -> Scalar:
    """Attends over an item's blocks as they come, and sends the result out; returns how many entries were used."""
    item = worker.agenda.item(worker.first + i * plan.stride)
    plgpu.barrier_wait(refs.asked.at[worker.place])

    def block(j: Scalar, carry: tuple[Scalar, Sums]) -> tuple[Scalar, Sums]:
        count, sums = carry
        begin = (item.first_block + j) * BLOCK_TOKENS
        keys = _await_block(plan, refs, worker, count)
        logits = _logits(plan, refs, worker, item, begin, keys)
        _release_block(plan, refs, worker, count)

        peak = jnp.maximum(sums.peak, logits.max(axis=1))
        fade = jnp.exp2(sums.peak - peak)
        weights = jnp.exp2(logits - lax.broadcast_in_dim(peak, logits.shape, [0]))
        total = sums.total * fade + weights.sum(axis=1)
        # In this order, for registers: weights are narrowed before the sum is touched.
        weights, total, fade = lax.optimization_barrier((weights.astype(plan.dtype), total, fade))
        faded = sums.values * lax.broadcast_in_dim(fade, sums.values.shape, [0])

        held = _await_block(plan, refs, worker, count + 1)
        _clear_unseen(item, begin, held)
        values = _add_values(plan, refs, worker, weights, faded, held)
        _release_block(plan, refs, worker, count + 1)
        return count + 2, Sums(values, peak, total)

    by_row = plgpu.Layout.WGMMA.reduce(1)
    nothing = Sums(
        plgpu.layout_cast(jnp.zeros((ROWS, plan.shape.head_dim), jnp.float32), plgpu.Layout.WGMMA),
        plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), by_row),
        plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), by_row),
    )
    count, sums = lax.fori_loop(0, item.num_blocks, block, (count, nothing))
    _fetch_queries(plan, refs, worker, i + 1)
    _send(plan, refs, worker, item, sums)
    return count


def _await_block(plan: Plan, refs: Refs, worker: Worker, count: Scalar) -> Ref:
    """Waits for entry number `count`, and returns where its keys or values lie in the queries' dtype."""
    slot = plan.slot(worker.place, count)
    plgpu.barrier_wait(refs.full.at[slot])
    if refs.wide is None:
        return refs.ring.at[slot]
    widen(refs.ring, slot, refs.wide, worker.place, WIDENED_COLUMNS)
    # Fenced before the loader may overwrite what has been read, and before wgmma reads what has been written.
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs.empty.at[slot])
    return refs.wide.at[worker.place]


def _release_block(plan: Plan, refs: Refs, worker: Worker, count: Scalar) -> None:
    """Gives entry number `count` back to the loader, unless widening it already has."""
    if refs.wide is None:
        plgpu.barrier_arrive(refs.empty.at[plan.slot(worker.place, count)])


def _logits(plan: Plan, refs: Refs, worker: Worker, item: Item, begin: Scalar, keys: Ref) -> Block:
    """Logits of a block of keys times log2(e), -inf where nothing is visible."""

    def multiply(acc: Ref) -> Block:
        # Opaque, lest the descriptors of all of the queries' tiles be kept in registers over the loop.
        own = lax.optimization_barrier(worker.place)
        plgpu.wgmma(acc, refs.queries.at[own], keys.transpose((1, 0)))
        product: Block = acc[...]
        return product

    logits = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((ROWS, BLOCK_TOKENS), jnp.float32))
    if plan.soft_cap is None:
        logits = logits * (worker.scale * LOG2E)
    else:
        # tanh(x) is 1 - 2 / (1 + exp(2 x)); the hardware's own is good to 11 bits only.
        grown = jnp.exp2(logits * (worker.scale * (2 * LOG2E / plan.soft_cap)))
        logits = (1.0 - 2.0 / (1.0 + grown)) * (plan.soft_cap * LOG2E)
    return jnp.where(_seen(item, begin, logits.shape, 1), logits, -jnp.inf)


def _seen(item: Item, begin: Scalar, shape: tuple[int, ...], axis: int) -> Array:
    """Which positions along an axis, counted from `begin`, are visible."""
    position = begin + plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)
    return (position >= item.start) & (position < item.stop)


def _clear_unseen(item: Item, begin: Scalar, held: Ref) -> None:
    """Clears values of a block that are not visible, for they may be NaN and weigh 0."""

    @pl.when((begin < item.start) | (begin + BLOCK_TOKENS > item.stop))
    def _() -> None:
        values = plgpu.layout_cast(held[...], plgpu.Layout.WGMMA)
        held[...] = jnp.where(_seen(item, begin, values.shape, 0), values, jnp.zeros_like(values))
        plgpu.commit_smem()


def _add_values(plan: Plan, refs: Refs, worker: Worker, weights: Block, faded: Block, held: Ref) -> Block:
    """Adds a block's weighted values to the sum so far."""
    if plan.tiles.interpretable:
        refs.weights[worker.place] = weights
        plgpu.commit_smem()

        def multiply(acc: Ref) -> Block:
            plgpu.wgmma(acc, refs.weights.at[worker.place], held)
            product: Block = acc[...]
            return product

        added: Block = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((ROWS, plan.shape.head_dim), jnp.float32))
        return faded + added

    def add(acc: Ref) -> None:
        plgpu.wgmma(acc, weights, held)

    values: Block = pl.run_state(add)(plgpu.WGMMAAccumulatorRef.init(faded))
    return values


def _send(plan: Plan, refs: Refs, worker: Worker, item: Item, sums: Sums) -> None:
    """Sends an item's result on its way, once that of the item before has left shared memory."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    refs.rows[worker.place, 0] = sums.peak
    refs.rows[worker.place, 1] = sums.total
    columns = plan.shape.stage_columns
    for c in range(0, plan.shape.head_dim, columns):
        if c:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        refs.outgoing[worker.place] = sums.values[:, c : c + columns]
        plgpu.commit_smem()
        source = refs.outgoing.at[worker.place, pl.ds(0, plan.shape.padded_group)]
        plgpu.copy_smem_to_gmem(source, refs.partials.values.at[item.place, item.head, :, pl.ds(c, columns)])
    plgpu.copy_smem_to_gmem(refs.rows.at[worker.place, 0], refs.partials.peaks.at[item.place, item.head])
    plgpu.copy_smem_to_gmem(refs.rows.at[worker.place, 1], refs.partials.totals.at[item.place, item.head])


def _attend(plan: Plan, q: Array, kv_pages: Array, batch: RaggedBatch, layer: AttentionLayer, scale: float) -> Partials:
    """Runs the kernel."""
    shape, tiles = plan.shape, plan.tiles
    places = shape.num_seqs * plan.splits.most
    by_row = jax.ShapeDtypeStruct((places, shape.num_kv_heads, ROWS), jnp.float32)
    by_head = jax.ShapeDtypeStruct((places, shape.num_kv_heads, shape.padded_group, shape.head_dim), jnp.float32)
    num_entries = tiles.workers * tiles.entries
    run = plgpu.kernel(
        _named(plan),
        out_type=(by_head, by_row, by_row),
        scratch_types=(
            tiled((num_entries, BLOCK_TOKENS, shape.head_dim), plan.kv_dtype),
            tiled((tiles.workers, ROWS, shape.head_dim), plan.dtype),
            tiled((tiles.workers, ROWS, shape.stage_columns), jnp.dtype(jnp.float32)),
            plgpu.SMEM((tiles.workers, 2, ROWS), jnp.float32),
            plgpu.SMEM((2 * tiles.workers, agenda_size(shape.num_seqs)), jnp.int32),
            plgpu.Barrier(num_arrivals=plan.copies, num_barriers=num_entries),
            plgpu.Barrier(num_barriers=num_entries),
            plgpu.Barrier(num_barriers=tiles.workers),
            None if plan.kv_dtype == plan.dtype else tiled((tiles.workers, BLOCK_TOKENS, shape.head_dim), plan.dtype),
            tiled((tiles.workers, ROWS, BLOCK_TOKENS), plan.dtype) if tiles.interpretable else None,
        ),
        grid=(tiles.num_blocks,),
        grid_names=("block",),
        num_threads=2 * tiles.workers,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    # Hardware fills rows past the end with zeros; only the box must fit the array. The interpreter allows neither.
    queries = q.reshape(-1, shape.head_dim)
    margin = shape.padded_group - (0 if tiles.interpretable else queries.shape[0])
    if margin > 0:
        queries = jnp.pad(queries, ((0, margin), (0, 0)))
    factor = jnp.float32(scale) if layer.k_scale is None else scale * layer.k_scale
    values, peaks, totals = run(
        queries,
        kv_pages,
        batch.context_lens,
        batch.num_decodes[None],
        batch.page_table,
        layer.page_offset[None],
        factor[None],
    )
    return Partials(values, peaks, totals)


def _named(plan: Plan) -> Callable[..., None]:
    def paged_decode(*refs: Ref) -> None:
        _kernel(plan, *refs)

    return paged_decode
