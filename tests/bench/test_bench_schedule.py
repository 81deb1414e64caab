"""Schedules that libtpu dumped are read right: a kernel of ours, counted by hand, and small texts for the rest."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from jaxserve.bench.bundles import find_loops, read_bundles
from jaxserve.bench.schedule import Branch, Loop, read_kernels

# The copy kernel of `page_copy`, 16 pairs and 4 layers, compiled for v6e by libtpu 0.0.51.
DUMP = Path(__file__).parents[1] / "data" / "schedule"


def bundle(cycle: int, *operations: str, label: str = "", comment: str = "") -> str:
    return (
        f"  {cycle:#x} {label:>2} : > {{ {'  ;;  '.join(operations)} }}{comment}"
        if operations
        else f"  {cycle:#x}   :  {{}}"
    )


def test_a_kernel_of_ours() -> None:
    (kernel,) = read_kernels(DUMP)
    assert kernel.name == "page_copy.1"
    assert kernel.cycles == 161
    assert kernel.memory_bytes == {"smem": 1024, "sflag": 20}
    assert kernel.spilled_vectors == 0
    found = [(loop.start, loop.end, loop.depth, loop.own_cycles, loop.empty_cycles) for loop in kernel.loops]
    # The loop over pairs; in it waiting, starting, waiting, each once a layer; the last pair's waiting.
    assert found == [
        (10, 125, 0, 77, 39),
        (44, 54, 1, 11, 5),
        (71, 87, 1, 17, 5),
        (107, 117, 1, 11, 5),
        (136, 144, 0, 9, 5),
    ]
    assert [loop.dma_starts for loop in kernel.loops] == [0, 0, 1, 0, 0]
    assert [loop.dma_waits for loop in kernel.loops] == [0, 1, 0, 1, 1]
    assert [loop.cycles for loop in kernel.loops] == [116, 11, 17, 11, 9]
    assert kernel.loops[0].least_cycles == 57
    assert max(branch.dma_starts for branch in kernel.loops[0].branches) == 1
    starting = kernel.loops[2]
    assert starting.used_slots["SALU"] == 20
    assert starting.mxu_fraction(array_size=256, flops_per_cycle=4 * 256 * 256 * 2) == 0


def test_what_is_no_pallas_kernel_is_left_out(tmp_path: Path) -> None:
    for path in DUMP.iterdir():
        shutil.copy(path, tmp_path)
    (analysis,) = tmp_path.glob("*schedule-analysis*")
    analysis.write_text("fusion")
    assert read_kernels(tmp_path) == []


def test_a_dump_that_is_missing_or_of_another_length_is_an_error(tmp_path: Path) -> None:
    for path in DUMP.iterdir():
        shutil.copy(path, tmp_path)
    (slots,) = tmp_path.glob("*utilization*")
    slots.write_text("\n".join(slots.read_text().splitlines()[:-1]))
    with pytest.raises(ValueError, match="161 bundles but 160 lines of slots"):
        read_kernels(tmp_path)
    slots.unlink()
    with pytest.raises(ValueError, match="has no dump pre-delay"):
        read_kernels(tmp_path)


def loops_of(tmp_path: Path, lines: list[str]) -> tuple[Loop, ...]:
    """The loops of a kernel whose schedule has these lines."""
    names = {path.name.rpartition("-")[0]: path for path in DUMP.iterdir()}
    for path in names.values():
        shutil.copy(path, tmp_path)
    (schedule,) = (path for path in tmp_path.glob("*packed-bundles-post-ra.txt"))
    schedule.write_text("\n".join(lines))
    (slots,) = tmp_path.glob("*utilization*")
    head = slots.read_text().splitlines()[:3]
    slots.write_text("\n".join([*head, *["0 0 0 0 0 0 0 0 0 0 1"] * sum(line.startswith("  0x") for line in lines)]))
    (kernel,) = read_kernels(tmp_path)
    return kernel.loops


def test_matmuls_spills_and_bytes(tmp_path: Path) -> None:
    granules = "/*hbm=*/%s1, /*size_in_granules=*/{}, /*vmem=*/%s2, /*dst_syncflagno=*/%s3"
    lines = [
        bundle(0, "%s0 = smov.u32 0"),
        bundle(
            1,
            "%1 = vmatmul.mubr.bf16.gmra.mxu0 %v1",
            "%2 = vmatmul.mubr.f32.gmra.mxu1 %v2 /* a comment ;; with an end }\n and a line break */",
            label="LB",
        ),
        bundle(2, "%3 = vst [vmem:[#allocation2_spill] sm:$0xff] %v3", "%4 = vld [vmem:[#allocation2_spill] sm:$0xff]"),
        bundle(3, f"%5 = dma.hbm_to_vmem {granules.format(64)}", f"%6 = dma.hbm_to_vmem {granules.format(16)}"),
        bundle(4, "%7 = dma.done.wait %s1, 80", "%8 = sld [smem:[#allocation3_spill]]"),
        bundle(5, "%9 = sbr.rel (!%p1) target bundleno = 1 (0x1), region = 4"),
        *(bundle(cycle) for cycle in range(6, 12)),
    ]
    (loop,) = loops_of(tmp_path, lines)
    assert (loop.start, loop.end, loop.own_cycles, loop.empty_cycles) == (1, 9, 9, 4)
    assert loop.matmuls == {"bf16": 1, "f32": 1}
    assert (loop.spill_stores, loop.spill_fills) == (1, 2)
    assert (loop.dma_starts, loop.dma_waits, loop.dma_bytes) == (2, 1, 80 * 32)
    assert loop.mxu_fraction(array_size=128, flops_per_cycle=128 * 128 * 2) == pytest.approx((16 + 8) / 9)
    lines[3] = bundle(3, f"%5 = dma.hbm_to_vmem {granules.format('%s9')}")
    assert loops_of(tmp_path, lines)[0].dma_bytes is None


def test_loops_and_what_can_be_skipped() -> None:
    """An outer loop over 2..17 with an inner one over 4..9, and a branch over 13 and 14."""
    lines = [bundle(cycle, "%s = smov.u32 0") for cycle in range(22)]
    lines[2] = bundle(2, "%s = smov.u32 0", label="LB", comment=" /* Start region 7 */")
    lines[4] = bundle(4, "%s = smov.u32 0", label="LB")
    lines[5] = bundle(5, "%b = sbr.rel (%p) target bundleno = 4 (0x4), region = 8")
    lines[10] = bundle(10, "%s = smov.u32 0", label="LE")
    lines[10] = bundle(10, "%b = sbr.rel (%p) target bundleno = 17 (0x11), region = 9", label="LE")
    lines[13] = bundle(13, "%b = sbr.rel (%p) target = $region7")
    outer, inner = find_loops(read_bundles("\n".join(lines)))
    assert (outer.start, outer.end, outer.depth) == (2, 17, 0)
    assert (inner.start, inner.end, inner.depth) == (4, 9, 1)
    assert outer.own == (2, 3, *range(10, 18))
    assert [(skip.start, skip.end) for skip in outer.skips] == [(15, 16)]


def test_steady_cycles_count_the_first_tile_s_fetch_once() -> None:
    loop = Loop(
        start=0,
        end=99,
        depth=0,
        cycles=100,
        own_cycles=100,
        least_cycles=20,
        branches=(Branch(cycles=80, dma_starts=8), Branch(cycles=30, dma_starts=4), Branch(cycles=25, dma_starts=4)),
        empty_cycles=0,
        used_slots={},
        matmuls={},
        dma_starts=8,
        dma_waits=1,
        dma_bytes=None,
        spill_stores=0,
        spill_fills=0,
    )
    assert loop.steady_cycles(4) == 70
    assert loop.steady_cycles(8) == 100


def test_no_bundles() -> None:
    with pytest.raises(ValueError, match="no bundles found"):
        read_bundles("nothing here")
