"""What a decode has to do: which splits of which sequences there are, and which of them a warpgroup takes next.

A context is split at multiples of `Splits.tokens` of the position, so a sequence's splits do not depend on the batch.
Items are (split, KV head) of all decoding sequences, one after another; the number of an item's sequence is found by
bisecting the sequences' first items. Each warpgroup makes this list for itself when it starts, in its own shared
memory, so that nothing has to be launched before the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32

from jaxserve.pallas.paged_attention.gpu.tiles import BLOCK_TOKENS

LARGEST = (1 << 31) - 1
UNROLL = 32
"""Context lengths that are read at a time."""

LANES = 128
"""Elements of a warpgroup's vector."""

Ref: TypeAlias = Any
Scalar: TypeAlias = Int32[Array, ""]


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """How contexts are split.

    Attributes:
        tokens: Context of a split.
        window: Of the attention, or None.
        most: Splits of the longest sequence.
    """

    tokens: int
    window: int | None
    most: int

    def first_position(self, context: Scalar) -> Scalar:
        """The first position that is visible from a context's last."""
        return jnp.int32(0) if self.window is None else jnp.maximum(context - self.window, 0)

    def count(self, context: Scalar) -> Scalar:
        """Splits with a visible position."""
        tokens = jnp.int32(self.tokens)
        return lax.div(context + (tokens - 1), tokens) - lax.div(self.first_position(context), tokens)


def decode_splits(split_tokens: int, window: int | None, capacity: int) -> Splits:
    """How contexts of up to `capacity` tokens are split.

    Args:
        split_tokens: Context of a split.
        window: Of the attention, or None.
        capacity: Tokens of the longest sequence.
    """
    most = -(-capacity // split_tokens)
    if window is not None:
        most = min(most, -(-window // split_tokens) + 1)
    return Splits(tokens=split_tokens, window=window, most=most)


class Item(NamedTuple):
    """One split of one sequence, for one KV head."""

    seq: Scalar
    head: Scalar
    # where its partial result goes
    place: Scalar
    # its visible positions
    start: Scalar
    stop: Scalar
    # blocks of BLOCK_TOKENS positions that hold them
    first_block: Scalar
    num_blocks: Scalar


class Agenda(NamedTuple):
    """The items of a step."""

    # SMEM, [agenda_size]: a sequence's first split among all, or LARGEST if it is no decode
    begins: Ref
    # [S]; context lengths
    lens: Ref
    splits: Splits
    num_seqs: int
    num_kv_heads: int

    def write(self, num_decodes: Scalar) -> Scalar:
        """Makes the list, and returns the number of items.

        It is made in registers and stored as vectors, for a warpgroup's threads meet before and after each store.

        Args:
            num_decodes: Sequences [0, num_decodes) are decodes.
        """
        step = min(_power_of_two(self.num_seqs), UNROLL)
        num_decodes = jnp.minimum(num_decodes, self.num_seqs)
        layout = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)
        lane = plgpu.broadcasted_iota(jnp.int32, (LANES,), 0, layout=layout)

        def several(i: Scalar, carry: tuple[Array, Scalar, Scalar]) -> tuple[Array, Scalar, Scalar]:
            begins, total, first = carry
            contexts = [self.lens[jnp.minimum(first + i * step + u, self.num_seqs - 1)] for u in range(step)]
            for u, context in enumerate(contexts):
                alive = first + i * step + u < num_decodes
                # In this order, for a selection has the sign of its first operand, and iota has none.
                begins = jnp.where(lane != i * step + u, begins, jnp.where(alive, total, LARGEST))
                total = total + jnp.where(alive, self.splits.count(context), 0)
            return begins, total, first

        def part(index: Scalar, total: Scalar) -> Scalar:
            first = index * LANES
            left = jnp.minimum(jnp.maximum(num_decodes - first, 0), LANES)
            begins = jnp.maximum(lane, LARGEST)
            num_steps = lax.div(left + (step - 1), jnp.int32(step))
            begins, total, _ = lax.fori_loop(0, num_steps, several, (begins, total, first))
            self.begins[pl.ds(first, LANES)] = begins
            return total

        total: Scalar = lax.fori_loop(0, agenda_size(self.num_seqs) // LANES, part, jnp.int32(0))
        return total * self.num_kv_heads

    def item(self, index: Scalar) -> Item:
        """One item; the KV heads of a split are neighbours, so that they read the same pages at the same time."""
        heads = jnp.int32(self.num_kv_heads)
        split, head = lax.div(index, heads), lax.rem(index, heads)
        seq, stride = jnp.int32(0), _power_of_two(self.num_seqs) // 2
        while stride:
            seq = jnp.where(self.begins[seq + stride] <= split, seq + stride, seq)
            stride //= 2
        nth, context = split - self.begins[seq], self.lens[seq]
        low, tokens = self.splits.first_position(context), jnp.int32(self.splits.tokens)
        begin = (lax.div(low, tokens) + nth) * tokens
        start, stop = jnp.maximum(begin, low), jnp.minimum(begin + tokens, context)
        first = lax.div(start, jnp.int32(BLOCK_TOKENS))
        num_blocks = lax.div(stop + jnp.int32(BLOCK_TOKENS - 1), jnp.int32(BLOCK_TOKENS)) - first
        return Item(seq, head, seq * self.splits.most + nth, start, stop, first, num_blocks)


def agenda_size(num_seqs: int) -> int:
    """Elements that an agenda takes: a power of two, for bisection, and whole vectors."""
    return max(_power_of_two(num_seqs), LANES)


def _power_of_two(number: int) -> int:
    """The next one."""
    return 1 << (number - 1).bit_length()
