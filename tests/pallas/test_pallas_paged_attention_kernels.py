"""Conformance of the attention kernels: what runs by default, and sizes that only matter to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from _pytest.mark import ParameterSet
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_interpreters import GPU, TPU, Runner
from paged_attention_cases import Case, Length, Shape, build
from paged_attention_checks import (
    CAP,
    PLAIN,
    WIDE,
    WINDOW,
    backends,
    check,
    ragged,
    run,
)

from jaxserve.pallas.dispatch import Backend
from jaxserve.pallas.paged_attention.api import AttentionConfig

# Heads of 128 and two KV heads are what the TPU's decode kernel takes; ten pages are three of its items.
SMALL = Shape(max_seqs=4, max_tokens=12, num_kv_heads=2, group=3, head_dim=128, page_size=16, pages_per_seq=10)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """What is static of a case: kernels are compiled once for all batches of it."""

    config: AttentionConfig
    dtype: str
    kv_dtype: str
    sinks: bool = False
    scales: bool = False
    shape: Shape = SMALL

    def case(self, backend: Runner, lengths: Sequence[Length], **changes: int) -> Case:
        # Hopper's kernels have float16 where others have float32.
        dtype, kv_dtype = (
            "float16" if backend.backend is Backend.GPU and name == "float32" else name
            for name in (self.dtype, self.kv_dtype)
        )
        return build(
            self.shape, lengths, dtype=dtype, kv_dtype=kv_dtype, sinks=self.sinks, scales=self.scales, **changes
        )


KINDS = {
    "plain": Kind(config=PLAIN, dtype="bfloat16", kv_dtype="bfloat16"),
    "window": Kind(config=WINDOW, dtype="float32", kv_dtype="float32", sinks=True),
    "cap": Kind(config=CAP, dtype="bfloat16", kv_dtype="float8_e4m3fn", scales=True),
    "all": Kind(config=WIDE, dtype="bfloat16", kv_dtype="int8", sinks=True, scales=True),
    "heads_of_64": Kind(
        config=PLAIN, dtype="bfloat16", kv_dtype="bfloat16", shape=dataclasses.replace(SMALL, head_dim=64)
    ),
}

MIXES = (
    (Length(cached=70, new=1), Length(cached=30, new=2), Length(cached=9, new=0), Length(cached=0, new=9)),
    (Length(cached=150, new=1), Length(cached=0, new=1), Length(cached=14, new=5)),
)
EDGES = (
    (),
    (Length(cached=127, new=1), Length(cached=64, new=1), Length(cached=159, new=1), Length(cached=63, new=1)),
    (Length(cached=120, new=12),),
)

TPU_HERE = pytest.param(TPU, id="tpu")


def runs(kind: str, backend: ParameterSet, *, always: Sequence[str]) -> ParameterSet:
    """A kind on a backend; only those of `always` run by default."""
    (runner,) = backend.values
    assert isinstance(runner, Runner)
    slow = [] if kind in always else [pytest.mark.slow]
    return pytest.param(runner, kind, marks=[*backend.marks, *slow], id=f"{kind}-{runner}")


@pytest.mark.parametrize(
    ("backend", "kind"),
    [
        *(runs(kind, TPU_HERE, always=tuple(KINDS)) for kind in KINDS),
        *(runs(kind, GPU, always=("plain", "all")) for kind in KINDS),
    ],
)
def test_the_kernels(backend: Runner, kind: str) -> None:
    """Decodes, chunks, both, neither; with races, and NaN or garbage that must not matter."""
    # The GPU's interpreter takes seconds a batch.
    for seed, lengths in enumerate(MIXES if backend.backend is Backend.GPU else (*MIXES, *EDGES)):
        out, _ = check(KINDS[kind].case(backend, lengths, seed=seed), KINDS[kind].config, backend)
        if not seed:
            again, _ = run(KINDS[kind].case(backend, lengths, poison_seed=1), KINDS[kind].config, backend)
            np.testing.assert_array_equal(out, again)


@pytest.mark.parametrize(
    ("backend", "kind"),
    [
        *(runs(kind, TPU_HERE, always=[name for name in KINDS if name != "heads_of_64"]) for kind in KINDS),
        *(runs(kind, GPU, always=()) for kind in KINDS),
    ],
)
@given(data=st.data())
@settings(max_examples=6)
def test_random_ragged_batches_of_the_kernels(backend: Runner, kind: str, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**16))
    case = KINDS[kind].case(backend, data.draw(ragged(KINDS[kind].shape)), share=seed % 2, seed=seed)
    check(case, KINDS[kind].config, backend)


@backends
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dims(backend: Runner, head_dim: int) -> None:
    shape = dataclasses.replace(SMALL, head_dim=head_dim)
    lengths = (Length(cached=17, new=1), Length(cached=14, new=5))
    check(build(shape, lengths, dtype="bfloat16", kv_dtype="bfloat16", seed=head_dim), PLAIN, backend)


@backends
@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (1, 64), (8, 1), (4, 7), (2, 16)])
def test_heads(backend: Runner, kv_heads: int, group: int) -> None:
    shape = dataclasses.replace(SMALL, num_kv_heads=kv_heads, group=group)
    lengths = (Length(cached=17, new=1), Length(cached=14, new=5))
    check(build(shape, lengths, dtype="bfloat16", kv_dtype="bfloat16", seed=group), PLAIN, backend)


@backends
@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256])
def test_page_sizes(backend: Runner, page_size: int) -> None:
    shape = dataclasses.replace(SMALL, page_size=page_size, pages_per_seq=max(1, 64 // page_size) + 1)
    lengths = (Length(cached=page_size, new=1), Length(cached=page_size - 3, new=5))
    check(build(shape, lengths, dtype="bfloat16", kv_dtype="bfloat16", seed=page_size), PLAIN, backend)
