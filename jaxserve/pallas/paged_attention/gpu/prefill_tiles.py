"""How the Hopper prefill kernel cuts its work: rows of a warpgroup, block and ring sizes, and what memory they take.

A work item is the rows (query head, token) of one KV head and a run of a chunk's tokens: 64 rows for each of the two
computing warpgroups. Query heads that share a KV head are put into one item as far as they go, which divides the
reading of keys and values among them and keeps the item's tokens few, so that little of the causal diagonal is wasted.
Everything is a function of static shapes, so a row is computed in the same order whatever else is in the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from jaxserve.pallas.paged_attention.gpu.tiles import NUM_SMS, RESERVED_BYTES, ROWS, SMEM_BYTES, swizzle_of

WARPGROUPS = 2
"""Computing warpgroups of a thread block; one multiplies while the other takes its softmax."""

MIN_TOKENS = 8
"""Fewest tokens of a warpgroup: rows of a swizzled tile."""

EDGE_COLUMNS = 64
"""Columns of an output tile that go through shared memory at a time where its rows are written one by one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Registers:
    """Registers of a thread, once a block's warpgroups have shared out a multiprocessor's 64 Ki.

    Attributes:
        computing: Of the two computing warpgroups.
        loading: Of the loading one.
        widening: Of the one that widens blocks, or 0 if there is none.
    """

    computing: int
    loading: int
    widening: int


WIDE = Registers(computing=232, loading=40, widening=0)
NARROW = Registers(computing=208, loading=40, widening=56)
NARROW_LARGE = Registers(computing=224, loading=24, widening=40)
"""For pools of the queries' dtype, for narrow ones, and for narrow ones with heads of more than 128."""

SPARE_REGISTERS = 40
"""Registers left for addresses, barriers' phases and loop counters; checked against the compiler's report."""

SMALL_HEAD = 128
"""Head dims up to which registers hold two products of large blocks."""

LARGE_BLOCK, SMALL_BLOCK = 128, 64
"""Tokens of a block."""

MAX_NARROW_ENTRIES = 8
"""Blocks on their way from a narrow pool that the heuristic takes at most."""

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
        itemsize: Bytes of an element of q.
        kv_itemsize: Bytes of an element of the pool.
    """

    num_kv_heads: int
    group: int
    head_dim: int
    page_size: int
    itemsize: int
    kv_itemsize: int

    @property
    def swizzle(self) -> int:
        """Bytes of a row of the shared memory's tiles, which must divide a head; 0 if none does."""
        return swizzle_of(self.head_dim * self.itemsize)

    @property
    def is_narrow(self) -> bool:
        """Whether blocks of the pool are widened, by a warpgroup of their own, before they are multiplied."""
        return self.kv_itemsize < self.itemsize

    @property
    def registers(self) -> Registers:
        """How warpgroups share out the registers."""
        if not self.is_narrow:
            return WIDE
        return NARROW if self.head_dim <= SMALL_HEAD else NARROW_LARGE

    @property
    def value_columns(self) -> int:
        """Columns of values that one wgmma multiplies.

        Its results must fit the registers that a thread has at the start: 168, or 128 with a fourth warpgroup.
        """
        large = self.is_narrow and self.head_dim > SMALL_HEAD
        return math.gcd(self.head_dim, SMALL_HEAD) if large else self.head_dim

    @property
    def shares_tokens(self) -> bool:
        """Whether the warpgroups of an item have the same tokens and different query heads, or the reverse."""
        return self.group % WARPGROUPS == 0

    @property
    def own_heads(self) -> int:
        """Query heads of a warpgroup's rows."""
        return _own_heads(self.group)

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
        return item_tokens(self.group)

    @property
    def items_per_tile(self) -> int:
        """Items that have the same tokens: one a KV head, or several if its query heads are many."""
        return self.num_kv_heads * (self.group // self.item_heads)

    @property
    def edge_columns(self) -> int:
        """Columns written at a time where rows are written one by one."""
        return EDGE_COLUMNS if self.value_columns % EDGE_COLUMNS == 0 else self.value_columns

    @property
    def edge_pitch(self) -> int:
        """Elements from one such row to the next, which the copy engine wants aligned to 128 bytes."""
        return -(-self.edge_columns // EDGE_COLUMNS) * EDGE_COLUMNS


def _own_heads(group: int) -> int:
    return math.gcd(group if group % WARPGROUPS else group // WARPGROUPS, ROWS // MIN_TOKENS)


def item_tokens(group: int) -> int:
    """Tokens of an item.

    Args:
        group: Query heads to a KV head.
    """
    return ROWS // _own_heads(group) * (WARPGROUPS if group % WARPGROUPS else 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillTiles:
    """How a prefill is cut.

    Attributes:
        block_tokens: Keys and values multiplied at a time.
        stages: Blocks of keys, and of values, in flight or in use.
        query_buffers: Query tiles; the second lets the next item's queries come, and this one's results go, meanwhile.
        looks_ahead: Whether the next block's keys are multiplied together with a block's values.
        narrow_entries: Blocks as they are in the pool, of keys and of values, in flight or being widened.
        num_blocks: Thread blocks of the persistent grid.
        interpretable: Weights reach wgmma through shared memory and products are added outside, which Mosaic GPU's
            interpreter needs; slower.
    """

    block_tokens: int
    stages: int
    query_buffers: int
    looks_ahead: bool = True
    narrow_entries: int = 0
    num_blocks: int = NUM_SMS
    interpretable: bool = False

    def smem_bytes(self, shape: PrefillShape) -> int:
        """Shared memory of a thread block: rings of keys and values, query tiles, rows at the edge of a chunk."""
        ring = 2 * self.stages * self.block_tokens * shape.head_dim * shape.itemsize
        queries = self.query_buffers * WARPGROUPS * ROWS * shape.head_dim * shape.itemsize
        edge = WARPGROUPS * ROWS * shape.edge_pitch * shape.itemsize
        staged = WARPGROUPS * ROWS * self.block_tokens * shape.itemsize if self.interpretable else 0
        narrow = self.narrow_entries * self.block_tokens * shape.head_dim * shape.kv_itemsize
        return ring + queries + edge + staged + narrow + RESERVED_BYTES

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
        most = shape.registers.computing
        if self.registers(shape) > most:
            raise NotImplementedError(f"{self} needs {self.registers(shape)} of {most} registers")
        if not _fits(self.block_tokens, shape.page_size):
            raise NotImplementedError(f"blocks of {self.block_tokens} tokens do not fit pages of {shape.page_size}")


def _fits(block_tokens: int, page_size: int) -> bool:
    """Whether a block is some whole pages, or a page some whole blocks."""
    return block_tokens % page_size == 0 or page_size % block_tokens == 0


def prefill_tiles(shape: PrefillShape, *, num_blocks: int = NUM_SMS, interpretable: bool = False) -> PrefillTiles:
    """Chooses tiles: the largest block whose logits fit the registers, and as many stages as fit the shared memory.

    Args:
        shape: Static facts.
        num_blocks: Thread blocks of the persistent grid.
        interpretable: See `PrefillTiles`.
    """
    small = shape.head_dim <= SMALL_HEAD
    large_blocks = small and not interpretable and not shape.is_narrow and _fits(LARGE_BLOCK, shape.page_size)
    tiles = PrefillTiles(
        block_tokens=LARGE_BLOCK if large_blocks else SMALL_BLOCK,
        stages=0,
        num_blocks=num_blocks,
        query_buffers=2 if small else 1,
        looks_ahead=small or not shape.is_narrow,
        interpretable=interpretable,
    )
    entry = tiles.block_tokens * shape.head_dim
    left = SMEM_BYTES - tiles.smem_bytes(shape)
    if not shape.is_narrow:
        return replace(tiles, stages=min(left // (2 * entry * shape.itemsize), MAX_STAGES))
    # What is loading hides latency; what has been widened must only keep the multiplying warpgroups busy.
    stages = 2 if small else 1
    left -= 2 * stages * entry * shape.itemsize
    return replace(tiles, stages=stages, narrow_entries=min(left // (entry * shape.kv_itemsize), MAX_NARROW_ENTRIES))
