"""The host-time benchmark measures the steps it says it measures."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from jaxserve.bench.engine import PHASES, endure, measure_host_time
from jaxserve.cli import main


def test_steps_in_which_all_decode() -> None:
    result = measure_host_time(8, prompt_tokens=20, output_tokens=50)
    assert result.num_seqs == 8
    # Each sequence decodes 49 times after its prefill; at the ends not all are there.
    assert 30 <= result.num_steps <= 49
    assert 0 < result.step.percentiles[50] <= result.step.percentiles[99] < 1000
    # The phases are parts of the step, and nothing is missing.
    assert tuple(result.phases) == PHASES
    assert all(spread.mean > 0 for spread in result.phases.values())
    assert sum(spread.mean for spread in result.phases.values()) == pytest.approx(result.step.mean)


def test_ten_thousand_requests_leave_nothing_behind() -> None:
    result = endure(10_000)
    assert (result.num_answered, result.num_left, result.kv_cache_usage) == (10_000, 0, 0)
    assert result.grown_blocks <= 1000  # of 5,000 requests: not one block each
    assert result.clean


def test_endurance_says_what_is_wrong() -> None:
    result = endure(100)
    assert not replace(result, num_answered=99).clean
    assert not replace(result, num_left=1).clean
    assert not replace(result, kv_cache_usage=0.1).clean
    assert not replace(result, grown_blocks=600).clean


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "engine", "--num-seqs", "2,4", "--input-len", "4", "--output-len", "20", "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [run["num_seqs"] for run in runs] == [2, 4]
    assert all(run["num_steps"] > 0 and run["step_ms"]["p50"] > 0 for run in runs)
    for run in runs:
        assert run["phases"].keys() == {f"{phase}_ms" for phase in PHASES}
        assert sum(phase["mean"] for phase in run["phases"].values()) == pytest.approx(run["step_ms"]["mean"])


def test_endurance_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "engine", "--requests", "300", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["num_requests"], result["num_answered"], result["num_left"]) == (300, 300, 0)
    assert main(["bench", "engine", "--requests", "300"]) == 0
    assert "answered" in capsys.readouterr().out


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "engine", "--num-seqs", "3", "--input-len", "4", "--output-len", "20"]) == 0
    text = capsys.readouterr().out
    assert "sequences" in text
    assert "p99, ms" in text
    assert all(phase in text for phase in PHASES)
