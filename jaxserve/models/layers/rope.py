"""Rotary position embedding (arXiv:2104.09864): angles once a step, then one rotation a head."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32
from numpy.typing import NDArray

from jaxserve.models.spec import (
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    RopeSpec,
    YarnRopeScaling,
)


class Rotation(NamedTuple):
    """Cosine and sine of each token's angles, float32, for both halves of a head; the first half's sine is negated."""

    cos: Float[Array, "T H"]
    sin: Float[Array, "T H"]


def inverse_frequencies(spec: RopeSpec, head_dim: int, max_len: int) -> NDArray[np.float32]:
    """Radians a position for each pair of a head's dimensions, [H / 2].

    Args:
        spec: The rope.
        head_dim: H.
        max_len: Longest sequence that is served, in tokens; some scalings depend on it, for all positions alike.
    """
    match spec.scaling:
        case None:
            return _plain(spec.theta, head_dim)
        case LinearRopeScaling(factor=factor):
            return _plain(spec.theta, head_dim) / np.float32(factor)
        case Llama3RopeScaling() as scaling:
            return _llama3(_plain(spec.theta, head_dim), scaling)
        case YarnRopeScaling() as scaling:
            return _yarn(spec.theta, head_dim, scaling)
        case LongRopeScaling() as scaling:
            divisors = scaling.long_factors if max_len > scaling.original_max_len else scaling.short_factors
            return _inverse(np.array(divisors, np.float32) * _wavelengths(spec.theta, head_dim))
        case DynamicRopeScaling(factor=factor, original_max_len=original):
            stretch = factor * max(max_len, original) / original - (factor - 1)
            return _plain(spec.theta * stretch ** (head_dim / (head_dim - 2)), head_dim)


def attention_factor(spec: RopeSpec) -> float:
    """What cosine and sine are multiplied by."""
    scaling = spec.scaling
    return scaling.attention_factor if isinstance(scaling, YarnRopeScaling | LongRopeScaling) else 1.0


def _wavelengths(theta: float, head_dim: int) -> NDArray[np.float32]:
    """Positions a radian for each pair of dimensions."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    wavelengths: NDArray[np.float32] = np.power(np.float32(theta), exponents)
    return wavelengths


def _plain(theta: float, head_dim: int) -> NDArray[np.float32]:
    return _inverse(_wavelengths(theta, head_dim))


def _inverse(wavelengths: NDArray[np.float32]) -> NDArray[np.float32]:
    frequencies: NDArray[np.float32] = np.float32(1) / wavelengths
    return frequencies


def _llama3(frequencies: NDArray[np.float32], scaling: Llama3RopeScaling) -> NDArray[np.float32]:
    """Divides long wavelengths by the factor, keeps short ones, and blends in between."""
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_len / wavelengths
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(blend, 0.0, 1.0)
    return ((1 - keep) * frequencies / scaling.factor + keep * frequencies).astype(np.float32)


def _yarn(theta: float, head_dim: int, scaling: YarnRopeScaling) -> NDArray[np.float32]:
    """Divides dimensions that turn seldom by the factor, keeps those that turn often, and blends in between."""

    def dimension(turns: float) -> float:
        """The pair of dimensions that turns so often in the original context; not a whole number."""
        return head_dim * math.log(scaling.original_max_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    pairs = np.arange(head_dim // 2, dtype=np.float32)
    divided = np.clip((pairs - np.float32(first)) / np.float32(last - first), 0, 1)
    kept = _plain(theta, head_dim)
    blended: NDArray[np.float32] = kept / np.float32(scaling.factor) * divided + kept * (np.float32(1) - divided)
    return blended


def rotation(spec: RopeSpec, head_dim: int, positions: Int32[Array, " T"], max_len: int) -> Rotation:
    """The rotation of each token's position; `max_len` as for `inverse_frequencies`."""
    frequencies = jnp.asarray(inverse_frequencies(spec, head_dim, max_len))
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if (factor := attention_factor(spec)) != 1.0:
        cos, sin = cos * jnp.float32(factor), sin * jnp.float32(factor)
    return Rotation(jnp.concatenate([cos, cos], axis=1), jnp.concatenate([-sin, sin], axis=1))


def rotate(x: Float[Array, "T N H"], by: Rotation) -> Float[Array, "T N H"]:
    """Rotates the first half of each head against the second; float32 inside, x's dtype outside."""
    first, second = jnp.split(x, 2, axis=-1)
    # Whole heads at a time: products of halves are twice as many instructions on a TPU, and slower to compile.
    swapped = jnp.concatenate([second, first], axis=-1).astype(jnp.float32)
    return (x.astype(jnp.float32) * by.cos[:, None, :] + swapped * by.sin[:, None, :]).astype(x.dtype)
