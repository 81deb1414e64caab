"""How the TPU's prefill kernel cuts its work: tile sizes, the choice of them, and the VMEM they take.

A chunk's new tokens are cut into query tiles; for each of them the context streams through VMEM in tiles of whole
pages. Inside a tile the work is cut once more into blocks of rows (token, query head of one KV head) so that what one
matmul leaves for the vector unit stays small. `Geometry` holds all static sizes; the kernel and the estimate read
them from there.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

LANES = 128
SUBLANES = 8

MAX_BLOCK_ROWS = 512
"""Rows of a block that the heuristic aims at: enough to pay for loading a matmul's weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillTiles:
    """Tile sizes of the prefill kernel.

    Attributes:
        query_tokens: New tokens whose queries are held in VMEM at a time; a multiple of block_tokens.
        block_tokens: Tokens of a block of rows; a power of two, at least 16.
        pages: Pages of a KV tile.
        unroll: Steps of the main loop's body, even; a step's matmuls hide another's softmax.
        sum_by_matmul: Whether the matmul with the values also sums the weights, in columns that are empty otherwise.
    """

    query_tokens: int
    block_tokens: int
    pages: int
    unroll: int
    sum_by_matmul: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """Static sizes of one call.

    Attributes:
        tiles: How the work is cut.
        page_size: Tokens of a page.
        num_heads: Query heads.
        num_kv_heads: KV heads.
        head_dim: Of the arrays in HBM.
        query_dtype: Of queries and output.
        kv_dtype: Of the pool.
    """

    tiles: PrefillTiles
    page_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    query_dtype: jnp.dtype
    kv_dtype: jnp.dtype

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
        return jnp.dtype(jnp.float32 if 4 in (self.query_dtype.itemsize, self.kv_dtype.itemsize) else jnp.bfloat16)

    @property
    def block_rows(self) -> int:
        """Rows of a block."""
        return self.tiles.block_tokens * self.group

    @property
    def num_units(self) -> int:
        """Blocks of rows of all KV heads in a query tile."""
        return self.tiles.query_tokens // self.tiles.block_tokens * self.num_kv_heads

    @property
    def heads_at_once(self) -> int:
        """Query heads that are put in order by one iteration."""
        return next(n for n in (8, 7, 6, 5, 4, 3, 2, 1) if self.num_heads % n == 0)

    @property
    def tile_tokens(self) -> int:
        """Tokens of a KV tile."""
        return self.tiles.pages * self.page_size

    @property
    def head_stride(self) -> int:
        """Rows from one token to the next where queries and outputs of all heads are staged."""
        return _odd(self.num_heads)

    @property
    def kv_stride(self) -> int:
        """Rows from one token to the next where keys and values of all heads are staged."""
        return _odd(2 * self.num_kv_heads)

    @property
    def word_stride(self) -> int:
        """Rows from one KV head to the next where two tokens' keys, or values, are one word."""
        return _odd(self.tile_tokens // 2)


def _odd(x: int) -> int:
    """The next odd number: rows so far apart lie in different banks of VMEM, and eight of them are one access."""
    return x | 1


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
