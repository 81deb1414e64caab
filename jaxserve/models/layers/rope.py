"""Rotary position embedding (arXiv:2104.09864): angles once a step, then one rotation a head."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32
from numpy.typing import NDArray

from jaxserve.models.spec import LinearRopeScaling, Llama3RopeScaling, RopeSpec


class Rotation(NamedTuple):
    """Cosine and sine of each token's angles, float32."""

    cos: Float[Array, "T half"]
    sin: Float[Array, "T half"]


def inverse_frequencies(spec: RopeSpec, head_dim: int) -> NDArray[np.float32]:
    """Radians a position for each pair of a head's dimensions, [H / 2]."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies: NDArray[np.float32] = (1.0 / np.power(np.float32(spec.theta), exponents)).astype(np.float32)
    match spec.scaling:
        case None:
            return frequencies
        case LinearRopeScaling(factor=factor):
            return frequencies / np.float32(factor)
        case Llama3RopeScaling() as scaling:
            return _llama3(frequencies, scaling)


def _llama3(frequencies: NDArray[np.float32], scaling: Llama3RopeScaling) -> NDArray[np.float32]:
    """Divides long wavelengths by the factor, keeps short ones, and blends in between."""
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_len / wavelengths
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(blend, 0.0, 1.0)
    return ((1 - keep) * frequencies / scaling.factor + keep * frequencies).astype(np.float32)


def rotation(spec: RopeSpec, head_dim: int, positions: Int32[Array, " T"]) -> Rotation:
    """The rotation of each token's position."""
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(inverse_frequencies(spec, head_dim))[None, :]
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "T N H"], by: Rotation) -> Float[Array, "T N H"]:
    """Rotates the first half of each head against the second; float32 inside, x's dtype outside."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = by.cos[:, None, :], by.sin[:, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
