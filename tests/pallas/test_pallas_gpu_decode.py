"""The Hopper decode kernel: in Mosaic GPU's interpreter, and on a GPU.

The interpreter has a race detector on, and takes 0 for nothing: pools are NaN wherever no sequence's visible tokens
are. It runs what `DecodeTiles.interpretable` selects, which differs from the device's program in two wgmma operands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_interpreters import GPU_INTERPRETER, Runner
from paged_attention_cases import Case, Length, Shape, build, oracle, tolerance

from jaxserve.pallas.dispatch import Backend
from jaxserve.pallas.paged_attention.cache import write_pages
from jaxserve.pallas.paged_attention.gpu.agenda import Splits, decode_splits
from jaxserve.pallas.paged_attention.gpu.decode import attend_decodes
from jaxserve.pallas.paged_attention.gpu.tiles import SMEM_BYTES, DecodeShape, decode_tiles
from jaxserve.pallas.paged_attention.inputs import AttentionConfig

PLAIN = AttentionConfig(scale=0.1, sliding_window=None, soft_cap=None)

runs = pytest.mark.skipif(
    jax.default_backend() != "gpu" and GPU_INTERPRETER is None, reason="no GPU, and this JAX has no interpreter"
)
on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")


def decode(case: Case, config: AttentionConfig) -> np.ndarray:
    batch, layer = case.batch(), case.layer()
    q, k, v, pool = (jnp.asarray(x) for x in (case.q, case.k, case.v, case.kv_pages))
    pool = write_pages(k, v, pool, batch, layer)
    with Runner(Backend.GPU).traced():
        return np.asarray(jax.jit(lambda q, pool: attend_decodes(q, pool, batch, layer, config))(q, pool))


def check(case: Case, config: AttentionConfig) -> np.ndarray:
    out = decode(case, config)
    rows = int(case.batch().num_decodes)
    pool = np.asarray(
        write_pages(*(jnp.asarray(x) for x in (case.k, case.v, case.kv_pages)), case.batch(), case.layer())
    )
    expected = oracle(case, pool, config)[: out.shape[0]]
    np.testing.assert_allclose(out[:rows].astype(np.float64), expected[:rows], rtol=0, atol=tolerance(case))
    assert not out[rows:].any()
    return out


def lengths(*contexts: int) -> list[Length]:
    return [Length(cached=context - 1, new=1) for context in contexts]


NARROW = Shape(max_seqs=4, max_tokens=8, num_kv_heads=2, group=3, head_dim=64, page_size=16, pages_per_seq=12)


@pytest.mark.slow
@runs
def test_decodes_beside_chunks_with_window_cap_and_sinks() -> None:
    config = AttentionConfig(scale=0.1, sliding_window=70, soft_cap=2.0)
    mixed = [*lengths(101, 65), Length(cached=3, new=4)]
    check(build(NARROW, mixed, dtype="bfloat16", kv_dtype="bfloat16", sinks=True), config)


@pytest.mark.slow
@runs
@pytest.mark.parametrize(
    ("shape", "contexts", "dtype"),
    [
        (
            Shape(max_seqs=2, max_tokens=2, num_kv_heads=1, group=64, head_dim=128, page_size=8, pages_per_seq=20),
            (100,),
            "bfloat16",
        ),
        (
            Shape(max_seqs=1, max_tokens=1, num_kv_heads=2, group=1, head_dim=256, page_size=128, pages_per_seq=2),
            (201,),
            "float16",
        ),
        (
            Shape(max_seqs=2, max_tokens=2, num_kv_heads=1, group=9, head_dim=80, page_size=64, pages_per_seq=2),
            (66,),
            "bfloat16",
        ),
    ],
    ids=["mqa64", "wide_heads", "heads_of_80"],
)
def test_shapes(shape: Shape, contexts: Sequence[int], dtype: str) -> None:
    check(build(shape, lengths(*contexts), dtype=dtype, kv_dtype=dtype), PLAIN)


@pytest.mark.slow
@runs
@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "head_dim"),
    [
        ("bfloat16", "float8_e4m3fn", 64),
        ("float16", "float8_e5m2", 64),
        ("bfloat16", "int8", 80),
    ],
)
def test_narrow_pools_with_scales(dtype: str, kv_dtype: str, head_dim: int) -> None:
    shape = dataclasses.replace(NARROW, max_seqs=1, max_tokens=1, num_kv_heads=1, head_dim=head_dim)
    check(build(shape, lengths(75), dtype=dtype, kv_dtype=kv_dtype, scales=True), PLAIN)


@runs
def test_contexts_of_all_lengths_and_a_result_does_not_depend_on_the_batch() -> None:
    case = build(NARROW, lengths(1, 64, 101, 192), dtype="bfloat16", kv_dtype="bfloat16")
    together = check(case, PLAIN)
    alone = dataclasses.replace(
        case,
        q=np.concatenate([case.q[2:3], case.q[:7]]),
        k=np.concatenate([case.k[2:3], case.k[:7]]),
        v=np.concatenate([case.v[2:3], case.v[:7]]),
        page_table=case.page_table[[2, 0, 1, 3]],
        lengths=case.lengths[2:3],
    )
    np.testing.assert_array_equal(decode(alone, PLAIN)[0], together[2])


@on_gpu
@pytest.mark.parametrize("window", [None, 300], ids=["all", "window"])
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(8, 4, 128), (3, 3, 64), (1, 16, 256), (2, 8, 96)])
@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_on_a_device(kv_heads: int, group: int, head_dim: int, page_size: int, window: int | None) -> None:
    shape = Shape(
        max_seqs=16,
        max_tokens=16,
        num_kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        page_size=page_size,
        pages_per_seq=2048 // page_size,
    )
    config = AttentionConfig(scale=0.05, sliding_window=window, soft_cap=30.0)
    contexts = [1, 2, 63, 64, 65, 511, 512, 513, 1024, 1500, 2047, 2048]
    check(build(shape, lengths(*contexts), dtype="bfloat16", kv_dtype="bfloat16", sinks=True), config)


@pytest.mark.parametrize(
    ("head_dim", "kv_itemsize"), [(64, 2), (80, 2), (96, 2), (128, 2), (128, 1), (256, 2), (256, 1)]
)
@pytest.mark.parametrize(("kv_heads", "group"), [(8, 1), (8, 4), (1, 8), (2, 16), (1, 64)])
@pytest.mark.parametrize("pages_per_seq", [1, 64, 2048])
def test_tiles_fit_and_do_not_depend_on_the_batch(
    head_dim: int, kv_itemsize: int, kv_heads: int, group: int, pages_per_seq: int
) -> None:
    splits = set()
    for num_seqs in (1, 8, 256):
        shape = DecodeShape(
            num_seqs=num_seqs,
            num_kv_heads=kv_heads,
            group=group,
            head_dim=head_dim,
            page_size=64,
            pages_per_seq=pages_per_seq,
            itemsize=2,
            kv_itemsize=kv_itemsize,
        )
        tiles = decode_tiles(shape)
        tiles.check(shape)
        # Less than two blocks of keys and values, and loading would not overlap with computing.
        assert tiles.entries >= 4
        assert tiles.smem_bytes(shape) <= SMEM_BYTES
        splits.add(tiles.split_tokens)
        with pytest.raises(NotImplementedError, match="shared memory"):
            dataclasses.replace(tiles, entries=40).check(shape)
    assert len(splits) == 1


@pytest.mark.parametrize("window", [None, 1, 100, 5000])
def test_splits_cover_what_is_visible(window: int | None) -> None:
    splits = decode_splits(256, window, 4096)
    for context in (1, 255, 256, 257, 3000, 4096):
        first = 0 if window is None else max(0, context - window)
        assert int(splits.first_position(jnp.int32(context))) == first
        wanted = len({position // 256 for position in range(first, context)})
        assert int(splits.count(jnp.int32(context))) == wanted
        assert wanted <= splits.most


def test_a_window_bounds_the_splits() -> None:
    assert decode_splits(256, 300, 1 << 20) == Splits(tokens=256, window=300, most=3)
