"""How the TPU's decode kernel cuts its work: the tokens of an item, the items of an iteration, and the VMEM they take.

An item is some neighbouring pages of one sequence. An iteration of the kernel's loop works on several items, of one
sequence or of several, so that the latencies of one hide behind the work of another. `DecodeGeometry` holds all static
sizes; the kernel and the estimate read them from there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from jaxserve.pallas.paged_attention.tpu.prefill_tiles import LANES, SPARE_BYTES, SUBLANES, Core, Sizes, padded_bytes
from jaxserve.pallas.tuning import tuned_tiles

KERNEL = "decode"
"""What tables of tuned tiles call the kernel."""

SLOTS = 4
"""Iterations whose keys and values have room: one weighs values, one scores keys, two are on their way."""

ITEM_TOKENS = 1024
"""Tokens of an item that the heuristic aims at, unless they make too many columns."""

ITEM_COLUMNS = 4096
"""Keys of an item, all KV heads together, that the heuristic aims at: what a row of logits holds at a time."""

GROUP_COLUMNS = 8192
"""Keys of an iteration that the heuristic aims at."""

GROUP_ITEMS = 8
GROUP_PAGES = 64
"""Most items, and pages, of an iteration: the loop's body grows with both."""

TABLE_ROWS = 16
"""Rows of the page table in SMEM, a power of two and at least twice the items of an iteration."""

TABLE_BYTES = 256 << 10
"""SMEM that these rows may take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeTiles:
    """Tile sizes of the decode kernel.

    Attributes:
        pages: Pages of an item.
        items: Items of an iteration.
    """

    pages: int
    items: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeGeometry(Sizes):
    """All static sizes of a call. `max_tokens` is the number of rows that may be decodes.

    Attributes:
        tiles: How the work is cut.
    """

    tiles: DecodeTiles

    @property
    def packing(self) -> int:
        """Elements of the pool in the 32 bits of a lane."""
        return 4 // self.kv_dtype.itemsize

    @property
    def token_words(self) -> int:
        """Rows of 32-bit words of a token."""
        return 2 * self.num_kv_heads // self.packing

    @property
    def page_words(self) -> int:
        """Rows of words of a page."""
        return self.page_size * self.token_words

    @property
    def item_words(self) -> int:
        """Rows of words of an item."""
        return self.tiles.pages * self.page_words

    @property
    def columns(self) -> int:
        """Keys of an item, all KV heads together."""
        return self.tiles.pages * self.page_size * self.num_kv_heads

    @property
    def halves(self) -> bool:
        """Whether a key is half a word: those of an item's first and second half become one array's rows in turn."""
        return bool(self.dtype == jnp.bfloat16)

    @property
    def table_lanes(self) -> int:
        """Length of a row of the page table, padded."""
        pages_per_seq = self.max_context // self.page_size
        return pages_per_seq + -pages_per_seq % LANES

    @property
    def table_rows(self) -> int:
        """Rows of the page table in SMEM."""
        fitting = TABLE_BYTES // (4 * self.table_lanes)
        return min(TABLE_ROWS, 1 << max(fitting.bit_length() - 1, 0))

    def buffers(self) -> dict[str, tuple[tuple[int, ...], jnp.dtype]]:
        """Shapes and dtypes of the kernel's arrays in VMEM, by name; `decode.Refs` says what they hold."""
        f32, heads, items = jnp.dtype(jnp.float32), self.num_heads, self.tiles.items
        state = (heads, LANES), f32
        return {
            "ring": ((SLOTS, items, self.item_words, self.packing, self.head_dim), self.kv_dtype),
            "logits": ((items, heads, self.columns), f32),
            "tops": ((items, heads, LANES), f32),
            "peak": state,
            "total": state,
            "acc": ((heads, self.head_dim), f32),
            "result": ((self.max_tokens + 1, heads, self.head_dim), self.query_dtype),
        }

    @property
    def vmem_bytes(self) -> int:
        """VMEM that a call takes: its buffers, queries and new tokens, and room for what the compiler spills."""
        queries = padded_bytes((self.max_tokens, self.num_heads, self.head_dim), self.query_dtype)
        new = padded_bytes((self.max_tokens, self.token_words, self.packing, self.head_dim), self.kv_dtype)
        spilled = 4 * self.tiles.items * self.num_heads * self.columns
        return SPARE_BYTES + spilled + queries + new + sum(padded_bytes(*each) for each in self.buffers().values())


def is_supported(sizes: Sizes) -> bool:
    """Whether the kernel can read pages of these sizes as rows of words: what it does not, prefill does.

    Pages of 128 values a head, a power of two of KV heads, and whole words a token lie in HBM without gaps.

    Args:
        sizes: Of the call's arguments.
    """
    heads, bits = sizes.num_kv_heads, 8 * sizes.kv_dtype.itemsize
    formats = jnp.dtype(jnp.float16) not in (sizes.kv_dtype, sizes.query_dtype)
    whole = heads & (heads - 1) == 0 and heads <= LANES // 2 and 2 * heads * bits >= 32
    return formats and whole and sizes.head_dim == LANES and sizes.page_size % SUBLANES == 0


def choose_decode_tiles(sizes: Sizes, core: Core) -> DecodeTiles:
    """Tiles for a call: tuned ones if there are some that fit it, else the heuristic's.

    Args:
        sizes: Of the call's arguments, supported ones.
        core: Where it will run.

    Raises:
        NotImplementedError: Not even the smallest tiles fit.
    """
    found: Any = None if sizes.sliding_window else tuned_tiles(core.chip, KERNEL, sizes.problem)
    if found is not None and decode_fits(sizes, core, tiles := DecodeTiles(**found)):
        return tiles
    return heuristic_decode_tiles(sizes, core)


def decode_fits(sizes: Sizes, core: Core, tiles: DecodeTiles) -> bool:
    """Whether a context fills an item of these tiles, in whole registers, and the core has VMEM and SMEM for them.

    Args:
        sizes: Of the call's arguments, supported ones.
        core: Where it will run.
        tiles: Of choice.
    """
    cut, tokens = cut_decode(sizes, tiles), tiles.pages * sizes.page_size
    whole = tokens % SUBLANES == 0 and cut.columns % LANES == 0
    roomy = cut.table_rows >= 2 * tiles.items and cut.vmem_bytes <= core.usable_vmem_bytes
    return tokens <= sizes.max_context and whole and roomy


def heuristic_decode_tiles(sizes: Sizes, core: Core) -> DecodeTiles:
    """What measured best in schedules of a few problems, cut down until it fits.

    Args:
        sizes: Of the call's arguments, supported ones.
        core: Where it will run.

    Raises:
        NotImplementedError: Not even the smallest tiles fit.
    """
    step = math.lcm(sizes.page_size, max(LANES // sizes.num_kv_heads, SUBLANES))
    tokens = min(ITEM_TOKENS, ITEM_COLUMNS // sizes.num_kv_heads, sizes.max_context)
    pages = max(tokens // step, 1) * step // sizes.page_size
    columns = pages * sizes.page_size * sizes.num_kv_heads
    tiles = DecodeTiles(pages=pages, items=1)
    if (rows := cut_decode(sizes, tiles).table_rows) < 2:
        raise NotImplementedError(f"two rows of {sizes.max_context // sizes.page_size} pages do not fit into SMEM")
    items = max(1, min(GROUP_ITEMS, GROUP_COLUMNS // columns, GROUP_PAGES // pages, rows // 2))
    tiles = replace(tiles, items=items)
    smallest = step // sizes.page_size
    while (needed := cut_decode(sizes, tiles).vmem_bytes) > core.usable_vmem_bytes:
        if tiles.items > 1:
            tiles = replace(tiles, items=tiles.items // 2)
        elif tiles.pages > smallest:
            tiles = replace(tiles, pages=max(smallest, tiles.pages // 2 // smallest * smallest))
        else:
            raise NotImplementedError(f"decode needs {needed >> 20} MiB of VMEM, of {core.vmem_bytes >> 20}")
    return tiles


def cut_decode(sizes: Sizes, tiles: DecodeTiles) -> DecodeGeometry:
    """The sizes of a call that is cut like this.

    Args:
        sizes: Of the call's arguments.
        tiles: How the work is cut.
    """
    return DecodeGeometry(
        page_size=sizes.page_size,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        query_dtype=sizes.query_dtype,
        kv_dtype=sizes.kv_dtype,
        max_tokens=sizes.max_tokens,
        max_context=sizes.max_context,
        sliding_window=sizes.sliding_window,
        tiles=tiles,
    )
