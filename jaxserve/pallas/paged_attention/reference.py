"""Paged attention as plainly as it can be said: the oracle that every other backend is held against.

New keys and values are written into their pages; then each token, one at a time, gathers every page of its sequence,
forgets what it must not see, and takes a softmax in float32. Nothing is fast here and nothing is clever.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped

from jaxserve.pallas.paged_attention.cache import decode, write_pages
from jaxserve.pallas.paged_attention.inputs import AttentionConfig, AttentionLayer, RaggedBatch


class _Row(NamedTuple):
    """One token."""

    query: Float[Array, "N H"]
    sequence: Int32[Array, ""]
    position: Int32[Array, ""]


def paged_attention_reference(
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
    kv_pages = write_pages(k, v, kv_pages, batch, layer)

    def attend(row: _Row) -> Float[Array, "N H"]:
        pages = batch.page_table.at[row.sequence].get(mode="clip") + layer.page_offset
        kv = kv_pages.at[pages].get(mode="clip").reshape(-1, *kv_pages.shape[2:])
        keys, values = decode(kv[:, 0::2], layer.k_scale), decode(kv[:, 1::2], layer.v_scale)
        return _attend(row, keys, values, layer.sinks, config)

    out = jax.lax.map(attend, _Row(q, batch.token_seq, batch.positions))
    is_token = jnp.arange(q.shape[0]) < batch.query_starts[batch.num_seqs]
    return jnp.where(is_token[:, None, None], out, jnp.zeros_like(out)), kv_pages


def _attend(
    row: _Row,
    keys: Float[Array, "C K H"],
    values: Float[Array, "C K H"],
    sinks: Float[Array, " N"] | None,
    config: AttentionConfig,
) -> Float[Array, "N H"]:
    """One token's attention over the C places in its sequence's pages."""
    num_heads, head_dim = row.query.shape
    places = jnp.arange(keys.shape[0])
    visible = places <= row.position
    if config.sliding_window is not None:
        visible &= places > row.position - config.sliding_window
    # What is not visible may be anything, NaN included, and 0 * NaN is NaN.
    keys = jnp.where(visible[:, None, None], keys, 0.0)
    values = jnp.where(visible[:, None, None], values, 0.0)
    queries = row.query.astype(jnp.float32).reshape(keys.shape[1], -1, head_dim)

    precision = jax.lax.Precision.HIGHEST
    logits = jnp.einsum("kgh,ckh->kgc", queries, keys, precision=precision) * config.scale
    if config.soft_cap is not None:
        logits = config.soft_cap * jnp.tanh(logits / config.soft_cap)
    logits = jnp.where(visible[None, None, :], logits, -jnp.inf)
    if sinks is not None:
        # A sink takes part in the softmax and contributes no value.
        sink = sinks.astype(jnp.float32).reshape(*logits.shape[:2], 1)
        weights = jax.nn.softmax(jnp.concatenate([logits, sink], axis=2), axis=2)[:, :, :-1]
    else:
        weights = jax.nn.softmax(logits, axis=2)
    out = jnp.einsum("kgc,ckh->kgh", weights, values, precision=precision)
    return out.reshape(num_heads, head_dim).astype(row.query.dtype)
