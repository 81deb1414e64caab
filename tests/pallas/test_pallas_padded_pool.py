"""A pool of more and wider heads than the model has: the same attention, and zeros beside what is written."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from kernel_interpreters import PLAIN, TPU, Runner, races_fail
from paged_attention_cases import Length, Shape, build, exact

from jaxserve.pallas.paged_attention.api import AttentionConfig, paged_attention

SHAPE = Shape(max_seqs=4, max_tokens=16, num_kv_heads=3, group=3, head_dim=64, page_size=16, pages_per_seq=4)
LENGTHS = (Length(cached=9, new=1), Length(cached=40, new=1), Length(cached=20, new=5))
CONFIG = AttentionConfig(scale=0.1, sliding_window=30, soft_cap=20.0)
HELD, LANES = 4, 128


@pytest.mark.parametrize("runner", [*PLAIN, TPU], ids=str)
def test_a_padded_pool(runner: Runner) -> None:
    case = build(SHAPE, LENGTHS)
    plain = case.kv_pages
    padded = np.zeros((*plain.shape[:2], 2 * HELD, LANES), plain.dtype)
    padded[:, :, : plain.shape[2], : plain.shape[3]] = plain
    arrays = [jnp.asarray(x) for x in (case.q, case.k, case.v, padded)]
    sinks = jnp.linspace(-1.0, 1.0, SHAPE.num_kv_heads * SHAPE.group, dtype=jnp.float32)
    layer = dataclasses.replace(case.layer(), sinks=sinks)
    with runner.traced(), races_fail():
        out, pool = paged_attention(*arrays, case.batch(), layer, config=CONFIG, target=runner.target)
    found = np.asarray(pool)
    assert found.shape == padded.shape
    held = found[:, :, : plain.shape[2], : plain.shape[3]]
    wanted = exact(dataclasses.replace(case, sinks=np.asarray(sinks)), held, CONFIG)
    rows = slice(case.num_tokens)
    assert out.shape == case.q.shape
    assert np.all(np.abs(np.asarray(out) - wanted.out)[rows] <= wanted.bound[rows])
    assert not found[:, :, plain.shape[2] :].any()
    assert not found[..., plain.shape[3] :].any()
    changed = ~((held == plain) | (np.isnan(held) & np.isnan(plain)))
    assert np.count_nonzero(changed.any(axis=(2, 3))) == case.num_tokens


def test_a_pool_of_other_heads_is_refused() -> None:
    case = build(SHAPE, LENGTHS)
    arrays = [jnp.asarray(x) for x in (case.q, case.k, case.v)]
    pool = jnp.zeros((12, 16, 10, 128), jnp.float32)
    with pytest.raises(ValueError, match=r"must be \[P, page_size, 6, 64\] to hold k .* or \(8, 128\) of them"):
        paged_attention(*arrays, pool, case.batch(), case.layer(), config=CONFIG)
