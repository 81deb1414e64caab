"""Paged attention on Hopper GPUs: the new keys and values into their pages, then the decodes, then the chunks.

Each kind of sequence has its kernel. Rows of decodes are the first ones of the batch, so their result comes as the
leading rows of the output, zeros elsewhere; the chunks' kernel fills its rows in. `support` says what they can do.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxserve.pallas.hopper import require_hopper
from jaxserve.pallas.paged_attention.cache import write_pages
from jaxserve.pallas.paged_attention.gpu.support import check_support
from jaxserve.pallas.paged_attention.inputs import AttentionConfig, AttentionLayer, RaggedBatch


def paged_attention_gpu(
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
    require_hopper()
    check_support(q, kv_pages)
    # Imported here, for Mosaic GPU takes a while that no other start should pay.
    from jaxserve.pallas.paged_attention.gpu.decode import attend_decodes
    from jaxserve.pallas.paged_attention.gpu.prefill import attend_chunks

    kv_pages = write_pages(k, v, kv_pages, batch, layer)
    with jax.named_scope("decode"):
        decoded = attend_decodes(q, kv_pages, batch, layer, config)
    out = jnp.pad(decoded, ((0, q.shape[0] - decoded.shape[0]), (0, 0), (0, 0)))
    with jax.named_scope("prefill"):
        return attend_chunks(q, kv_pages, batch, layer, config, out), kv_pages
