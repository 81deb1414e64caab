"""Page copies: within the KV pool, and between the pool and contiguous buffers.

`copy_pages` serves copy-on-write, `gather_pages` and `scatter_pages` take a sequence's pages of all layers out of the
pool into one contiguous buffer and back: what offloading and transfer move. Each writes its target in place if the
caller donates it. `moves` says in which order pages are copied and how they are laid out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Shaped

from jaxserve.pallas.dispatch import ANYWHERE, Backend, Target, deferred, interpreted, select
from jaxserve.pallas.page_copy.moves import CopyLayout, PagePairs, Rows
from jaxserve.pallas.page_copy.reference import copy_reference
from jaxserve.pallas.page_copy.xla import copy_xla

__all__ = ["BACKENDS", "Target", "copy_pages", "gather_pages", "scatter_pages"]

BACKENDS: Mapping[Backend, Callable[..., Array]] = MappingProxyType(
    {
        Backend.REFERENCE: copy_reference,
        Backend.XLA: copy_xla,
        Backend.TPU: deferred("page_copy.tpu", "copy_tpu"),
        Backend.GPU: deferred("page_copy.gpu", "copy_gpu"),
    }
)


def copy_pages(
    pool: Shaped[Array, "P page_size K2 H"],
    sources: Int32[Array, " C"],
    targets: Int32[Array, " C"],
    *,
    num_layers: int,
    target: Target = ANYWHERE,
) -> Shaped[Array, "P page_size K2 H"]:
    """Copies pages within the pool, in every layer, one pair after another.

    Args:
        pool: [L * num_pages, page_size, 2 * K, H].
        sources: [C]; page ids within a layer.
        targets: [C]; page ids within a layer; a pair with a negative id does nothing.
        num_layers: L.
        target: Where it will run, and which implementation was asked for.

    Returns:
        The pool.

    Raises:
        ValueError: Shapes or dtypes do not fit together.
        NotImplementedError: The chosen backend cannot do this.
        ConfigError: There is no such backend.
    """
    rows = _pool_rows(pool, num_layers)
    layout = CopyLayout(num_layers=num_layers, source=rows, target=rows)
    return _run(None, pool, PagePairs(sources=sources, targets=targets), layout, target)


def gather_pages(
    pool: Shaped[Array, "P page_size K2 H"],
    page_ids: Int32[Array, " C"],
    buffer: Shaped[Array, "C L page_size K2 H"],
    *,
    target: Target = ANYWHERE,
) -> Shaped[Array, "C L page_size K2 H"]:
    """Takes pages out of the pool, all layers of each, into a buffer.

    Args:
        pool: [L * num_pages, page_size, 2 * K, H].
        page_ids: [C]; page ids within a layer; the buffer keeps what it holds where they are negative.
        buffer: [C, L, page_size, 2 * K, H] in the pool's dtype.
        target: Where it will run, and which implementation was asked for.

    Returns:
        The buffer.

    Raises:
        ValueError: Shapes or dtypes do not fit together.
        NotImplementedError: The chosen backend cannot do this.
        ConfigError: There is no such backend.
    """
    _check_buffer(pool, page_ids, buffer)
    num_layers = buffer.shape[1]
    layout = CopyLayout(
        num_layers=num_layers, source=_pool_rows(pool, num_layers), target=Rows(per_layer=1, per_page=num_layers)
    )
    pairs = PagePairs(sources=page_ids, targets=jnp.arange(buffer.shape[0], dtype=jnp.int32))
    return _run(pool, buffer.reshape(-1, *pool.shape[1:]), pairs, layout, target).reshape(buffer.shape)


def scatter_pages(
    buffer: Shaped[Array, "C L page_size K2 H"],
    page_ids: Int32[Array, " C"],
    pool: Shaped[Array, "P page_size K2 H"],
    *,
    target: Target = ANYWHERE,
) -> Shaped[Array, "P page_size K2 H"]:
    """Puts the pages of a buffer, all layers of each, into the pool.

    Args:
        buffer: [C, L, page_size, 2 * K, H] in the pool's dtype.
        page_ids: [C]; page ids within a layer; pages of the buffer with a negative id go nowhere.
        pool: [L * num_pages, page_size, 2 * K, H].
        target: Where it will run, and which implementation was asked for.

    Returns:
        The pool.

    Raises:
        ValueError: Shapes or dtypes do not fit together.
        NotImplementedError: The chosen backend cannot do this.
        ConfigError: There is no such backend.
    """
    _check_buffer(pool, page_ids, buffer)
    num_layers = buffer.shape[1]
    layout = CopyLayout(
        num_layers=num_layers, source=Rows(per_layer=1, per_page=num_layers), target=_pool_rows(pool, num_layers)
    )
    pairs = PagePairs(sources=jnp.arange(buffer.shape[0], dtype=jnp.int32), targets=page_ids)
    return _run(buffer.reshape(-1, *pool.shape[1:]), pool, pairs, layout, target)


def _run(source: Array | None, written: Array, pairs: PagePairs, layout: CopyLayout, target: Target) -> Array:
    for name, ids in (("page ids to read", pairs.sources), ("page ids to write", pairs.targets)):
        if ids.ndim != 1 or ids.dtype != jnp.int32:
            raise ValueError(f"{name} must be int32[C], not {ids.dtype}{list(ids.shape)}")
    if pairs.sources.shape != pairs.targets.shape:
        raise ValueError(f"{pairs.sources.shape[0]} pages to read and {pairs.targets.shape[0]} to write are not pairs")
    if not pairs.sources.shape[0]:
        return written
    run = select("page_copy", BACKENDS, target)
    with interpreted(target), jax.named_scope("page_copy"):
        return run(source, written, pairs, layout=layout)


def _pool_rows(pool: Array, num_layers: int) -> Rows:
    if pool.ndim != 4:
        raise ValueError(f"a pool must be [P, page_size, 2K, H], not {pool.shape}")
    if num_layers < 1 or pool.shape[0] % num_layers:
        raise ValueError(f"a pool of {pool.shape[0]} pages does not divide among {num_layers} layers")
    return Rows(per_layer=pool.shape[0] // num_layers, per_page=1)


def _check_buffer(pool: Array, page_ids: Array, buffer: Array) -> None:
    if buffer.ndim != 5 or buffer.shape[2:] != pool.shape[1:]:
        raise ValueError(f"a buffer {buffer.shape} must be [C, L, {', '.join(map(str, pool.shape[1:]))}]")
    if buffer.dtype != pool.dtype:
        raise ValueError(f"a buffer of {buffer.dtype} and a pool of {pool.dtype} must hold the same")
    if page_ids.shape != buffer.shape[:1]:
        raise ValueError(f"a buffer of {buffer.shape[0]} pages needs as many page ids, not {list(page_ids.shape)}")
