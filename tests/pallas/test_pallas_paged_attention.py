"""Conformance of every paged-attention backend: right answers, nothing read or written that must not be."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_interpreters import Runner, races_fail
from paged_attention_cases import SHAPES, Case, Length, build, from_pool, tolerance
from paged_attention_checks import ALL, CAP, PLAIN, WINDOW, backends, check, compiled, dtypes, ragged, run

from jaxserve.pallas.paged_attention.api import AttentionConfig, paged_attention
from jaxserve.quant.bits import storage_dtype

MIXED = (Length(cached=9, new=1), Length(cached=0, new=1), Length(cached=5, new=4), Length(cached=0, new=6))


def examples(backend: Runner, most: int) -> int:
    """How many cases of a kind are worth their time."""
    return 1 if backend.is_interpreted else most


@backends
@pytest.mark.parametrize("config", [PLAIN, ALL], ids=["plain", "all"])
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_random_ragged_batches(backend: Runner, config: AttentionConfig, data: st.DataObject) -> None:
    if backend.is_interpreted:
        pytest.skip("see test_random_ragged_batches_of_the_kernels")
    shape = SHAPES["gqa3"]
    lengths = data.draw(ragged(shape))
    seed = data.draw(st.integers(0, 2**16))
    case = build(shape, lengths, sinks=config is ALL, share=data.draw(st.integers(0, 2)), seed=seed, **dtypes(backend))
    check(case, config, backend)


@backends
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "long"])
def test_shapes(backend: Runner, name: str) -> None:
    shape = SHAPES[name]
    lengths = [Length(cached=min(x.cached, shape.max_context - x.new), new=x.new) for x in MIXED[: shape.max_seqs]]
    for seed in range(examples(backend, 3)):
        check(build(shape, lengths, seed=seed, **dtypes(backend)), PLAIN, backend)


@backends
@pytest.mark.parametrize("config", [PLAIN, WINDOW, CAP], ids=["plain", "window", "cap"])
@pytest.mark.parametrize("sinks", [False, True], ids=["no_sinks", "sinks"])
def test_features(backend: Runner, config: AttentionConfig, sinks: bool) -> None:
    for seed in range(examples(backend, 3)):
        check(build(SHAPES["gqa3"], MIXED, sinks=sinks, seed=seed, **dtypes(backend)), config, backend)


@backends
@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "scales"),
    [
        ("float32", "bfloat16", False),
        ("bfloat16", "bfloat16", False),
        ("float32", "float8_e4m3fn", False),
        ("bfloat16", "float8_e4m3fn", True),
        ("float32", "uint16", False),
        ("bfloat16", "uint16", True),
        ("bfloat16", "uint8", True),
        ("bfloat16", "int8", True),
    ],
)
def test_dtypes(backend: Runner, dtype: str, kv_dtype: str, scales: bool) -> None:
    for seed in range(examples(backend, 3)):
        case = build(SHAPES["gqa3"], MIXED, dtype=dtype, kv_dtype=kv_dtype, scales=scales, sinks=True, seed=seed)
        check(case, ALL, backend)


@backends
@pytest.mark.parametrize(("kv_format", "bits"), [("bfloat16", "uint16"), ("float8_e4m3fn", "uint8")])
def test_a_format_and_its_bits_are_the_same(backend: Runner, kv_format: str, bits: str) -> None:
    out, kv_pages = run(build(SHAPES["gqa3"], MIXED, kv_dtype=kv_format, scales=True), PLAIN, backend)
    out_of_bits, kv_bits = run(build(SHAPES["gqa3"], MIXED, kv_dtype=bits, scales=True), PLAIN, backend)
    np.testing.assert_array_equal(out, out_of_bits)
    np.testing.assert_array_equal(from_pool(kv_pages), from_pool(kv_bits))


@backends
@pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", "uint8", "int8"])
def test_narrow_formats_saturate(backend: Runner, kv_dtype: str) -> None:
    case = build(SHAPES["gqa3"], MIXED, scales=True, **dtypes(backend, kv_dtype))
    case.k[0, 0, 0], case.v[0, 0, 0] = 1e6, -1e6
    _, kv_pages = check(case, PLAIN, backend)
    limit = 127 if kv_dtype == "int8" else 448
    first = from_pool(kv_pages[case.places(0, [case.lengths[0].cached])])[0]
    assert first[0, 0] == limit
    assert first[1, 0] == -limit


@backends
@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_output_does_not_depend_on_what_must_not_be_read(backend: Runner, kv_dtype: str) -> None:
    outs = [
        run(build(SHAPES["gqa3"], MIXED, scales=True, poison_seed=seed, **dtypes(backend, kv_dtype)), PLAIN, backend)[0]
        for seed in range(3)
    ]
    np.testing.assert_array_equal(outs[0], outs[1])
    np.testing.assert_array_equal(outs[0], outs[2])


@backends
@pytest.mark.parametrize(
    "lengths",
    [
        (),
        (Length(cached=0, new=1),),
        (Length(cached=31, new=1),) * 5,
        (Length(cached=0, new=24),),
        (Length(cached=8, new=24),),
        (Length(cached=7, new=2), Length(cached=8, new=8), Length(cached=15, new=14)),
        (Length(cached=17, new=1), Length(cached=9, new=0), Length(cached=0, new=0), Length(cached=3, new=7)),
        # One-token chunks after longer ones are not decodes.
        (Length(cached=3, new=1), Length(cached=0, new=3), Length(cached=12, new=1)),
    ],
    ids=[
        "empty",
        "one_token",
        "full_decodes",
        "full_prefill",
        "full_context",
        "page_borders",
        "empty_chunks",
        "late_single",
    ],
)
def test_edges(backend: Runner, lengths: Sequence[Length]) -> None:
    check(build(SHAPES["gqa3"], lengths, seed=3, **dtypes(backend)), PLAIN, backend)


@backends
def test_chunks_that_could_be_decodes_may_be_declared_chunks(backend: Runner) -> None:
    case = build(SHAPES["gqa3"], (Length(cached=9, new=1), Length(cached=4, new=1)), **dtypes(backend))
    arrays = [jnp.asarray(x) for x in (case.q, case.k, case.v, case.kv_pages)]
    batch = jax.tree.map(lambda x: x, case.batch())
    object.__setattr__(batch, "num_decodes", jnp.int32(0))
    op = jax.jit(functools.partial(paged_attention, config=PLAIN, target=backend.target))
    with backend.traced(), races_fail():
        out = jax.block_until_ready(op(*arrays, batch, case.layer())[0])
    expected, _ = run(case, PLAIN, backend)
    np.testing.assert_allclose(np.asarray(out), expected, rtol=0, atol=tolerance(case))


@backends
@pytest.mark.parametrize("window", [None, 1, 100, 10_000])
def test_long_contexts_and_chunks(backend: Runner, window: int | None) -> None:
    lengths: tuple[Length, ...] = (
        Length(cached=0, new=1),
        Length(cached=63, new=1),
        Length(cached=64, new=1),
        Length(cached=719, new=1),
        *(Length(cached=17 * i, new=1) for i in range(5)),
        Length(cached=255, new=65),
        Length(cached=590, new=125),
    )
    if backend.is_interpreted:
        lengths = (Length(cached=719, new=1), Length(cached=64, new=1), Length(cached=255, new=20))
    config = AttentionConfig(scale=0.2, sliding_window=window, soft_cap=None)
    case = build(SHAPES["long"], lengths, sinks=window == 100, share=3, seed=window or 0, **dtypes(backend))
    check(case, config, backend)


@backends
def test_large_logits_do_not_overflow(backend: Runner) -> None:
    config = AttentionConfig(scale=1e4, sliding_window=None, soft_cap=None)
    check(build(SHAPES["gqa3"], MIXED, sinks=True, **dtypes(backend)), config, backend)


@backends
def test_chunked_prefill_equals_one_go(backend: Runner) -> None:
    """The same prompt in one chunk, or in three steps that read what earlier ones wrote."""
    shape = SHAPES["gqa3"]
    whole = build(shape, (Length(cached=0, new=20),), **dtypes(backend))
    expected, pool_at_once = run(whole, PLAIN, backend)
    kv_pages, outs, start = whole.kv_pages, [], 0
    for new in (7, 1, 12):
        rows = np.r_[start : start + new]

        def padded(x: np.ndarray, rows: np.ndarray = rows) -> np.ndarray:
            out = np.full_like(x, np.nan)
            out[: len(rows)] = x[rows]
            return out

        step = Case(
            q=padded(whole.q),
            k=padded(whole.k),
            v=padded(whole.v),
            kv_pages=kv_pages,
            page_table=whole.page_table,
            lengths=(Length(cached=start, new=new),),
            layer_offset=whole.layer_offset,
            sinks=None,
            k_scale=None,
            v_scale=None,
        )
        out, kv_pages = run(step, PLAIN, backend)
        outs.append(out[:new])
        start += new
    np.testing.assert_allclose(np.concatenate(outs), expected[:20], rtol=0, atol=tolerance(whole))
    assert kv_pages.tobytes() == pool_at_once.tobytes()


@backends
@pytest.mark.parametrize("kv_format", ["float32", "bfloat16", "float8_e4m3fn"])
def test_donated_pool_is_changed_in_place(backend: Runner, kv_format: str) -> None:
    if backend.is_interpreted:
        pytest.skip("the interpreter's memory is not a device's")
    dtype = storage_dtype(kv_format, jax.default_backend())
    case = build(SHAPES["gqa3"], MIXED, kv_dtype=dtype.name, scales=True)
    q, k, v = (jnp.asarray(x) for x in (case.q, case.k, case.v))
    big = jax.ShapeDtypeStruct((100_000, *case.kv_pages.shape[1:]), dtype)
    stats = compiled(backend, PLAIN).lower(q, k, v, big, case.batch(), case.layer()).compile().memory_analysis()
    pool_bytes = int(np.prod(big.shape)) * dtype.itemsize
    assert stats.alias_size_in_bytes == pool_bytes
    assert stats.temp_size_in_bytes < pool_bytes / 50


@backends
@pytest.mark.parametrize(
    ("config", "lengths"),
    [
        (PLAIN, MIXED),
        (WINDOW, (Length(cached=0, new=1), Length(cached=31, new=1), Length(cached=12, new=20))),
        (CAP, (Length(cached=0, new=24),)),
        (ALL, MIXED[2:3]),
    ],
    ids=["plain", "window", "cap", "all"],
)
def test_agrees_with_the_ragged_paged_attention_of_jax(
    backend: Runner, config: AttentionConfig, lengths: Sequence[Length]
) -> None:
    """On what that covers: no sinks, one dtype."""
    kernel = pytest.importorskip("jax.experimental.pallas.ops.tpu.ragged_paged_attention")
    case = build(SHAPES["gqa3"], lengths, seed=7, **dtypes(backend))
    out, kv_pages = run(case, config, backend)
    batch = case.batch()
    with jax.numpy_dtype_promotion("standard"):
        expected = kernel.ref_ragged_paged_attention(
            jnp.asarray(case.q),
            jnp.asarray(kv_pages),
            batch.context_lens,
            batch.page_table + case.layer_offset,
            batch.query_starts,
            batch.num_seqs[None],
            sm_scale=config.scale,
            sliding_window=config.sliding_window,
            soft_cap=config.soft_cap,
        )
    np.testing.assert_allclose(out[: case.num_tokens], expected, rtol=0, atol=tolerance(case))
