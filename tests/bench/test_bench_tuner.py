"""The tuner: it finds the best of what it is told, takes nothing that does not fit or grows, and keeps tables small."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxserve.bench import kernel_clock, kernels
from jaxserve.bench.kernel_clock import clock_tiles, tpu_here
from jaxserve.bench.kernel_names import JAX_RAGGED, OURS
from jaxserve.bench.kernel_programs import lower
from jaxserve.bench.kernels import Failure, StaticReport
from jaxserve.bench.tiled_kernels import DECODE, PREFILL, core_of, sizes_of, tiled_kernel
from jaxserve.bench.tuner import Score, Tuning, merged, table, tune
from jaxserve.cli import main
from jaxserve.core.errors import ConfigError
from jaxserve.pallas.paged_attention.shapes import TUNED_SHAPES
from jaxserve.pallas.tuning import Tuned, read_tuned
from jaxserve.sharding.chips import chip_named

V6E = chip_named("v6e")
DECODES, CHUNK = TUNED_SHAPES["decode 32,8 p64"], TUNED_SHAPES["prefill 32,8 p64"]
HEURISTIC = DECODE.heuristic(sizes_of(DECODES), core_of(V6E))


def scorer(cost: Callable[[Any], float | None], bundles: Callable[[Any], int] = lambda _: 100) -> Any:
    def score(name: str, shape: Any, tiles: Any) -> Score | None:
        found = cost(tiles)
        return None if found is None else Score(cost=found, bundles=bundles(tiles), compile_s=1.0)

    return score


def test_kernels_of_problems() -> None:
    assert tiled_kernel(DECODES) is DECODE
    assert tiled_kernel(CHUNK) is PREFILL
    # A decode that the decode kernel does not support goes through prefill.
    assert tiled_kernel(replace(DECODES, head_dim=64)) is PREFILL


def test_the_best_of_fake_scores_is_found() -> None:
    """Best is a quarter of the pages and three items more, several changes from where it starts."""
    best = replace(HEURISTIC, pages=HEURISTIC.pages // 4, items=HEURISTIC.items + 3)
    distance = scorer(lambda t: 10 + abs(t["pages"] - best.pages) + 3 * abs(t["items"] - best.items))
    found = tune("decode", DECODES, V6E, distance)
    assert found.best == asdict(best)
    assert found.heuristic == asdict(HEURISTIC)
    assert found.gain == pytest.approx((10 + HEURISTIC.pages - best.pages + 3 * 3) / 10)
    assert (found.kernel, found.problem) == ("decode", "32,8 h128 p64 bfloat16 bfloat16")
    assert found.tried[0] == (asdict(HEURISTIC), 1.0)
    assert len({str(tiles) for tiles, _ in found.tried}) == len(found.tried)


def test_all_that_is_tried_fits() -> None:
    sizes, core = sizes_of(CHUNK), core_of(V6E)
    tried: list[dict[str, Any]] = []
    tune("prefill", CHUNK, V6E, scorer(lambda tiles: tried.append(tiles) or 1 / (1 + tiles["unroll"])))
    assert len(tried) > 5
    assert all(PREFILL.fits(sizes, core, PREFILL.tiles(**each)) for each in tried)


@pytest.mark.parametrize(
    ("cost", "bundles"),
    [
        (lambda tiles: 100 if tiles == asdict(HEURISTIC) else 98, lambda _: 100),
        (lambda tiles: 100 if tiles == asdict(HEURISTIC) else None, lambda _: 100),
        (lambda tiles: tiles["items"], lambda tiles: 100 if tiles == asdict(HEURISTIC) else 151),
    ],
    ids=["little better", "fail", "too long"],
)
def test_the_heuristic_stays_unless_beaten_well(cost: Any, bundles: Any) -> None:
    found = tune("decode", DECODES, V6E, scorer(cost, bundles))
    assert found.best == found.heuristic
    assert found.gain == 1
    assert len(found.tried) > 2


def test_a_heuristic_that_fails_is_an_error() -> None:
    with pytest.raises(ValueError, match="decode: the heuristic's tiles"):
        tune("decode", DECODES, V6E, scorer(lambda _: None))


def tuning(**changes: Any) -> Tuning:
    plain = Tuning(
        shape="decode 32,8 p64",
        kernel="decode",
        problem="p",
        heuristic={"pages": 4, "items": 4},
        best={"pages": 8, "items": 4},
        gain=1.25,
        tried=[],
    )
    return replace(plain, **changes)


def test_tables_hold_what_is_better_and_keep_the_rest() -> None:
    old = Tuned(by="b", gain=1.1, tiles={"pages": 1, "items": 1})
    before = {"decode": {"p": old, "other": old, "worse": old}, "prefill": {"p": old}}
    worse = tuning(problem="worse", best={"pages": 4, "items": 4}, gain=1.0)
    after = merged(before, [tuning(), worse], "c")
    assert after["decode"] == {"other": old, "p": Tuned(by="c", gain=1.25, tiles={"pages": 8, "items": 4})}
    assert after["prefill"] == before["prefill"]
    assert "worse" in before["decode"]
    assert table("v6e", [tuning(), worse]).row_count == 2


def test_the_command_writes_what_schedules_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def report(topology: object, kernel: str, name: str, shape: object, tiles: Any) -> StaticReport | Failure:
        assert (kernel, name) == (OURS, "decode 32,8 p64")
        if tiles["items"] > HEURISTIC.items:
            return Failure(kernel=kernel, shape=name, reason="no room")
        return StaticReport(
            kernel=kernel, shape=name, compile_s=1.0, compile_cpu_s=1.0, compute_s=1.0, fetch_s=1.0,
            useful_fraction=1 / (tiles["pages"] + 1), issued_fraction=1.0, cycles=100, border_cycles=None, dma_starts=1,
            loop_spills=0, spilled_vectors=0, vmem_bytes=0, smem_bytes=0, temp_bytes=0, bundles=1,
        )  # fmt: skip

    monkeypatch.setattr(kernels, "report_kernel", report)
    monkeypatch.setattr("jaxserve.sharding.topology.require_compiler", lambda _: None)
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"{name} 1.2")
    flags = ["bench", "tune", "--topology", "v6e:1x1", "--problem", "decode 32,8 p64"]
    assert main([*flags, "--write", "--folder", str(tmp_path), "--json"]) == 0
    (said,) = json.loads(capsys.readouterr().out)["v6e"]
    (found,) = read_tuned("v6e", tmp_path)["decode"].values()
    assert said["best"] == found.tiles
    assert found.tiles == {"pages": 1, "items": HEURISTIC.items}
    assert found.by == "schedule, libtpu libtpu 1.2"
    assert main(flags) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 120
    assert main([*flags, "--folder", str(tmp_path)]) == 2


def test_tiles_are_for_ours_only() -> None:
    with pytest.raises(ValueError, match="not cut by our tiles"):
        lower(JAX_RAGGED, DECODES, V6E, None, {"pages": 1, "items": 1})  # type: ignore[arg-type]  # nothing is lowered


def test_tiles_are_timed_and_what_fails_has_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(DECODES, num_seqs=1, context=64)
    timed: list[int] = []

    def stopwatch(step: Callable[[Any], Any], states: list[Any], rounds: int) -> float:
        timed.append(len(states))
        if len(timed) > 1:
            raise RuntimeError("RESOURCE_EXHAUSTED: vmem")
        changed = jax.eval_shape(step, states[0])
        assert [each.shape for each in changed] == [each.shape for each in states[0]]
        return 0.5

    monkeypatch.setattr(kernel_clock, "time_on_device", stopwatch)
    monkeypatch.setattr(kernel_clock, "MAX_STATES", 2)
    score = clock_tiles("decode", small, {"pages": 1, "items": 2})
    assert score is not None
    assert score.cost == 0.5
    assert timed == [2]
    assert clock_tiles("decode", small, {"pages": 1, "items": 2}) is None


def test_there_must_be_a_tpu_to_time_on() -> None:
    if jax.default_backend() != "cpu":
        pytest.skip("it has one")
    with pytest.raises(ConfigError, match="There is no TPU here"):
        tpu_here()
