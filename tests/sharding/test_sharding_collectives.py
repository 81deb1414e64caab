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


# Sums of two arrays in one pair, and what passes between neighbours.
ASYNCHRONOUS = """HloModule jit_step

ENTRY %main (p: bf16[8,64], q: f32[8]) -> bf16[8,64] {
  %sums = (bf16[8,64]{1,0:T(8,128)(2,1)}, f32[8]{0}) all-reduce-start(%p, %q), channel_id=1, to_apply=%add
  %summed = (bf16[8,64]{1,0:T(8,128)(2,1)}, f32[8]{0}) all-reduce-done(%sums)
  %moving = (bf16[8,64]{1,0}, bf16[8,64]{1,0}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1}}
  %moved = bf16[8,64]{1,0} collective-permute-done(%moving)
  %ragged = f32[16]{0} ragged-all-to-all(%q, %out, %a, %b, %c, %d), channel_id=2
  %sent = (f32[8]{0}, u32[], token[]) send(%q, %token), channel_id=3
  %gone = token[] send-done(%sent), channel_id=3
  %got = ((bf16[4]{0}, f32[2]{0}), u32[], token[]) recv(%token), channel_id=4
  %here = ((bf16[4]{0}, f32[2]{0}), token[]) recv-done(%got), channel_id=4
  ROOT %copy = bf16[8,64]{1,0} copy(%moved)
}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %total = f32[] add(%a, %b)
}
"""


def test_asynchronous_pairs_count_once_and_with_all_their_arrays() -> None:
    found = {(each.kind, each.shape): (each.count, each.num_bytes) for each in collectives(ASYNCHRONOUS)}
    assert found == {
        ("all-reduce", "bf16[8,64] f32[8]"): (1, 1024 + 32),
        ("collective-permute", "bf16[8,64]"): (1, 1024),
        ("ragged-all-to-all", "f32[16]"): (1, 64),
        ("send", "f32[8]"): (1, 32),
        ("recv", "bf16[4] f32[2]"): (1, 16),
    }


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
