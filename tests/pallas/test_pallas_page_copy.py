"""Conformance of every page-copy backend: pages arrive, in order, in every layer, and nothing else changes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_interpreters import GPU, PLAIN, TPU, Runner, races_fail

from jaxserve.core.errors import ConfigError
from jaxserve.kv.pool import PoolLayout, copy_pages
from jaxserve.pallas.dispatch import Target
from jaxserve.pallas.page_copy import api
from jaxserve.sharding.mesh import make_mesh
from jaxserve.sharding.topology import parse_topology, require_compiler, run_deviceless

LAYERS, PAGES, SLOTS = 3, 7, 5
SHAPES = {"plain": ((4, 2, 16), "float32"), "bits": ((16, 4, 128), "uint16"), "odd": ((3, 6, 80), "int8")}
OPS: dict[str, Callable[..., jax.Array]] = {
    "copy": functools.partial(api.copy_pages, num_layers=LAYERS),
    "gather": api.gather_pages,
    "scatter": api.scatter_pages,
}
DONATED = {"copy": 0, "gather": 2, "scatter": 2}

runners = pytest.mark.parametrize("runner", [*PLAIN, TPU, GPU], ids=str)


@functools.cache
def compiled(runner: Runner, op: str) -> Callable[..., jax.Array]:
    return jax.jit(functools.partial(OPS[op], target=runner.target), donate_argnums=DONATED[op])


def run(runner: Runner, op: str, *args: np.ndarray) -> np.ndarray:
    with runner.traced(), races_fail():
        return np.asarray(compiled(runner, op)(*(jnp.asarray(x) for x in args)))


def random_pages(rng: np.random.Generator, *leading: int, shape: str = "plain") -> np.ndarray:
    """Pages of random bits; as floats, NaN among them."""
    size, dtype = SHAPES[shape]
    bits = rng.integers(0, 256, size=(*leading, *size[:-1], size[-1] * jnp.dtype(dtype).itemsize), dtype=np.uint8)
    return bits.view(jnp.dtype(dtype))


def bytes_of(x: np.ndarray) -> bytes:
    return np.ascontiguousarray(x).tobytes()


def by_layer(pool: np.ndarray) -> np.ndarray:
    return pool.reshape(LAYERS, -1, *pool.shape[1:])


def copied(pool: np.ndarray, sources: Sequence[int], targets: Sequence[int]) -> np.ndarray:
    pool = pool.copy()
    for source, target in zip(sources, targets, strict=True):
        if source >= 0 and target >= 0:
            by_layer(pool)[:, target] = by_layer(pool)[:, source]
    return pool


def gathered(pool: np.ndarray, ids: Sequence[int], buffer: np.ndarray) -> np.ndarray:
    buffer = buffer.copy()
    for slot, page in enumerate(ids):
        if page >= 0:
            buffer[slot] = by_layer(pool)[:, page]
    return buffer


def scattered(buffer: np.ndarray, ids: Sequence[int], pool: np.ndarray) -> np.ndarray:
    pool = pool.copy()
    for slot, page in enumerate(ids):
        if page >= 0:
            by_layer(pool)[:, page] = buffer[slot]
    return pool


def check_all(runner: Runner, pairs: Sequence[tuple[int, int]], *, seed: int, shape: str = "plain") -> None:
    rng = np.random.default_rng(seed)
    pool, buffer = random_pages(rng, LAYERS * PAGES, shape=shape), random_pages(rng, SLOTS, LAYERS, shape=shape)
    sources, targets = np.array(pairs, np.int32).T
    expected = copied(pool, sources, targets)
    assert bytes_of(run(runner, "copy", pool, sources, targets)) == bytes_of(expected)
    expected = gathered(pool, sources, buffer)
    assert bytes_of(run(runner, "gather", pool, sources, buffer)) == bytes_of(expected)
    expected = scattered(buffer, targets, pool)
    assert bytes_of(run(runner, "scatter", buffer, targets, pool)) == bytes_of(expected)


@runners
@given(
    pairs=st.lists(st.tuples(st.integers(-1, PAGES - 1), st.integers(-2, PAGES - 1)), min_size=SLOTS, max_size=SLOTS),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=12)
def test_random_pairs(runner: Runner, pairs: list[tuple[int, int]], seed: int) -> None:
    check_all(runner, pairs, seed=seed)


@runners
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_dtypes(runner: Runner, shape: str) -> None:
    check_all(runner, [(0, 6), (3, 1), (-1, 2), (5, 4), (2, -1)], seed=1, shape=shape)


@runners
@pytest.mark.parametrize(
    "pairs",
    [
        [(0, 1), (1, 2), (2, 3), (3, 4), (4, 0)],
        [(0, 1), (2, 0), (3, 2), (4, 3), (1, 4)],
        [(0, 6), (1, 6), (2, 6), (6, 6), (3, 6)],
        [(0, 1), (-1, 3), (1, 2), (5, -1), (2, 4)],
        [(-1, -1)] * 5,
    ],
    ids=["chain", "freed_and_taken", "same_target", "chain_over_padding", "padding"],
)
def test_pairs_take_effect_in_order(runner: Runner, pairs: list[tuple[int, int]]) -> None:
    check_all(runner, pairs, seed=2)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("runner", PLAIN, ids=str)
def test_the_target_is_changed_in_place(runner: Runner, op: str) -> None:
    big, ids = jax.ShapeDtypeStruct((LAYERS * 20_000, 4, 2, 16), jnp.uint16), jax.ShapeDtypeStruct((8,), jnp.int32)
    buffer = jax.ShapeDtypeStruct((8, LAYERS, 4, 2, 16), jnp.uint16)
    args: dict[str, tuple[Any, ...]] = {
        "copy": (big, ids, ids),
        "gather": (big, ids, buffer),
        "scatter": (buffer, ids, big),
    }
    target = args[op][DONATED[op]]
    stats = compiled(runner, op).lower(*args[op]).compile().memory_analysis()
    assert stats.alias_size_in_bytes == target.size * 2
    assert stats.temp_size_in_bytes < 100_000


@pytest.mark.parametrize(
    ("topology", "page", "dtype"),
    [
        ("v6e:1x1", (16, 16, 128), "bfloat16"),
        ("v5e:1x1", (64, 2, 128), "bfloat16"),
        ("h100:1", (16, 16, 128), "bfloat16"),
        ("h100:1", (16, 2, 80), "int8"),
    ],
)
def test_compiled_for_a_chip_that_is_not_here(
    topology: str, page: tuple[int, ...], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place, with nothing beside but what page ids take."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=":")
    try:
        require_compiler(parse_topology(topology))
    except ConfigError as error:
        pytest.skip(error.message)
    request = {"topology": topology, "page": page, "dtype": dtype}
    found = run_deviceless(parse_topology(topology), "deviceless_page_copy", request)
    assert set(found) == set(OPS)
    for name, memory in found.items():
        assert memory["aliased"], name
        assert memory["temp_bytes"] < 4096, name


def test_the_race_detector_works() -> None:
    """A kernel that reads before its DMA has been waited for is caught: the suite can fail."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    def hasty(x: Any, out: Any, held: Any, semaphore: Any) -> None:
        copy = pltpu.make_async_copy(x, held, semaphore)
        copy.start()
        out[...] = held[...]
        copy.wait()

    def call(x: jax.Array) -> jax.Array:
        return pl.pallas_call(
            hasty,
            in_specs=[pl.BlockSpec(memory_space=pltpu.HBM)],
            out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
            scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
        )(x)

    try:
        with pytest.raises((AssertionError, jax.errors.JaxRuntimeError), match="RACE"), TPU.traced(), races_fail():
            jax.block_until_ready(jax.jit(call)(jnp.ones((8, 128))))
    finally:
        pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_a_pool_on_a_mesh(tensor: int) -> None:
    mesh = make_mesh(tensor=tensor, devices=jax.devices()[:tensor])
    layout = PoolLayout(
        num_layers=LAYERS, num_pages=PAGES, page_size=4, num_kv_heads=4, head_dim=16, dtype=jnp.dtype(jnp.float32)
    )
    pool = np.random.default_rng(0).standard_normal(layout.shape).astype(np.float32)
    sources, targets = np.array([0, 1, -1], np.int32), np.array([1, 3, 2], np.int32)
    function = jax.jit(
        functools.partial(copy_pages, num_layers=LAYERS, mesh=mesh),
        donate_argnums=0,
        out_shardings=layout.sharding(mesh),
    )
    result = function(jax.device_put(pool, layout.sharding(mesh)), sources, targets)
    assert result.sharding == layout.sharding(mesh)
    np.testing.assert_array_equal(result, copied(pool, sources, targets))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: api.copy_pages(jnp.zeros((6, 4, 2)), ids(1), ids(1), num_layers=3), "a pool must be"),
        (lambda: api.copy_pages(jnp.zeros((7, 4, 2, 8)), ids(1), ids(1), num_layers=3), "does not divide"),
        (lambda: api.copy_pages(jnp.zeros((6, 4, 2, 8)), ids(2), ids(1), num_layers=3), "are not pairs"),
        (lambda: api.copy_pages(jnp.zeros((6, 4, 2, 8)), jnp.zeros(1), ids(1), num_layers=3), "must be int32"),
        (lambda: api.gather_pages(jnp.zeros((6, 4, 2, 8)), ids(1), jnp.zeros((1, 3, 4, 2, 16))), "a buffer"),
        (lambda: api.gather_pages(jnp.zeros((6, 4, 2, 8)), ids(2), jnp.zeros((1, 3, 4, 2, 8))), "as many page ids"),
        (
            lambda: api.scatter_pages(jnp.zeros((1, 3, 4, 2, 8), jnp.int8), ids(1), jnp.zeros((6, 4, 2, 8))),
            "must hold the same",
        ),
    ],
)
def test_what_does_not_fit_together_is_named(call: Callable[[], jax.Array], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def ids(count: int) -> jax.Array:
    return jnp.zeros((count,), jnp.int32)


def test_no_pairs_change_nothing() -> None:
    pool = jnp.ones((6, 4, 2, 8))
    assert api.copy_pages(pool, ids(0), ids(0), num_layers=3, target=Target(platform="tpu")) is pool
