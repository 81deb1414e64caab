"""What the TPU's prefill kernel touches, and the item of work at hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int32

from jaxserve.pallas.paged_attention.inputs import AttentionConfig
from jaxserve.pallas.paged_attention.tpu.prefill_tiles import Geometry

Ref: TypeAlias = Any
Copy: TypeAlias = Any
Scalar: TypeAlias = Int32[Array, ""]


class Refs(NamedTuple):
    """Everything the kernel touches."""

    # SMEM: [page_offset, num_decodes, num_seqs]; context_lens; query_starts; [query and value factor]
    counts: Ref
    contexts: Ref
    starts: Ref
    factors: Ref
    # HBM: page table [S, 1, pages_per_seq]; [T, N, H], [T, 2K, H]; results aliased to arguments
    table: Ref
    queries: Ref
    new: Ref
    out: Ref
    pages: Ref
    # VMEM: [N, 128], base-2 logits, or None
    sinks: Ref | None
    # VMEM: what DMAs fill and empty
    raw_queries: Ref
    raw_kv: Ref
    raw_out: Ref
    # VMEM: rows of all heads and KV rows of all heads, by token, float32
    stage: Ref
    kv_stage: Ref
    # VMEM, keys and values by KV head
    k: Ref
    v: Ref
    # VMEM, rows by block and KV head, with one more unit: queries, and the running softmax in float32
    q: Ref
    peak: Ref
    total: Ref
    acc: Ref
    # VMEM, two units in flight: logits and maximum
    logits: Ref
    peaks: Ref
    # SMEM: rows of the page table, of the chunk whose pages are written and of the one whose pages are read
    write_table: Ref
    read_table: Ref
    table_done: Ref
    queries_done: Ref
    kv_done: Ref
    out_done: Ref
    writes_done: Ref


class Item(NamedTuple):
    """A query tile of a chunk."""

    seq: Scalar
    tile: Scalar
    # rows of the batch, and position of the first token
    row: Scalar
    tokens: Scalar
    position: Scalar
    # KV tiles that its queries see
    first: Scalar
    end: Scalar


class Span(NamedTuple):
    """Neighbouring tokens of a KV tile."""

    first: Scalar
    width: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is static."""

    geometry: Geometry
    config: AttentionConfig
    pages_per_seq: int


def copy_queries(refs: Refs, item: Item) -> Copy:
    """The copy of an item's queries into VMEM."""
    rows = pl.ds(0, item.tokens)
    source = refs.queries.at[pl.ds(item.row, item.tokens)]
    return pltpu.make_async_copy(source, refs.raw_queries.at[rows], refs.queries_done)


def copy_out(refs: Refs, row: Scalar, tokens: Scalar) -> Copy:
    """The copy of the outputs of some tokens to their rows of the batch."""
    return pltpu.make_async_copy(refs.raw_out.at[pl.ds(0, tokens)], refs.out.at[pl.ds(row, tokens)], refs.out_done)
