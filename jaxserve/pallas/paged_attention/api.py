"""Paged attention over a ragged batch: new keys and values go into the pages, then each token attends to its sequence.

One call serves one layer of a step that mixes prefill chunks and decodes. The pool holds the pages of all layers in one
array [num_layers * num_pages, page_size, 2 * K, H]; key and value of KV head h lie at 2 * h and 2 * h + 1. The pool is
passed in, changed in place when the caller donates it, and returned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxserve.pallas.dispatch import ANYWHERE, Backend, Target, deferred, interpreted, preference, select
from jaxserve.pallas.paged_attention.cache import FORMATS
from jaxserve.pallas.paged_attention.gpu.prefill_schedule import prefill_schedule
from jaxserve.pallas.paged_attention.gpu.prefill_tiles import item_tokens
from jaxserve.pallas.paged_attention.inputs import AttentionConfig, AttentionLayer, RaggedBatch
from jaxserve.pallas.paged_attention.reference import paged_attention_reference
from jaxserve.pallas.paged_attention.xla import paged_attention_xla
from jaxserve.quant.bits import format_of

__all__ = ["BACKENDS", "AttentionConfig", "AttentionLayer", "RaggedBatch", "Target", "paged_attention", "prepared"]

BACKENDS: Mapping[Backend, Callable[..., tuple[Array, Array]]] = MappingProxyType(
    {
        Backend.REFERENCE: paged_attention_reference,
        Backend.XLA: paged_attention_xla,
        Backend.TPU: deferred("paged_attention.tpu.op", "paged_attention_tpu"),
        Backend.GPU: deferred("paged_attention.gpu.op", "paged_attention_gpu"),
    }
)


def paged_attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    kv_pages: Shaped[Array, "P page_size rows lanes"],
    batch: RaggedBatch,
    layer: AttentionLayer,
    *,
    config: AttentionConfig,
    target: Target = ANYWHERE,
) -> tuple[Float[Array, "T N H"], Shaped[Array, "P page_size rows lanes"]]:
    """Writes the new keys and values into the pages and attends causally over each sequence's context.

    Rows past the batch's last token are padding: they may hold anything, write nothing, and come back as zeros. Nothing
    is read but the context of the batch's sequences, and nothing is written but their new tokens.

    Args:
        q: [T, N, H]; N query heads, N / K of them to a KV head.
        k: [T, K, H].
        v: [T, K, H].
        kv_pages: [P, page_size, 2 * K, H] in one of the formats of `cache`; int8 needs both scales. The pool may hold
            more heads and wider ones than there are (`kv.pool.held_heads`); they are written as zeros.
        batch: Sequences, pages and positions.
        layer: The layer's place in the pool, its sinks and its scales.
        config: Static facts about the model's attention.
        target: Where it will run, and which implementation was asked for.

    Returns:
        The attention's output in q's dtype, and the pool.

    Raises:
        ValueError: Shapes or dtypes do not fit together.
        NotImplementedError: The chosen backend cannot do this.
        ConfigError: There is no such backend.
    """
    _check_tokens(q, k, v)
    _check_pages(k, kv_pages, layer)
    _check_layer(q.shape[1], layer)
    _check_batch(q.shape[0], batch)
    _check_config(config)
    run = select("paged_attention", BACKENDS, target)
    with interpreted(target), jax.named_scope("paged_attention"):
        *tokens, wide = _widened(q, k, v, kv_pages, layer)
        out, kv_pages = run(*tokens, kv_pages, batch, wide, config=config)
        return out[:, : q.shape[1], : q.shape[2]], kv_pages


def _widened(
    q: Array, k: Array, v: Array, kv_pages: Array, layer: AttentionLayer
) -> tuple[Array, Array, Array, AttentionLayer]:
    """Queries, keys, values and sinks with as many KV heads and elements a head as the pool holds."""
    num_kv_heads, head_dim = k.shape[1:]
    num_held, held_dim = kv_pages.shape[2] // 2, kv_pages.shape[3]
    if (num_held, held_dim) == (num_kv_heads, head_dim):
        return q, k, v, layer
    group = q.shape[1] // num_kv_heads
    more = (0, num_held - num_kv_heads), (0, held_dim - head_dim)
    k, v = (jnp.pad(x, ((0, 0), *more)) for x in (k, v))
    q = jnp.pad(q, ((0, 0), (0, group * more[0][1]), more[1]))
    sinks = None if layer.sinks is None else jnp.pad(layer.sinks, (0, q.shape[1] - layer.sinks.shape[0]))
    return q, k, v, dataclasses.replace(layer, sinks=sinks)


def prepared(batch: RaggedBatch, *, group: int, target: Target = ANYWHERE) -> RaggedBatch:
    """Adds to a batch what can be made once for all layers, if the backend that will run wants it; optional.

    Args:
        batch: Sequences, pages and positions.
        group: Query heads to a KV head.
        target: As `paged_attention` will be told.
    """
    chosen = target.backend or preference(target.resolved_platform)[0]
    if chosen is not Backend.GPU:
        return batch
    return dataclasses.replace(batch, prefill=prefill_schedule(batch, item_tokens(group)))


def _check_tokens(q: Array, k: Array, v: Array) -> None:
    if q.ndim != 3 or k.ndim != 3:
        raise ValueError(f"q must be [T, N, H] and k [T, K, H], not {q.shape} and {k.shape}")
    if k.shape != v.shape:
        raise ValueError(f"k {k.shape} and v {v.shape} differ in shape")
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    if (k.shape[0], k.shape[2]) != (num_tokens, head_dim):
        raise ValueError(f"k {k.shape} must have the tokens and the head dim of q {q.shape}")
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide among {num_kv_heads} KV heads")
    for name, array in (("q", q), ("k", k), ("v", v)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point, not {array.dtype}")


def _check_pages(k: Array, kv_pages: Array, layer: AttentionLayer) -> None:
    heads, head_dim = k.shape[1:]
    wanted, padded = (2 * heads, head_dim), (2 << (heads - 1).bit_length(), 128)
    if kv_pages.ndim != 4 or kv_pages.shape[2:] not in (wanted, padded) or kv_pages.shape[3] < head_dim:
        raise ValueError(
            f"pages {kv_pages.shape} must be [P, page_size, {wanted[0]}, {wanted[1]}] to hold k {k.shape}, or "
            f"{padded} of them in a pool padded for TPUs"
        )
    if format_of(kv_pages.dtype) not in FORMATS:
        raise ValueError(f"pages must hold one of {', '.join(FORMATS)}, not {kv_pages.dtype}")
    if kv_pages.dtype == jnp.int8 and (layer.k_scale is None or layer.v_scale is None):
        raise ValueError("int8 pages need k_scale and v_scale")


def _check_layer(num_heads: int, layer: AttentionLayer) -> None:
    if layer.page_offset.shape != () or layer.page_offset.dtype != jnp.int32:
        raise ValueError(f"page_offset must be an int32 scalar, not {_describe(layer.page_offset)}")
    if layer.sinks is not None and layer.sinks.shape != (num_heads,):
        raise ValueError(f"sinks {layer.sinks.shape} must have one logit for each of {num_heads} query heads")
    for name, scale in (("k_scale", layer.k_scale), ("v_scale", layer.v_scale)):
        if scale is not None and (scale.shape != () or scale.dtype != jnp.float32):
            raise ValueError(f"{name} must be a float32 scalar, not {_describe(scale)}")


def _check_batch(num_tokens: int, batch: RaggedBatch) -> None:
    if batch.page_table.ndim != 2:
        raise ValueError(f"page_table must be [S, pages_per_seq], not {batch.page_table.shape}")
    num_seqs = batch.page_table.shape[0]
    wanted = {
        "page_table": (batch.page_table, batch.page_table.shape),
        "context_lens": (batch.context_lens, (num_seqs,)),
        "query_starts": (batch.query_starts, (num_seqs + 1,)),
        "num_seqs": (batch.num_seqs, ()),
        "num_decodes": (batch.num_decodes, ()),
        "positions": (batch.positions, (num_tokens,)),
        "token_seq": (batch.token_seq, (num_tokens,)),
    }
    for name, (array, shape) in wanted.items():
        if array.shape != shape or array.dtype != jnp.int32:
            raise ValueError(f"{name} must be int32{list(shape)}, not {_describe(array)}")


def _check_config(config: AttentionConfig) -> None:
    if config.sliding_window is not None and config.sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1, not {config.sliding_window}")
    if config.soft_cap is not None and config.soft_cap <= 0:
        raise ValueError(f"soft_cap must be positive, not {config.soft_cap}")


def _describe(array: Array) -> str:
    return f"{array.dtype}{list(array.shape)}"
