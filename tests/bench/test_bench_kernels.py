"""`bench kernels`: figures follow from schedules and times, and kernels compile for chips that are not here."""

from __future__ import annotations

import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxserve.bench import kernel_clock
from jaxserve.bench.kernel_clock import Ceilings, ClockReport, available, clock_kernels
from jaxserve.bench.kernel_names import JAX_PAGED, OURS, XLA
from jaxserve.bench.kernels import Core, Failure, StaticReport, find_kernel, report_kernels, summarise, table
from jaxserve.bench.schedule import Branch, KernelSchedule, Loop
from jaxserve.bench.tiled_kernels import Work
from jaxserve.cli import main
from jaxserve.core.errors import ConfigError
from jaxserve.pallas.dispatch import Backend
from jaxserve.pallas.paged_attention.shapes import DEVICE_SHAPES, STATIC_SHAPES, AttentionShape
from jaxserve.sharding.chips import chip_named
from jaxserve.sharding.topology import parse_topology

CORE = Core(array_size=128, flops_per_cycle=100_000, cycles_per_s=1e9, bytes_per_s=1e12)
SMALL = AttentionShape(
    num_heads=4, num_kv_heads=2, head_dim=16, page_size=8, num_seqs=3, context=20, query_tokens=1, dtype="float32",
    kv_dtype="float32",
)  # fmt: skip

needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu compiles for TPUs")


def loop(start: int, end: int, depth: int, own: int, **changes: object) -> Loop:
    plain = Loop(
        start=start,
        end=end,
        depth=depth,
        cycles=end - start + 1,
        own_cycles=own,
        least_cycles=own,
        branches=(),
        empty_cycles=0,
        used_slots={},
        matmuls={},
        dma_starts=0,
        dma_waits=0,
        dma_bytes=0,
        spill_stores=0,
        spill_fills=0,
    )
    return dataclasses.replace(plain, **changes)


def schedule(*loops: Loop) -> KernelSchedule:
    return KernelSchedule(
        name="attention.1",
        cycles=10_000,
        loops=loops,
        memory_bytes={"vmem": 3 << 20, "smem": 64},
        spilled_vectors=7,
    )


WORK = Work(tile_bytes=1_000_000, tile_dmas=4, tile_flops=5e6)
ANSWER = {
    "compile_s": 2.0,
    "compile_cpu_s": 1.5,
    "temp_bytes": 0,
    "kernel": "attention",
    "work": dataclasses.asdict(WORK),
}


def answer(**changes: float) -> dict[str, object]:
    return {**ANSWER, "work": dataclasses.asdict(dataclasses.replace(WORK, **changes))}


def test_figures_of_a_kernel_whose_kv_loop_is_one_loop() -> None:
    branches = (Branch(cycles=500, dma_starts=4), Branch(cycles=400, dma_starts=4))
    hot = loop(100, 1599, 1, 1500, matmuls={"bf16": 64}, dma_starts=8, branches=branches, spill_stores=3)
    report = summarise("k", "p", schedule(loop(0, 2000, 0, 501), hot), ANSWER, CORE)
    assert report.cycles == 1000
    assert report.compute_s == pytest.approx(1e-6)
    assert report.fetch_s == pytest.approx(1e-6)
    assert report.compute_to_fetch == pytest.approx(1)
    assert report.useful_fraction == pytest.approx(0.05)
    assert report.issued_fraction == pytest.approx(64 * 16 * 128 * 128 * 2 / (1000 * 100_000))
    assert (report.loop_spills, report.spilled_vectors) == (3, 7)
    assert report.vmem_bytes == 3 << 20


def test_figures_of_a_kernel_with_loops_inside_its_kv_loop() -> None:
    inside = (
        loop(10, 1000, 1, 200),
        loop(20, 40, 2, 21, dma_starts=1, dma_bytes=10),
        loop(50, 65, 2, 16, dma_waits=1),
        loop(70, 140, 2, 71, used_slots={"VSTORE": 30}),
        loop(150, 180, 2, 31, used_slots={"VSTORE": 30}),
        loop(200, 499, 2, 300, matmuls={"bf16": 8}),
        loop(500, 900, 2, 401, matmuls={"bf16": 8}),
    )
    said = answer(hot_trips=10, unpack_trips=5)
    report = summarise("k", "p", schedule(loop(0, 2000, 0, 100), *inside), said, CORE)
    assert report.cycles == 200 + 10 * 300 + 4 * (21 + 16) + 5 * 31
    assert report.border_cycles is None
    assert report.whole_to_fetch is None


def test_ends_of_sequences_are_counted_beside_an_iteration() -> None:
    """Half a sequence ends in an iteration: every other one looks at its 4 items, and every other one has an end."""
    inside = (
        loop(10, 24, 1, 15, dma_starts=1),
        loop(30, 99, 1, 60, least_cycles=20, branches=(Branch(cycles=40, dma_starts=1),)),
        loop(40, 50, 2, 11),
    )
    hot = loop(0, 1999, 0, 1000, matmuls={"bf16": 8}, dma_starts=4)
    report = summarise("k", "p", schedule(hot, *inside), answer(tile_items=4, tile_ends=0.5), CORE)
    assert report.cycles == 1000
    assert report.border_cycles == 0.5 * 15 + 0.5 * 4 * 20 + 0.5 * 40
    assert report.compute_to_fetch == pytest.approx(1)
    assert report.whole_to_fetch == pytest.approx(1 + 67.5 / 1000)
    assert report.time_over_peak == pytest.approx((1000 + 67.5) * 100_000 / 5e6)
    # Two sequences end in each iteration.
    often = summarise("k", "p", schedule(hot, *inside), answer(tile_items=4, tile_ends=2.0), CORE)
    assert often.border_cycles == 2 * 15 + 4 * 20 + 2 * 40


def test_a_kernel_without_matmuls_or_of_another_name_is_an_error() -> None:
    with pytest.raises(ValueError, match="no loop that multiplies"):
        summarise("k", "p", schedule(loop(0, 9, 0, 10)), ANSWER, CORE)
    with pytest.raises(ValueError, match=r"no kernel called decode was compiled, only attention.1"):
        find_kernel([schedule()], "decode")


@pytest.mark.parametrize(
    ("chip", "gigahertz", "gigabytes"),
    [("v5e", 1.50, 820), ("v6e", 1.75, 1640), ("tpu7x", 2.20, 3690), ("v4", 1.05, 614), ("v5p", 1.75, 1382.5)],
)
def test_cores(chip: str, gigahertz: float, gigabytes: float) -> None:
    core = Core.of(chip_named(chip))
    assert core.cycles_per_s / 1e9 == pytest.approx(gigahertz, rel=0.005)
    assert core.bytes_per_s / 1e9 == pytest.approx(gigabytes)


def test_gpus_have_no_schedules() -> None:
    with pytest.raises(ConfigError, match="read for TPUs"):
        report_kernels(parse_topology("h100:1"), [OURS], STATIC_SHAPES, lambda *_: None)


def test_problems() -> None:
    decode, prefill = DEVICE_SHAPES["decode 64 x 4k"], DEVICE_SHAPES["prefill 8k"]
    assert decode.kv_bytes == 64 * 4096 * 2 * 8 * 128 * 2
    assert decode.flops == 4 * 64 * 4096 * 32 * 128
    assert prefill.flops == 4 * (8192 * 8193 // 2) * 32 * 128
    batch = SMALL.batch(np.random.default_rng(0))
    assert sorted(np.asarray(batch.page_table).ravel()) == list(range(9))
    assert np.asarray(batch.positions).tolist() == [19, 19, 19]
    assert {name: each.shape for name, each in SMALL.arrays(np.random.default_rng(0)).items()} == {
        "q": (3, 4, 16),
        "k": (3, 2, 16),
        "v": (3, 2, 16),
        "kv_pages": (9, 8, 4, 16),
    }


def test_ragged_problems() -> None:
    ragged = DEVICE_SHAPES["prefill ragged"]
    lengths = ragged.lengths
    assert (ragged.num_seqs, ragged.query_tokens, ragged.context) == (8, 2048, 7000)
    assert ragged.num_tokens == sum(new for new, _ in lengths)
    assert ragged.kv_bytes == sum(context for _, context in lengths) * 2 * 8 * 128 * 2
    assert ragged.flops == 4 * 32 * 128 * sum(sum(range(c - n + 1, c + 1)) for n, c in lengths)
    batch = ragged.batch(np.random.default_rng(0))
    table, starts = np.asarray(batch.page_table), np.asarray(batch.query_starts)
    used = np.concatenate([table[s, : -(-context // 64)] for s, (_, context) in enumerate(lengths)])
    assert sorted(used) == list(range(ragged.num_pages))
    assert starts[-1] == ragged.num_tokens
    for s, (new, context) in enumerate(lengths):
        own = slice(starts[s], starts[s + 1])
        assert np.asarray(batch.positions)[own].tolist() == list(range(context - new, context))
        assert set(np.asarray(batch.token_seq)[own].tolist()) == {s}


@needs_libtpu
def test_the_command_reads_a_peer_s_schedule(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """JAX's paged kernel, 32 and 8 heads, pages of 128, on v6e: its KV loop takes 4.9 times as long as its DMAs."""
    out = tmp_path / "figures.json"
    flags = ["--topology", "v6e:2x4", "--kernels", "jax paged", "--problem", "decode 32,8 p128", "--out", str(out)]
    assert main(["bench", "kernels", *flags]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 120
    (figures,) = json.loads(out.read_text())["topologies"]["v6e:2x4"]
    assert figures["kernel"] == JAX_PAGED
    assert figures["fetch_s"] == pytest.approx(2 * 512 * 128 * 2 / 1640e9)
    assert 4 < figures["compute_to_fetch"] < 6


def test_tables_and_failures() -> None:
    failure = Failure(kernel=OURS, shape="decode", reason="no room")
    fields = {field.name: 1 for field in dataclasses.fields(StaticReport)}
    report = StaticReport(**{**fields, "kernel": "k", "shape": "p"})
    assert table(parse_topology("v6e:2x4"), [failure, report]).row_count == 2
    assert report.as_json()["compute_to_fetch"] == 1
    assert failure.as_json()["reason"] == "no room"
    timed = ClockReport(kernel=XLA, shape="p", seconds=1e-3, bytes_per_s=1e9, flops_per_s=1e12, fraction=0.5)
    ceilings = Ceilings(device="d", copy_bytes_per_s=1e12, matmul_flops_per_s=1e15)
    assert kernel_clock.table(ceilings, [failure, timed]).row_count == 2


def test_kernels_are_timed_and_a_failure_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> tuple[object, list[object]]:
        raise RuntimeError("no such device")

    makers = {OURS: broken, XLA: kernel_clock._own(Backend.REFERENCE), JAX_PAGED: broken}
    monkeypatch.setattr(kernel_clock, "available", lambda _: makers)
    monkeypatch.setattr(kernel_clock, "MAX_STATES", 2)
    ceilings = Ceilings(device="d", copy_bytes_per_s=1e6, matmul_flops_per_s=1e15)
    done: list[tuple[str, int, int]] = []
    reports = clock_kernels({"decode": SMALL}, None, ceilings, lambda *step: done.append(step))
    failed, timed, _ = reports
    assert isinstance(failed, Failure)
    assert failed.reason == "RuntimeError: no such device"
    assert isinstance(timed, ClockReport)
    assert timed.bytes_per_s == pytest.approx(SMALL.kv_bytes / timed.seconds)
    assert timed.fraction == pytest.approx(timed.bytes_per_s / 1e6)
    assert done[-1][1:] == (3, 3)
    prompt = dataclasses.replace(SMALL, num_seqs=1, query_tokens=20)
    (only,) = clock_kernels({"prompt": prompt}, [OURS, JAX_PAGED], ceilings, lambda *_: None)
    assert only.kernel == OURS


def test_this_machine_must_have_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    if jax.default_backend() != "cpu":
        pytest.skip("it has one")
    assert main(["bench", "kernels"]) == 2
    assert "There is no TPU or GPU here" in capsys.readouterr().err
    assert list(available("gpu")) == [OURS, XLA, JAX_PAGED, "jax flash", "cudnn flash"]
    assert list(available("tpu")) == [OURS, XLA, "jax ragged", JAX_PAGED]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kernels", "flash"], "none of jaxserve"),
        (["--problem", "encode"], "no problem holds encode"),
        (["--topology", "v6e"], "is no topology"),
        (["--out", "/nowhere/figures.json"], "there is no folder"),
    ],
)
def test_wrong_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--topology", "v6e:2x4", *flags]) == 2
    assert message in capsys.readouterr().err
