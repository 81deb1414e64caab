"""Figures of hand-made timings."""

from __future__ import annotations

import io
from itertools import pairwise

import pytest
from rich.console import Console

from jaxserve.bench.client import Timing
from jaxserve.bench.report import Spread, summarise, table


def timing(sent_s: float, *pieces_s: float, failure: str | None = None) -> Timing:
    return Timing(
        sent_s=sent_s,
        first_s=pieces_s[0] if pieces_s else None,
        last_s=pieces_s[-1] if pieces_s else sent_s + 9,
        gaps_s=tuple(after - before for before, after in pairwise(pieces_s)),
        prompt_tokens=10,
        cached_tokens=4,
        output_tokens=len(pieces_s),
        failure=failure,
    )


def test_percentiles_are_interpolated() -> None:
    spread = Spread.of([0.004, 0.001, 0.003, 0.002, 0.005])
    assert spread.mean == pytest.approx(3)
    assert spread.percentiles == pytest.approx({50: 3, 90: 4.6, 99: 4.96})


def test_a_sample_may_be_empty() -> None:
    assert Spread.of([]) == Spread(mean=0.0, percentiles={50: 0.0, 90: 0.0, 99: 0.0})


def test_figures_of_a_run() -> None:
    timings = [timing(0, 1, 2, 4), timing(1, 1.5, 5), timing(0, failure="refused"), timing(2, failure="refused")]
    report = summarise("c=2", timings, {}, client_cpu_s=2.2)
    assert report.num_requests == 4
    assert report.failures == {"refused": 2}
    assert (report.input_tokens, report.cached_tokens, report.output_tokens) == (20, 8, 5)
    assert report.duration_s == 11
    assert report.rates == pytest.approx(
        {
            "requests_per_s": 2 / 11,
            "input_tokens_per_s": 20 / 11,
            "output_tokens_per_s": 5 / 11,
            "total_tokens_per_s": 25 / 11,
        }
    )
    assert report.client_cores == pytest.approx(0.2)
    assert report.latencies["ttft"].mean == pytest.approx(750)
    assert report.latencies["tpot"].mean == pytest.approx((1500 + 3500) / 2)
    assert report.latencies["itl"].mean == pytest.approx((1000 + 2000 + 3500) / 3)
    assert report.latencies["e2e"].mean == pytest.approx(4000)


@pytest.mark.parametrize(
    ("objective", "num_good"),
    [
        ({"ttft": 700}, 1),
        ({"ttft": 1000}, 2),
        ({"tpot": 1500}, 1),
        ({"e2e": 3999}, 0),
        ({"ttft": 700, "tpot": 1500}, 0),
    ],
)
def test_goodput(objective: dict[str, float], num_good: int) -> None:
    report = summarise(
        "c=2", [timing(0, 1, 2, 4), timing(1, 1.5, 5), timing(0, failure="refused")], objective, client_cpu_s=0
    )
    assert report.num_good == num_good
    assert report.rates["goodput_per_s"] == pytest.approx(num_good / 9)


def test_one_token_has_no_time_per_output_token() -> None:
    assert timing(0, 1).tpot_s is None
    assert summarise("c=1", [timing(0, 1)], {"tpot": 1}, client_cpu_s=0).num_good == 1


def test_json_has_every_figure() -> None:
    figures = summarise("c=1", [timing(0, 1, 2)], {"ttft": 5000}, client_cpu_s=0).as_json()
    assert figures["ttft_ms"] == {"mean": 1000, "p50": 1000, "p90": 1000, "p99": 1000}
    assert figures["goodput_per_s"] == 0.5
    assert (figures["load"], figures["num_failed"], figures["failures"]) == ("c=1", 0, {})


def test_the_table_has_a_column_a_run() -> None:
    reports = [summarise(load, [timing(0, 1, 2)], {}, client_cpu_s=0) for load in ("c=1", "c=8")]
    console = Console(file=io.StringIO(), width=120)
    console.print(table(reports))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "c=1" in text
    assert "c=8" in text
    assert "ttft p99, ms" in text
    assert text.count("1000.0") == 2 * 12
