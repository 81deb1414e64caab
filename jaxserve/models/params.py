"""ParamInfo: the abstract form of one parameter, before any byte of it exists.

The decoder declares its parameters once; `abstract_params` in `models/decoder` reads shapes, dtypes and logical axes
off that declaration. The loader, the random initialiser and ahead-of-time compilation all work from the same
dictionary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp

Held: TypeAlias = jax.Array | tuple[jax.Array, ...]
"""A parameter as programs take it: an array, of all layers if layers have it, or an array a layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParamInfo:
    """Shape, dtype and logical axes of one parameter.

    Attributes:
        shape: Global shape.
        dtype: Element type it is served in.
        axes: One logical axis name (see `sharding/rules`) a dimension; None is never sharded.
        order: Dimensions from major to minor as a matrix unit wants them in memory; None if any order does.
        turned: Dimensions in the order in which it is held while the model runs; None if as declared.
    """

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: tuple[str | None, ...]
    order: tuple[int, ...] | None = None
    turned: tuple[int, ...] | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole parameter over all devices."""
        size = self.dtype.itemsize
        for dim in self.shape:
            size *= dim
        return size
