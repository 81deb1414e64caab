"""What moves where: pairs of page ids, and how an id becomes a row of an array that holds pages of many layers.

The KV pool keeps a layer's pages together, a buffer made for one sequence keeps a page's layers together:

    pool    [L * num_pages, page_size, 2K, H]    layer l of page p is row l * num_pages + p
    buffer  [C, L, page_size, 2K, H]             layer l of page c is row c * L + l, seen as [C * L, ...]

Pairs are done one after another, all layers of a pair together: a pair may read what an earlier one wrote, and write
what an earlier one read. A pair with a negative id is padding and does nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jaxtyping import Array, Int32


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """How the pages of an array are laid out: layer l of page p is row `l * per_layer + p * per_page`.

    Attributes:
        per_layer: Rows from one layer of a page to the next.
        per_page: Rows from a page to the next of the same layer.
    """

    per_layer: int
    per_page: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyLayout:
    """Static facts of a copy.

    Attributes:
        num_layers: L.
        source: Rows of the array that is read.
        target: Rows of the array that is written.
    """

    num_layers: int
    source: Rows
    target: Rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class PagePairs:
    """Which pages are copied."""

    # [C]; pages to read
    sources: Int32[Array, " C"]
    # [C]; pages to write
    targets: Int32[Array, " C"]
