"""Int8 weights: values with one float32 scale per output channel, and the matmul that uses them.

Weights are quantised once, on the host, while they are loaded. Activations are quantised on the device, one scale a
row, so that the product runs as an integer matmul; the scales are multiplied back afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, Shaped
from numpy.typing import NDArray

INT8_MAX = 127.0


def quantize_channels(
    array: NDArray[np.floating], contracted: Sequence[int]
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric absmax quantisation with one scale per output channel.

    Args:
        array: Weights of any shape.
        contracted: Dimensions that the matmul sums over; they share a scale.

    Returns:
        Int8 values of the same shape, and float32 scales of the shape without the contracted dimensions. A channel of
        zeros gets scale 1.
    """
    axes = tuple(contracted)
    weights = np.asarray(array, np.float32)
    absmax = np.max(np.abs(weights), axis=axes, keepdims=True)
    scale = np.where(absmax > 0, absmax / np.float32(INT8_MAX), np.float32(1)).astype(np.float32)
    values = np.rint(weights / scale).astype(np.int8)
    return values, np.squeeze(scale, axis=axes)


def contract(
    x: Shaped[Array, "T *inputs"], kernel: Shaped[Array, "..."], dtype: jnp.dtype, *, inputs_last: bool = False
) -> Shaped[Array, "T ..."]:
    """Sums x over all dimensions but its first against those of a kernel.

    Float32 is multiplied as such: left to itself a matrix unit rounds it to bfloat16 or TF32.

    Args:
        x: Activations, one row a token.
        kernel: [*inputs, *outputs], or [*outputs, *inputs] if `inputs_last`.
        dtype: In which the sum is kept and returned.
        inputs_last: Where the kernel's contracted dimensions are.
    """
    inputs = x.ndim - 1
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    multiply = partial(jax.lax.dot_general, precision=precision, preferred_element_type=dtype)
    if not inputs_last:
        dims = ((tuple(range(1, inputs + 1)), tuple(range(inputs))), ((), ()))
        return multiply(x, kernel, dims)
    # As matrices: with more dimensions XLA would first turn the whole kernel around on CPUs, where it is held so.
    outputs = kernel.shape[: kernel.ndim - inputs]
    rows = x.reshape(x.shape[0], -1)
    dims = (((1,), (1,)), ((), ()))
    y = multiply(rows, kernel.reshape(-1, rows.shape[1]), dims)
    return y.reshape(x.shape[0], *outputs)


def quantize_rows(x: Float[Array, "T *inputs"]) -> tuple[Int8[Array, "T *inputs"], Float[Array, " T"]]:
    """Dynamic symmetric quantisation of activations, one scale a row."""
    x32 = x.astype(jnp.float32)
    absmax = jnp.max(jnp.abs(x32), axis=tuple(range(1, x.ndim)))
    scale = jnp.maximum(absmax, jnp.float32(1e-12)) * jnp.float32(1.0 / INT8_MAX)
    return jnp.round(x32 / _spread(scale, x.ndim)).astype(jnp.int8), scale


def int8_matmul(
    x: Float[Array, "T *inputs"],
    values: Int8[Array, "..."],
    scale: Float[Array, "*outputs"],
    *,
    inputs_last: bool = False,
) -> Float[Array, "T *outputs"]:
    """`x @ (values * scale)` with x quantised per row, accumulated in int32, returned in float32.

    Args:
        x: Activations, one row a token.
        values: [*inputs, *outputs], or [*outputs, *inputs] if `inputs_last`.
        scale: One an output channel.
        inputs_last: Where the contracted dimensions of `values` are.
    """
    rows, row_scale = quantize_rows(x)
    total = contract(rows, values, jnp.dtype(jnp.int32), inputs_last=inputs_last)
    return total.astype(jnp.float32) * _spread(row_scale, total.ndim) * scale[None]


def _spread(rows: Float[Array, " T"], ndim: int) -> Array:
    """One value a row, for arrays of `ndim` dimensions."""
    return rows.reshape(-1, *(1,) * (ndim - 1))
