"""Paged attention in plain JAX, made for the CPU and for whatever no kernel supports.

New keys and values are scattered into their pages first. Then two loops attend, both with trip counts known only at run
time, so that a step pays for the context it has and not for the longest it might have: decoding sequences go in
groups of `DECODE_ROWS`, prompt chunks one after another in tiles of `QUERY_TILE` tokens. Both walk the context in
blocks and keep a running softmax (online normaliser, arXiv:1805.02867). Logits, weights and sums are float32.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Shaped

from jaxserve.pallas.paged_attention.cache import decode, write_pages
from jaxserve.pallas.paged_attention.inputs import AttentionConfig, AttentionLayer, RaggedBatch

DECODE_ROWS = 8
DECODE_BLOCK = 64
QUERY_TILE = 64
PREFILL_BLOCK = 64

MASKED = -1e30
"""A logit that counts for nothing; finite, so that a row without any context stays free of NaN."""

FAR = (1 << 31) - 1
"""A position no sequence reaches."""

EXACT = jax.lax.Precision.HIGHEST
"""Float32 stays float32: left to itself a matrix unit rounds it to bfloat16 or TF32."""

Scalar: TypeAlias = Int32[Array, ""]
Grouped: TypeAlias = Float[Array, "T K G H"]


class Layer(NamedTuple):
    """One layer's pages and how its attention works."""

    kv_pages: Array
    placed: AttentionLayer
    config: AttentionConfig


class Softmax(NamedTuple):
    """A running softmax: maximum, sum of weights, weighted sum of values."""

    peak: Float[Array, "B K Q"]
    total: Float[Array, "B K Q"]
    values: Float[Array, "B K Q H"]


def paged_attention_xla(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    kv_pages: Shaped[Array, "P page_size K2 H"],
    batch: RaggedBatch,
    layer: AttentionLayer,
    *,
    config: AttentionConfig,
) -> tuple[Float[Array, "T N H"], Shaped[Array, "P page_size K2 H"]]:
    """See `api.paged_attention`."""
    num_tokens, num_heads, head_dim = q.shape
    kv_pages = write_pages(k, v, kv_pages, batch, layer)
    queries = (q.astype(jnp.float32) * jnp.float32(config.scale)).reshape(num_tokens, k.shape[1], -1, head_dim)
    # A tile may reach past the last token; the margin keeps slices from being shifted back.
    queries = jnp.pad(queries, ((0, max(QUERY_TILE, DECODE_ROWS)), (0, 0), (0, 0), (0, 0)))
    view = Layer(kv_pages, layer, config)
    out = jnp.zeros_like(queries)
    with jax.named_scope("decode"):
        out = _attend_decodes(queries, out, view, batch)
    with jax.named_scope("prefill"):
        out = _attend_chunks(queries, out, view, batch)
    return out[:num_tokens].reshape(num_tokens, num_heads, head_dim).astype(q.dtype), kv_pages


def _attend_decodes(queries: Grouped, out: Grouped, layer: Layer, batch: RaggedBatch) -> Grouped:
    num_seqs = batch.page_table.shape[0]
    rows = min(DECODE_ROWS, num_seqs)
    missing = -num_seqs % rows
    table = jnp.pad(batch.page_table, ((0, missing), (0, 0)))
    lens = jnp.pad(batch.context_lens, (0, missing))

    def group(index: Scalar, out: Grouped) -> Grouped:
        first = index * rows
        alive = first + jnp.arange(rows, dtype=jnp.int32) < batch.num_decodes
        query = jax.lax.dynamic_slice_in_dim(queries, first, rows)
        last = jnp.where(alive, jax.lax.dynamic_slice_in_dim(lens, first, rows) - 1, -1)
        result = _walk(query, layer, jax.lax.dynamic_slice_in_dim(table, first, rows), last[:, None], DECODE_BLOCK)
        return _put(out, result, alive, first)

    num_groups = (batch.num_decodes + (rows - 1)) // rows
    attended: Grouped = jax.lax.fori_loop(0, num_groups, group, out)
    return attended


def _attend_chunks(queries: Grouped, out: Grouped, layer: Layer, batch: RaggedBatch) -> Grouped:
    _, kv_heads, group_size, head_dim = queries.shape
    offsets = jnp.arange(QUERY_TILE, dtype=jnp.int32)

    def chunk(seq: Scalar, out: Grouped) -> Grouped:
        start, stop = batch.query_starts[seq], batch.query_starts[seq + 1]
        table = jax.lax.dynamic_slice_in_dim(batch.page_table, seq, 1)

        def tile(index: Scalar, out: Grouped) -> Grouped:
            first = start + index * QUERY_TILE
            alive = first + offsets < stop
            position = jnp.where(alive, batch.context_lens[seq] - (stop - first) + offsets, -1)
            query = jax.lax.dynamic_slice_in_dim(queries, first, QUERY_TILE)
            # Rows of a tile are (token, query head): one matmul a KV head serves them all.
            query = query.transpose(1, 0, 2, 3).reshape(1, kv_heads, QUERY_TILE * group_size, head_dim)
            result = _walk(query, layer, table, jnp.repeat(position, group_size)[None, :], PREFILL_BLOCK)
            result = result.reshape(kv_heads, QUERY_TILE, group_size, head_dim).transpose(1, 0, 2, 3)
            return _put(out, result, alive, first)

        num_tiles = (stop - start + (QUERY_TILE - 1)) // QUERY_TILE
        attended: Grouped = jax.lax.fori_loop(0, num_tiles, tile, out)
        return attended

    attended: Grouped = jax.lax.fori_loop(batch.num_decodes, batch.num_seqs, chunk, out)
    return attended


def _put(out: Grouped, rows: Float[Array, "R K G H"], alive: Bool[Array, " R"], first: Scalar) -> Grouped:
    """Writes the rows that are alive at `first`, leaving what the others would overwrite."""
    before = jax.lax.dynamic_slice_in_dim(out, first, rows.shape[0])
    return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(alive[:, None, None, None], rows, before), first, 0)


def _walk(
    query: Float[Array, "B K Q H"],
    layer: Layer,
    table: Int32[Array, "B pages_per_seq"],
    last: Int32[Array, "B columns"],
    block_tokens: int,
) -> Float[Array, "B K Q H"]:
    """Attention of B sequences' queries over their pages, block by block.

    Args:
        query: Already scaled, float32. Its Q rows share the sequence's pages; Q is a multiple of G in chunks, G in
        decodes.
        layer: Pages and configuration.
        table: Pages of each sequence.
        last: Last position each query sees, or each sequence's if there is one column; -1 for a dead row.
        block_tokens: How much context an iteration takes.
    """
    page_size = layer.kv_pages.shape[1]
    window = layer.config.sliding_window
    pages_per_block = max(1, min(block_tokens // page_size, table.shape[1]))
    block = pages_per_block * page_size
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % pages_per_block)))

    def step(index: Scalar, state: Softmax) -> Softmax:
        ids = jax.lax.dynamic_slice_in_dim(table, index * pages_per_block, pages_per_block, axis=1)
        keys, values = _read(layer, ids)
        position = index * block + jnp.arange(block, dtype=jnp.int32)
        visible = position[None, None, :] <= last[:, :, None]
        if window is not None:
            visible &= position[None, None, :] > last[:, :, None] - window
        # What no query sees may be anything, NaN included, which 0 * NaN would let through.
        owned = position[None, :] <= jnp.max(last, axis=1, keepdims=True)
        values = jnp.where(owned[:, :, None, None], values, jnp.float32(0))
        return _update(state, query, keys, values, visible, layer.config.soft_cap)

    first = jnp.int32(0)
    if window is not None:
        alive = jnp.where(last < 0, jnp.int32(FAR), last)
        first = jnp.maximum(jnp.min(alive) - (window - 1), 0) // block
    num_blocks = (jnp.max(last) + block) // block
    state = jax.lax.fori_loop(first, num_blocks, step, _start(query, layer.placed.sinks))
    total: Array = jnp.where(state.total > 0, state.total, jnp.float32(1))
    attended: Array = state.values / total[..., None]
    return attended


def _start(query: Float[Array, "B K Q H"], sinks: Float[Array, " N"] | None) -> Softmax:
    rows = query.shape[:3]
    values = jnp.zeros(query.shape, jnp.float32)
    if sinks is None:
        return Softmax(jnp.full(rows, MASKED, jnp.float32), jnp.zeros(rows, jnp.float32), values)
    per_head = sinks.astype(jnp.float32).reshape(rows[1], -1)
    peak = jnp.tile(per_head, (1, rows[2] // per_head.shape[1]))
    return Softmax(jnp.broadcast_to(peak[None], rows), jnp.ones(rows, jnp.float32), values)


def _read(layer: Layer, ids: Int32[Array, "B n"]) -> tuple[Float[Array, "B C K H"], Float[Array, "B C K H"]]:
    """Keys and values of a block of pages, in float32."""
    ids = ids + layer.placed.page_offset
    pages = jax.lax.platform_dependent(layer.kv_pages, ids, cpu=_gather_rows, default=_gather)
    kv = pages.reshape(ids.shape[0], -1, pages.shape[3] // 2, 2, pages.shape[4])
    return decode(kv[:, :, :, 0], layer.placed.k_scale), decode(kv[:, :, :, 1], layer.placed.v_scale)


def _gather(
    kv_pages: Shaped[Array, "P page_size K2 H"], ids: Int32[Array, "B n"]
) -> Shaped[Array, "B n page_size K2 H"]:
    pages: Array = kv_pages.at[ids].get(mode="clip")
    return pages


def _gather_rows(
    kv_pages: Shaped[Array, "P page_size K2 H"], ids: Int32[Array, "B n"]
) -> Shaped[Array, "B n page_size K2 H"]:
    """The same in rows of all heads, which XLA copies as vectors on CPUs; short rows it copies element by element."""
    page_size, heads, head_dim = kv_pages.shape[1:]
    rows = kv_pages.reshape(-1, page_size, heads * head_dim).at[ids].get(mode="clip")
    return rows.reshape(*ids.shape, page_size, heads, head_dim)


def _update(
    state: Softmax,
    query: Float[Array, "B K Q H"],
    keys: Float[Array, "B C K H"],
    values: Float[Array, "B C K H"],
    visible: Bool[Array, "B #Q C"],
    soft_cap: float | None,
) -> Softmax:
    logits = jnp.einsum("bkqh,bckh->bkqc", query, keys, precision=EXACT)
    if soft_cap is not None:
        logits = jnp.float32(soft_cap) * jnp.tanh(logits / jnp.float32(soft_cap))
    shown = visible[:, None]
    logits = jnp.where(shown, logits, jnp.float32(MASKED))
    peak = jnp.maximum(state.peak, jnp.max(logits, axis=3))
    weights = jnp.where(shown, jnp.exp(logits - peak[..., None]), jnp.float32(0))
    decay = jnp.exp(state.peak - peak)
    added = jnp.einsum("bkqc,bckh->bkqh", weights, values, precision=EXACT)
    return Softmax(peak, state.total * decay + jnp.sum(weights, axis=3), state.values * decay[..., None] + added)
