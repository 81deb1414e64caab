"""Small floats held as bits: an unsigned integer array that means bfloat16 or float8.

On the CPU, XLA widens a whole array of small floats, and narrows it back, wherever a loop updates or slices it;
integers it leaves alone. So what is carried through a loop there (the KV pool, the stacked weights) is held as
integers and turned into floats where it is used, which costs nothing: a bitcast of a slice. Measured with jax 0.10.2,
one layer's update of a 114 MB pool takes 136 ms as bfloat16 and 0.3 ms as uint16.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

BITS: Mapping[str, str] = MappingProxyType({"uint16": "bfloat16", "uint8": "float8_e4m3fn"})
"""Integer dtypes, and the float format whose bits they hold."""


def storage_dtype(number_format: str, platform: str) -> jnp.dtype:
    """The dtype an array should have to be carried through a loop in place.

    Args:
        number_format: Name of a dtype: what the elements mean.
        platform: Where the array lives: "cpu", "tpu" or "gpu".
    """
    holders = {held: holder for holder, held in BITS.items()}
    return jnp.dtype(holders.get(number_format, number_format) if platform == "cpu" else number_format)


def format_of(dtype: jnp.dtype) -> str:
    """What the elements of an array of this dtype mean."""
    return BITS.get(dtype.name, dtype.name)


def to_storage(x: Shaped[Array, "*shape"], dtype: jnp.dtype) -> Shaped[Array, "*shape"]:
    """Rounds values to the format that `dtype` holds, and holds them in it."""
    return jax.lax.bitcast_convert_type(x.astype(format_of(dtype)), dtype)


def from_storage(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """The values that an array holds; itself if it holds them as they are."""
    return jax.lax.bitcast_convert_type(x, jnp.dtype(format_of(x.dtype)))
