"""What the TPU's decode kernel touches, and pages as rows of 32-bit words.

A row of words holds, lane by lane, neighbouring elements of a page: with 16-bit elements key and value of one KV head,
with 8 bits those of two, with 32 bits keys and values in turn. Rows of words are not tiled, so they can be read and
written wherever they begin, eight at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int32, UInt32

from jaxserve.pallas.paged_attention.inputs import AttentionConfig
from jaxserve.pallas.paged_attention.tpu.decode_tiles import DecodeGeometry

Ref: TypeAlias = Any
Scalar: TypeAlias = Int32[Array, ""]


class Refs(NamedTuple):
    """Everything the kernel touches."""

    # SMEM: [page_offset, num_decodes]; context_lens; [logit and value factor]
    counts: Ref
    contexts: Ref
    factors: Ref
    # HBM: page table [S, 1, padded]
    table: Ref
    # VMEM: [rows, N, H]; [rows, words of a token, packing, H]
    queries: Ref
    new: Ref
    # VMEM: [N, 128], base-2 logits, or None
    sinks: Ref | None
    # HBM: [T, N, H]; [P, words of a page, packing, H]; both are aliased to arguments
    out: Ref
    pages: Ref
    # VMEM, by slot and item: pages as they come
    ring: Ref
    # VMEM, by item: logits, and their maximum lane by lane
    logits: Ref
    tops: Ref
    # VMEM: the running softmax, and finished rows with one more for items that are none
    peak: Ref
    total: Ref
    acc: Ref
    result: Ref
    # SMEM: rows of the page table, by sequence modulo their number; how many of them have come, and been asked for
    rows: Ref
    reached: Ref
    # SMEM, by slot: pages, whether an item begins or ends in its middle; by slot and item: `Field`s
    totals: Ref
    borders: Ref
    fields: Ref
    rows_done: Ref
    pages_done: Ref
    writes_done: Ref
    out_done: Ref


class Field:
    """Where the facts of an item lie; tokens are counted from the item's first."""

    SEQ = 0
    # tokens [LOW, HIGH) are seen
    LOW = 1
    HIGH = 2
    IS_FIRST = 3
    # page of the pool that the new token goes to, -1 in all items but a sequence's last
    NEW_PAGE = 4
    COUNT = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """An item's slot, and its fields of the same names."""

    slot: Scalar
    seq: Scalar
    low: Scalar
    high: Scalar
    is_first: Scalar


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is static.

    Attributes:
        geometry: Sizes.
        config: Of the attention.
        compiled: Whether the kernel is compiled for a TPU; the interpreter cannot look at memory as words.
    """

    geometry: DecodeGeometry
    config: AttentionConfig
    compiled: bool


def load_words(plan: Plan, pages: Ref, start: Scalar | int, size: int, stride: int = 1) -> UInt32[Array, "size H"]:
    """Rows of words, `stride` apart.

    Args:
        plan: What is static.
        pages: [W, packing, H] in VMEM.
        start: First row.
        size: How many.
        stride: From one to the next.
    """
    g = plan.geometry
    if plan.compiled:
        words: UInt32[Array, "size H"] = _words(pages, g)[pl.ds(start, size, stride=stride), :]
        return words
    rows = pages[pl.ds(start, size, stride=stride)].reshape(size * g.packing, g.head_dim)
    return pltpu.bitcast(rows, jnp.uint32)


def store_words(plan: Plan, pages: Ref, start: Scalar, words: UInt32[Array, "size H"]) -> None:
    """Writes neighbouring rows of words.

    Args:
        plan: What is static.
        pages: [W, packing, H] in VMEM.
        start: First row.
        words: What to write.
    """
    g, size = plan.geometry, words.shape[0]
    if plan.compiled:
        _words(pages, g)[pl.ds(start, size), :] = words
    else:
        rows = pltpu.bitcast(words, g.kv_dtype)
        pages[pl.ds(start, size)] = rows.reshape(size, g.packing, g.head_dim)


def _words(pages: Ref, g: DecodeGeometry) -> Ref:
    return pages.bitcast(jnp.uint32).reshape(pages.shape[0], g.head_dim)


def as_bfloat16_words(plan: Plan, words: UInt32[Array, "W H"]) -> UInt32[Array, "twice_or_W H"]:
    """Words of which each holds one key and its value in bfloat16; of 8-bit elements a word becomes two."""
    g = plan.geometry
    if g.packing == 2:
        return words
    return pltpu.bitcast(pltpu.bitcast(words, g.kv_dtype).astype(jnp.bfloat16), jnp.uint32)


def keys_or_values(plan: Plan, pages: Ref, *, values: bool) -> Array:
    """Keys, or values, of an item, all KV heads together: [columns, H] in the matmuls' dtype.

    Column c belongs to pair c, or if `geometry.halves` to pair c // 2 + c % 2 * columns / 2; the pairs of a token lie
    together, by KV head.

    Args:
        plan: What is static.
        pages: [W, packing, H] in VMEM.
        values: Which of the two.
    """
    g = plan.geometry
    if g.packing == 1:
        words = load_words(plan, pages, int(values), g.columns, stride=2)
        return jax.lax.bitcast_convert_type(words, jnp.float32)
    words = as_bfloat16_words(plan, load_words(plan, pages, 0, g.item_words))
    lower, upper = jnp.uint32(0xFFFF), jnp.uint32(0xFFFF0000)
    if not g.halves:
        return jax.lax.bitcast_convert_type(words & upper if values else words << 16, jnp.float32)
    a, b = words[: g.columns // 2], words[g.columns // 2 :]
    paired = (a >> 16) | (b & upper) if values else (a & lower) | (b << 16)
    return pltpu.bitcast(paired, jnp.bfloat16)
