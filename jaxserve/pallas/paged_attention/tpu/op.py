"""Paged attention on a TPU: two Mosaic kernels on one pool and one output, decodes first and then prompt chunks."""

from __future__ import annotations

import logging
from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxserve.pallas.paged_attention.cache import encode
from jaxserve.pallas.paged_attention.inputs import AttentionConfig, AttentionLayer, RaggedBatch
from jaxserve.pallas.paged_attention.tpu.calls import current_core
from jaxserve.pallas.paged_attention.tpu.decode import decode, decode_sizes
from jaxserve.pallas.paged_attention.tpu.decode_tiles import DecodeTiles, choose_decode_tiles, is_supported
from jaxserve.pallas.paged_attention.tpu.prefill import prefill
from jaxserve.pallas.paged_attention.tpu.prefill_tiles import Sizes
from jaxserve.quant.bits import from_storage

logger = logging.getLogger(__name__)


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
    tiles = _decode_tiles(decode_sizes(q, kv_pages, batch, config))
    if tiles is not None:
        out, kv_pages = decode(q, new_kv, kv_pages, out, batch, layer, config=config, tiles=tiles)
    else:
        # A decode is a chunk of one token.
        batch = replace(batch, num_decodes=jnp.zeros_like(batch.num_decodes))
    out, kv_pages = prefill(q, new_kv, kv_pages, out, batch, layer, config=config)
    return out, jax.lax.bitcast_convert_type(kv_pages, held)


def _decode_tiles(sizes: Sizes) -> DecodeTiles | None:
    """How decodes are cut; None, with a line in the log, if they must go through the prefill kernel."""
    if not is_supported(sizes):
        logger.warning("paged_attention: the prefill kernel decodes %s", sizes.problem)
        return None
    try:
        return choose_decode_tiles(sizes, current_core())
    except NotImplementedError as error:
        logger.warning("paged_attention: the prefill kernel decodes %s: %s", sizes.problem, error)
        return None
