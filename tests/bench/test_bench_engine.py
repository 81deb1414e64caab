"""The host-time benchmark measures the steps it says it measures."""

from __future__ import annotations

import json

import pytest

from jaxserve.bench.engine import measure_host_time
from jaxserve.cli import main


def test_steps_in_which_all_decode() -> None:
    result = measure_host_time(8, prompt_tokens=20, output_tokens=50)
    assert result.num_seqs == 8
    # Each sequence decodes 49 times after its prefill; at the ends not all are there.
    assert 30 <= result.num_steps <= 49
    assert 0 < result.step.percentiles[50] <= result.step.percentiles[99] < 1000


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "engine", "--num-seqs", "2,4", "--input-len", "4", "--output-len", "20", "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [run["num_seqs"] for run in runs] == [2, 4]
    assert all(run["num_steps"] > 0 and run["step_ms"]["p50"] > 0 for run in runs)


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "engine", "--num-seqs", "3", "--input-len", "4", "--output-len", "20"]) == 0
    text = capsys.readouterr().out
    assert "sequences decoding" in text
    assert "p99, ms" in text
