"""From a scheduled step to the arrays the programs take, padded to the smallest bucket that holds them.

The host sends one packed int32 vector and the page table of the step's sequences; all else is derived on the device.
Token ids do not travel at all: a sequence's history is loaded when it is admitted, and each sampled token is appended
to it on the device, so the programs read every input token from there. That is what lets the next step be dispatched
before this one's tokens are known.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32
from numpy.typing import NDArray

from jaxserve.engine.sequence import Sequence
from jaxserve.engine.steps import ScheduledStep
from jaxserve.pallas.paged_attention.api import RaggedBatch

HostOrDevice: TypeAlias = Array | NDArray[np.int32] | jax.ShapeDtypeStruct
"""Int32 arrays: made on the host, traced in a program, abstract when it is compiled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Buckets:
    """The closed set of shapes, known before the first request.

    What a step costs depends on its tokens in the decoder and on its sequences in the head; each has a ladder of its
    own, so that programs add up instead of multiplying.

    Attributes:
        tokens: Sizes T the decoder is compiled for, ascending; the last is the token budget.
        seqs: Sizes S the head is compiled for, ascending; the last is the number of slots.
    """

    tokens: tuple[int, ...]
    seqs: tuple[int, ...]

    def tokens_for(self, num_tokens: int) -> int:
        """The smallest T that holds a step's tokens; the scheduler keeps steps within the largest."""
        return self.tokens[bisect_left(self.tokens, num_tokens)]

    def seqs_for(self, num_seqs: int) -> int:
        """The smallest S that holds a step's sequences."""
        return self.seqs[bisect_left(self.seqs, num_seqs)]

    def rows_for(self, num_tokens: int) -> int:
        """Most sequences a step of T tokens can have: the rows of its page table."""
        return min(num_tokens, self.seqs[-1])


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StepInput:
    """What the host sends for a step."""

    # [4 S_max + 2]; context_lens, query_lens, slots, samples, then num_seqs and num_decodes
    packed: HostOrDevice
    # [min(T, S_max), pages_per_seq]
    page_table: HostOrDevice


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """A step's sequences on the device, one row each."""

    # [S]; tokens visible after the step
    context_lens: Int32[Array, " S"]
    # [S]; tokens of the step
    query_lens: Int32[Array, " S"]
    # [S]; out of range for padding
    slots: Int32[Array, " S"]
    # [S]
    samples: Bool[Array, " S"]


def unpack_rows(packed: Int32[Array, " packed"], num_rows: int) -> Rows:
    """The first `num_rows` sequences of a packed step."""
    fields = packed[:-2].reshape(4, -1)[:, :num_rows]
    context_lens, query_lens, slots, samples = fields
    return Rows(context_lens=context_lens, query_lens=query_lens, slots=slots, samples=samples != 0)


def unpack(packed: Int32[Array, " packed"], page_table: Int32[Array, "S pages"], num_tokens: int) -> RaggedBatch:
    """Derives what attention needs from what the host sent; call it inside the program."""
    num_rows = page_table.shape[0]
    rows = unpack_rows(packed, num_rows)
    ends = jnp.cumsum(rows.query_lens, dtype=jnp.int32)
    tokens = jnp.arange(num_tokens, dtype=jnp.int32)
    token_seq = jnp.sum((tokens[:, None] >= ends[None, :]).astype(jnp.int32), axis=1, dtype=jnp.int32)
    # Token t of a sequence stands (end - t) before the end of its context.
    gap = rows.context_lens - ends
    positions = jnp.where(token_seq < num_rows, tokens + gap.at[token_seq].get(mode="clip"), 0)
    return RaggedBatch(
        page_table=page_table,
        context_lens=rows.context_lens,
        query_starts=jnp.concatenate([jnp.zeros((1,), jnp.int32), ends]),
        num_seqs=packed[-2],
        num_decodes=packed[-1],
        positions=positions,
        token_seq=token_seq,
    )


class BatchBuilder:
    """Keeps each slot's row of the page table and packs steps.

    Args:
        buckets: The shapes there are.
        pages_per_seq: Width of the page table.
    """

    def __init__(self, buckets: Buckets, *, pages_per_seq: int) -> None:
        self._buckets = buckets
        self._max_num_seqs = buckets.seqs[-1]
        self._table = np.zeros((self._max_num_seqs, pages_per_seq), np.int32)

    def admit(self, sequence: Sequence) -> None:
        """Takes over the pages of a sequence that has got a slot."""
        pages = sequence.pages
        self._table[sequence.slot, : len(pages)] = pages

    def build(self, step: ScheduledStep) -> tuple[int, StepInput]:
        """Packs a step into fresh arrays, for a dispatched program may still read those of the step before.

        Returns:
            T, and what to send.
        """
        items, size = step.items, self._max_num_seqs
        count = len(items)
        num_tokens = self._buckets.tokens_for(step.num_tokens)
        slots = [item.slot for item in items]
        packed = np.zeros(4 * size + 2, np.int32)
        rows = packed[:-2].reshape(4, size)
        rows[0, :count] = [item.start + item.num_tokens for item in items]
        rows[1, :count] = [item.num_tokens for item in items]
        rows[2, :count] = slots
        rows[2, count:] = size
        rows[3, :count] = [item.samples for item in items]
        packed[-2:] = count, step.num_decodes
        self._table[slots, [item.page_index for item in items]] = [item.page for item in items]
        table = np.zeros((self._buckets.rows_for(num_tokens), self._table.shape[1]), np.int32)
        np.take(self._table, slots, axis=0, out=table[:count], mode="clip")
        return num_tokens, StepInput(packed=packed, page_table=table)
