"""Collectives counted in the text of programs: loops, asynchronous pairs, branches, work of a SparseCore."""

from __future__ import annotations

from jaxserve.sharding.collectives import Collective, collectives

LOOP = """HloModule jit_step

%condition (arg: (s32[], bf16[8,64])) -> pred[] {
  %bound = s32[]{:T(128)} constant(12)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%body (arg: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %sum.1 = bf16[8,64]{1,0:T(8,128)(2,1)} all-reduce(%x), channel_id=1, to_apply=%add
  %sum.2 = bf16[8,64]{1,0:T(8,128)(2,1)} all-reduce(%y), channel_id=2, to_apply=%add
}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %total = f32[] add(%a, %b)
}

ENTRY %main (p: bf16[8,64]) -> f32[8,256] {
  %start = (bf16[8,32]{1,0}, bf16[8,64]{1,0}) all-gather-start(%p), dimensions={1}
  %done = bf16[8,64]{1,0} all-gather-done(%start)
  ROOT %loop = (s32[], bf16[8,64]) while(%t), condition=%condition, body=%body
}
"""

# As libtpu writes a gather that a SparseCore does.
OFFLOADED = """HloModule jit_score

%called_computation.1 (param: f32[16,6144]) -> f32[16,49152] {
  ROOT %all-gather.4 = f32[16,49152]{1,0:T(8,128)} all-gather(%param), channel_id=1, dimensions={1}
}, execution_thread="sparsecore"

%async_computation (param: f32[16,6144]) -> f32[16,49152] {
  ROOT %call = f32[16,49152]{1,0} custom-call(%param), called_computations={%called_computation.1}
}, execution_thread="sparsecore"

ENTRY %main (p: f32[16,6144]) -> f32[16,49152] {
  %all-gather.3.call-start = ((), f32[16,49152]) async-start(), calls=%async_computation
  %all-gather.3.call-update = ((f32[16,6144]), f32[16,49152]) async-update(%all-gather.3.call-start, %p)
  ROOT %all-gather.3.call-done = f32[16,49152]{1,0} async-done(%all-gather.3.call-update)
}
"""


def test_loops_count_as_often_as_they_turn() -> None:
    assert collectives(LOOP) == (
        Collective(kind="all-gather", shape="bf16[8,64]", count=1, num_bytes=1024),
        Collective(kind="all-reduce", shape="bf16[8,64]", count=24, num_bytes=1024),
    )


def test_what_a_sparse_core_does_counts() -> None:
    gathered = 16 * 49152 * 4
    assert collectives(OFFLOADED) == (
        Collective(kind="all-gather", shape="f32[16,49152]", count=1, num_bytes=gathered),
    )
