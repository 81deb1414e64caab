"""The TPU decode kernel: in Mosaic's interpreter with its race detector on, and compiled for TPUs that are not here.

Pools are NaN wherever no sequence's tokens are, and so is memory that the kernel has not written. Tiles are small, so
that few tokens make several items of a sequence and several sequences of an iteration.
"""

from __future__ import annotations

import functools
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
from paged_attention_cases import Case, Length, Shape, build, exact

from jaxserve.core.errors import ConfigError
from jaxserve.pallas.paged_attention.cache import encode
from jaxserve.pallas.paged_attention.inputs import AttentionConfig
from jaxserve.pallas.paged_attention.tpu.decode import decode
from jaxserve.pallas.paged_attention.tpu.decode_tiles import (
    DecodeTiles,
    choose_decode_tiles,
    cut_decode,
    is_supported,
)
from jaxserve.pallas.paged_attention.tpu.prefill_tiles import Core, Sizes
from jaxserve.sharding.topology import environment, parse_topology, require_compiler

PLAIN = AttentionConfig(scale=0.2, sliding_window=None, soft_cap=None)
WINDOW = AttentionConfig(scale=0.2, sliding_window=41, soft_cap=None)
ALL = AttentionConfig(scale=0.3, sliding_window=150, soft_cap=2.0)

GQA3 = Shape(max_seqs=5, max_tokens=9, num_kv_heads=2, group=3, head_dim=128, page_size=16, pages_per_seq=20)

# Several items, a new page, a first token, the end of a page and of an item; a chunk that is left alone.
MIXED = (
    Length(cached=200, new=1),
    Length(cached=32, new=1),
    Length(cached=0, new=1),
    Length(cached=127, new=1),
    Length(cached=3, new=4),
)

UNTOUCHED = 7.0


@functools.cache
def compiled(config: AttentionConfig, cut: DecodeTiles | None) -> Callable[..., tuple[jax.Array, jax.Array]]:
    return jax.jit(functools.partial(decode, config=config, tiles=cut))


def run(case: Case, config: AttentionConfig, cut: DecodeTiles | None) -> tuple[np.ndarray, np.ndarray]:
    batch, layer, dtype = case.batch(), case.layer(), jnp.dtype(case.kv_pages.dtype)
    k, v = (encode(jnp.asarray(x), s, dtype) for x, s in ((case.k, layer.k_scale), (case.v, layer.v_scale)))
    new = jnp.stack([k, v], axis=2).reshape(k.shape[0], -1, k.shape[2])
    out = jnp.full(case.q.shape, UNTOUCHED, case.q.dtype)
    interpreter = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    with pltpu.force_tpu_interpret_mode(interpreter), races_fail():
        results = compiled(config, cut)(jnp.asarray(case.q), new, jnp.asarray(case.kv_pages), out, batch, layer)
        out, pages = (np.asarray(x) for x in results)
    # Where every decode's key and value belong, in the pool's format; nothing else may have changed.
    expected = case.kv_pages.copy()
    for s in range(int(batch.num_decodes)):
        expected[case.places(s, [case.lengths[s].cached])] = np.asarray(new)[case.rows()[s]]
    assert pages.tobytes() == expected.tobytes()
    return out, pages


def check(case: Case, config: AttentionConfig, cut: DecodeTiles | None) -> None:
    out, pages = run(case, config, cut)
    pages = pages.copy()
    for s in range(int(case.batch().num_decodes), len(case.lengths)):
        pages[case.places(s, range(case.lengths[s].cached, case.lengths[s].context))] = 0
    wanted = exact(case, pages, config)
    rows = slice(0, int(case.batch().num_decodes))
    off = np.abs(out[rows].astype(np.float64) - wanted.out[rows])
    assert np.all(off <= wanted.bound[rows]), f"off by up to {np.max(off / wanted.bound[rows]):.2f} of what is allowed"
    assert np.all(out[rows.stop :] == UNTOUCHED)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("dtype", "config"),
    [
        pytest.param("bfloat16", PLAIN, id="bfloat16-plain", marks=SLOW),
        pytest.param("bfloat16", WINDOW, id="bfloat16-window"),
        pytest.param("float32", ALL, id="float32-all"),
        pytest.param("float32", PLAIN, id="float32-plain", marks=SLOW),
        pytest.param("float32", WINDOW, id="float32-window", marks=SLOW),
        pytest.param("bfloat16", ALL, id="bfloat16-all", marks=SLOW),
    ],
)
def test_features(config: AttentionConfig, dtype: str) -> None:
    case = build(GQA3, MIXED, dtype=dtype, kv_dtype=dtype, sinks=config is ALL, seed=1)
    check(case, config, DecodeTiles(pages=8, items=2))


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [
        ("float32", "bfloat16"),
        pytest.param("bfloat16", "int8", marks=SLOW),
        pytest.param("bfloat16", "float32", marks=SLOW),
        pytest.param("bfloat16", "float8_e4m3fn", marks=SLOW),
        pytest.param("bfloat16", "float8_e5m2", marks=SLOW),
        pytest.param("float32", "int8", marks=SLOW),
    ],
)
def test_dtypes(dtype: str, kv_dtype: str) -> None:
    case = build(GQA3, MIXED, dtype=dtype, kv_dtype=kv_dtype, scales=True, sinks=True, seed=2)
    check(case, ALL, DecodeTiles(pages=8, items=2))


@pytest.mark.parametrize(
    ("heads", "page_size", "pages"),
    [((1, 8), 16, 8), ((1, 1), 64, 4), ((4, 2), 32, 2), ((8, 4), 64, 1), ((16, 1), 16, 1)],
    ids=str,
)
def test_heads_and_pages(heads: tuple[int, int], page_size: int, pages: int) -> None:
    shape = Shape(
        max_seqs=4,
        max_tokens=4,
        num_kv_heads=heads[0],
        group=heads[1],
        head_dim=128,
        page_size=page_size,
        pages_per_seq=320 // page_size,
    )
    lengths = tuple(Length(cached=cached, new=1) for cached in (150, 5, 79, 64))
    case = build(shape, lengths, dtype="bfloat16", kv_dtype="bfloat16", seed=3)
    check(case, PLAIN, DecodeTiles(pages=pages, items=3))


@pytest.mark.parametrize(
    "lengths",
    [
        (),
        (Length(cached=9, new=5),),
        (Length(cached=319, new=1),),
        (Length(cached=0, new=1), Length(cached=0, new=0)),
        tuple(Length(cached=20 * i, new=1) for i in range(5)),
    ],
    ids=["empty", "a chunk", "full context", "first token", "all rows"],
)
def test_edges(lengths: Sequence[Length]) -> None:
    check(build(GQA3, lengths, dtype="bfloat16", kv_dtype="bfloat16", seed=4), PLAIN, DecodeTiles(pages=8, items=2))


def test_more_sequences_than_rows_of_the_table_in_smem() -> None:
    shape = Shape(max_seqs=20, max_tokens=20, num_kv_heads=1, group=2, head_dim=128, page_size=16, pages_per_seq=9)
    lengths = tuple(Length(cached=(37 * i) % 140, new=1) for i in range(20))
    case = build(shape, lengths, dtype="bfloat16", kv_dtype="bfloat16", seed=5)
    assert cut_decode(sizes_of(shape), DecodeTiles(pages=8, items=3)).table_rows < 20
    check(case, PLAIN, DecodeTiles(pages=8, items=3))


def test_chosen_tiles_run() -> None:
    check(build(GQA3, MIXED, dtype="bfloat16", kv_dtype="bfloat16", seed=6), PLAIN, None)


def sizes_of(shape: Shape, **changes: object) -> Sizes:
    facts: dict[str, object] = {
        "page_size": shape.page_size,
        "num_heads": shape.num_kv_heads * shape.group,
        "num_kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "query_dtype": jnp.dtype(jnp.bfloat16),
        "kv_dtype": jnp.dtype(jnp.bfloat16),
        "max_tokens": shape.max_seqs,
        "max_context": shape.max_context,
        "sliding_window": None,
    }
    return Sizes(**{**facts, **changes})  # type: ignore[arg-type]  # sizes and dtypes in one mapping


def assert_too_small(sizes: Sizes, core: Core) -> None:
    """The smallest tiles alone need more VMEM than a kernel may take."""
    pages = max(1, 128 // (sizes.page_size * sizes.num_kv_heads))
    assert cut_decode(sizes, DecodeTiles(pages=pages, items=1)).vmem_bytes > core.usable_vmem_bytes


@pytest.mark.parametrize("vmem_mib", [32, 64, 128])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(32, 8), (8, 1), (64, 1), (64, 8), (32, 32), (16, 4)])
def test_chosen_tiles_fit(num_heads: int, num_kv_heads: int, vmem_mib: int) -> None:
    core = Core(wide_matmul=True, vmem_bytes=vmem_mib << 20)
    for page_size, max_context in ((16, 4096), (64, 131072), (128, 300), (256, 1 << 20)):
        for query_dtype, kv_dtype in ((jnp.bfloat16, jnp.bfloat16), (jnp.float32, jnp.float32)):
            sizes = sizes_of(
                GQA3,
                page_size=page_size,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                query_dtype=jnp.dtype(query_dtype),
                kv_dtype=jnp.dtype(kv_dtype),
                max_tokens=256,
                max_context=max_context,
            )
            assert is_supported(sizes)
            try:
                tiles = choose_decode_tiles(sizes, core)
            except NotImplementedError:
                assert_too_small(sizes, core)
                continue
            cut = cut_decode(sizes, tiles)
            assert cut.vmem_bytes <= core.usable_vmem_bytes
            assert cut.columns % 128 == 0
            assert 2 * tiles.items <= max(cut.table_rows, 2)
            assert cut.table_rows * cut.table_lanes * 4 <= 256 << 10


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 64},
        {"head_dim": 256},
        {"num_kv_heads": 3},
        {"num_kv_heads": 1, "kv_dtype": jnp.dtype(jnp.int8)},
        {"kv_dtype": jnp.dtype(jnp.float16)},
    ],
    ids=str,
)
def test_what_prefill_does_instead(changes: dict[str, object]) -> None:
    assert is_supported(sizes_of(GQA3))
    assert not is_supported(sizes_of(GQA3, **changes))


COMPILE = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxserve.pallas.paged_attention.inputs import AttentionConfig, AttentionLayer, RaggedBatch
from jaxserve.pallas.paged_attention.tpu.decode import decode

topology = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1])
mesh = Mesh(np.array(topology.devices[:1]), ("x",))
jax.set_mesh(mesh)

def spec(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

for heads, kv_heads, page, kv_dtype, window, cap in eval(sys.argv[2]):
    number, scalar = spec((), jnp.int32), spec((), jnp.float32)
    batch = RaggedBatch(
        page_table=spec((32, 64), jnp.int32), context_lens=spec((32,), jnp.int32), query_starts=spec((33,), jnp.int32),
        num_seqs=number, num_decodes=number, positions=spec((48,), jnp.int32), token_seq=spec((48,), jnp.int32))
    sinks = spec((heads,), jnp.float32) if window else None
    layer = AttentionLayer(page_offset=number, sinks=sinks, k_scale=scalar, v_scale=scalar)
    config = AttentionConfig(scale=0.1, sliding_window=window, soft_cap=cap)
    q, pool = spec((48, heads, 128), jnp.bfloat16), spec((4096, page, 2 * kv_heads, 128), kv_dtype)
    run = lambda q, new, pool, out, batch, layer: decode(q, new, pool, out, batch, layer, config=config)
    lowered = jax.jit(run, donate_argnums=(2, 3)).lower(
        q, spec((48, 2 * kv_heads, 128), kv_dtype), pool, q, batch, layer)
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= pool.size * pool.dtype.itemsize, memory
    assert memory.temp_size_in_bytes < 1 << 20, memory
"""


@pytest.mark.parametrize(
    "name", [pytest.param("v5e:2x2", marks=SLOW), "v6e:2x4", pytest.param("tpu7x:2x2x1", marks=SLOW)]
)
def test_compiles_deviceless_and_in_place(name: str) -> None:
    topology = parse_topology(name)
    try:
        require_compiler(topology)
    except ConfigError as error:
        pytest.skip(str(error))
    problems = [
        (32, 8, 64, "bfloat16", None, None),
        (8, 1, 64, "bfloat16", 4096, None),
        (9, 1, 16, "float32", None, None),
        (16, 4, 128, "int8", 100, 30.0),
        (16, 2, 32, "float8_e4m3fn", None, None),
    ]
    subprocess.run(
        [sys.executable, "-c", COMPILE, name, repr(problems)],
        env=os.environ | environment(topology),
        check=True,
        timeout=300,
    )
