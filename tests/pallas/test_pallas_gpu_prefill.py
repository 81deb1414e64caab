"""The Hopper prefill kernel: in Mosaic GPU's interpreter, and on a GPU.

The interpreter has a race detector on. It runs what `PrefillTiles.interpretable` selects, which differs from the
device's program in where wgmma finds its weights and in who adds products up. Pools are NaN wherever no sequence's
tokens are, and rows of the output that are not chunks' hold something that must stay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_interpreters import GPU_INTERPRETER, Runner, interpretable_prefill_tiles
from paged_attention_cases import Case, Length, Shape, build, oracle, tolerance

from jaxserve.pallas.dispatch import Backend
from jaxserve.pallas.paged_attention.cache import write_pages
from jaxserve.pallas.paged_attention.gpu.prefill import attend_chunks, prefill_shape
from jaxserve.pallas.paged_attention.gpu.prefill_schedule import prefill_schedule
from jaxserve.pallas.paged_attention.gpu.prefill_tiles import WARPGROUPS, PrefillShape, prefill_tiles
from jaxserve.pallas.paged_attention.gpu.tiles import ROWS, SMEM_BYTES
from jaxserve.pallas.paged_attention.inputs import AttentionConfig

PLAIN = AttentionConfig(scale=0.1, sliding_window=None, soft_cap=None)
UNTOUCHED = 7.0

# What is not visible may be NaN, which numpy's matmul notices inside the interpreter.
runs = [
    pytest.mark.skipif(
        jax.default_backend() != "gpu" and GPU_INTERPRETER is None, reason="no GPU, and this JAX has no interpreter"
    ),
    pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning"),
]
on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")


def interpreted(test: pytest.MarkDecorator | object) -> object:
    for mark in runs:
        test = mark(test)
    return test


def prefill(case: Case, config: AttentionConfig, block_tokens: int = 0) -> np.ndarray:
    runner = Runner(Backend.GPU)
    batch, layer = case.batch(), case.layer()
    q, k, v, pool = (jnp.asarray(x) for x in (case.q, case.k, case.v, case.kv_pages))
    pool = write_pages(k, v, pool, batch, layer)
    tiles = None
    if block_tokens and runner.is_interpreted:
        tiles = dataclasses.replace(interpretable_prefill_tiles(prefill_shape(q, pool)), block_tokens=block_tokens)
    with runner.traced():
        run = jax.jit(lambda q, pool, out: attend_chunks(q, pool, batch, layer, config, out, tiles))
        return np.asarray(run(q, pool, jnp.full(q.shape, UNTOUCHED, q.dtype)))


def check(case: Case, config: AttentionConfig, block_tokens: int = 0) -> np.ndarray:
    out = prefill(case, config, block_tokens)
    batch = case.batch()
    pool = np.asarray(write_pages(*(jnp.asarray(x) for x in (case.k, case.v, case.kv_pages)), batch, case.layer()))
    expected = oracle(case, pool, config)
    rows = np.zeros(out.shape[0], bool)
    rows[int(batch.num_decodes) : case.num_tokens] = True
    np.testing.assert_allclose(out[rows].astype(np.float64), expected[rows], rtol=0, atol=tolerance(case))
    assert np.all(out[~rows] == UNTOUCHED)
    return out


NARROW = Shape(max_seqs=4, max_tokens=160, num_kv_heads=2, group=2, head_dim=64, page_size=16, pages_per_seq=40)
RAGGED = (
    Length(cached=9, new=1),
    Length(cached=200, new=70),
    Length(cached=0, new=5),
    Length(cached=63, new=1),
)


@pytest.mark.slow
@interpreted
def test_large_blocks_and_scales() -> None:
    lengths = (Length(cached=127, new=129), Length(cached=300, new=20))
    check(build(NARROW, lengths, dtype="bfloat16", kv_dtype="bfloat16", scales=True), PLAIN, block_tokens=128)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("window", [1, 100])
def test_windows_cap_and_sinks(window: int) -> None:
    config = AttentionConfig(scale=0.2, sliding_window=window, soft_cap=2.0)
    lengths = (Length(cached=0, new=1), Length(cached=500, new=70), Length(cached=3, new=5))
    check(build(NARROW, lengths, dtype="bfloat16", kv_dtype="bfloat16", sinks=True), config)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize(
    ("changes", "length", "dtype"),
    [
        ({"num_kv_heads": 1, "group": 3}, Length(cached=60, new=129), "bfloat16"),
        ({"num_kv_heads": 1, "group": 64, "page_size": 256, "max_tokens": 24}, Length(cached=250, new=17), "float16"),
        ({"num_kv_heads": 1, "group": 4, "head_dim": 128, "page_size": 64}, Length(cached=60, new=40), "bfloat16"),
        ({"num_kv_heads": 3, "head_dim": 256}, Length(cached=70, new=70), "bfloat16"),
        ({"num_kv_heads": 1, "head_dim": 80, "page_size": 8}, Length(cached=70, new=70), "bfloat16"),
        ({"max_tokens": 12}, Length(cached=0, new=12), "bfloat16"),
    ],
    ids=["gqa3", "mqa64", "gqa4", "wide_heads", "heads_of_80", "few_rows"],
)
def test_shapes(changes: dict[str, int], length: Length, dtype: str) -> None:
    shape = dataclasses.replace(NARROW, max_seqs=2, pages_per_seq=20, **changes)
    check(build(shape, (length,), dtype=dtype, kv_dtype=dtype, sinks=True), PLAIN)


@interpreted
@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "head_dim"),
    [
        ("bfloat16", "float8_e4m3fn", 64),
        pytest.param("float16", "float8_e5m2", 80, marks=pytest.mark.slow),
        pytest.param("bfloat16", "int8", 256, marks=pytest.mark.slow),
    ],
)
def test_narrow_pools_with_scales(dtype: str, kv_dtype: str, head_dim: int) -> None:
    shape = dataclasses.replace(NARROW, max_seqs=2, pages_per_seq=20, num_kv_heads=1, head_dim=head_dim)
    config = AttentionConfig(scale=0.1, sliding_window=100, soft_cap=3.0)
    lengths = (Length(cached=9, new=1), Length(cached=150, new=70))
    check(build(shape, lengths, dtype=dtype, kv_dtype=kv_dtype, sinks=True, scales=True), config)


@interpreted
def test_ragged_chunks_beside_decodes_and_a_row_does_not_depend_on_the_batch_or_the_chunk() -> None:
    """A sequence's last tokens are the same to the bit alone in a chunk, or after others and beside others."""
    case = build(NARROW, RAGGED, dtype="bfloat16", kv_dtype="bfloat16")
    together = check(case, PLAIN)
    pool = write_pages(*(jnp.asarray(x) for x in (case.k, case.v, case.kv_pages)), case.batch(), case.layer())
    rows = slice(1 + 70 - 33, 1 + 70)

    def alone(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x[rows], np.full_like(x[rows.stop - rows.start :], np.nan)])

    later = dataclasses.replace(
        case,
        q=alone(case.q),
        k=alone(case.k),
        v=alone(case.v),
        kv_pages=np.asarray(pool),
        page_table=case.page_table[[1, 0, 2, 3]],
        lengths=(Length(cached=270 - 33, new=33),),
    )
    np.testing.assert_array_equal(prefill(later, PLAIN)[:33], together[rows])


@pytest.mark.parametrize("lengths", [RAGGED, (), (Length(cached=5, new=1),), (Length(cached=0, new=160),)])
def test_the_schedule_has_every_chunk_once_longest_first(lengths: Sequence[Length]) -> None:
    case = build(NARROW, lengths)
    batch = case.batch()
    schedule = prefill_schedule(batch, 32)
    tiles = np.asarray(schedule.tiles)[: int(schedule.num_tiles)]
    found = [(int(s), int(r) + i, int(p) + i) for s, r, p, n, _ in tiles for i in range(int(n))]
    rows = [
        (s, row, length.cached + row - span.start)
        for s, (span, length) in enumerate(zip(case.rows(), lengths, strict=True))
        if s >= int(batch.num_decodes)
        for row in range(span.start, span.stop)
    ]
    assert sorted(found) == rows
    assert all(end == lengths[s].context for s, _, _, _, end in tiles)
    assert np.all(np.diff(tiles[:, 2] + tiles[:, 3]) <= 0)


@on_gpu
@pytest.mark.parametrize("window", [None, 300], ids=["all", "window"])
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(8, 4, 128), (3, 3, 64), (1, 16, 256), (2, 8, 96)])
@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_on_a_device(kv_heads: int, group: int, head_dim: int, page_size: int, window: int | None) -> None:
    shape = Shape(
        max_seqs=8,
        max_tokens=1024,
        num_kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        page_size=page_size,
        pages_per_seq=2048 // page_size,
    )
    config = AttentionConfig(scale=0.05, sliding_window=window, soft_cap=30.0)
    lengths = (
        Length(cached=100, new=1),
        Length(cached=0, new=300),
        Length(cached=1500, new=513),
        Length(cached=64, new=64),
        Length(cached=0, new=7),
        Length(cached=2047, new=1),
    )
    check(build(shape, lengths, dtype="bfloat16", kv_dtype="bfloat16", sinks=True), config)


@pytest.mark.parametrize("page_size", [8, 16, 64, 192, 256])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8, 12, 16, 64])
@pytest.mark.parametrize("kv_itemsize", [1, 2])
def test_tiles_fit_and_cover_the_heads(page_size: int, head_dim: int, group: int, kv_itemsize: int) -> None:
    shape = PrefillShape(
        num_kv_heads=2, group=group, head_dim=head_dim, page_size=page_size, itemsize=2, kv_itemsize=kv_itemsize
    )
    tiles = prefill_tiles(shape)
    tiles.check(shape)
    # With one stage, loading would not overlap with computing.
    assert max(tiles.stages, tiles.narrow_entries // 2) >= 2
    assert tiles.smem_bytes(shape) <= SMEM_BYTES
    assert shape.item_heads * shape.item_tokens == WARPGROUPS * ROWS
    assert shape.items_per_tile * shape.item_heads == 2 * group
    assert shape.own_tokens % 8 == 0
    with pytest.raises(NotImplementedError, match="shared memory"):
        dataclasses.replace(tiles, stages=40 * tiles.stages).check(shape)
    with pytest.raises(NotImplementedError, match="registers"):
        dataclasses.replace(tiles, stages=0, narrow_entries=0, block_tokens=512).check(shape)
