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
    """Cosine and sine of each token's angles, float32, for both halves of a head; the first half's sine is negated."""

    cos: Float[Array, "T H"]
    sin: Float[Array, "T H"]


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
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return Rotation(jnp.concatenate([cos, cos], axis=1), jnp.concatenate([-sin, sin], axis=1))


def rotate(x: Float[Array, "T N H"], by: Rotation) -> Float[Array, "T N H"]:
    """Rotates the first half of each head against the second; float32 inside, x's dtype outside."""
    first, second = jnp.split(x, 2, axis=-1)
    # Whole heads at a time: products of halves are twice as many instructions on a TPU, and slower to compile.
    swapped = jnp.concatenate([second, first], axis=-1).astype(jnp.float32)
    return (x.astype(jnp.float32) * by.cos[:, None, :] + swapped * by.sin[:, None, :]).astype(x.dtype)
