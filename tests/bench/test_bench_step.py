"""The step benchmark runs the serving programs on the step it says, and sets them beside the right number of bytes."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_engine import CONFIG, SPEC, placed

from jaxserve.bench.step import matmuls, measure_steps, step_input, table
from jaxserve.core.errors import ConfigError
from jaxserve.engine.batch import unpack
from jaxserve.engine.compile import compile_holders
from jaxserve.engine.programs import Replica
from jaxserve.launch.build import plan_replica
from jaxserve.sharding.mesh import make_mesh


@pytest.fixture(scope="module")
def replica() -> Replica:
    return plan_replica(CONFIG, SPEC, make_mesh(devices=jax.devices()[:1]))[0]


@pytest.fixture
def params(replica: Replica) -> dict[str, jax.Array]:
    holders = compile_holders(replica)
    return {path: replica.hold(path, value, holders) for path, value in placed(SPEC, replica).items()}


def test_the_step_is_the_one_asked_for(replica: Replica) -> None:
    inputs = step_input(replica, 5, 30)
    num_tokens = replica.buckets.tokens_for(5)
    batch = unpack(jnp.asarray(inputs.packed), jnp.asarray(inputs.page_table), num_tokens)
    assert int(batch.num_seqs) == int(batch.num_decodes) == 5
    np.testing.assert_array_equal(batch.context_lens[:5], 30)
    np.testing.assert_array_equal(batch.positions[:5], 29)
    pages = np.asarray(inputs.page_table)[:5, :8]
    assert len(set(pages.flat)) == 5 * 8, "no two sequences share a page"


def test_times_and_bytes(replica: Replica, params: dict[str, jax.Array]) -> None:
    times = measure_steps(replica, params, [(1, 8), (4, 100)], repeats=2)
    assert [(each.num_seqs, each.context_len) for each in times] == [(1, 8), (4, 100)]
    assert all(each.decode_ms > 0 and each.step_ms > 0 for each in times)
    # 2 layers, keys and values of 2 heads of 16 float32: 512 bytes a token; read all, and write one a sequence.
    assert times[1].memory_bytes - times[0].memory_bytes == 512 * (4 * 100 + 4 - 8 - 1) + 3 * 64 * 4
    assert times[0].floor_ms == pytest.approx(1e3 * times[0].memory_bytes / times[0].bandwidth)
    assert table(times).row_count == 2


def test_the_matmuls_alone_are_all_of_the_step_s_matmuls(replica: Replica, params: dict[str, jax.Array]) -> None:
    hidden = jnp.ones((8, SPEC.hidden_size))
    compute = partial(matmuls, blueprint=replica.blueprint, num_scored=4)
    scores = compute(params, hidden)
    assert scores.shape == (4,)
    # Every kernel takes part: without any one of them the result is another.
    for path, value in params.items():
        changed = compute({**params, path: value * 2}, hidden)
        assert np.any(np.asarray(changed) != np.asarray(scores)) == path.endswith((".kernel", "lm_head.table")), path
    operations = jax.jit(compute).lower(params, hidden).as_text()
    assert operations.count("dot_general") == 5


def test_a_pool_that_is_too_small_is_refused(replica: Replica) -> None:
    small = dataclasses.replace(replica, layout=dataclasses.replace(replica.layout, num_pages=3))
    with pytest.raises(ConfigError, match="need 4 pages of 3"):
        measure_steps(small, {}, [(1, 16)])
