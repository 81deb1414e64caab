"""From timings to figures: percentiles, throughput, goodput, reasons of failures, as a table or as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from jaxserve.bench.client import Timing

PERCENTILES = (50, 90, 99)

LATENCIES = ("ttft", "tpot", "itl", "e2e")
"""Time to first token, time per output token after it, gap between pieces, all of a request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """How a latency is distributed, in milliseconds; all zero if there is no sample.

    Attributes:
        mean: Arithmetic mean.
        percentiles: Percentile to its value.
    """

    mean: float
    percentiles: Mapping[int, float]

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """The distribution of a sample; percentiles are interpolated between its neighbours."""
        ordered = sorted(second * 1e3 for second in seconds)
        mean = sum(ordered) / len(ordered) if ordered else 0.0
        return cls(mean=mean, percentiles={point: _percentile(ordered, point) for point in PERCENTILES})


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The figures of one run.

    Attributes:
        load: What load it was: `c=8`, `2 req/s`.
        duration_s: From the first request sent to the last token of the last.
        num_requests: Sent.
        failures: Reason to how many requests failed for it.
        input_tokens: Prompt tokens of the requests that succeeded.
        cached_tokens: Of those, taken from the prefix cache.
        output_tokens: Generated for the requests that succeeded.
        latencies: Each of `LATENCIES`, over the requests that succeeded.
        num_good: Requests that succeeded within the objective; None without one.
        client_cpu_s: Processor time the load generator itself took.
    """

    load: str
    duration_s: float
    num_requests: int
    failures: Mapping[str, int]
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    latencies: Mapping[str, Spread]
    num_good: int | None
    client_cpu_s: float

    @property
    def client_cores(self) -> float:
        """Share of a core that the load generator took; near 1 the figures are its own, not the server's."""
        return self.client_cpu_s / self.duration_s if self.duration_s else 0.0

    @property
    def num_failed(self) -> int:
        """Requests that failed."""
        return sum(self.failures.values())

    @property
    def rates(self) -> dict[str, float]:
        """What the server did in a second: requests, tokens in and out, and requests within the objective."""
        counts = {
            "requests_per_s": self.num_requests - self.num_failed,
            "input_tokens_per_s": self.input_tokens,
            "output_tokens_per_s": self.output_tokens,
            "total_tokens_per_s": self.input_tokens + self.output_tokens,
        }
        if self.num_good is not None:
            counts["goodput_per_s"] = self.num_good
        return {name: count / self.duration_s if self.duration_s else 0.0 for name, count in counts.items()}

    def as_json(self) -> dict[str, object]:
        """All figures, latencies in milliseconds."""
        return {
            "load": self.load,
            "duration_s": self.duration_s,
            "num_requests": self.num_requests,
            "num_failed": self.num_failed,
            "failures": dict(self.failures),
            "input_tokens": self.input_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            "client_cores": self.client_cores,
            **self.rates,
            **{
                f"{name}_ms": {"mean": spread.mean, **{f"p{p}": value for p, value in spread.percentiles.items()}}
                for name, spread in self.latencies.items()
            },
        }


def summarise(
    load: str, timings: Sequence[Timing], objective_ms: Mapping[str, float], *, client_cpu_s: float
) -> Report:
    """The figures of a run.

    Args:
        load: What load it was.
        timings: One a request, at least one.
        objective_ms: Name of a latency (`ttft`, `tpot`, `e2e`) to the most milliseconds a good request takes.
        client_cpu_s: Processor time the load generator took.
    """
    done = [timing for timing in timings if timing.failure is None]
    samples = {
        "ttft": [timing.ttft_s for timing in done if timing.ttft_s is not None],
        "tpot": [timing.tpot_s for timing in done if timing.tpot_s is not None],
        "itl": [gap for timing in done for gap in timing.gaps_s],
        "e2e": [timing.e2e_s for timing in done],
    }
    return Report(
        load=load,
        duration_s=max(timing.last_s for timing in timings) - min(timing.sent_s for timing in timings),
        num_requests=len(timings),
        failures=Counter(timing.failure for timing in timings if timing.failure is not None),
        input_tokens=sum(timing.prompt_tokens for timing in done),
        cached_tokens=sum(timing.cached_tokens for timing in done),
        output_tokens=sum(timing.output_tokens for timing in done),
        latencies={name: Spread.of(sample) for name, sample in samples.items()},
        num_good=sum(_is_good(timing, objective_ms) for timing in done) if objective_ms else None,
        client_cpu_s=client_cpu_s,
    )


def table(reports: Sequence[Report]) -> Table:
    """A table with a column a run."""
    grid = Table()
    grid.add_column("")
    for report in reports:
        grid.add_column(report.load, justify="right")
    grid.add_row("requests ok / failed", *(f"{r.num_requests - r.num_failed} / {r.num_failed}" for r in reports))
    grid.add_row("duration, s", *(f"{r.duration_s:.2f}" for r in reports))
    grid.add_row(
        "tokens in (cached) / out", *(f"{r.input_tokens} ({r.cached_tokens}) / {r.output_tokens}" for r in reports)
    )
    for name in reports[0].rates:
        label = name.replace("_per_s", "/s").replace("_", " ")
        grid.add_row(label, *(f"{report.rates[name]:.2f}" for report in reports))
    grid.add_row("load generator, cores", *(f"{report.client_cores:.2f}" for report in reports))
    for name in LATENCIES:
        grid.add_section()
        grid.add_row(f"{name} mean, ms", *(f"{r.latencies[name].mean:.1f}" for r in reports))
        for point in PERCENTILES:
            grid.add_row(f"{name} p{point}, ms", *(f"{r.latencies[name].percentiles[point]:.1f}" for r in reports))
    return grid


def _percentile(ordered: Sequence[float], point: int) -> float:
    if not ordered:
        return 0.0
    rank = (len(ordered) - 1) * point / 100
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def _is_good(timing: Timing, objective_ms: Mapping[str, float]) -> bool:
    took = {"ttft": timing.ttft_s, "tpot": timing.tpot_s or 0.0, "e2e": timing.e2e_s}
    return all((second := took[name]) is not None and second * 1e3 <= most for name, most in objective_ms.items())
