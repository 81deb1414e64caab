"""How the Hopper kernels cut their work: block and split sizes, ring depths, and the shared memory they take.

Everything here is a function of static shapes, and of those that do not change from batch to batch: were a split to
depend on how many sequences there are, the same sequence would be summed in another order in another batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

ROWS = 64
"""Rows of a wgmma: query heads of one KV head are padded to it, which decode, bound by memory, does not notice."""

BLOCK_TOKENS = 64
"""Tokens of a ring entry, keys or values."""

NUM_SMS = 132
"""Streaming multiprocessors of an H100 or H200 (SXM); persistent kernels start one thread block on each."""

SMEM_BYTES = 227 * 1024
"""Shared memory that one thread block may use on sm_90."""

RESERVED_BYTES = 3 * 1024
"""What Mosaic GPU itself takes: barriers, and scratch for reductions across warps."""

STAGE_COLUMNS = 64
"""Columns of an accumulator that leave through shared memory at a time, or fewer that divide a head."""

MAX_SPLITS = 64
"""Splits of the longest sequence: what bounds the memory for partial results."""

SWIZZLE_BYTES = (128, 64, 32)
"""Swizzles that wgmma and the tensor memory accelerator share, best first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeShape:
    """Static facts about a decode.

    Attributes:
        num_seqs: Sequences of the batch, padding included.
        num_kv_heads: KV heads here, after sharding.
        group: Query heads to a KV head.
        head_dim: Elements of a head.
        page_size: Tokens of a page.
        pages_per_seq: Pages of the longest sequence.
        itemsize: Bytes of an element of q.
        kv_itemsize: Bytes of an element of the pool.
    """

    num_seqs: int
    num_kv_heads: int
    group: int
    head_dim: int
    page_size: int
    pages_per_seq: int
    itemsize: int
    kv_itemsize: int

    @property
    def padded_group(self) -> int:
        """Query heads to a KV head, rounded up to what a tiled copy moves."""
        return -(-self.group // 8) * 8

    @property
    def stage_columns(self) -> int:
        """Columns of an accumulator that leave through shared memory at a time."""
        return math.gcd(self.head_dim, STAGE_COLUMNS)


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeTiles:
    """How a decode is cut.

    Attributes:
        split_tokens: Context that one work item takes, for one sequence and KV head; a multiple of BLOCK_TOKENS.
        entries: Entries of a worker's ring; keys and values of a block take one each.
        workers: Pairs of a computing and a loading warpgroup in a thread block.
        num_blocks: Thread blocks of the persistent grid.
        interpretable: Only what Mosaic GPU's interpreter can do: wgmma takes weights from shared memory, not from
            registers, and starts sums at zero; slower.
    """

    split_tokens: int
    entries: int
    workers: int
    num_blocks: int
    interpretable: bool = False

    def smem_bytes(self, shape: DecodeShape) -> int:
        """Shared memory of a thread block: rings, queries, outgoing columns and statistics, and agendas."""
        ring = self.entries * BLOCK_TOKENS * shape.head_dim * shape.kv_itemsize
        wide = BLOCK_TOKENS * shape.head_dim * shape.itemsize if shape.kv_itemsize != shape.itemsize else 0
        queries = ROWS * shape.head_dim * shape.itemsize
        outgoing = ROWS * shape.stage_columns * 4 + 2 * ROWS * 4
        weights = ROWS * BLOCK_TOKENS * shape.itemsize if self.interpretable else 0
        agendas = 2 * 4 * max(1 << (shape.num_seqs - 1).bit_length(), 128)
        return self.workers * (ring + wide + queries + outgoing + weights + agendas) + RESERVED_BYTES

    def check(self, shape: DecodeShape) -> None:
        """Checks that the tiles fit the chip.

        Raises:
            NotImplementedError: They need more shared memory than there is.
        """
        if self.smem_bytes(shape) > SMEM_BYTES:
            raise NotImplementedError(f"{self} needs {self.smem_bytes(shape)} of {SMEM_BYTES} bytes of shared memory")


def decode_tiles(shape: DecodeShape, *, num_blocks: int = NUM_SMS) -> DecodeTiles:
    """Chooses tiles.

    Partial results are written and read once: a split of 32 tokens a query head keeps that near a twentieth of the keys
    and values. Few KV heads need short splits to fill the chip with few sequences. A long capacity makes splits longer.

    Args:
        shape: Static facts.
        num_blocks: Thread blocks of the persistent grid.
    """
    least = max(512 if shape.num_kv_heads >= 4 else 256, 16 * shape.padded_group)
    capacity = shape.page_size * shape.pages_per_seq
    split = 1 << (max(least, -(-capacity // MAX_SPLITS)) - 1).bit_length()
    workers = 2 if shape.head_dim <= 128 else 1
    empty = DecodeTiles(split_tokens=split, entries=0, workers=workers, num_blocks=num_blocks)
    entry = BLOCK_TOKENS * shape.head_dim * shape.kv_itemsize
    entries = (SMEM_BYTES - empty.smem_bytes(shape)) // (workers * entry)
    return DecodeTiles(split_tokens=split, entries=min(entries, 8), workers=workers, num_blocks=num_blocks)


def swizzle_of(row_bytes: int) -> int:
    """The best swizzle whose bytes divide a row's; 0 if none does."""
    return next((s for s in SWIZZLE_BYTES if row_bytes % s == 0), 0)
