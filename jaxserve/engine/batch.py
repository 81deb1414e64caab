"""From a scheduled step to the arrays a program takes, in the smallest bucket that holds it.

The host sends one packed int32 vector and the page table of the step's sequences; all else is derived on the device.
Token ids do not travel at all: a sequence's history is loaded when it is admitted, and each sampled token is appended
to it on the device, so the program reads every input token from there. That is what lets the next step be dispatched
before this one's tokens are known.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32
from numpy.typing import NDArray

from jaxserve.engine.sequence import Sequence
from jaxserve.engine.steps import ScheduledSequence, ScheduledStep
from jaxserve.pallas.paged_attention.api import RaggedBatch

HostOrDevice: TypeAlias = Array | NDArray[np.int32] | jax.ShapeDtypeStruct
"""Int32 arrays: made on the host, traced in the program, abstract when it is compiled."""

FLAG_SAMPLES = 1
FLAG_PROMPT_LOGPROBS = 2


class Bucket(NamedTuple):
    """The static shape of a step: T tokens of at most S sequences, S <= T; decode-only if they are equal."""

    num_tokens: int
    num_seqs: int

    @property
    def name(self) -> str:
        """As metrics and logs call it."""
        return f"{self.num_tokens}x{self.num_seqs}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Buckets:
    """The closed set of shapes, known before the first request.

    Attributes:
        decode: Buckets of steps in which every sequence has one token, ascending.
        mixed: Buckets of the other steps, ascending by tokens, then sequences.
    """

    decode: tuple[Bucket, ...]
    mixed: tuple[Bucket, ...]

    @classmethod
    def of(cls, *, seq_buckets: Seq[int], token_buckets: Seq[int]) -> Buckets:
        """Every decode size; every token size with the smallest, a middle and the largest number of sequences.

        Args:
            seq_buckets: Numbers of sequences, ascending; the last is the most that can run.
            token_buckets: Numbers of tokens, ascending; the last is the token budget.
        """
        few = tuple(sorted({seq_buckets[min(1, len(seq_buckets) - 1)], seq_buckets[-1]}))
        mixed = {Bucket(tokens, min(seqs, tokens)) for tokens in token_buckets for seqs in few}
        return cls(decode=tuple(Bucket(size, size) for size in seq_buckets), mixed=tuple(sorted(mixed)))

    def all(self) -> tuple[Bucket, ...]:
        """Every bucket once."""
        return tuple(dict.fromkeys((*self.decode, *self.mixed)))

    def choose(self, num_tokens: int, num_seqs: int, *, scores_prompt: bool = False) -> Bucket:
        """The smallest bucket that holds a step.

        Args:
            num_tokens: Tokens of the step.
            num_seqs: Its sequences.
            scores_prompt: Whether prompt tokens must be scored, which decode-only programs do not do.

        Raises:
            ValueError: None does; the scheduler's limits and the buckets disagree.
        """
        if num_tokens == num_seqs and not scores_prompt:
            index = bisect_left(self.decode, (num_tokens, num_seqs))
            if index < len(self.decode):
                return self.decode[index]
        for bucket in self.mixed:
            if bucket.num_tokens >= num_tokens and bucket.num_seqs >= num_seqs:
                return bucket
        raise ValueError(f"no bucket holds {num_tokens} tokens of {num_seqs} sequences")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StepInput:
    """What the host sends for a step."""

    # [4 S + 2]; context_lens, query_lens, slots, flags, then num_seqs and num_decodes
    packed: HostOrDevice
    # [S, pages_per_seq]
    page_table: HostOrDevice


@dataclass(frozen=True, kw_only=True, slots=True)
class Unpacked:
    """A step's arrays on the device."""

    batch: RaggedBatch
    # [S]; out of range for padding
    slots: Int32[Array, " S"]
    # [S]
    samples: Bool[Array, " S"]
    # [S]
    wants_prompt_logprobs: Bool[Array, " S"]


def unpack(inputs: StepInput, bucket: Bucket) -> Unpacked:
    """Derives what attention and sampling need from what the host sent; call it inside the program."""
    num_tokens, num_seqs = bucket
    packed = jnp.asarray(inputs.packed)
    context_lens, query_lens, slots, flags = packed[: 4 * num_seqs].reshape(4, num_seqs)
    ends = jnp.cumsum(query_lens, dtype=jnp.int32)
    query_starts = jnp.concatenate([jnp.zeros((1,), jnp.int32), ends])
    tokens = jnp.arange(num_tokens, dtype=jnp.int32)
    token_seq = jnp.sum((tokens[:, None] >= ends[None, :]).astype(jnp.int32), axis=1, dtype=jnp.int32)
    # Token t of sequence s is context_len - (end - t) from the start.
    gap = context_lens - ends
    positions = jnp.where(token_seq < num_seqs, tokens + gap.at[token_seq].get(mode="clip"), 0)
    batch = RaggedBatch(
        page_table=jnp.asarray(inputs.page_table),
        context_lens=context_lens,
        query_starts=query_starts,
        num_seqs=packed[4 * num_seqs],
        num_decodes=packed[4 * num_seqs + 1],
        positions=positions,
        token_seq=token_seq,
    )
    return Unpacked(
        batch=batch,
        slots=slots,
        samples=(flags & FLAG_SAMPLES) != 0,
        wants_prompt_logprobs=(flags & FLAG_PROMPT_LOGPROBS) != 0,
    )


class BatchBuilder:
    """Keeps each slot's row of the page table and packs steps.

    Args:
        buckets: The shapes there are.
        max_num_seqs: Slots.
        pages_per_seq: Width of the page table.
    """

    def __init__(self, buckets: Buckets, *, max_num_seqs: int, pages_per_seq: int) -> None:
        self._buckets = buckets
        self._max_num_seqs = max_num_seqs
        self._table = np.zeros((max_num_seqs, pages_per_seq), np.int32)

    def admit(self, sequence: Sequence) -> None:
        """Takes over the pages of a sequence that has got a slot."""
        pages = sequence.pages
        self._table[sequence.slot, : len(pages)] = pages

    def build(self, step: ScheduledStep) -> tuple[Bucket, StepInput]:
        """Packs a step into fresh arrays: a dispatched program may still read those of the step before."""
        items = step.items
        count = len(items)
        flags = [_flags(item) for item in items]
        bucket = self._buckets.choose(
            step.num_tokens, count, scores_prompt=any(flag & FLAG_PROMPT_LOGPROBS for flag in flags)
        )
        size = bucket.num_seqs
        packed = np.zeros(4 * size + 2, np.int32)
        rows = packed[: 4 * size].reshape(4, size)
        rows[2, count:] = self._max_num_seqs
        slots = [item.slot for item in items]
        rows[0, :count] = [item.start + item.num_tokens for item in items]
        rows[1, :count] = [item.num_tokens for item in items]
        rows[2, :count] = slots
        rows[3, :count] = flags
        packed[4 * size] = count
        packed[4 * size + 1] = step.num_decodes
        self._table[slots, [item.page_index for item in items]] = [item.page for item in items]
        table = np.zeros((size, self._table.shape[1]), np.int32)
        np.take(self._table, slots, axis=0, out=table[:count], mode="clip")
        return bucket, StepInput(packed=packed, page_table=table)


def _flags(item: ScheduledSequence) -> int:
    sequence = item.sequence
    scores = sequence.prompt_logprobs is not None and item.start + 1 < sequence.num_prompt
    return (FLAG_SAMPLES if item.samples else 0) | (FLAG_PROMPT_LOGPROBS if scores else 0)
