"""The KV pool: one flat array of pages for all layers, so that a scanned decoder updates it in place.

Layer l's page p is row `l * num_pages + p`; page ids that the host hands out are the same in every layer. On a TPU the
pool's dimensions are kept in order in memory, because kernels copy whole pages: left to itself the compiler turns the
pool of a small head dim around, and then every program would begin and end with a copy of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int32, Shaped

from jaxserve.pallas.page_copy import api as page_copy
from jaxserve.sharding.rules import shard_map, sharding_for

POOL_AXES = (None, None, "kv_heads", None)
"""Logical axes of the pool; keys and values of a head stay together."""

_LANES = 128
_SUBLANES = 8
_WORD_BYTES = 4
_IN_ORDER = Layout(major_to_minor=(0, 1, 2, 3))


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolLayout:
    """Shape and dtype of the pool.

    Attributes:
        num_layers: L.
        num_pages: Pages of each layer.
        page_size: Tokens a page holds.
        num_kv_heads: K, as stored (repeated heads and `held_heads` counted).
        head_dim: H, as stored.
        dtype: Element type.
    """

    num_layers: int
    num_pages: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    dtype: jnp.dtype

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[L * num_pages, page_size, 2K, H]."""
        return (self.num_layers * self.num_pages, self.page_size, 2 * self.num_kv_heads, self.head_dim)

    def sharding(self, mesh: Mesh) -> NamedSharding:
        """Each device holds its KV heads of every page."""
        return sharding_for(POOL_AXES, (*self.shape[:2], self.num_kv_heads, self.head_dim), mesh)

    def format(self, mesh: Mesh) -> Format | NamedSharding:
        """`sharding`, and on a TPU the order of the dimensions in memory."""
        sharding = self.sharding(mesh)
        return Format(_IN_ORDER, sharding) if _platform(mesh) == "tpu" else sharding

    def device_bytes(self, mesh: Mesh) -> int:
        """Bytes that one device's part takes there: a TPU pads heads to 128 lanes and their number to its tiles."""
        *pages, rows, lanes = self.sharding(mesh).shard_shape(self.shape)
        if _platform(mesh) == "tpu":
            rows, lanes = tiled(rows, lanes, self.dtype)
        return math.prod(pages) * rows * lanes * self.dtype.itemsize

    def abstract(self, mesh: Mesh) -> jax.ShapeDtypeStruct:
        """The pool before it exists."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=self.format(mesh))

    def zeros(self) -> Array:
        """An empty pool; jit it with `format` as the sharding of its result."""
        return jnp.zeros(self.shape, self.dtype)

    def allocate(self, mesh: Mesh) -> Array:
        """An empty pool on the devices."""
        made: Array = jax.jit(self.zeros, out_shardings=self.format(mesh))()
        return made


def tiled(rows: int, lanes: int, dtype: jnp.dtype) -> tuple[int, int]:
    """The last two dimensions of an array as a TPU holds them: tiles of 128 lanes by 8 rows, or by 4 or 2.

    Args:
        rows: The last dimension but one.
        lanes: The last dimension.
        dtype: Element type; narrow ones share a row's 32-bit words.
    """
    few = max(_WORD_BYTES // dtype.itemsize, 1 << (rows - 1).bit_length())
    multiple = min(_SUBLANES, few)
    return -(-rows // multiple) * multiple, -(-lanes // _LANES) * _LANES


def held_heads(num_kv_heads: int, head_dim: int, dtype: jnp.dtype, *, num_shards: int) -> tuple[int, int]:
    """KV heads and head dim of a pool for TPU kernels: as a TPU holds them anyway, so that a page has no gaps.

    A page of a power of two of heads of 128 can be read as rows of words, which the decode kernel wants; 3 heads of
    64 take the memory of 4 of 128 as it is. What pads a head stays zero.

    Args:
        num_kv_heads: K, repeated heads counted.
        head_dim: H.
        dtype: Element type.
        num_shards: Devices that would split the heads.

    Returns:
        K and H to hold: those given, if others would take more memory or the devices do not split the heads.
    """
    if num_kv_heads % num_shards:
        return num_kv_heads, head_dim
    local = num_kv_heads // num_shards
    wide = 1 << (local - 1).bit_length()
    if tiled(2 * local, head_dim, dtype) != (2 * wide, _LANES):
        return num_kv_heads, head_dim
    return wide * num_shards, _LANES


def _platform(mesh: Mesh) -> str:
    platform: str = mesh.devices.flat[0].platform
    return platform


def copy_pages(
    kv_pages: Shaped[Array, "P page_size K2 H"],
    source: Int32[Array, " C"],
    target: Int32[Array, " C"],
    num_layers: int,
    mesh: Mesh | None = None,
) -> Shaped[Array, "P page_size K2 H"]:
    """Copies pages within the pool, in every layer, one pair after another; jit it with the pool donated.

    Args:
        kv_pages: The pool.
        source: [C]; page ids to read.
        target: [C]; page ids to write; negative ids are padding.
        num_layers: L.
        mesh: What the pool is split over, or None for one device.
    """
    platform = None if mesh is None else _platform(mesh)
    run = partial(page_copy.copy_pages, num_layers=num_layers, target=page_copy.Target(platform=platform))
    if mesh is None or mesh.size == 1:
        return run(kv_pages, source, target)
    sizes = {"kv_heads": kv_pages.shape[2] // 2}
    split = shard_map(
        lambda *args: (run(*args),), mesh, in_axes=(POOL_AXES, None, None), out_axes=(POOL_AXES,), sizes=sizes
    )
    copied: Array = split(kv_pages, source, target)[0]
    return copied
