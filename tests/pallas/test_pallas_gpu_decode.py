"""The Hopper decode kernel: in Mosaic GPU's interpreter, compiled for an H100 that is not here, and on a GPU.

The interpreter has a race detector on, and takes 0 for nothing: pools are NaN wherever no sequence's visible tokens
are. It runs what `DecodeTiles.interpretable` selects, which differs from the device's program in two wgmma operands.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from kernel_interpreters import GPU_INTERPRETER, Runner
from paged_attention_cases import Case, Length, Shape, build, oracle, tolerance

from jaxserve.core.errors import ConfigError
from jaxserve.pallas.dispatch import Backend
from jaxserve.pallas.paged_attention.cache import write_pages
from jaxserve.pallas.paged_attention.gpu.agenda import Splits, decode_splits
from jaxserve.pallas.paged_attention.gpu.decode import attend_decodes, decode_shape
from jaxserve.pallas.paged_attention.gpu.tiles import SMEM_BYTES, DecodeShape, decode_tiles
from jaxserve.pallas.paged_attention.inputs import AttentionConfig
from jaxserve.sharding.topology import environment, parse_topology, require_compiler

PLAIN = AttentionConfig(scale=0.1, sliding_window=None, soft_cap=None)

runs = pytest.mark.skipif(
    jax.default_backend() != "gpu" and GPU_INTERPRETER is None, reason="no GPU, and this JAX has no interpreter"
)
on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU")


def decode(case: Case, config: AttentionConfig, split_tokens: int) -> np.ndarray:
    runner = Runner(Backend.GPU)
    batch, layer = case.batch(), case.layer()
    q, k, v, pool = (jnp.asarray(x) for x in (case.q, case.k, case.v, case.kv_pages))
    pool = write_pages(k, v, pool, batch, layer)
    tiles = dataclasses.replace(decode_tiles(decode_shape(q, pool, batch)), split_tokens=split_tokens)
    if runner.is_interpreted:
        # One thread block, and short rings, so that they come round.
        tiles = dataclasses.replace(tiles, num_blocks=1, entries=min(tiles.entries, 4), interpretable=True)
    with runner.traced():
        run = jax.jit(lambda q, pool: attend_decodes(q, pool, batch, layer, config, tiles))
        return np.asarray(run(q, pool))


def check(case: Case, config: AttentionConfig, split_tokens: int) -> None:
    out = decode(case, config, split_tokens)
    rows = int(case.batch().num_decodes)
    pool = np.asarray(
        write_pages(*(jnp.asarray(x) for x in (case.k, case.v, case.kv_pages)), case.batch(), case.layer())
    )
    expected = oracle(case, pool, config)[: out.shape[0]]
    np.testing.assert_allclose(out[:rows].astype(np.float64), expected[:rows], rtol=0, atol=tolerance(case))
    assert not out[rows:].any()


def lengths(*contexts: int) -> list[Length]:
    return [Length(cached=context - 1, new=1) for context in contexts]


NARROW = Shape(max_seqs=4, max_tokens=8, num_kv_heads=2, group=3, head_dim=64, page_size=16, pages_per_seq=12)


@runs
def test_contexts_of_all_lengths_in_one_batch() -> None:
    check(build(NARROW, lengths(1, 64, 101, 192), dtype="bfloat16", kv_dtype="bfloat16"), PLAIN, 64)


@runs
def test_decodes_beside_chunks_with_window_cap_and_sinks() -> None:
    config = AttentionConfig(scale=0.1, sliding_window=70, soft_cap=2.0)
    mixed = [*lengths(101, 65), Length(cached=3, new=4)]
    check(build(NARROW, mixed, dtype="bfloat16", kv_dtype="bfloat16", sinks=True), config, 64)


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
    check(build(shape, lengths(*contexts), dtype=dtype, kv_dtype=dtype), PLAIN, 64)


@runs
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"), [("bfloat16", "float8_e4m3fn"), ("float16", "float8_e5m2"), ("bfloat16", "int8")]
)
def test_narrow_pools_with_scales(dtype: str, kv_dtype: str) -> None:
    check(build(NARROW, lengths(75), dtype=dtype, kv_dtype=kv_dtype, scales=True), PLAIN, 64)


@runs
def test_a_result_does_not_depend_on_the_batch() -> None:
    case = build(NARROW, lengths(150, 7, 77), dtype="bfloat16", kv_dtype="bfloat16")
    together = decode(case, PLAIN, 64)
    alone = dataclasses.replace(
        case,
        q=np.concatenate([case.q[2:3], case.q[:7]]),
        k=np.concatenate([case.k[2:3], case.k[:7]]),
        v=np.concatenate([case.v[2:3], case.v[:7]]),
        page_table=case.page_table[[2, 0, 1, 3]],
        lengths=case.lengths[2:],
    )
    np.testing.assert_array_equal(decode(alone, PLAIN, 64)[0], together[2])


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
    check(build(shape, lengths(*contexts), dtype="bfloat16", kv_dtype="bfloat16", sinks=True), config, 512)


COMPILE = """
import sys
import jax, jax.numpy as jnp
from jaxserve.pallas.paged_attention.gpu.decode import attend_decodes
from jaxserve.pallas.paged_attention.inputs import AttentionConfig
from jaxserve.pallas.paged_attention.shapes import AttentionShape
from jaxserve.sharding.mesh import make_mesh
from jaxserve.sharding.rules import replicated
from jaxserve.sharding.topology import abstract_devices, parse_topology
import numpy as np
sharding = replicated(make_mesh(devices=abstract_devices(parse_topology("h100:1"))))
for heads, kv_heads, head_dim, page_size, window, cap, kv_dtype in eval(sys.argv[1]):
    shape = AttentionShape(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, page_size=page_size, num_seqs=8,
                           context=4096, query_tokens=1, kv_dtype=kv_dtype)
    config = AttentionConfig(scale=0.1, sliding_window=window, soft_cap=cap)
    arrays = shape.abstract_arrays()
    given = (arrays["q"], arrays["kv_pages"], shape.batch(np.random.default_rng(0)), shape.layer())
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), given)
    jax.jit(lambda q, pool, batch, layer: attend_decodes(q, pool, batch, layer, config)).lower(*given).compile()
"""


def test_compiles_for_a_chip_that_is_not_here_without_spills(tmp_path: Path) -> None:
    topology = parse_topology("h100:1")
    try:
        require_compiler(topology)
    except ConfigError as error:
        pytest.skip(str(error))
    problems = [
        (32, 8, 128, 64, None, None, "bfloat16"),
        (8, 1, 128, 16, 1000, 30.0, "int8"),
        (24, 8, 64, 128, None, None, "float8_e4m3fn"),
        (16, 8, 256, 128, None, None, "bfloat16"),
    ]
    subprocess.run(
        [sys.executable, "-c", COMPILE, repr(problems)],
        env=os.environ | environment(topology) | {"MOSAIC_GPU_DUMP_TO": str(tmp_path)},
        check=True,
        timeout=300,
    )
    reports = [path.read_text() for path in tmp_path.glob("*.ptxas")]
    assert len(reports) == 2 * len(problems)
    for report in reports:
        spilled = [
            int(line.split(" bytes spill stores")[0].split()[-1])
            for line in report.splitlines()
            if "spill stores" in line
        ]
        assert not any(spilled), report


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


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "shape", "reason"),
    [
        ("float32", "float32", NARROW, "q must be"),
        ("bfloat16", "float32", NARROW, "pages float32"),
        ("bfloat16", "int8", dataclasses.replace(NARROW, head_dim=80), "head dim 80 of int8"),
        ("bfloat16", "bfloat16", dataclasses.replace(NARROW, page_size=4), "pages of 4"),
        ("bfloat16", "bfloat16", dataclasses.replace(NARROW, head_dim=72), "head dim 72"),
        ("bfloat16", "bfloat16", dataclasses.replace(NARROW, group=65), "65 query heads"),
    ],
)
def test_what_it_cannot_do(dtype: str, kv_dtype: str, shape: Shape, reason: str) -> None:
    rows = (shape.max_tokens, shape.num_kv_heads * shape.group, shape.head_dim)
    q = jnp.zeros(rows, jnp.dtype(dtype))
    pool = jnp.zeros(
        (3, shape.page_size, 2 * shape.num_kv_heads, shape.head_dim), getattr(ml_dtypes, kv_dtype, kv_dtype)
    )
    batch = build(NARROW, ()).batch()
    with pytest.raises(NotImplementedError, match=reason):
        decode_shape(q, pool, batch)
