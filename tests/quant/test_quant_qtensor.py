"""Int8 weights and activations: errors within what rounding allows, exact where nothing is rounded."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.quant.qtensor import int8_matmul, quantize_channels, quantize_rows

RNG = np.random.default_rng(7)


@pytest.mark.parametrize(("shape", "contracted"), [((64, 24), (0,)), ((3, 4, 8, 24), (0, 1, 2)), ((24, 64), (1,))])
def test_weights_are_within_half_a_step(shape: tuple[int, ...], contracted: tuple[int, ...]) -> None:
    weights = (RNG.standard_normal(shape) * RNG.uniform(1e-3, 1e3, shape)).astype(np.float32)
    values, scale = quantize_channels(weights, contracted)
    assert values.dtype == np.int8
    assert scale.shape == tuple(size for dim, size in enumerate(shape) if dim not in contracted)
    spread = np.expand_dims(scale, contracted)
    assert np.all(np.abs(values * spread - weights) <= spread * (0.5 + 1e-4))
    assert np.all(np.max(np.abs(values), axis=contracted) == 127)


def test_channel_of_zeros() -> None:
    values, scale = quantize_channels(np.zeros((4, 3), np.float32), (0,))
    assert not values.any()
    assert scale.tolist() == [1, 1, 1]


@pytest.mark.parametrize("transposed", [False, True])
def test_matmul_error_is_bounded(transposed: bool) -> None:
    """|error| <= sum over inputs of |w| dx + |x| dw + dx dw, with dx and dw half a quantisation step."""
    x = (RNG.standard_normal((17, 64)) * RNG.uniform(0.1, 50, (17, 1))).astype(np.float32)
    weights = RNG.standard_normal((64, 24)).astype(np.float32)
    values, scale = quantize_channels(weights, (0,))
    stored = values.T if transposed else values
    got = np.asarray(int8_matmul(jnp.asarray(x), jnp.asarray(stored), jnp.asarray(scale), inputs_last=transposed))
    exact = x.astype(np.float64) @ weights
    dx = np.abs(x).max(1, keepdims=True) / 127 / 2
    dw = scale / 2
    bound = dx * np.abs(weights).sum(0) + np.abs(x).sum(1, keepdims=True) * dw + 64 * dx * dw
    assert np.all(np.abs(got - exact) <= bound * 1.001)
    # The bound is the worst case; typical errors add up like noise.
    assert np.sqrt(np.mean((got - exact) ** 2)) < 0.02 * np.sqrt(np.mean(exact**2))
    rows, row_scale = (np.asarray(part) for part in quantize_rows(jnp.asarray(x)))
    integers = (rows.astype(np.int64) @ values.astype(np.int64)) * row_scale.astype(np.float64)[:, None] * scale
    np.testing.assert_allclose(got, integers, rtol=1e-5)


def test_rows_of_zeros_stay_zero() -> None:
    got = int8_matmul(jnp.zeros((2, 8)), jnp.ones((8, 3), jnp.int8), jnp.ones((3,)))
    assert not np.asarray(got).any()
