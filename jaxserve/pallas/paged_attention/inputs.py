"""What paged attention is told besides arrays of tokens: the ragged batch, the layer, and the static configuration.

A step's tokens lie one after another in one flat batch of T rows, each sequence's new tokens together. Sequence s owns
rows [query_starts[s], query_starts[s + 1]) and pages page_table[s]; its context_lens[s] tokens are the cached ones
followed by the new ones. Shapes are static and padded:

    rows       0 .. query_starts[num_seqs] are tokens, the rest up to T is padding
    sequences  0 .. num_decodes have one new token, num_decodes .. num_seqs any number, num_seqs .. S are padding
    pages      0 .. ceil(context_len / page_size) of a row of page_table are owned, the rest may hold any page id
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int32


class PrefillSchedule(NamedTuple):
    """A step's chunks in the order in which a kernel takes them, the same for all layers."""

    # [M, 5]; sequence, first row, its position, tokens, and the context's end; those that read most come first
    tiles: Int32[Array, "M 5"]
    # scalar; how many there are
    num_tiles: Int32[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class RaggedBatch:
    """Which tokens belong to which sequence, and where their keys and values lie."""

    # [S, pages_per_seq]; page ids within a layer, in order of position
    page_table: Int32[Array, "S pages_per_seq"]
    # [S]; tokens visible after this step, the new ones included; 0 for padding sequences
    context_lens: Int32[Array, " S"]
    # [S + 1]; first row of each sequence, then the end of the last; padding sequences have no rows
    query_starts: Int32[Array, " S_plus_1"]
    # scalar; sequences that are not padding
    num_seqs: Int32[Array, ""]
    # scalar; the first num_decodes sequences have exactly one row
    num_decodes: Int32[Array, ""]
    # [T]; position of each row's token in its sequence
    positions: Int32[Array, " T"]
    # [T]; sequence of each row; S for padding
    token_seq: Int32[Array, " T"]
    # made once for all layers by `api.prepared`, or None: a backend that needs it makes it itself
    prefill: PrefillSchedule | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class AttentionLayer:
    """What differs from layer to layer."""

    # scalar; first page of the layer in the pool: layer * num_pages
    page_offset: Int32[Array, ""]
    # [N]; an extra logit a head in the softmax's denominator, or None
    sinks: Float[Array, " N"] | None = None
    # scalar; keys are stored divided by it, or None for 1
    k_scale: Float[Array, ""] | None = None
    # scalar; values are stored divided by it, or None for 1
    v_scale: Float[Array, ""] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig:
    """Static facts about a model's attention.

    Attributes:
        scale: Multiplies the dot products, usually head_dim ** -0.5.
        sliding_window: A token at position p sees positions (p - sliding_window, p]; None sees all up to p.
        soft_cap: Logits x become soft_cap * tanh(x / soft_cap) after scaling; None leaves them.
    """

    scale: float
    sliding_window: int | None
    soft_cap: float | None
