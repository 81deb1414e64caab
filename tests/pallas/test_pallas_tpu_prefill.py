"""The TPU prefill kernel: in Mosaic's interpreter with its race detector on, and compiled for TPUs that are not here.

Pools are NaN wherever no sequence's tokens are, and so is memory that the kernel has not written. Cases cover each
feature, dtype and head dim once; several of them in one case where they do not hide each other.
"""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from kernel_interpreters import races_fail
from paged_attention_cases import Case, Length, Shape, build, oracle, tolerance

from jaxserve.core.errors import ConfigError
from jaxserve.pallas.paged_attention.cache import encode
from jaxserve.pallas.paged_attention.inputs import AttentionConfig
from jaxserve.pallas.paged_attention.tpu.prefill import prefill
from jaxserve.pallas.paged_attention.tpu.prefill_tiles import Core, PrefillTiles, Sizes, choose_tiles
from jaxserve.sharding.topology import environment, parse_topology, require_compiler

PLAIN = AttentionConfig(scale=0.2, sliding_window=None, soft_cap=None)
WINDOW = AttentionConfig(scale=0.2, sliding_window=21, soft_cap=None)
ALL = AttentionConfig(scale=0.3, sliding_window=7, soft_cap=2.0)

GQA3 = Shape(max_seqs=5, max_tokens=24, num_kv_heads=3, group=3, head_dim=64, page_size=16, pages_per_seq=8)
WORDS = Shape(max_seqs=4, max_tokens=80, num_kv_heads=4, group=2, head_dim=128, page_size=64, pages_per_seq=5)

MIXED = (Length(cached=9, new=1), Length(cached=13, new=7), Length(cached=0, new=6), Length(cached=0, new=1))

UNTOUCHED = 7.0


def tiles(shape: Shape, **changes: int | bool) -> PrefillTiles:
    """Small tiles, so that few tokens make several of each."""
    small = {"query_tokens": 16, "block_tokens": 16, "pages": 128 // shape.page_size, "unroll": 2}
    return PrefillTiles(**{**small, "sum_by_matmul": shape.head_dim <= 128, **changes})  # type: ignore[arg-type]  # flags and sizes in one mapping


@functools.cache
def compiled(config: AttentionConfig, cut: PrefillTiles | None) -> Callable[..., tuple[jax.Array, jax.Array]]:
    return jax.jit(functools.partial(prefill, config=config, tiles=cut))


def run(case: Case, config: AttentionConfig, cut: PrefillTiles | None) -> tuple[np.ndarray, np.ndarray]:
    batch, layer, dtype = case.batch(), case.layer(), jnp.dtype(case.kv_pages.dtype)
    k, v = (encode(jnp.asarray(x), s, dtype) for x, s in ((case.k, layer.k_scale), (case.v, layer.v_scale)))
    new = jnp.stack([k, v], axis=2).reshape(k.shape[0], -1, k.shape[2])
    out = jnp.full(case.q.shape, UNTOUCHED, case.q.dtype)
    interpreter = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    with pltpu.force_tpu_interpret_mode(interpreter), races_fail():
        results = compiled(config, cut)(jnp.asarray(case.q), new, jnp.asarray(case.kv_pages), out, batch, layer)
        out, pages = (np.asarray(x) for x in results)
    # Where every chunk's keys and values belong, in the pool's format; nothing else may have changed.
    expected = case.kv_pages.copy()
    for s in range(int(batch.num_decodes), len(case.lengths)):
        places = case.places(s, range(case.lengths[s].cached, case.lengths[s].context))
        expected[places] = np.asarray(new)[case.rows()[s]]
    assert pages.tobytes() == expected.tobytes()
    return out, pages


def check(case: Case, config: AttentionConfig, cut: PrefillTiles | None) -> None:
    out, pages = run(case, config, cut)
    first = int(case.batch().query_starts[case.batch().num_decodes])
    chunks = slice(first, case.num_tokens)
    expected = oracle(case, pages, config)
    np.testing.assert_allclose(out[chunks].astype(np.float64), expected[chunks], rtol=0, atol=tolerance(case))
    assert np.all(out[:first] == UNTOUCHED)
    assert np.all(out[case.num_tokens :] == UNTOUCHED)


@pytest.mark.parametrize(
    ("heads", "head_dim", "page_size"),
    [((2, 1), 64, 32), ((1, 5), 80, 16), ((2, 2), 96, 64), ((1, 64), 128, 128), ((2, 3), 256, 256)],
    ids=str,
)
def test_head_dims_groups_and_pages(heads: tuple[int, int], head_dim: int, page_size: int) -> None:
    shape = Shape(
        max_seqs=3,
        max_tokens=32,
        num_kv_heads=heads[0],
        group=heads[1],
        head_dim=head_dim,
        page_size=page_size,
        pages_per_seq=2,
    )
    cut = tiles(shape, pages=max(1, 128 // page_size))
    check(build(shape, (Length(cached=19, new=11), Length(cached=0, new=5))), PLAIN, cut)


@pytest.mark.parametrize(
    ("config", "sum_by_matmul"), [(PLAIN, False), (WINDOW, True), (ALL, False)], ids=["plain", "window", "all"]
)
def test_features(config: AttentionConfig, sum_by_matmul: bool) -> None:
    case = build(GQA3, MIXED, sinks=config is not PLAIN, seed=1)
    check(case, config, tiles(GQA3, sum_by_matmul=sum_by_matmul))


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [
        ("float32", "bfloat16"),
        ("float32", "int8"),
        pytest.param("bfloat16", "float32", marks=pytest.mark.slow),
        pytest.param("bfloat16", "float8_e4m3fn", marks=pytest.mark.slow),
        pytest.param("bfloat16", "float8_e5m2", marks=pytest.mark.slow),
    ],
)
def test_dtypes(dtype: str, kv_dtype: str) -> None:
    case = build(GQA3, MIXED, dtype=dtype, kv_dtype=kv_dtype, scales=True, sinks=True, seed=2)
    check(case, ALL, tiles(GQA3))


@pytest.mark.parametrize(
    ("kv_dtype", "window"), [("bfloat16", 100), pytest.param("int8", None, marks=pytest.mark.slow)]
)
def test_keys_and_values_unpacked_as_words(kv_dtype: str, window: int | None) -> None:
    """Several KV tiles, chunks longer than a query tile, tiles seen in full, in part and not at all."""
    config = AttentionConfig(scale=0.09, sliding_window=window, soft_cap=None)
    lengths = (Length(cached=190, new=20), Length(cached=0, new=17))
    case = build(WORDS, lengths, dtype="bfloat16", kv_dtype=kv_dtype, scales=kv_dtype == "int8", seed=3)
    check(case, config, tiles(WORDS))


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 150])
def test_borders_are_crossed_in_narrower_tiles(window: int | None) -> None:
    config = AttentionConfig(scale=0.09, sliding_window=window, soft_cap=None)
    lengths = (Length(cached=150, new=33), Length(cached=0, new=5))
    case = build(WORDS, lengths, dtype="bfloat16", kv_dtype="bfloat16", seed=6)
    check(case, config, tiles(WORDS, query_tokens=48, pages=4, narrow_tokens=128))


@pytest.mark.parametrize(
    "lengths",
    [
        (),
        (Length(cached=5, new=1), Length(cached=0, new=1)),
        (Length(cached=5, new=0), Length(cached=0, new=9), Length(cached=31, new=0), Length(cached=15, new=2)),
        (Length(cached=16, new=16),),
        (Length(cached=104, new=24),),
    ],
    ids=["empty", "decodes", "empty_chunks", "whole_page", "full_context"],
)
def test_edges(lengths: Sequence[Length]) -> None:
    check(build(GQA3, lengths, seed=4), PLAIN, tiles(GQA3))


def test_chosen_tiles_run() -> None:
    check(build(GQA3, MIXED, dtype="bfloat16", kv_dtype="bfloat16", seed=5), PLAIN, None)


def assert_too_small(sizes: Sizes, core: Core) -> None:
    """The smallest tiles alone need more VMEM than a kernel may take."""
    smallest = PrefillTiles(
        query_tokens=16,
        block_tokens=16,
        pages=math.lcm(sizes.page_size, 128) // sizes.page_size,
        unroll=4,
        sum_by_matmul=core.wide_matmul and sizes.head_dim <= 128,
        packed_rows=16 if core.wide_matmul else 8,
    )
    assert sizes.cut(smallest).vmem_bytes > core.usable_vmem_bytes


@pytest.mark.parametrize("vmem_mib", [16, 64, 128])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(32, 8), (8, 1), (64, 1), (9, 3), (16, 16)])
def test_chosen_tiles_fit(num_heads: int, num_kv_heads: int, vmem_mib: int) -> None:
    for head_dim, page_size, window in ((64, 16, None), (80, 48, 100), (128, 128, 1024), (256, 256, None)):
        for dtype, kv_dtype, wide in ((jnp.bfloat16, jnp.int8, True), (jnp.bfloat16, jnp.bfloat16, False)):
            sizes = Sizes(
                page_size=page_size,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                query_dtype=jnp.dtype(dtype),
                kv_dtype=jnp.dtype(kv_dtype),
                max_tokens=2048,
                max_context=4096,
                sliding_window=window,
            )
            core = Core(wide_matmul=wide, vmem_bytes=vmem_mib << 20)
            try:
                chosen = choose_tiles(sizes, core)
            except NotImplementedError:
                assert_too_small(sizes, core)
                continue
            cut = sizes.cut(chosen)
            assert cut.vmem_bytes <= core.usable_vmem_bytes
            assert cut.tile_tokens % 128 == 0
            assert chosen.query_tokens % chosen.block_tokens == 0
            assert chosen.block_tokens % 16 == 0
            assert chosen.unroll % 2 == 0


COMPILE = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxserve.pallas.paged_attention.inputs import AttentionConfig, AttentionLayer, RaggedBatch
from jaxserve.pallas.paged_attention.tpu.prefill import prefill

topology = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1])
mesh = Mesh(np.array(topology.devices[:1]), ("x",))
jax.set_mesh(mesh)

def spec(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

for heads, kv_heads, head_dim, page, dtype, kv_dtype, window, cap in eval(sys.argv[2]):
    number, scalar = spec((), jnp.int32), spec((), jnp.float32)
    batch = RaggedBatch(
        page_table=spec((8, 32), jnp.int32), context_lens=spec((8,), jnp.int32), query_starts=spec((9,), jnp.int32),
        num_seqs=number, num_decodes=number, positions=spec((512,), jnp.int32), token_seq=spec((512,), jnp.int32))
    sinks = spec((heads,), jnp.float32) if window else None
    layer = AttentionLayer(page_offset=number, sinks=sinks, k_scale=scalar, v_scale=scalar)
    config = AttentionConfig(scale=0.1, sliding_window=window, soft_cap=cap)
    q, pool = spec((512, heads, head_dim), dtype), spec((512, page, 2 * kv_heads, head_dim), kv_dtype)
    run = lambda q, new, pool, out, batch, layer: prefill(q, new, pool, out, batch, layer, config=config)
    lowered = jax.jit(run, donate_argnums=(2, 3)).lower(
        q, spec((512, 2 * kv_heads, head_dim), kv_dtype), pool, q, batch, layer)
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= pool.size * pool.dtype.itemsize, memory
    assert memory.temp_size_in_bytes < 1 << 20, memory
"""


@pytest.mark.parametrize(
    "name",
    [pytest.param("v5e:2x2", marks=pytest.mark.slow), "v6e:2x4", pytest.param("tpu7x:2x2x1", marks=pytest.mark.slow)],
)
def test_compiles_deviceless_and_in_place(name: str) -> None:
    topology = parse_topology(name)
    try:
        require_compiler(topology)
    except ConfigError as error:
        pytest.skip(str(error))
    problems = [
        (32, 8, 128, 128, "bfloat16", "bfloat16", None, None),
        (9, 3, 64, 16, "bfloat16", "int8", 100, 30.0),
        (64, 1, 128, 16, "float32", "float32", None, None),
    ]
    subprocess.run(
        [sys.executable, "-c", COMPILE, name, repr(problems)],
        env=os.environ | environment(topology),
        check=True,
        timeout=300,
    )
