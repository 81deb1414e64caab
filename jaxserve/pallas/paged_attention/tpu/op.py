"""Paged attention on a TPU: two Mosaic kernels on one pool and one output, decodes first and then prompt chunks."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxserve.pallas.paged_attention.cache import encode
from jaxserve.pallas.paged_attention.inputs import AttentionConfig, AttentionLayer, RaggedBatch
from jaxserve.pallas.paged_attention.tpu.decode import decode, decode_sizes
from jaxserve.pallas.paged_attention.tpu.decode_tiles import is_supported
from jaxserve.pallas.paged_attention.tpu.prefill import prefill
from jaxserve.quant.bits import from_storage


def paged_attention_tpu(
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
    if jnp.float16 in (q.dtype, kv_pages.dtype):
        raise NotImplementedError("TPUs have no arithmetic for float16")
    num_tokens, num_kv_heads, head_dim = k.shape
    # A pool held as bits is a CPU's, in the interpreter; kernels read the floats that it means.
    held, kv_pages = kv_pages.dtype, from_storage(kv_pages)
    new = jnp.stack([encode(k, layer.k_scale, kv_pages.dtype), encode(v, layer.v_scale, kv_pages.dtype)], axis=2)
    new_kv = new.reshape(num_tokens, 2 * num_kv_heads, head_dim)
    out = jnp.zeros_like(q)
    if is_supported(decode_sizes(q, kv_pages, batch, config)):
        out, kv_pages = decode(q, new_kv, kv_pages, out, batch, layer, config=config)
    else:
        # A decode is a chunk of one token.
        batch = replace(batch, num_decodes=jnp.zeros_like(batch.num_decodes))
    out, kv_pages = prefill(q, new_kv, kv_pages, out, batch, layer, config=config)
    return out, jax.lax.bitcast_convert_type(kv_pages, held)
