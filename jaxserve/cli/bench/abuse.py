"""`jaxserve bench abuse`: what a server on this machine makes of malformed and costly requests."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from jaxserve.cli.console import console
from jaxserve.cli.parsing import DefaultsFormatter, above_zero, add_switch, natural, positive

if TYPE_CHECKING:
    from rich.table import Table

    from jaxserve.bench.abuse.run import AbuseReport
    from jaxserve.cli.parsing import Commands

NICENESS = 10
"""The generator gives way to the server and to the prober, which measures it."""

_MIB = 1 << 20


def add_command(subjects: Commands) -> None:
    """Adds the subject."""
    parser = subjects.add_parser(
        "abuse",
        help="malformed and costly requests to a server of your own",
        description="Send malformed and costly requests to a server on this machine, while another process asks for "
        "/health all the time; report the longest that it had to wait, the server's memory, and how requests ended. "
        "Fails if a request was answered with a 5xx, or the server does not answer in the end.",
        formatter_class=DefaultsFormatter,
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server; only one on this machine is taken")
    parser.add_argument("--api-key", help="key to present")
    parser.add_argument("--pid", type=positive, help="its process, to see the peak of its memory")
    parser.add_argument("--requests", type=natural, default=25_000, metavar="N", help="malformed requests to send")
    parser.add_argument("--concurrency", type=positive, default=8, metavar="N", help="how many of them at once")
    parser.add_argument("--seed", type=natural, default=0, help="draws them")
    add_switch(parser, "--bodies", default=True, help="also send the costly ones, one after another")
    parser.add_argument(
        "--silent", type=natural, default=0, metavar="N", help="then open N silent connections and time a new request"
    )
    parser.add_argument(
        "--patience", type=above_zero, default=1.0, metavar="S", help="how long a malformed request waits for an answer"
    )
    parser.add_argument(
        "--timeout", type=above_zero, default=60.0, metavar="S", help="longest that a costly one may take"
    )
    parser.add_argument("--max-seconds", type=above_zero, default=1800.0, metavar="S", help="longest that all may take")
    add_switch(parser, "--json", help="print JSON instead of tables")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON there")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Does it and reports; fails if the server did not take it well."""
    from jaxserve.bench.abuse.run import Plan, run_abuse
    from jaxserve.telemetry import logging

    logging.install(level="warning")
    plan = Plan(
        url=arguments.url,
        num_requests=arguments.requests,
        concurrency=arguments.concurrency,
        seed=arguments.seed,
        bodies=arguments.bodies,
        num_silent=arguments.silent,
        api_key=arguments.api_key,
        pid=arguments.pid,
        patience_s=arguments.patience,
        timeout_s=arguments.timeout,
        max_seconds=arguments.max_seconds,
    )
    report = run_abuse(plan, before_sending=lambda: os.nice(NICENESS))
    text = json.dumps(report.as_json(), indent=2)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n")
    if arguments.json:
        print(text)
    else:
        for each in tables(report):
            console().print(each)
    return 0 if report.survived else 1


def tables(report: AbuseReport) -> list[Table]:
    """The report for people."""
    from rich.table import Table

    figures = Table(title="abuse", show_header=False)
    probes, memory = report.probes, report.memory
    figures.add_row("worst /health", f"{1000 * probes['worst_s']:.0f} ms ({report.worst_at})")
    figures.add_row("99.9th percentile, median", f"{1000 * probes['p999_s']:.1f}, {1000 * probes['median_s']:.1f} ms")
    figures.add_row("probes, failed", f"{probes['number']:.0f}, {probes['failed']:.0f}")
    figures.add_row("the prober itself late by", f"{1000 * probes['late_s']:.0f} ms")
    for name, number in memory.items():
        figures.add_row(f"memory {name}", "unknown" if number is None else f"{number / _MIB:.0f} MiB")
    figures.add_row("malformed requests", f"{report.num_sent} in {report.seconds:.1f} s")
    figures.add_row("how they ended", ", ".join(f"{status}: {count}" for status, count in report.statuses.items()))
    errors = ", ".join(f"{kind}: {count}" for kind, count in report.server_errors.items())
    figures.add_row("answered with a 5xx", errors or "none")
    if (silent := report.silent) is not None:
        beside = f"{silent.status} after {1000 * silent.seconds:.0f} ms"
        figures.add_row(f"a new request beside {silent.opened} silent connections", beside)
    figures.add_row("an ordinary request at the end", f"{report.normal[0]} after {1000 * report.normal[1]:.0f} ms")
    if not report.named:
        return [figures]
    named = Table("costly request", "ended", "seconds", "worst /health, ms", title="one after another")
    for each in report.named:
        named.add_row(each.name, each.status, f"{each.seconds:.2f}", f"{1000 * each.stall_s:.0f}")
    return [figures, named]
