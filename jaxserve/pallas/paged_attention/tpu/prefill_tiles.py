"""How the TPU's prefill kernel cuts its work: tile sizes, the choice of them, and the VMEM they take.

A chunk's new tokens are cut into query tiles; for each of them the context streams through VMEM in tiles of whole
pages. Inside a tile the work is cut once more into units, a block of rows (token, query head of one KV head) against
the tile, so that what one matmul leaves for the vector unit stays small. `Geometry` holds all static sizes; the kernel
and the estimate read them from there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from jaxserve.pallas.tuning import tuned_tiles

KERNEL = "prefill"
"""What tables of tuned tiles call the kernel."""

LANES = 128
SUBLANES = 8

UNIT_ROWS = 256
"""Rows of a unit that the heuristic aims at: enough to pay for loading a matmul's weights."""

QUERY_TOKENS = 512
"""New tokens that the heuristic holds at a time if they fit: what each KV tile is unpacked for."""

NARROW_TOKENS = 512
"""Least width of a KV tile's part that is worth a matmul of its own."""

SPARE_BYTES = 2 << 20
"""Room for the compiler's own scratch; beside it registers are spilled, in proportion to the logits of a unit."""

TABLE_BYTES = 768 << 10
"""Most SMEM for rows of the page table, of 1 MiB that cores have: numbers of sequences lie there, too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillTiles:
    """Tile sizes of the prefill kernel.

    Attributes:
        query_tokens: New tokens whose queries are held in VMEM at a time; a multiple of block_tokens.
        block_tokens: Tokens of a block of rows; a power of two, at least 16.
        pages: Pages of a KV tile, a multiple of 128 tokens.
        narrow_tokens: Tokens of the parts in which a KV tile is worked on where the diagonal or a window crosses it, a
            multiple of 128; None, or what does not divide the tile, for the whole tile.
        unroll: Steps of the main loop's body, even; a step's matmuls hide another's softmax.
        sum_by_matmul: Whether the matmul with the values also sums the weights, in columns that are empty otherwise.
        packed_rows: Rows of a token's keys and values that are unpacked at once, 8 or 16.
    """

    query_tokens: int
    block_tokens: int
    pages: int
    unroll: int
    sum_by_matmul: bool
    packed_rows: int = 8
    narrow_tokens: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Core:
    """What the choice of tiles depends on.

    Attributes:
        wide_matmul: Whether the matrix units have 256 columns.
        vmem_bytes: VMEM of a core.
        chip: What the table of its tuned tiles is called; None has none.
    """

    wide_matmul: bool
    vmem_bytes: int
    chip: str | None = None

    @property
    def usable_vmem_bytes(self) -> int:
        """VMEM that a kernel may take: what it does not, the compiler has for what is around it."""
        return self.vmem_bytes * 3 // 4

    def vmem_limit(self, estimate: int) -> int:
        """What the compiler is allowed for a kernel: twice the estimate, so that one too low is no failure.

        Args:
            estimate: VMEM that the kernel should take, in bytes.
        """
        return max(estimate, min(2 * estimate, self.usable_vmem_bytes))


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Static sizes of a call's arguments.

    Attributes:
        page_size: Tokens of a page.
        num_heads: Query heads.
        num_kv_heads: KV heads.
        head_dim: Of the arrays in HBM.
        query_dtype: Of queries and output.
        kv_dtype: Of the pool.
        max_tokens: Rows of the batch.
        max_context: Tokens that a row of the page table has room for.
        sliding_window: Of the attention, or None.
    """

    page_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    query_dtype: jnp.dtype
    kv_dtype: jnp.dtype
    max_tokens: int
    max_context: int
    sliding_window: int | None

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def lanes(self) -> int:
        """The head dim, padded to whole registers."""
        return _round_up(self.head_dim, LANES)

    @property
    def dtype(self) -> jnp.dtype:
        """What the matmuls take."""
        exact = 4 in (self.query_dtype.itemsize, self.kv_dtype.itemsize)
        dtype: jnp.dtype = jnp.dtype(jnp.float32 if exact else jnp.bfloat16)
        return dtype

    @property
    def problem(self) -> str:
        """What tables of tuned tiles call calls like this one, however long."""
        heads = f"{self.num_heads},{self.num_kv_heads} h{self.head_dim} p{self.page_size}"
        return f"{heads} {self.query_dtype.name} {self.kv_dtype.name}"

    def cut(self, tiles: PrefillTiles) -> Geometry:
        """The sizes of a call that is cut like this."""
        return Geometry(
            page_size=self.page_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            query_dtype=self.query_dtype,
            kv_dtype=self.kv_dtype,
            max_tokens=self.max_tokens,
            max_context=self.max_context,
            sliding_window=self.sliding_window,
            tiles=tiles,
        )

    @property
    def table_bytes(self) -> int:
        """SMEM of the prefill kernel's two rows of the page table."""
        return 2 * 4 * _round_up(self.max_context // self.page_size, LANES)

    @property
    def heads_at_once(self) -> int:
        """Query heads that are put in order by one iteration."""
        return next(n for n in (8, 7, 6, 5, 4, 3, 2, 1) if self.num_heads % n == 0)

    @property
    def head_stride(self) -> int:
        """Rows from one token to the next where queries and outputs of all heads are staged."""
        return _odd(self.num_heads)

    @property
    def kv_stride(self) -> int:
        """Rows from one token to the next where keys and values of all heads are staged."""
        return _odd(2 * self.num_kv_heads)


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry(Sizes):
    """All static sizes of a call.

    Attributes:
        tiles: How the work is cut.
    """

    tiles: PrefillTiles

    @property
    def block_rows(self) -> int:
        """Rows of a block."""
        return self.tiles.block_tokens * self.group

    @property
    def num_units(self) -> int:
        """Blocks of rows of all KV heads in a query tile."""
        return self.tiles.query_tokens // self.tiles.block_tokens * self.num_kv_heads

    @property
    def tile_tokens(self) -> int:
        """Tokens of a KV tile."""
        return self.tiles.pages * self.page_size

    @property
    def narrow_tokens(self) -> int:
        """Tokens of a KV tile's part where a border crosses it."""
        narrow = self.tiles.narrow_tokens or self.tile_tokens
        return narrow if self.tile_tokens % narrow == 0 else self.tile_tokens

    @property
    def packed_rows(self) -> int:
        """Rows of a token's keys and values that are unpacked at once."""
        return min(self.tiles.packed_rows, 2 * self.num_kv_heads)

    @property
    def words(self) -> bool:
        """Whether K and V of a head are unpacked as halves of 32-bit words, without being staged in float32."""
        whole = 2 * self.num_kv_heads % self.packed_rows == 0 and self.packed_rows in (2, 4, 8, 16)
        return self.dtype == jnp.bfloat16 and whole and self.head_dim % LANES == 0

    @property
    def word_stride(self) -> int:
        """Rows from one KV head to the next where two tokens' keys, or values, are one word."""
        return _odd(self.tile_tokens // 2)

    def buffers(self) -> dict[str, tuple[tuple[int, ...], jnp.dtype]]:
        """Shapes and dtypes of the kernel's arrays in VMEM, by name; `prefill.Buffers` says what they hold."""
        f32, tile, lanes = jnp.dtype(jnp.float32), self.tile_tokens, self.lanes
        chunks, rows = lanes // LANES, (self.num_units + 1) * self.block_rows
        tokens = (self.tiles.query_tokens, self.num_heads, self.head_dim)
        staged = SUBLANES if self.words else tile * self.kv_stride
        by_head = (chunks, self.num_kv_heads * self.word_stride, LANES), jnp.dtype(jnp.uint32)
        kv = by_head if self.words else ((self.num_kv_heads, tile, lanes), self.dtype)
        return {
            "raw_queries": (tokens, self.query_dtype),
            "raw_kv": ((2, tile, 2 * self.num_kv_heads, self.head_dim), self.kv_dtype),
            "raw_out": (tokens, self.query_dtype),
            "stage": ((chunks, self.tiles.query_tokens * self.head_stride, LANES), f32),
            "kv_stage": ((chunks, staged, LANES), f32),
            "k": kv,
            "v": kv,
            "q": ((rows, lanes), self.dtype),
            "peak": ((rows, LANES), f32),
            "total": ((rows, LANES), f32),
            "acc": ((rows, lanes), f32),
            "logits": ((2, self.block_rows, tile), f32),
            "peaks": ((2, self.block_rows, LANES), f32),
        }

    @property
    def vmem_bytes(self) -> int:
        """VMEM that a call takes, padding included, and room for what the compiler spills."""
        # An exact product of float32 keeps its operands in three parts.
        spilled = (24 if self.dtype == jnp.float32 else 6) * self.block_rows * self.tile_tokens
        return SPARE_BYTES + spilled + sum(padded_bytes(*each) for each in self.buffers().values())


def choose_tiles(sizes: Sizes, core: Core) -> PrefillTiles:
    """Tiles for a call: tuned ones if there are some that fit it, else the heuristic's.

    Args:
        sizes: Of the call's arguments.
        core: Where it will run.

    Raises:
        NotImplementedError: Not even the smallest tiles fit into VMEM, or rows of the page table into SMEM.
    """
    if sizes.table_bytes > TABLE_BYTES:
        raise NotImplementedError(f"two rows of {sizes.max_context // sizes.page_size} pages do not fit into SMEM")
    found: Any = None if sizes.sliding_window else tuned_tiles(core.chip, KERNEL, sizes.problem)
    if found is not None and fits(sizes, core, tiles := PrefillTiles(**found)):
        return tiles
    return heuristic_tiles(sizes, core)


def fits(sizes: Sizes, core: Core, tiles: PrefillTiles) -> bool:
    """Whether a call has work for tiles of these sizes, and the core VMEM.

    Args:
        sizes: Of the call's arguments.
        core: Where it will run.
        tiles: Of choice.
    """
    cut = sizes.cut(tiles)
    filled = tiles.query_tokens <= _round_up(sizes.max_tokens, 16) and cut.tile_tokens <= sizes.max_context
    whole = tiles.query_tokens % tiles.block_tokens == 0 and cut.tile_tokens % LANES == 0
    return filled and whole and cut.vmem_bytes <= core.usable_vmem_bytes


def heuristic_tiles(sizes: Sizes, core: Core) -> PrefillTiles:
    """What measured best in schedules of a few problems, cut down until it fits.

    Args:
        sizes: Of the call's arguments.
        core: Where it will run.

    Raises:
        NotImplementedError: Not even the smallest tiles fit into VMEM.
    """
    exact = sizes.dtype == jnp.float32
    rows, tokens = (UNIT_ROWS // 2, 256) if exact else (UNIT_ROWS, 1024 if core.wide_matmul else 512)
    block = max(16, min(_power_of_two(rows // sizes.group), _power_of_two(_round_up(sizes.max_tokens, 16))))
    # A group of many heads makes units tall; narrower tiles keep what they hold.
    tokens = max(LANES, min(tokens, tokens * rows // (block * sizes.group) // LANES * LANES))
    seen = sizes.max_context
    if sizes.sliding_window is not None:
        seen = min(seen, sizes.sliding_window + block)
    step = math.lcm(sizes.page_size, LANES)
    tokens = max(step, min(tokens // step * step, _round_up(seen, step)))
    tiles = PrefillTiles(
        query_tokens=_round_up(min(QUERY_TOKENS, _round_up(sizes.max_tokens, 16)), block),
        block_tokens=block,
        pages=tokens // sizes.page_size,
        unroll=2 if exact else 4,
        sum_by_matmul=core.wide_matmul and sizes.lanes == LANES,
        packed_rows=16 if core.wide_matmul else 8,
        narrow_tokens=NARROW_TOKENS,
    )
    while (needed := sizes.cut(tiles).vmem_bytes) > core.usable_vmem_bytes:
        smaller = _smaller(tiles, step // sizes.page_size)
        if smaller == tiles:
            raise NotImplementedError(f"prefill needs {needed >> 20} MiB of VMEM, of {core.vmem_bytes >> 20}")
        tiles = smaller
    return tiles


def _smaller(tiles: PrefillTiles, step: int) -> PrefillTiles:
    """Fewer queries first, then a narrower KV tile, then a smaller block; the same when nothing is left."""
    if tiles.query_tokens > max(128, tiles.block_tokens):
        return replace(tiles, query_tokens=_round_up(tiles.query_tokens // 2, tiles.block_tokens))
    if tiles.pages > step:
        return replace(tiles, pages=max(step, tiles.pages // 2 // step * step))
    if tiles.query_tokens > tiles.block_tokens:
        return replace(tiles, query_tokens=_round_up(tiles.query_tokens // 2, tiles.block_tokens))
    if tiles.block_tokens > 16:
        return replace(tiles, block_tokens=tiles.block_tokens // 2, query_tokens=tiles.query_tokens // 2)
    return tiles


def padded_bytes(shape: tuple[int, ...], dtype: jnp.dtype) -> int:
    """Bytes of an array in VMEM, where rows are padded to 128 lanes and few rows to a power of two."""
    *leading, rows, lanes = shape
    packed = 4 // dtype.itemsize
    rows = _round_up(rows, max(packed, min(SUBLANES, 1 << (rows - 1).bit_length())))
    return math.prod(leading) * rows * _round_up(lanes, LANES) * dtype.itemsize


def _power_of_two(x: int) -> int:
    """The largest power of two that is not above x, at least 1."""
    return 1 << (max(x, 1).bit_length() - 1)


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def _odd(x: int) -> int:
    """The next odd number: rows so far apart lie in different banks of VMEM, and eight of them are one access."""
    return x | 1
