"""What every paged-attention backend is checked for: right answers, nothing read or written that must not be."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from _pytest.mark import ParameterSet
from hypothesis import strategies as st
from kernel_interpreters import GPU, TPU, Runner, races_fail
from kernel_interpreters import PLAIN as EVERYWHERE
from paged_attention_cases import Case, Length, Shape, exact, from_pool, to_pool

from jaxserve.pallas.dispatch import Backend
from jaxserve.pallas.paged_attention.api import AttentionConfig, paged_attention

PLAIN = AttentionConfig(scale=0.25, sliding_window=None, soft_cap=None)
WINDOW = AttentionConfig(scale=0.25, sliding_window=5, soft_cap=None)
CAP = AttentionConfig(scale=0.5, sliding_window=None, soft_cap=1.5)
ALL = AttentionConfig(scale=0.3, sliding_window=7, soft_cap=2.0)
WIDE = AttentionConfig(scale=0.3, sliding_window=75, soft_cap=2.0)

KERNELS = (pytest.param(TPU, id="tpu"), GPU)


def slow_if_interpreted(kernel: ParameterSet) -> ParameterSet:
    (backend,) = kernel.values
    assert isinstance(backend, Runner)
    slow = [pytest.mark.slow] if backend.is_interpreted else []
    return pytest.param(backend, marks=[*kernel.marks, *slow], id=kernel.id)


# In the interpreter a kernel is compiled for seconds: some kinds of cases run by default (see
# `test_pallas_paged_attention_kernels`), the rest is slow.
backends = pytest.mark.parametrize("backend", [*EVERYWHERE, *map(slow_if_interpreted, KERNELS)], ids=str)


def dtypes(backend: Runner, kv_dtype: str | None = None) -> dict[str, str]:
    """Dtypes where a test has no wish, or one for the pool only: float32, which Hopper's kernels refuse."""
    if backend.backend is Backend.GPU:
        return {"dtype": "bfloat16", "kv_dtype": "bfloat16" if kv_dtype in (None, "float32") else kv_dtype}
    return {"kv_dtype": kv_dtype or "float32"}


@functools.cache
def compiled(backend: Runner, config: AttentionConfig) -> Callable[..., tuple[jax.Array, jax.Array]]:
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    op = functools.partial(paged_attention, config=config, target=backend.target)
    return jax.jit(op, donate_argnums=3, compiler_options=options)


def is_refused(case: Case, backend: Runner) -> bool:
    """Whether a backend must refuse a case: wgmma has no exact float32, tiles of pages have their sizes."""
    if backend.backend is not Backend.GPU:
        return False
    query, held = case.q.dtype.name, case.kv_pages.dtype.name
    (page_size, _, head_dim), group = case.kv_pages.shape[1:], case.q.shape[1] // case.k.shape[1]
    formats = query in ("bfloat16", "float16") and held in (query, "float8_e4m3fn", "float8_e5m2", "int8")
    sizes = (page_size in (8, 16, 32) or page_size % 64 == 0) and head_dim in range(16, 257, 16) and group <= 64
    return not (formats and sizes)


def run(case: Case, config: AttentionConfig, backend: Runner) -> tuple[np.ndarray, np.ndarray]:
    arrays = (jnp.asarray(x) for x in (case.q, case.k, case.v, case.kv_pages))
    with backend.traced(), races_fail():
        if is_refused(case, backend):
            with pytest.raises(NotImplementedError):
                compiled(backend, config)(*arrays, case.batch(), case.layer())
            pytest.skip("refused, as it must be")
        out, kv_pages = compiled(backend, config)(*arrays, case.batch(), case.layer())
        return np.asarray(out), np.asarray(kv_pages)


def check(case: Case, config: AttentionConfig, backend: Runner) -> tuple[np.ndarray, np.ndarray]:
    out, kv_pages = run(case, config, backend)
    assert out.dtype == case.q.dtype
    assert out.shape == case.q.shape
    check_pool(case, kv_pages)
    expected = exact(case, kv_pages, config)
    worst = np.abs(out.astype(np.float64) - expected.out)[: case.num_tokens] - expected.bound[: case.num_tokens]
    assert np.isfinite(out.astype(np.float32)).all()
    assert np.all(worst <= 0), f"off by {worst.max()} more than rounding allows"
    assert not out[case.num_tokens :].any()
    return out, kv_pages


def check_pool(case: Case, kv_pages: np.ndarray) -> None:
    """New tokens stand where they belong, up to one rounding; no other byte has changed."""
    written = np.zeros(kv_pages.shape[:2], bool)
    for s, rows in enumerate(case.rows()):
        places = case.places(s, range(case.lengths[s].cached, case.lengths[s].context))
        written[places] = True
        for new, scale, offset in ((case.k, case.k_scale, 0), (case.v, case.v_scale, 1)):
            wanted = new[rows].astype(np.float32) / (np.float32(1) if scale is None else scale)
            got = from_pool(kv_pages[places][:, offset::2])
            exact = from_pool(to_pool(wanted, kv_pages.dtype))
            # A scaled quotient may round to the neighbouring element; an unscaled one must be exact.
            slack = 0.0 if scale is None else 1.01 if kv_pages.dtype == np.int8 else 0.13 * np.abs(exact) + 2**-9
            assert np.all(np.abs(got - exact) <= slack)
    before, after = case.kv_pages[~written], kv_pages[~written]
    assert before.tobytes() == after.tobytes()


@st.composite
def ragged(draw: st.DrawFn, shape: Shape) -> tuple[Length, ...]:
    """Any batch that fits the shape: decodes first, then chunks, possibly empty ones, possibly none of either."""
    num_seqs = draw(st.integers(0, shape.max_seqs))
    num_decodes = draw(st.integers(0, num_seqs))
    left = shape.max_tokens
    lengths = []
    for s in range(num_seqs):
        after = num_seqs - s - 1
        new = 1 if s < num_decodes else draw(st.integers(0, min(left - after, shape.max_context)))
        left -= new
        lengths.append(Length(cached=draw(st.integers(0, shape.max_context - new)), new=new))
    return tuple(lengths)
