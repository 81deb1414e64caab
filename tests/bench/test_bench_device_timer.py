"""The device timer: it times calls, not dispatch, and leaves its inputs alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxserve.bench.device_timer import copy_bandwidth, matmul_rate, time_on_device


def test_more_work_takes_longer_and_dispatch_is_not_counted() -> None:
    def work(size: int) -> float:
        x = jnp.eye(size, dtype=jnp.float32)
        return time_on_device(lambda a: jnp.matmul(a, a), [x, x], 20)

    small, large = work(8), work(384)
    assert large > 4 * small
    assert small < 2e-3


def test_every_state_is_advanced_once_a_round_and_inputs_are_kept() -> None:
    calls: list[jax.Array] = []

    def count(state: dict[str, jax.Array]) -> dict[str, jax.Array]:
        calls.append(state["x"])
        return {"x": state["x"] + 1}

    states = [{"x": jnp.full(4, i, jnp.int32)} for i in range(3)]
    time_on_device(count, states, 2)
    # Traced for each state, in a short loop and in a long one; tracing a loop's body may happen more than once.
    assert len(calls) % (2 * len(states)) == 0
    assert [int(state["x"][0]) for state in states] == [0, 1, 2]


@pytest.mark.parametrize(("states", "repeats"), [([], 1), ([jnp.zeros(1)], 0)])
def test_nothing_to_time(states: list[jax.Array], repeats: int) -> None:
    with pytest.raises(ValueError, match="at least"):
        time_on_device(lambda x: x, states, repeats)


def test_ceilings_are_plausible() -> None:
    assert 1e8 < copy_bandwidth(1 << 24, 20) < 1e13
    assert 1e8 < matmul_rate(256, "float32", 20) < 1e15
