"""Layers against formulas written with plain numpy, in float64."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.layers.linear import Linear, Numerics, Table
from jaxserve.models.layers.mlp import activate
from jaxserve.models.layers.norm import RMSNorm
from jaxserve.models.layers.rope import inverse_frequencies, rotate, rotation
from jaxserve.models.spec import Activation, LinearRopeScaling, Llama3RopeScaling, RopeSpec
from jaxserve.quant.qtensor import quantize_channels

RNG = np.random.default_rng(11)
FLOAT32 = jnp.dtype(jnp.float32)
LLAMA3 = Llama3RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_len=8192)


def expected_frequency(spec: RopeSpec, head_dim: int, pair: int) -> float:
    """The published formulas, one pair at a time, by cases."""
    frequency = spec.theta ** (-2 * pair / head_dim)
    match spec.scaling:
        case None:
            return frequency
        case LinearRopeScaling(factor=factor):
            return frequency / factor
        case Llama3RopeScaling() as s:
            wavelength = 2 * math.pi / frequency
            if wavelength > s.original_max_len / s.low_freq_factor:
                return frequency / s.factor
            if wavelength < s.original_max_len / s.high_freq_factor:
                return frequency
            smooth = (s.original_max_len / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
            return (1 - smooth) * frequency / s.factor + smooth * frequency


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize(
    "spec",
    [
        RopeSpec(theta=10000.0, scaling=None),
        RopeSpec(theta=500000.0, scaling=LLAMA3),
        RopeSpec(theta=10000.0, scaling=LinearRopeScaling(factor=4.0)),
    ],
)
def test_rope_frequencies(spec: RopeSpec, head_dim: int) -> None:
    expected = [expected_frequency(spec, head_dim, pair) for pair in range(head_dim // 2)]
    np.testing.assert_allclose(inverse_frequencies(spec, head_dim, 1), expected, rtol=1e-5)


def test_llama3_scaling_has_all_three_ranges() -> None:
    plain = inverse_frequencies(RopeSpec(theta=500000.0, scaling=None), 128, 1)
    ratio = plain / inverse_frequencies(RopeSpec(theta=500000.0, scaling=LLAMA3), 128, 1)
    assert ratio[0] == pytest.approx(1)
    assert ratio[-1] == pytest.approx(8)
    assert np.sum((ratio > 1.01) & (ratio < 7.99)) >= 3


def test_rotation_turns_pairs_as_complex_numbers() -> None:
    spec, positions = RopeSpec(theta=10000.0, scaling=None), np.array([0, 1, 7, 200], np.int32)
    x = RNG.standard_normal((4, 3, 16)).astype(np.float32)
    got = np.asarray(rotate(jnp.asarray(x), rotation(spec, 16, jnp.asarray(positions), 1)))
    turn = np.exp(1j * positions[:, None] * 10000.0 ** (-np.arange(8) / 8))
    turned = (x[..., :8] + 1j * x[..., 8:]) * turn[:, None]
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rms_norm(dtype: Any) -> None:
    norm = RMSNorm(32, "embed", eps=1e-3, dtype=jnp.dtype(dtype))
    scale = jnp.asarray(RNG.uniform(0.5, 2, 32), dtype)
    norm.scale[...] = scale
    # Small rows, where epsilon matters, and large ones, whose squares overflow half precision.
    x = jnp.asarray(RNG.standard_normal((5, 2, 32)) * np.array([1e-3, 1e-2, 1, 30, 3e4])[:, None, None], dtype)
    got = norm(x)
    exact = np.asarray(x, np.float64)
    exact = exact / np.sqrt(np.mean(exact**2, -1, keepdims=True) + 1e-3) * np.asarray(scale, np.float64)
    assert got.dtype == dtype
    np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=1e-5 if dtype == jnp.float32 else 1e-2)


@pytest.mark.parametrize("bias", [False, True])
def test_linear_keeps_its_dimensions(bias: bool) -> None:
    layer = Linear({"a": 3, "b": 8}, {"c": 5, "d": 2}, bias=bias, numerics=Numerics(dtype=FLOAT32, quantization=None))
    kernel = RNG.standard_normal((3, 8, 5, 2)).astype(np.float32)
    added = RNG.standard_normal((5, 2)).astype(np.float32) if bias else np.zeros((5, 2), np.float32)
    layer.kernel[...] = jnp.asarray(kernel)
    if layer.bias is not None:
        layer.bias[...] = jnp.asarray(added)
    x = RNG.standard_normal((7, 3, 8)).astype(np.float32)
    expected = np.einsum("tab,abcd->tcd", x, kernel) + added
    np.testing.assert_allclose(np.asarray(layer(jnp.asarray(x))), expected, atol=1e-4)


def test_int8_layers_are_near_the_float_ones() -> None:
    numerics = Numerics(dtype=FLOAT32, quantization="int8")
    kernel = RNG.standard_normal((3, 32, 5, 2)).astype(np.float32)
    layer = Linear({"a": 3, "b": 32}, {"c": 5, "d": 2}, bias=False, numerics=numerics)
    values, scale = quantize_channels(kernel, (0, 1))
    assert layer.scale is not None
    layer.kernel[...], layer.scale[...] = jnp.asarray(values), jnp.asarray(scale)
    x = RNG.standard_normal((40, 3, 32)).astype(np.float32)
    exact = np.einsum("tab,abcd->tcd", x, kernel)
    error = np.asarray(layer(jnp.asarray(x))) - exact
    assert np.sqrt(np.mean(error**2)) < 0.02 * np.sqrt(np.mean(exact**2))
    rows = RNG.standard_normal((50, 32)).astype(np.float32)
    values, scale = quantize_channels(rows, (1,))
    table = Table(50, 32, numerics=numerics)
    assert table.scale is not None
    table.table[...], table.scale[...] = jnp.asarray(values), jnp.asarray(scale)
    looked_up = np.asarray(table.rows(jnp.array([3, 49, 0], jnp.int32)))
    assert np.all(np.abs(looked_up - rows[[3, 49, 0]]) <= scale[[3, 49, 0], None] * 0.501)
    exact = x[:, 0] @ rows.T
    error = np.asarray(table.logits(jnp.asarray(x[:, 0]))) - exact
    assert np.sqrt(np.mean(error**2)) < 0.02 * np.sqrt(np.mean(exact**2))


@pytest.mark.parametrize("activation", list(Activation))
def test_activations(activation: Activation) -> None:
    x = np.linspace(-6, 6, 64, dtype=np.float32).reshape(8, 8)
    expected = {
        Activation.SILU: x / (1 + np.exp(-x)),
        Activation.GELU_TANH: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    }[activation]
    np.testing.assert_allclose(np.asarray(activate(jnp.asarray(x), activation)), expected, atol=1e-5)
