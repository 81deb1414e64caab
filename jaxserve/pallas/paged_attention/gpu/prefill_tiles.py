"""How the Hopper prefill kernel cuts its work: rows of a warpgroup, block and ring sizes, and what memory they take.

A work item is the rows (query head, token) of one KV head and a run of a chunk's tokens: 64 rows for each of the two
computing warpgroups. Query heads that share a KV head are put into one item as far as they go, which divides the
reading of keys and values among them and keeps the item's tokens few, so that little of the causal diagonal is wasted.
Everything is a function of static shapes, so a row is computed in the same order whatever else is in the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from jaxserve.pallas.paged_attention.gpu.tiles import NUM_SMS, RESERVED_BYTES, ROWS, SMEM_BYTES, SWIZZLE_BYTES

WARPGROUPS = 2
"""Computing warpgroups of a thread block; one multiplies while the other takes its softmax."""

MIN_TOKENS = 8
"""Fewest tokens of a warpgroup: rows of a swizzled tile."""

EDGE_COLUMNS = 64
"""Columns of an output tile that go through shared memory at a time where its rows are written one by one."""

REGISTERS = 240
"""Registers of a computing thread, after the loading warpgroup has given up most of its own."""

SPARE_REGISTERS = 40
"""Registers left for addresses, barriers' phases and loop counters; checked against the compiler's report."""

MAX_STAGES = 4
"""Stages of the ring that the heuristic takes at most; more would hide nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillShape:
    """Static facts about a prefill.

    Attributes:
        num_kv_heads: KV heads here, after sharding.
        group: Query heads to a KV head.
        head_dim: Elements of a head.
        page_size: Tokens of a page.
        itemsize: Bytes of an element of q and of the pool.
    """

    num_kv_heads: int
    group: int
    head_dim: int
    page_size: int
    itemsize: int

    @property
    def swizzle(self) -> int:
        """Bytes of a row of the shared memory's tiles, which must divide a head; 0 if none does."""
        return next((s for s in SWIZZLE_BYTES if self.head_dim * self.itemsize % s == 0), 0)

    @property
    def shares_tokens(self) -> bool:
        """Whether the warpgroups of an item have the same tokens and different query heads, or the reverse."""
        return self.group % WARPGROUPS == 0

    @property
    def own_heads(self) -> int:
        """Query heads of a warpgroup's rows."""
        heads = self.group // WARPGROUPS if self.shares_tokens else self.group
        return math.gcd(heads, ROWS // MIN_TOKENS)

    @property
    def own_tokens(self) -> int:
        """Tokens of a warpgroup's rows."""
        return ROWS // self.own_heads

    @property
    def item_heads(self) -> int:
        """Query heads of an item."""
        return self.own_heads * (WARPGROUPS if self.shares_tokens else 1)

    @property
    def item_tokens(self) -> int:
        """Tokens of an item."""
        return self.own_tokens * (1 if self.shares_tokens else WARPGROUPS)

    @property
    def items_per_tile(self) -> int:
        """Items that have the same tokens: one a KV head, or several if its query heads are many."""
        return self.num_kv_heads * (self.group // self.item_heads)

    @property
    def edge_columns(self) -> int:
        """Columns written at a time where rows are written one by one."""
        return EDGE_COLUMNS if self.head_dim % EDGE_COLUMNS == 0 else self.head_dim

    @property
    def edge_pitch(self) -> int:
        """Elements from one such row to the next, which the copy engine wants aligned to 128 bytes."""
        return -(-self.edge_columns // EDGE_COLUMNS) * EDGE_COLUMNS


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillTiles:
    """How a prefill is cut.

    Attributes:
        block_tokens: Keys and values multiplied at a time.
        stages: Blocks of keys, and of values, in flight or in use.
        query_buffers: Query tiles; the second lets the next item's queries come, and this one's results go, meanwhile.
        num_blocks: Thread blocks of the persistent grid.
        interpretable: Weights reach wgmma through shared memory and products are added outside, which Mosaic GPU's
            interpreter needs; slower.
    """

    block_tokens: int
    stages: int
    query_buffers: int
    num_blocks: int = NUM_SMS
    interpretable: bool = False

    def smem_bytes(self, shape: PrefillShape) -> int:
        """Shared memory of a thread block: rings of keys and values, query tiles, and rows at the edge of a chunk."""
        ring = 2 * self.stages * self.block_tokens * shape.head_dim * shape.itemsize
        queries = self.query_buffers * WARPGROUPS * ROWS * shape.head_dim * shape.itemsize
        edge = WARPGROUPS * ROWS * shape.edge_pitch * shape.itemsize
        staged = WARPGROUPS * ROWS * self.block_tokens * shape.itemsize if self.interpretable else 0
        return ring + queries + edge + staged + RESERVED_BYTES

    def registers(self, shape: PrefillShape) -> int:
        """Registers of a computing thread: accumulated values, logits, weights, row statistics, and the rest."""
        threads = 128
        accumulated = ROWS * shape.head_dim // threads
        logits = ROWS * self.block_tokens // threads
        weights = ROWS * self.block_tokens * shape.itemsize // (4 * threads)
        return accumulated + logits + weights + SPARE_REGISTERS

    def check(self, shape: PrefillShape) -> None:
        """Checks that the tiles fit the chip and the pages.

        Raises:
            NotImplementedError: They do not.
        """
        if self.smem_bytes(shape) > SMEM_BYTES:
            raise NotImplementedError(f"{self} needs {self.smem_bytes(shape)} of {SMEM_BYTES} bytes of shared memory")
        if self.registers(shape) > REGISTERS:
            raise NotImplementedError(f"{self} needs {self.registers(shape)} of {REGISTERS} registers")
        if self.block_tokens % shape.page_size and shape.page_size % self.block_tokens:
            raise NotImplementedError(f"blocks of {self.block_tokens} tokens do not fit pages of {shape.page_size}")


def prefill_tiles(shape: PrefillShape, *, interpretable: bool = False) -> PrefillTiles:
    """Chooses tiles: the largest block whose logits fit the registers, and as many stages as fit the shared memory.

    Args:
        shape: Static facts.
        interpretable: See `PrefillTiles`.
    """
    small = shape.head_dim <= 128
    tiles = PrefillTiles(
        block_tokens=128 if small and not interpretable else 64,
        stages=0,
        query_buffers=2 if small else 1,
        interpretable=interpretable,
    )
    stage = 2 * tiles.block_tokens * shape.head_dim * shape.itemsize
    return replace(tiles, stages=min((SMEM_BYTES - tiles.smem_bytes(shape)) // stage, MAX_STAGES))
