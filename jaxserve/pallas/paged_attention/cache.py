"""Keys and values in the pool: how a value becomes an element of a page, gets to its place, and comes back.

A page holds `x / scale` in the pool's number format. Narrow formats saturate, so an outlier costs precision and never
becomes NaN or wraps around; integers are rounded to the nearest.

The pool's array may hold the format's bits as unsigned integers; see `quant/bits`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxserve.pallas.paged_attention.inputs import AttentionLayer, RaggedBatch
from jaxserve.quant.bits import format_of, from_storage, to_storage

FORMATS: Mapping[str, float | None] = MappingProxyType(
    {
        "float32": None,
        "bfloat16": None,
        "float16": None,
        "float8_e4m3fn": 448.0,
        "float8_e5m2": 57344.0,
        "int8": 127.0,
    }
)
"""Number formats of the pool, with the largest magnitude stored by those that saturate."""


def encode(x: Float[Array, "*shape"], scale: Float[Array, ""] | None, dtype: jnp.dtype) -> Shaped[Array, "*shape"]:
    """Turns values into elements of the pool.

    Args:
        x: Keys or values.
        scale: Divides them, or None.
        dtype: The pool array's.
    """
    if scale is not None:
        x = x.astype(jnp.float32) / scale
    limit = FORMATS[format_of(dtype)]
    if limit is not None:
        x = jnp.clip(x.astype(jnp.float32), -limit, limit)
    if dtype == jnp.int8:
        x = jnp.round(x)
    return to_storage(x, dtype)


def decode(x: Shaped[Array, "*shape"], scale: Float[Array, ""] | None) -> Float[Array, "*shape"]:
    """Turns elements of the pool into float32 values; undoes `encode` up to rounding."""
    values = from_storage(x).astype(jnp.float32)
    return values if scale is None else values * scale


def write_pages(
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    kv_pages: Shaped[Array, "P page_size K2 H"],
    batch: RaggedBatch,
    layer: AttentionLayer,
) -> Shaped[Array, "P page_size K2 H"]:
    """Puts each token's keys and values at its position in its sequence's pages; padding writes nothing.

    Args:
        k: [T, K, H].
        v: [T, K, H].
        kv_pages: The pool; changed in place if it is donated.
        batch: Sequences, pages and positions.
        layer: The layer's place in the pool, and its scales.
    """
    num_tokens, num_kv_heads, head_dim = k.shape
    num_pages, page_size = kv_pages.shape[:2]
    is_token = jnp.arange(num_tokens, dtype=jnp.int32) < batch.query_starts[batch.num_seqs]
    page = batch.page_table.at[batch.token_seq, batch.positions // page_size].get(mode="clip") + layer.page_offset
    new = jnp.stack([encode(k, layer.k_scale, kv_pages.dtype), encode(v, layer.v_scale, kv_pages.dtype)], axis=2)
    # Padding goes to a page past the pool's end, which drops it.
    return kv_pages.at[jnp.where(is_token, page, num_pages), batch.positions % page_size].set(
        new.reshape(num_tokens, 2 * num_kv_heads, head_dim), mode="drop"
    )
