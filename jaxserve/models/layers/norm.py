"""RMS norm (arXiv:1910.07467), computed in float32 whatever the activations are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxserve.models.layers.linear import param
from jaxserve.quant.bits import from_storage


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last dimension.

    Args:
        size: Length of the last dimension.
        axis: Its logical axis.
        eps: Added to the mean square.
        dtype: Of the scale.
    """

    def __init__(self, size: int, axis: str, *, eps: float, dtype: jnp.dtype) -> None:
        self.scale = param((size,), (axis,), dtype)
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """Normalises each row; float32 inside, x's dtype outside."""
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
        scale = from_storage(self.scale[...]).astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        return (x32 * jax.lax.rsqrt(mean_square + jnp.float32(self.eps)) * scale).astype(x.dtype)
