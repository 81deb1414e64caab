"""Prefill on a TPU: the prompt chunks of a step, one Mosaic kernel, new keys and values written into the pool by it.

Queries and new keys and values stay in HBM and are copied row by row of the ragged batch; nothing is ever read or
written but what the chunks own. The kernel walks items, one query tile of one chunk each:

    new K, V (HBM)  --DMA-->  pages (HBM)            a chunk ahead of its first item
    queries (HBM)   --DMA-->  VMEM, rows by KV head  an item ahead
    pages (HBM)     --DMA-->  VMEM, K and V by head  a KV tile ahead
    running softmax (VMEM, float32)  -->  output rows (HBM)

A row is a token and a query head; rows of a block are ordered (head of the group, token), blocks by token. Softmax is
computed online (arXiv:1805.02867) in base 2: the scale and log2(e) are multiplied into the queries. KV tiles beyond
the diagonal, and outside a sliding window, are neither fetched nor computed; only blocks that a border crosses are
masked. Row sums are kept as 128 partial sums and added up at the end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Shaped

from jaxserve.pallas.paged_attention.inputs import AttentionConfig, AttentionLayer, RaggedBatch
from jaxserve.pallas.paged_attention.tpu.calls import (
    LOG2_E,
    attention_factors,
    current_core,
    matmul,
    sink_rows,
    table_rows,
)
from jaxserve.pallas.paged_attention.tpu.prefill_layout import (
    aligned,
    divide,
    keys_or_values,
    load_queries,
    store,
    unpack,
)
from jaxserve.pallas.paged_attention.tpu.prefill_refs import Item, Plan, Ref, Refs, Scalar, Span, copy_out, copy_queries
from jaxserve.pallas.paged_attention.tpu.prefill_tiles import (
    LANES,
    Geometry,
    PrefillTiles,
    Sizes,
    choose_tiles,
)

Carry: TypeAlias = tuple[Scalar, Scalar, Scalar, Scalar, Scalar]


def prefill(
    q: Float[Array, "T N H"],
    new_kv: Shaped[Array, "T K2 H"],
    kv_pages: Shaped[Array, "P page_size K2 H"],
    out: Float[Array, "T N H"],
    batch: RaggedBatch,
    layer: AttentionLayer,
    *,
    config: AttentionConfig,
    tiles: PrefillTiles | None = None,
) -> tuple[Float[Array, "T N H"], Shaped[Array, "P page_size K2 H"]]:
    """Writes the chunks' new keys and values into their pages and attends; decodes and padding are left alone.

    Args:
        q: Queries.
        new_kv: New keys and values as elements of the pool, interleaved like a page's.
        kv_pages: The pool; changed in place if it is donated.
        out: Changed in place: the chunks' rows.
        batch: Sequences, pages and positions.
        layer: The layer's place in the pool, its sinks and its scales.
        config: Static facts about the model's attention.
        tiles: Tile sizes; chosen for the core if None.

    Returns:
        `out` with the chunks' rows, and the pool.

    Raises:
        NotImplementedError: Not even the smallest tiles fit into VMEM, or rows of the page table into SMEM.
    """
    sizes = Sizes(
        page_size=kv_pages.shape[1],
        num_heads=q.shape[1],
        num_kv_heads=kv_pages.shape[2] // 2,
        head_dim=q.shape[2],
        query_dtype=q.dtype,
        kv_dtype=kv_pages.dtype,
        max_tokens=q.shape[0],
        max_context=batch.page_table.shape[1] * kv_pages.shape[1],
        sliding_window=config.sliding_window,
    )
    core = current_core()
    geometry = sizes.cut(choose_tiles(sizes, core) if tiles is None else tiles)
    plan = Plan(geometry=geometry, config=config, pages_per_seq=batch.page_table.shape[1])
    scalars = (
        jnp.stack([layer.page_offset, batch.num_decodes, batch.num_seqs]),
        batch.context_lens,
        batch.query_starts,
        attention_factors(layer, config),
    )
    anywhere, vmem = pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pltpu.VMEM)
    sinks = () if layer.sinks is None else (sink_rows(layer.sinks),)
    first = len(scalars)
    results: tuple[Array, Array] = pl.pallas_call(
        functools.partial(_kernel, plan, bool(sinks)),
        out_shape=(jax.ShapeDtypeStruct(out.shape, out.dtype), jax.ShapeDtypeStruct(kv_pages.shape, kv_pages.dtype)),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM)] * first + [anywhere] * 5 + [vmem] * len(sinks),
        out_specs=(anywhere, anywhere),
        scratch_shapes=_scratch(plan),
        input_output_aliases={first + 3: 0, first + 4: 1},
        compiler_params=pltpu.CompilerParams(
            disable_bounds_checks=True, has_side_effects=True, vmem_limit_bytes=core.vmem_limit(geometry.vmem_bytes)
        ),
        name="paged_attention_prefill",
    )(*scalars, table_rows(batch.page_table), q, new_kv, out, kv_pages, *sinks)
    return results


def _scratch(plan: Plan) -> list[Any]:
    buffers = {name: pltpu.VMEM(shape, dtype) for name, (shape, dtype) in plan.geometry.buffers().items()}
    one, two = pltpu.SemaphoreType.DMA, pltpu.SemaphoreType.DMA((2,))
    row = pltpu.SMEM((1, plan.pages_per_seq + -plan.pages_per_seq % LANES), jnp.int32)
    tables = {"write_table": row, "read_table": row, "table_done": one}
    return [buffers, tables | {"queries_done": one, "kv_done": two, "out_done": one, "writes_done": one}]


def _refs(has_sinks: bool, refs: tuple[Ref, ...]) -> Refs:
    """Names the kernel's arguments."""
    names = ["counts", "contexts", "starts", "factors", "table", "queries", "new", "aliased_out", "aliased_pages"]
    names += ["sinks"] * has_sinks + ["out", "pages"]
    named = {"sinks": None, **dict(zip(names, refs[: len(names)], strict=True))}
    del named["aliased_out"], named["aliased_pages"]
    return Refs(**named, **refs[-2], **refs[-1])


def _kernel(plan: Plan, has_sinks: bool, *arguments: Ref) -> None:
    refs = _refs(has_sinks, arguments)
    num_seqs = refs.counts[2]
    seq = _nonempty(refs, refs.counts[1])

    @pl.when(seq < num_seqs)
    def _() -> None:
        _write_pages(plan, refs, seq, wait=False)
        item = _item(plan, refs, seq, jnp.int32(0))
        _start_item(plan, refs, item, jnp.int32(0))

    def step(carry: Carry) -> Carry:
        seq, tile, fetched, row, tokens = carry
        item = _item(plan, refs, seq, tile)
        following = _following(plan, refs, item)
        load_queries(plan, refs, item)

        def visit(j: Scalar, slot: Scalar) -> Scalar:
            _prefetch(plan, refs, item, following, j + 1, 1 - slot)
            _wait_kv(plan, refs, item, j, slot)
            unpack(plan, refs, item, j, slot)
            _attend_tile(plan, refs, item, j)
            return 1 - slot

        slot = jax.lax.fori_loop(item.first, item.end, visit, fetched)
        divide(plan, refs, item)
        _wait_out(refs, row, tokens)
        store(plan, refs, item)
        return (*following, slot, item.row, item.tokens)

    zero = jnp.int32(0)
    carry = jax.lax.while_loop(lambda carry: carry[0] < num_seqs, step, (seq, zero, zero, zero, zero))
    _wait_out(refs, carry[3], carry[4])


def _nonempty(refs: Refs, seq: Scalar) -> Scalar:
    """The first sequence from `seq` on that has new tokens; num_seqs if there is none."""
    num_seqs = refs.counts[2]

    def is_empty(s: Scalar) -> Array:
        at = jnp.clip(s, 0, jnp.maximum(num_seqs - 1, 0))
        empty: Array = (s < num_seqs) & (refs.starts[at + 1] == refs.starts[at])
        return empty

    found: Scalar = jax.lax.while_loop(is_empty, lambda s: s + 1, seq)
    return found


def _item(plan: Plan, refs: Refs, seq: Scalar, tile: Scalar) -> Item:
    g = plan.geometry
    start, context = refs.starts[seq], refs.contexts[seq]
    num_new = refs.starts[seq + 1] - start
    skipped = tile * g.tiles.query_tokens
    tokens = jnp.minimum(num_new - skipped, g.tiles.query_tokens)
    position = context - num_new + skipped
    first = jnp.int32(0)
    if plan.config.sliding_window is not None:
        first = jnp.maximum(position - (plan.config.sliding_window - 1), 0) // g.tile_tokens
    end = pl.cdiv(position + tokens, g.tile_tokens)
    return Item(seq, tile, start + skipped, tokens, position, first, end)


def _following(plan: Plan, refs: Refs, item: Item) -> tuple[Scalar, Scalar]:
    """Sequence and tile of the next item; num_seqs if there is none."""
    num_new = refs.starts[item.seq + 1] - refs.starts[item.seq]
    more = (item.tile + 1) * plan.geometry.tiles.query_tokens < num_new
    seq = jnp.where(more, item.seq, _nonempty(refs, item.seq + 1))
    return seq, jnp.where(more, item.tile + 1, 0)


def _write_pages(plan: Plan, refs: Refs, seq: Scalar, *, wait: bool) -> None:
    """Starts, or waits for, the copies of a chunk's new keys and values to their places."""
    size = plan.geometry.page_size
    start, end = refs.starts[seq], refs.contexts[seq]
    begin = end - (refs.starts[seq + 1] - start)
    if not wait:
        _load_row(refs, seq, refs.write_table)

    # A wait counts bytes; which page they are of does not matter, and the row may be the next chunk's by then.
    def copy(index: Scalar, _: None) -> None:
        low, high = jnp.maximum(index * size, begin), jnp.minimum((index + 1) * size, end)
        page = refs.counts[0] + (0 if wait else refs.write_table[0, index])
        source = refs.new.at[pl.ds(start + low - begin, high - low)]
        target = refs.pages.at[page, pl.ds(low - index * size, high - low)]
        dma = pltpu.make_async_copy(source, target, refs.writes_done)
        dma.wait() if wait else dma.start()

    jax.lax.fori_loop(begin // size, pl.cdiv(end, size), copy, None)


def _load_row(refs: Refs, seq: Scalar, row: Ref) -> None:
    """Copies a sequence's row of the page table into SMEM."""
    dma = pltpu.make_async_copy(refs.table.at[seq], row, refs.table_done)
    dma.start()
    dma.wait()


def _wait_out(refs: Refs, row: Scalar, tokens: Scalar) -> None:
    """Waits until the rows of the item before have left."""

    @pl.when(tokens > 0)
    def _() -> None:
        copy_out(refs, row, tokens).wait()


def _copy_kv(plan: Plan, refs: Refs, item: Item, j: Scalar, slot: Scalar, *, wait: bool) -> None:
    """Starts, or waits for, the copies of the pages of KV tile j that the item's queries may see."""
    g = plan.geometry
    num_pages = pl.cdiv(item.position + item.tokens, g.page_size)
    first, end = j * g.tiles.pages, jnp.minimum((j + 1) * g.tiles.pages, num_pages)

    def copy(index: Scalar, _: None) -> None:
        page = refs.counts[0] + (0 if wait else refs.read_table[0, index])
        target = refs.raw_kv.at[slot, pl.ds((index - first) * g.page_size, g.page_size)]
        dma = pltpu.make_async_copy(refs.pages.at[page], target, refs.kv_done.at[slot])
        dma.wait() if wait else dma.start()

    jax.lax.fori_loop(first, end, copy, None)


def _wait_kv(plan: Plan, refs: Refs, item: Item, j: Scalar, slot: Scalar) -> None:
    _copy_kv(plan, refs, item, j, slot, wait=True)


def _start_item(plan: Plan, refs: Refs, item: Item, slot: Scalar) -> None:
    """Starts the copies of an item's first KV tile, after its chunk's pages have been written."""
    copy_queries(refs, item).start()

    @pl.when(item.tile == 0)
    def _() -> None:
        _write_pages(plan, refs, item.seq, wait=True)
        _load_row(refs, item.seq, refs.read_table)
        ahead = _nonempty(refs, item.seq + 1)

        @pl.when(ahead < refs.counts[2])
        def _() -> None:
            _write_pages(plan, refs, ahead, wait=False)

    _copy_kv(plan, refs, item, item.first, slot, wait=False)


def _prefetch(plan: Plan, refs: Refs, item: Item, following: tuple[Scalar, Scalar], j: Scalar, slot: Scalar) -> None:
    """Starts the copies of the KV tile after this one, of the next item if this item has no more."""

    @pl.when(j < item.end)
    def _() -> None:
        _copy_kv(plan, refs, item, j, slot, wait=False)

    @pl.when((j >= item.end) & (following[0] < refs.counts[2]))
    def _() -> None:
        _start_item(plan, refs, _item(plan, refs, *following), slot)


def _attend_tile(plan: Plan, refs: Refs, item: Item, j: Scalar) -> None:
    """Attends to KV tile j: blocks of rows that see all of it, then those that a border crosses.

    Causally, blocks [0, seen) see nothing, [seen, whole) a part; with a window [whole, fading) see everything, [fading,
    end) a part and the rest nothing.
    """
    g = plan.geometry
    block, heads = g.tiles.block_tokens, g.num_kv_heads
    num_blocks = pl.cdiv(item.tokens, block)
    ahead = j * g.tile_tokens - item.position
    seen = jnp.minimum(jnp.maximum(ahead, 0) // block, num_blocks)
    whole = jnp.minimum(pl.cdiv(jnp.maximum(ahead + g.tile_tokens - 1, 0), block), num_blocks)
    fading = end = num_blocks
    if plan.config.sliding_window is not None:
        until = ahead + plan.config.sliding_window
        fading = jnp.clip(pl.cdiv(jnp.maximum(until - block + 1, 0), block), whole, num_blocks)
        end = jnp.clip(pl.cdiv(jnp.maximum(until + g.tile_tokens - 1, 0), block), fading, num_blocks)

    def full(i: Scalar) -> Scalar:
        return whole * heads + i

    _attend_units(plan, refs, Span(jnp.int32(0), g.tile_tokens), full, (fading - whole) * heads, None)

    # Borders are crossed in narrower tiles: less is computed that nobody sees.
    def narrow(sub: Scalar, _: None) -> None:
        first = sub * g.narrow_tokens
        from_block = jnp.clip(jnp.maximum(ahead + first, 0) // block, seen, whole)
        to_block = end
        if plan.config.sliding_window is not None:
            past = ahead + first + g.narrow_tokens + plan.config.sliding_window - 1
            to_block = jnp.clip(pl.cdiv(jnp.maximum(past, 0), block), fading, end)
        num_before = (whole - from_block) * heads

        def partial(i: Scalar) -> Scalar:
            return jnp.where(i < num_before, from_block * heads + i, fading * heads + i - num_before)

        num_units = num_before + (to_block - fading) * heads
        _attend_units(plan, refs, Span(first, g.narrow_tokens), partial, num_units, ahead + first)

    jax.lax.fori_loop(0, g.tile_tokens // g.narrow_tokens, narrow, None)


def _attend_units(
    plan: Plan,
    refs: Refs,
    span: Span,
    unit_at: Callable[[Scalar], Scalar],
    num_units: Scalar,
    ahead: Scalar | None,
) -> None:
    """Attends to tokens of the present KV tile, a unit (block of rows, KV head) a step.

    A step takes the logits of one unit, and the softmax and the values of the unit before it, so that the matrix unit
    has work that does not wait for the vector unit. What comes after the last unit is one that nobody reads.

    Args:
        plan: What is static.
        refs: Everything.
        span: The tokens.
        unit_at: The units, by their number in this run.
        num_units: How many.
        ahead: How far the first of the tokens is past the item's first; None if every row sees them all.
    """
    g = plan.geometry
    nobody = jnp.int32(g.num_units)

    def unit(i: Scalar) -> Scalar:
        return jnp.where(i < num_units, unit_at(i), nobody)

    def steps(i: Scalar, _: None) -> None:
        for u in range(g.tiles.unroll):
            at = i * g.tiles.unroll + u
            _score(plan, refs, span, unit(at + 1), (u + 1) % 2, ahead)
            _weigh(plan, refs, span, unit(at), u % 2)

    @pl.when(num_units > 0)
    def _() -> None:
        _score(plan, refs, span, unit(jnp.int32(0)), 0, ahead)
        jax.lax.fori_loop(0, pl.cdiv(num_units, g.tiles.unroll), steps, None)


def _rows(g: Geometry, unit: Scalar) -> Ref:
    return pl.ds(aligned(unit * g.block_rows, 16), g.block_rows)


def _score(plan: Plan, refs: Refs, span: Span, unit: Scalar, slot: int, ahead: Scalar | None) -> None:
    """Logits of a unit, and the maximum so far."""
    g = plan.geometry
    rows, h = _rows(g, unit), jax.lax.rem(unit, g.num_kv_heads)
    x = matmul(refs.q[rows, :], keys_or_values(plan, refs.k, h, span), 1)
    if plan.config.soft_cap is not None:
        x = jnp.tanh(x) * jnp.float32(plan.config.soft_cap * LOG2_E)
    if ahead is not None:
        x = jnp.where(_visible(plan, span, ahead - unit // g.num_kv_heads * g.tiles.block_tokens), x, -jnp.inf)
    refs.logits[slot, :, : span.width] = x
    before = refs.peak[rows, :]
    refs.peaks[slot] = jnp.maximum(before, jnp.broadcast_to(jnp.max(x, axis=1, keepdims=True), before.shape))


def _weigh(plan: Plan, refs: Refs, span: Span, unit: Scalar, slot: int) -> None:
    """Weights of a unit, and the values that they weigh added to what earlier tiles gave."""
    g = plan.geometry
    rows, h = _rows(g, unit), jax.lax.rem(unit, g.num_kv_heads)
    peak = refs.peaks[slot]
    decay = jnp.exp2(refs.peak[rows, :] - peak)
    refs.peak[rows, :] = peak
    weights = [jnp.exp2(refs.logits[slot, :, c : c + LANES] - peak) for c in range(0, span.width, LANES)]
    values = keys_or_values(plan, refs.v, h, span)
    if g.tiles.sum_by_matmul:
        values = jnp.concatenate([values, jnp.ones((span.width, LANES), g.dtype)], axis=1)
    added = matmul(jnp.concatenate([w.astype(g.dtype) for w in weights], axis=1), values, 0)
    total = added[:, g.lanes :] if g.tiles.sum_by_matmul else functools.reduce(jnp.add, weights)
    refs.total[rows, :] = refs.total[rows, :] * decay + total
    wide = jnp.concatenate([decay] * (g.lanes // LANES), axis=1)
    refs.acc[rows, :] = refs.acc[rows, :] * wide + added[:, : g.lanes]


def _visible(plan: Plan, span: Span, ahead: Scalar) -> Array:
    """Which tokens of a KV tile the rows of a block see."""
    g = plan.geometry
    shape = (g.tiles.block_tokens, span.width)
    distance = jax.lax.broadcasted_iota(jnp.int32, shape, 0) - jax.lax.broadcasted_iota(jnp.int32, shape, 1) - ahead
    visible = distance >= 0
    if plan.config.sliding_window is not None:
        visible &= distance < plan.config.sliding_window
    return jnp.concatenate([visible] * g.group, axis=0)
