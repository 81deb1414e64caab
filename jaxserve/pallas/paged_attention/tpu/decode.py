"""Decodes on a TPU: one new token a sequence, one Mosaic kernel, new keys and values written into the pool by it.

The context of all sequences is one stream of items, neighbouring pages of one sequence each. The loop is a pipeline
over groups of items; group i is

    fetched    pages (HBM)  --DMA-->  ring (VMEM)                       in iteration i - 2
    scored     new token into the ring and, by DMA, into its page;
               queries x keys  -->  logits and maximum so far           in iteration i
    weighed    exp2(logits - maximum) x values  -->  running softmax    in iteration i + 1

so that an iteration's matmuls, exponentials and DMAs are of different groups and independent of each other. All of it
is straight-line code. Matmuls take all KV heads at once: a token's keys of all heads are neighbouring columns, and
logits of heads that do not belong to a row become -inf. The softmax is computed online (arXiv:1805.02867) in base 2.
Each item ends with the division by the sums; the division of a sequence's last item stays.

An item's keys and values outside the context are zeros: a matmul with them must not see what others left in a page.
"""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Shaped

from jaxserve.pallas.paged_attention.inputs import AttentionConfig, AttentionLayer, RaggedBatch
from jaxserve.pallas.paged_attention.tpu.calls import (
    LOG2_E,
    START,
    attention_factors,
    current_core,
    matmul,
    sink_rows,
    table_rows,
)
from jaxserve.pallas.paged_attention.tpu.decode_refs import (
    Facts,
    Field,
    Plan,
    Ref,
    Refs,
    Scalar,
    keys_or_values,
    load_words,
    store_words,
)
from jaxserve.pallas.paged_attention.tpu.decode_tiles import (
    SLOTS,
    DecodeTiles,
    choose_decode_tiles,
    cut_decode,
)
from jaxserve.pallas.paged_attention.tpu.prefill_tiles import LANES, SUBLANES, Sizes

Copy: TypeAlias = Any
Cursor: TypeAlias = tuple[Scalar, Scalar]
"""Sequence and item of it."""

State: TypeAlias = tuple[Array, Array, Array]
"""Maximum, partial sums and weighed values of the sequence at hand."""

Carry: TypeAlias = tuple[Scalar, Scalar, Scalar, Scalar]
"""Iteration, whether it weighs anything, cursor."""

ZERO_ROWS = 8 * SUBLANES
"""Rows of words that are made zeros at a time."""


def decode(
    q: Float[Array, "T N H"],
    new_kv: Shaped[Array, "T K2 H"],
    kv_pages: Shaped[Array, "P page_size K2 H"],
    out: Float[Array, "T N H"],
    batch: RaggedBatch,
    layer: AttentionLayer,
    *,
    config: AttentionConfig,
    tiles: DecodeTiles | None = None,
) -> tuple[Float[Array, "T N H"], Shaped[Array, "P page_size K2 H"]]:
    """Writes the decodes' new keys and values into their pages and attends; chunks and padding are left alone.

    Args:
        q: Queries.
        new_kv: New keys and values as elements of the pool, interleaved like a page's.
        kv_pages: The pool; changed in place if it is donated.
        out: Changed in place: the decodes' rows.
        batch: Sequences, pages and positions.
        layer: The layer's place in the pool, its sinks and its scales.
        config: Static facts about the model's attention.
        tiles: Tile sizes; chosen for the core if None.

    Returns:
        `out` with the decodes' rows, and the pool.

    Raises:
        NotImplementedError: Not even the smallest tiles fit, or `decode_tiles.is_supported` says no.
    """
    sizes = decode_sizes(q, kv_pages, batch, config)
    core = current_core()
    geometry = cut_decode(sizes, choose_decode_tiles(sizes, core) if tiles is None else tiles)
    plan = Plan(geometry=geometry, config=config, compiled=pltpu.is_tpu_device())
    scalars = (
        jnp.stack([layer.page_offset, batch.num_decodes]),
        batch.context_lens,
        attention_factors(layer, config),
    )
    rows, words = geometry.max_tokens, geometry.token_words
    pages = kv_pages.reshape(-1, geometry.page_words, geometry.packing, geometry.head_dim)
    new = new_kv[:rows].reshape(rows, words, geometry.packing, geometry.head_dim)
    sinks = () if layer.sinks is None else (sink_rows(layer.sinks),)
    smem, vmem, anywhere = (pl.BlockSpec(memory_space=each) for each in (pltpu.SMEM, pltpu.VMEM, pl.ANY))
    arguments = (*scalars, table_rows(batch.page_table), q[:rows], new, *sinks, out, pages)
    specs = [smem] * len(scalars) + [anywhere] + [vmem] * (2 + len(sinks)) + [anywhere] * 2
    out, pages = pl.pallas_call(
        functools.partial(_kernel, plan, bool(sinks)),
        out_shape=(jax.ShapeDtypeStruct(out.shape, out.dtype), jax.ShapeDtypeStruct(pages.shape, pages.dtype)),
        in_specs=specs,
        out_specs=(anywhere, anywhere),
        scratch_shapes=_scratch(plan),
        input_output_aliases={len(arguments) - 2: 0, len(arguments) - 1: 1},
        compiler_params=pltpu.CompilerParams(
            disable_bounds_checks=True, has_side_effects=True, vmem_limit_bytes=core.vmem_limit(geometry.vmem_bytes)
        ),
        name="paged_attention_decode",
    )(*arguments)
    return out, pages.reshape(kv_pages.shape)


def decode_sizes(q: Array, kv_pages: Array, batch: RaggedBatch, config: AttentionConfig) -> Sizes:
    """What the choice of tiles depends on.

    Args:
        q: [T, N, H].
        kv_pages: The pool.
        batch: Sequences and pages.
        config: Static facts about the model's attention.
    """
    num_seqs, pages_per_seq = batch.page_table.shape
    return Sizes(
        page_size=kv_pages.shape[1],
        num_heads=q.shape[1],
        num_kv_heads=kv_pages.shape[2] // 2,
        head_dim=q.shape[2],
        query_dtype=q.dtype,
        kv_dtype=kv_pages.dtype,
        max_tokens=min(num_seqs, q.shape[0]),
        max_context=pages_per_seq * kv_pages.shape[1],
        sliding_window=config.sliding_window,
    )


def _scratch(plan: Plan) -> list[Any]:
    g = plan.geometry
    buffers = {name: pltpu.VMEM(shape, dtype) for name, (shape, dtype) in g.buffers().items()}
    tables = {
        "rows": pltpu.SMEM((g.table_rows, 1, g.table_lanes), jnp.int32),
        "reached": pltpu.SMEM((2,), jnp.int32),
        "totals": pltpu.SMEM((SLOTS,), jnp.int32),
        "borders": pltpu.SMEM((SLOTS,), jnp.int32),
        "fields": pltpu.SMEM((SLOTS, g.tiles.items, Field.COUNT), jnp.int32),
    }
    one = pltpu.SemaphoreType.DMA
    done = {
        "rows_done": pltpu.SemaphoreType.DMA((g.table_rows,)),
        "pages_done": pltpu.SemaphoreType.DMA((SLOTS,)),
        "writes_done": one,
        "out_done": one,
    }
    return [buffers, tables | done]


def _refs(has_sinks: bool, refs: tuple[Ref, ...]) -> Refs:
    """Names the kernel's arguments."""
    names = ["counts", "contexts", "factors", "table", "queries", "new"] + ["sinks"] * has_sinks
    names += ["aliased_out", "aliased_pages", "out", "pages"]
    named = {"sinks": None, **dict(zip(names, refs[: len(names)], strict=True))}
    del named["aliased_out"], named["aliased_pages"]
    return Refs(**named, **refs[-2], **refs[-1])


def _kernel(plan: Plan, has_sinks: bool, *arguments: Ref) -> None:
    refs = _refs(has_sinks, arguments)
    zero, num_decodes, items = jnp.int32(0), refs.counts[1], plan.geometry.tiles.items
    cursor = (zero, zero)
    refs.reached[0], refs.reached[1] = zero, zero
    for slot in range(SLOTS - 2):
        _reach_rows(plan, refs, cursor[0])
        for u in range(items):
            cursor = _fetch(plan, refs, cursor, jnp.int32(slot), u)
    for u in range(items):
        refs.fields[SLOTS - 1, u, Field.SEQ] = jnp.int32(plan.geometry.max_tokens)
        refs.fields[SLOTS - 1, u, Field.IS_FIRST] = jnp.int32(1)

    def step(carry: Carry) -> Carry:
        i, _, seq, item = carry
        weighed, scored, fetched = (jax.lax.rem(i + d, SLOTS) for d in (SLOTS - 1, 0, 2))
        _wait_pages(plan, refs, scored)
        pl.when(_lacks_rows(plan, refs, seq))(lambda: _reach_rows(plan, refs, seq))
        pl.when(refs.borders[scored] > 0)(lambda: _finish_contexts(plan, refs, scored))
        # Facts are read before others are written: the compiler cannot tell the slots apart.
        facts = _facts(plan, refs, weighed), _facts(plan, refs, scored)
        cursor = _attend(plan, refs, *facts, (seq, item), fetched)
        return (i + 1, refs.totals[scored], *cursor)

    # There is one more iteration than groups: the last weighs and scores nothing.
    jax.lax.while_loop(lambda carry: carry[1] > 0, step, (zero, num_decodes, *cursor))

    @pl.when(num_decodes > 0)
    def _() -> None:
        rows = pl.ds(0, num_decodes)
        copy = pltpu.make_async_copy(refs.result.at[rows], refs.out.at[rows], refs.out_done)
        copy.start()
        pltpu.make_async_copy(refs.new.at[rows], refs.new.at[rows], refs.writes_done).wait()
        copy.wait()


def _lacks_rows(plan: Plan, refs: Refs, seq: Scalar) -> Array:
    """Whether a group that begins with this sequence may want rows of the page table that have not come."""
    lacks: Array = refs.reached[0] < jnp.minimum(seq + plan.geometry.tiles.items, refs.counts[1])
    return lacks


def _reach_rows(plan: Plan, refs: Refs, seq: Scalar) -> None:
    """Asks for rows of the page table as far as there is room, and waits for those that a group may want."""
    asked = jnp.minimum(seq + plan.geometry.table_rows, refs.counts[1])
    wanted = jnp.minimum(seq + plan.geometry.tiles.items, refs.counts[1])
    jax.lax.fori_loop(refs.reached[1], asked, lambda s, _: _copy_row(plan, refs, s).start(), None)
    jax.lax.fori_loop(refs.reached[0], wanted, lambda s, _: _copy_row(plan, refs, s).wait(), None)
    refs.reached[0], refs.reached[1] = wanted, asked


def _copy_row(plan: Plan, refs: Refs, seq: Scalar) -> Copy:
    """The copy of a sequence's row of the page table into SMEM."""
    at = jax.lax.rem(seq, plan.geometry.table_rows)
    return pltpu.make_async_copy(refs.table.at[seq], refs.rows.at[at], refs.rows_done.at[at])


def _fetch(plan: Plan, refs: Refs, cursor: Cursor, slot: Scalar, u: int) -> Cursor:
    """Starts the copies of the cursor's item and notes the item's facts; returns the next item."""
    g, window = plan.geometry, plan.config.sliding_window
    size, pages = g.page_size, g.tiles.pages
    seq, item = cursor
    is_item = seq < refs.counts[1]
    at = jnp.minimum(seq, g.max_tokens - 1)
    row, context = jax.lax.rem(at, g.table_rows), refs.contexts[at]
    end = jax.lax.div(context + (size - 1), size)
    unseen = jnp.int32(0) if window is None else jnp.maximum(context - window, 0)
    begin = jax.lax.div(unseen, size) + item * pages
    num_pages = jnp.where(is_item, jnp.minimum(end - begin, pages), 0)
    is_last = is_item & (begin + pages >= end)
    for p in range(pages):

        @pl.when(p < num_pages)
        def _(p: int = p) -> None:
            page = refs.counts[0] + refs.rows[row, 0, begin + p]
            target = refs.ring.at[slot, u, pl.ds(p * g.page_words, g.page_words)]
            pltpu.make_async_copy(refs.pages.at[page], target, refs.pages_done.at[slot]).start()

    last_page = refs.counts[0] + refs.rows[row, 0, jnp.maximum(end - 1, 0)]
    facts = {
        Field.SEQ: jnp.where(is_item, seq, g.max_tokens),
        Field.LOW: jnp.maximum(unseen - begin * size, 0),
        Field.HIGH: jnp.where(is_item, context - begin * size, 0),
        Field.IS_FIRST: (item == 0).astype(jnp.int32),
        Field.NEW_PAGE: jnp.where(is_last, last_page, -1),
    }
    for field, value in facts.items():
        refs.fields[slot, u, field] = value
    has_border = (is_last | (begin * size < unseen)).astype(jnp.int32)
    refs.totals[slot] = num_pages if u == 0 else refs.totals[slot] + num_pages
    refs.borders[slot] = has_border if u == 0 else refs.borders[slot] | has_border
    return jnp.where(is_last, seq + 1, seq), jnp.where(is_last, 0, item + 1)


def _wait_pages(plan: Plan, refs: Refs, slot: Scalar) -> None:
    """Waits for a group's pages; a wait counts bytes, which pages they are of does not matter."""
    num_pages = refs.totals[slot]

    @pl.when(num_pages > 0)
    def _() -> None:
        target = refs.pages.at[pl.ds(0, num_pages)]
        pltpu.make_async_copy(target, target, refs.pages_done.at[slot]).wait()


def _finish_contexts(plan: Plan, refs: Refs, slot: Scalar) -> None:
    """Puts new tokens where they belong, in the ring and in their pages, and zeros wherever no token is seen."""

    def finish(u: Scalar, _: None) -> None:
        seq, page = refs.fields[slot, u, Field.SEQ], refs.fields[slot, u, Field.NEW_PAGE]
        low = refs.fields[slot, u, Field.LOW]

        pl.when(page >= 0)(lambda: _append(plan, refs, slot, u, seq, page))
        if plan.config.sliding_window is not None:
            pl.when(low > 0)(lambda: _forget(plan, refs, slot, u, low))

    jax.lax.fori_loop(0, plan.geometry.tiles.items, finish, None)


def _append(plan: Plan, refs: Refs, slot: Scalar, u: Scalar, seq: Scalar, page: Scalar) -> None:
    """The new token of a sequence ends its last item: what follows becomes zeros."""
    g, ring = plan.geometry, refs.ring.at[slot, u]
    words = g.token_words
    token = refs.fields[slot, u, Field.HIGH] - 1
    place = jax.lax.rem(token, g.page_size) * words
    pltpu.make_async_copy(refs.new.at[seq], refs.pages.at[page, pl.ds(place, words)], refs.writes_done).start()
    size = max(words, SUBLANES)
    begin = pl.multiple_of(jax.lax.div(token * words, size) * size, SUBLANES)
    row = jax.lax.broadcasted_iota(jnp.int32, (size, g.head_dim), 0) - (token * words - begin)
    new = jnp.concatenate([load_words(plan, refs.new.at[seq], 0, words)] * (size // words), axis=0)
    before = jnp.where(row < 0, load_words(plan, ring, begin, size), jnp.uint32(0))
    store_words(plan, ring, begin, jnp.where((row >= 0) & (row < words), new, before))
    _fill_zeros(plan, ring, begin + size, jnp.int32(g.item_words))


def _forget(plan: Plan, refs: Refs, slot: Scalar, u: Scalar, low: Scalar) -> None:
    """Tokens that the window has left become zeros."""
    g, ring = plan.geometry, refs.ring.at[slot, u]
    border = low * g.token_words
    whole = pl.multiple_of(jax.lax.div(border, SUBLANES) * SUBLANES, SUBLANES)
    _fill_zeros(plan, ring, jnp.int32(0), whole)

    @pl.when(whole < border)
    def _() -> None:
        row = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, g.head_dim), 0)
        kept = jnp.where(row >= border - whole, load_words(plan, ring, whole, SUBLANES), jnp.uint32(0))
        store_words(plan, ring, whole, kept)


def _fill_zeros(plan: Plan, ring: Ref, begin: Scalar, end: Scalar) -> None:
    """Makes rows of words [begin, end) zeros, both multiples of 8."""

    def fill(first: Scalar, count: Scalar, size: int) -> None:
        zeros = jnp.zeros((size, plan.geometry.head_dim), jnp.uint32)

        def one(i: Scalar, _: None) -> None:
            store_words(plan, ring, pl.multiple_of(first + i * size, SUBLANES), zeros)

        jax.lax.fori_loop(0, count, one, None)

    many = jax.lax.div(jnp.maximum(end - begin, 0), ZERO_ROWS)
    fill(begin, many, ZERO_ROWS)
    rest = begin + many * ZERO_ROWS
    fill(rest, jax.lax.div(jnp.maximum(end - rest, 0), SUBLANES), SUBLANES)


def _facts(plan: Plan, refs: Refs, slot: Scalar) -> list[Facts]:
    """The facts of a group's items that attention needs."""
    return [
        Facts(
            slot=slot,
            seq=refs.fields[slot, u, Field.SEQ],
            low=refs.fields[slot, u, Field.LOW],
            high=refs.fields[slot, u, Field.HIGH],
            is_first=refs.fields[slot, u, Field.IS_FIRST],
        )
        for u in range(plan.geometry.tiles.items)
    ]


def _attend(
    plan: Plan, refs: Refs, weighed: list[Facts], scored: list[Facts], cursor: Cursor, fetched: Scalar
) -> Cursor:
    """Weighs the values of one group, scores the keys of the next and fetches the one after, item by item in turn.

    An item's matmul with keys comes before its counterpart's exponentials, which would leave the matrix units waiting;
    its logits then take their place.
    """
    g = plan.geometry
    state = refs.peak[...], refs.total[...], refs.acc[...]
    own_head = _own_head(plan)
    for u in range(g.tiles.items):
        products = _products(plan, refs, scored[u], u)
        cursor = _fetch(plan, refs, cursor, fetched, u)
        state = _weigh(plan, refs, weighed[u], u, state)
        _store_logits(plan, refs, scored[u], u, products, own_head)
    refs.peak[...], refs.total[...], refs.acc[...] = state
    return cursor


def _weigh(plan: Plan, refs: Refs, facts: Facts, u: int, state: State) -> State:
    """Adds an item's values, weighed, to the running softmax of its sequence, and stores what it comes to."""
    g = plan.geometry
    peak, total, acc = state
    is_first = facts.is_first == 1
    shape = (g.num_heads, LANES)
    if refs.sinks is None:
        before, weight = jnp.full(shape, START, jnp.float32), 0.0
    else:
        before, weight = refs.sinks[...], 1 / LANES
    before = jnp.where(is_first, before, peak)
    peak = jnp.maximum(before, jnp.broadcast_to(jnp.max(refs.tops[u], axis=1, keepdims=True), shape))
    decay = jnp.exp2(before - peak)
    weights = [jnp.exp2(refs.logits[u, :, c : c + LANES] - peak) for c in range(0, g.columns, LANES)]
    total = functools.reduce(jnp.add, weights, jnp.where(is_first, jnp.float32(weight), total) * decay)
    values = keys_or_values(plan, refs.ring.at[facts.slot, u], values=True)
    added = matmul(jnp.concatenate([w.astype(g.dtype) for w in weights], axis=1), values, 0)
    acc = jnp.where(is_first, jnp.float32(0), acc) * decay + added
    mean = acc * (refs.factors[1] / jnp.sum(total, axis=1, keepdims=True))
    refs.result[facts.seq] = mean.astype(g.query_dtype)
    return peak, total, acc


def _own_head(plan: Plan) -> Float[Array, "N 128"]:
    """Infinity where a row's query head belongs to the KV head of a column, else minus infinity."""
    g = plan.geometry
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, (g.num_heads, LANES), d) for d in (0, 1))
    pair = jax.lax.div(lane, 2) if g.halves else lane
    is_own = jax.lax.div(row, g.group) == jax.lax.rem(pair, g.num_kv_heads)
    return jnp.where(is_own, jnp.float32(jnp.inf), -jnp.float32(jnp.inf))


def _products(plan: Plan, refs: Refs, facts: Facts, u: int) -> Array:
    """Dot products of an item's keys and its sequence's queries, [N, columns]."""
    seq = jnp.minimum(facts.seq, plan.geometry.max_tokens - 1)
    query = (refs.queries[seq].astype(jnp.float32) * refs.factors[0]).astype(plan.geometry.dtype)
    return matmul(query, keys_or_values(plan, refs.ring.at[facts.slot, u], values=False), 1)


def _store_logits(plan: Plan, refs: Refs, facts: Facts, u: int, products: Array, own_head: Array) -> None:
    """Stores an item's logits, minus infinity where a row must not look, and each lane's maximum."""
    g = plan.geometry
    heads, shape = g.num_kv_heads, (g.num_heads, LANES)
    low, high = facts.low * heads, facts.high * heads
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    pair = jax.lax.div(lane, 2) + jax.lax.rem(lane, 2) * (g.columns // 2) if g.halves else lane
    top = jnp.full(shape, START, jnp.float32)
    for c in range(0, g.columns, LANES):
        ahead = c // 2 if g.halves else c
        seen = pair < high - ahead
        if plan.config.sliding_window is not None:
            seen &= pair >= low - ahead
        limit = jnp.where(seen, jnp.float32(jnp.inf), -jnp.float32(jnp.inf))
        part = products[:, c : c + LANES]
        if plan.config.soft_cap is not None:
            part = jnp.tanh(part) * jnp.float32(plan.config.soft_cap * LOG2_E)
        part = jnp.minimum(part, jnp.minimum(limit, own_head) if heads > 1 else limit)
        refs.logits[u, :, c : c + LANES] = part
        top = jnp.maximum(top, part)
    refs.tops[u] = top
