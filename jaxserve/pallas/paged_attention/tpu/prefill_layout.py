"""Orders of rows in the TPU's prefill kernel: by token as in HBM, and by KV head as the matmuls want them.

Queries come in by token and head; a unit's rows lie together, ordered (head of the group, token). Keys and values come
in by token, K and V of each head side by side, and go to one array each, by head. Outputs go the way of the queries
back. Rows of one head are picked from rows by token with strided accesses, at odd strides: those hit all banks.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from jaxserve.pallas.paged_attention.tpu.calls import START
from jaxserve.pallas.paged_attention.tpu.prefill_refs import Item, Plan, Ref, Refs, Scalar, Span, copy_out, copy_queries
from jaxserve.pallas.paged_attention.tpu.prefill_tiles import LANES, Geometry


def load_queries(plan: Plan, refs: Refs, item: Item) -> None:
    """Waits for the item's queries, scales them, puts them in order by KV head, and resets the running softmax."""
    g = plan.geometry
    block, stride = g.tiles.block_tokens, g.head_stride
    copy_queries(refs, item).wait()
    num_blocks, groups = pl.cdiv(item.tokens, block), g.num_heads // g.heads_at_once
    total = 0.0 if refs.sinks is None else 1.0 if g.tiles.sum_by_matmul else 1 / LANES

    def spread(i: Scalar, _: None) -> None:
        tokens = refs.raw_queries[pl.ds(i * 8, 8)]
        for u in range(8):
            t, row = i * 8 + u, tokens[u].astype(jnp.float32) * refs.factors[0]
            for c in range(g.lanes // LANES):
                part = row[:, c * LANES : (c + 1) * LANES]
                refs.stage[c, pl.ds(t * stride, g.num_heads), : part.shape[1]] = part

    jax.lax.fori_loop(0, num_blocks * (block // 8), spread, None)

    def gather(i: Scalar, _: None) -> None:
        r, n = i // groups, jax.lax.rem(i, groups) * g.heads_at_once
        for u in range(g.heads_at_once):
            rows = pl.ds(aligned((r * g.num_heads + n + u) * block, 16), block)
            for c in range(g.lanes // LANES):
                part = refs.stage[c, pl.ds(r * (block * stride) + n + u, block, stride=stride), :]
                refs.q[rows, c * LANES : (c + 1) * LANES] = _within(g, c, part).astype(g.dtype)
            if refs.sinks is not None:
                refs.peak[rows, :] = jnp.broadcast_to(refs.sinks[pl.ds(n + u, 1), :], (block, LANES))
            else:
                refs.peak[rows, :] = jnp.full((block, LANES), START, jnp.float32)
            refs.total[rows, :] = jnp.full((block, LANES), total, jnp.float32)
            refs.acc[rows, :] = jnp.zeros((block, g.lanes), jnp.float32)

    jax.lax.fori_loop(0, num_blocks * groups, gather, None)


def unpack(plan: Plan, refs: Refs, item: Item, j: Scalar, slot: Scalar) -> None:
    """Puts a KV tile's keys and values in order by head; values that no query of the item sees become zeros."""
    g = plan.geometry
    low = jnp.int32(0)
    if plan.config.sliding_window is not None:
        low = item.position - (plan.config.sliding_window - 1)
    low, high = low - j * g.tile_tokens, item.position + item.tokens - j * g.tile_tokens
    if plan.geometry.words:
        _unpack_words(plan, refs, slot, low, high)
        return
    stage = refs.kv_stage

    def spread(i: Scalar, _: None) -> None:
        tokens = refs.raw_kv[slot, pl.ds(i * 8, 8)]
        for u in range(8):
            t, row = i * 8 + u, tokens[u].astype(jnp.float32)
            for c in range(g.lanes // LANES):
                part = row[:, c * LANES : (c + 1) * LANES]
                stage[c, pl.ds(t * g.kv_stride, 2 * g.num_kv_heads), : part.shape[1]] = part

    jax.lax.fori_loop(0, g.tile_tokens // 8, spread, None)
    place = jax.lax.broadcasted_iota(jnp.int32, (g.tile_tokens, LANES), 0)
    seen = (place >= low) & (place < high)

    def gather(h: Scalar, _: None) -> None:
        for c in range(g.lanes // LANES):
            at = slice(c * LANES, (c + 1) * LANES)
            keys = stage[c, pl.ds(2 * h, g.tile_tokens, stride=g.kv_stride), :]
            values = stage[c, pl.ds(2 * h + 1, g.tile_tokens, stride=g.kv_stride), :]
            refs.k[h, :, at] = _within(g, c, keys).astype(g.dtype)
            refs.v[h, :, at] = _within(g, c, jnp.where(seen, values, jnp.float32(0))).astype(g.dtype)

    jax.lax.fori_loop(0, g.num_kv_heads, gather, None)


def _unpack_words(plan: Plan, refs: Refs, slot: Scalar, low: Scalar, high: Scalar) -> None:
    """The same where a word holds a token's key and value of one head: two tokens' words become one of each."""
    g = plan.geometry
    lower, upper = jnp.uint32(0xFFFF), jnp.uint32(0xFFFF0000)

    def pairs(i: Scalar, _: None, *, edge: bool) -> None:
        for u, first in itertools.product(range(8), range(0, 2 * g.num_kv_heads, g.packed_rows)):
            t, heads = i * 16 + 2 * u, g.packed_rows // 2
            parts = refs.raw_kv[slot, pl.ds(t, 2), first : first + g.packed_rows, :]
            a, b = (pltpu.bitcast(part.astype(jnp.bfloat16), jnp.uint32) for part in parts)
            keys, values = (a & lower) | (b << 16), (a >> 16) | (b & upper)
            if edge:
                keep_a = jnp.where((t >= low) & (t < high), lower, jnp.uint32(0))
                keep_b = jnp.where((t + 1 >= low) & (t + 1 < high), upper, jnp.uint32(0))
                values = values & (keep_a | keep_b)
            rows = pl.ds(i * 8 + u + first // 2 * g.word_stride, heads, stride=g.word_stride)
            for c in range(g.lanes // LANES):
                refs.k[c, rows, :] = keys[:, c * LANES : (c + 1) * LANES]
                refs.v[c, rows, :] = values[:, c * LANES : (c + 1) * LANES]

    is_edge = (low > 0) | (high < g.tile_tokens)
    for edge in (False, True):

        @pl.when(is_edge == edge)
        def _(edge: bool = edge) -> None:
            jax.lax.fori_loop(0, g.tile_tokens // 16, functools.partial(pairs, edge=edge), None)


def keys_or_values(plan: Plan, ref: Ref, h: Scalar, span: Span) -> Array:
    """Keys or values of one head and some tokens of the KV tile, [width, H]."""
    g = plan.geometry
    if not g.words:
        whole: Array = ref[h, pl.ds(aligned(span.first, LANES), span.width), :]
        return whole
    rows = pl.ds(h * g.word_stride + span.first // 2, span.width // 2)
    return jnp.concatenate([pltpu.bitcast(ref[c, rows, :], jnp.bfloat16) for c in range(g.lanes // LANES)], axis=1)


def divide(plan: Plan, refs: Refs, item: Item) -> None:
    """Divides by the sums and puts the item's rows in order by token."""
    g = plan.geometry
    block, stride, groups = g.tiles.block_tokens, g.head_stride, g.num_heads // g.heads_at_once

    def scatter(i: Scalar, _: None) -> None:
        r, n = i // groups, jax.lax.rem(i, groups) * g.heads_at_once
        for u in range(g.heads_at_once):
            rows = pl.ds(aligned((r * g.num_heads + n + u) * block, 16), block)
            total = refs.total[rows, :]
            if not g.tiles.sum_by_matmul:
                total = jnp.broadcast_to(jnp.sum(total, axis=1, keepdims=True), total.shape)
            for c in range(g.lanes // LANES):
                part = refs.acc[rows, c * LANES : (c + 1) * LANES] * (refs.factors[1] / total)
                refs.stage[c, pl.ds(r * (block * stride) + n + u, block, stride=stride), :] = part

    jax.lax.fori_loop(0, pl.cdiv(item.tokens, block) * groups, scatter, None)


def store(plan: Plan, refs: Refs, item: Item) -> None:
    """Sends the item's rows on their way."""
    g = plan.geometry

    def collect(i: Scalar, _: None) -> None:
        rows = []
        for u in range(8):
            t = i * 8 + u
            at = pl.ds(t * g.head_stride, g.num_heads)
            parts = [refs.stage[c, at, : min(LANES, g.head_dim - c * LANES)] for c in range(g.lanes // LANES)]
            rows.append(jnp.concatenate(parts, axis=1).astype(g.query_dtype))
        refs.raw_out[pl.ds(i * 8, 8)] = jnp.stack(rows)

    jax.lax.fori_loop(0, pl.cdiv(item.tokens, 8), collect, None)
    copy_out(refs, item.row, item.tokens).start()


def _within(g: Geometry, c: int, x: Array) -> Array:
    """Zeros in lanes past the head dim, which take part in the matmuls; x is chunk c of 128 lanes."""
    if g.head_dim >= (c + 1) * LANES:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(lane < g.head_dim - c * LANES, x, jnp.float32(0))


def aligned(x: Scalar, multiple: int) -> Scalar:
    """x, which the compiler may take for a multiple of `multiple`."""
    hinted: Scalar = pl.multiple_of(x, multiple)
    return hinted
