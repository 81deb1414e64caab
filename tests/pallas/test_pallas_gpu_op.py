"""The Hopper op around its kernels: what it refuses, what then runs instead, the schedule made before the layers."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paged_attention_cases import Length, Shape, build, exact

from jaxserve.pallas.dispatch import Backend, Target
from jaxserve.pallas.paged_attention.api import AttentionConfig, paged_attention, prepared
from jaxserve.pallas.paged_attention.gpu.prefill import prefill_shape
from jaxserve.pallas.paged_attention.gpu.prefill_schedule import prefill_schedule
from jaxserve.pallas.paged_attention.gpu.support import check_support

SHAPE = Shape(max_seqs=4, max_tokens=16, num_kv_heads=2, group=3, head_dim=64, page_size=16, pages_per_seq=4)
PLAIN = AttentionConfig(scale=0.1, sliding_window=None, soft_cap=None)
LENGTHS = (Length(cached=9, new=1), Length(cached=20, new=5))


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "changes", "reason"),
    [
        ("float32", "float32", {}, "q float32"),
        ("bfloat16", "float32", {}, "pages float32"),
        ("bfloat16", "float16", {}, "pages float16"),
        ("bfloat16", "bfloat16", {"page_size": 4}, "pages of 4"),
        ("bfloat16", "int8", {"page_size": 48}, "pages of 48"),
        ("bfloat16", "bfloat16", {"head_dim": 72}, "head dim 72"),
        ("bfloat16", "float8_e4m3fn", {"head_dim": 512}, "head dim 512"),
        ("bfloat16", "bfloat16", {"group": 65}, "65 query heads"),
    ],
)
def test_what_the_kernels_cannot_do(dtype: str, kv_dtype: str, changes: Mapping[str, int], reason: str) -> None:
    shape = dataclasses.replace(SHAPE, **changes)
    q = jnp.zeros((16, shape.num_kv_heads * shape.group, shape.head_dim), jnp.dtype(dtype))
    pool = jnp.zeros((3, shape.page_size, 2 * shape.num_kv_heads, shape.head_dim), jnp.dtype(kv_dtype))
    with pytest.raises(NotImplementedError, match=reason):
        check_support(q, pool)


def test_what_it_cannot_do_runs_in_plain_xla_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    case = build(SHAPE, LENGTHS)
    with caplog.at_level(logging.WARNING):
        out, pool = paged_attention(
            *(jnp.asarray(x) for x in (case.q, case.k, case.v, case.kv_pages)),
            case.batch(),
            case.layer(),
            config=PLAIN,
            target=Target(platform="gpu"),
        )
    (record,) = caplog.records
    assert "backend gpu cannot do this (q float32" in record.getMessage()
    assert record.getMessage().endswith("using xla")
    expected = exact(case, np.asarray(pool), PLAIN)
    assert np.all(np.abs(np.asarray(out) - expected.out)[: case.num_tokens] <= expected.bound[: case.num_tokens])


def test_only_batches_for_the_gpu_are_prepared() -> None:
    batch = build(SHAPE, LENGTHS).batch()
    assert prepared(batch, group=3, target=Target(platform="tpu")).prefill is None
    assert prepared(batch, group=3, target=Target(platform="gpu", backend=Backend.XLA)).prefill is None


def test_a_prepared_schedule_is_the_one_that_the_kernel_would_make() -> None:
    case = build(SHAPE, LENGTHS, dtype="bfloat16", kv_dtype="bfloat16")
    made = prepared(case.batch(), group=SHAPE.group, target=Target(platform="gpu")).prefill
    tile_tokens = prefill_shape(jnp.asarray(case.q), jnp.asarray(case.kv_pages)).item_tokens
    jax.tree.map(np.testing.assert_array_equal, made, prefill_schedule(case.batch(), tile_tokens))
