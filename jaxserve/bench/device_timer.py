"""Times programs on an accelerator by its own clock, as far as a host can: the difference of a long and a short loop.

A loop of a fixed number of rounds is compiled; a round calls the function once on each of several states, so that what
the caches hold of one state is gone when it comes round again. A state is updated by its call, which keeps the
compiler from calling once or in another order. Two loops of different length are timed from dispatch to completion;
dispatch and waiting are in both, and cancel in the difference.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp

State = TypeVar("State")

SAMPLES = 5
"""Times each loop is timed; the median counts."""


def time_on_device(fn: Callable[[State], State], inputs_rotation: Sequence[State], repeats: int) -> float:
    """Seconds a call takes on the device.

    Args:
        fn: Takes a state, a pytree of arrays, and returns its successor, of the same shapes and dtypes. Memory that it
            changes in place belongs to the state.
        inputs_rotation: States that take turns; together they should be several times the size of the cache. They are
            not changed.
        repeats: Rounds, calls on each state, that the difference of the two loops has.

    Raises:
        ValueError: There is nothing to time.
    """
    if not inputs_rotation or repeats < 1:
        raise ValueError("There must be a state and a repeat at least")

    def run(rounds: int, states: tuple[State, ...]) -> tuple[State, ...]:
        def turn(_: int, states: tuple[State, ...]) -> tuple[State, ...]:
            return tuple(fn(state) for state in states)

        # The number of rounds is static: a device asks the host before each round of a loop of unknown length.
        turned: tuple[State, ...] = jax.lax.fori_loop(0, rounds, turn, states)
        return turned

    loop = jax.jit(run, static_argnums=0, donate_argnums=1)
    states = jax.tree.map(jnp.copy, tuple(inputs_rotation))

    def timed(rounds: int) -> float:
        nonlocal states
        seconds = []
        # The first one compiles.
        for _ in range(SAMPLES + 1):
            started = time.perf_counter()
            states = jax.block_until_ready(loop(rounds, states))
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds[1:])

    short, long = timed(1), timed(1 + repeats)
    return (long - short) / (repeats * len(inputs_rotation))


def copy_bandwidth(num_bytes: int = 1 << 32, repeats: int = 20) -> float:
    """Bytes read and written per second while a large array is rewritten.

    Args:
        num_bytes: Size of the array.
        repeats: Times it is rewritten.
    """
    x = jax.random.normal(jax.random.key(0), (num_bytes // 4,), jnp.float32)
    seconds = time_on_device(jnp.negative, [x], repeats)
    return 2 * x.nbytes / seconds


def matmul_rate(size: int = 8192, dtype: str = "bfloat16", repeats: int = 40) -> float:
    """Floating-point operations per second of a square matrix product of random numbers.

    Args:
        size: Rows and columns.
        dtype: Of both factors and the product.
        repeats: Products.
    """
    left, right = jax.random.normal(jax.random.key(0), (2, size, size), jnp.float32)
    # The product is as large as its left factor, however often it is multiplied.
    factors = (left.astype(dtype), (right * size**-0.5).astype(dtype))

    def multiply(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return jnp.matmul(state[0], state[1]), state[1]

    return 2.0 * size**3 / time_on_device(multiply, [factors], repeats)
