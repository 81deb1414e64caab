"""`jaxserve bench serve`: load on any OpenAI URL."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from jaxserve.cli.parsing import DefaultsFormatter, above_zero, add_switch, natural, number, positive, positives

if TYPE_CHECKING:
    from jaxserve.bench.serve import Plan
    from jaxserve.cli.parsing import Commands

OBJECTIVES = ("ttft", "tpot", "e2e")

BUSY_CORES = 0.8
"""Share of its one core from which the load generator may delay what it measures."""


def add_command(subjects: Commands) -> None:
    """Adds the subject."""
    parser = subjects.add_parser(
        "serve",
        help="load on any OpenAI URL",
        description="Send completions or chats to any OpenAI URL and report time to first token (ttft), time per "
        "output token after it (tpot), gaps between pieces of a stream (itl), whole requests (e2e), throughput and "
        "failures.",
        formatter_class=DefaultsFormatter,
    )
    to = parser.add_argument_group("server")
    to.add_argument("--url", default="http://127.0.0.1:8000", help="where it is")
    to.add_argument(
        "--endpoint", choices=("completions", "chat"), default="completions", help="what of its API to call"
    )
    to.add_argument("--model", help="which of its models; none: its first")
    to.add_argument("--api-key", help="key to present")
    to.add_argument(
        "--timeout", type=above_zero, default=600.0, metavar="S", help="longest silence before a request fails"
    )
    load = parser.add_argument_group("load")
    how = load.add_mutually_exclusive_group()
    how.add_argument(
        "--concurrency", type=positives, metavar="N,...", help="requests in flight, a run each (default: 1)"
    )
    how.add_argument("--rate", type=above_zero, metavar="R", help="mean requests a second of a Poisson process")
    load.add_argument("--num-requests", type=positive, default=100, metavar="N", help="requests of a run")
    load.add_argument("--warmup", type=natural, default=2, metavar="N", help="requests before each run, not reported")
    load.add_argument("--seed", type=natural, default=0, help="draws prompts and arrivals")
    what = parser.add_argument_group("requests")
    what.add_argument("--input-len", type=positive, default=128, metavar="N", help="tokens of a prompt")
    what.add_argument("--output-len", type=positive, default=64, metavar="N", help="tokens to generate")
    what.add_argument("--spread", type=spread, default=0.0, help="lengths vary by this share up and down")
    what.add_argument(
        "--prefix-len", type=natural, default=0, metavar="N", help="tokens of a prompt that requests share"
    )
    what.add_argument(
        "--num-prefixes", type=positive, default=1, metavar="N", help="how many different shared prefixes"
    )
    what.add_argument("--prompt-kind", choices=("auto", "tokens", "text"), default="auto", help="form of the prompts")
    what.add_argument("--temperature", type=number, default=0.0, help="0 is greedy")
    add_switch(what, "--ignore-eos", default=True, help="generate all tokens asked for")
    out = parser.add_argument_group("report")
    out.add_argument(
        "--slo", type=objective, action="append", default=[], metavar="NAME=MS", help="bound of a good request"
    )
    add_switch(out, "--json", help="print JSON instead of the table")
    out.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON there")
    parser.set_defaults(run=run)


def objective(text: str) -> tuple[str, float]:
    """Reads `ttft=500`: a latency and its bound in milliseconds."""
    name, _, bound = text.partition("=")
    if name not in OBJECTIVES:
        raise argparse.ArgumentTypeError(f"{text} is not {', '.join(OBJECTIVES)} and a bound in ms, such as ttft=500")
    return name, above_zero(bound)


def spread(text: str) -> float:
    """A share in [0, 1)."""
    value = number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def plan_of(arguments: argparse.Namespace) -> Plan:
    """The benchmark that the flags describe."""
    from jaxserve.bench.serve import Load, Plan
    from jaxserve.bench.workload import Shape
    from jaxserve.core.errors import ConfigError

    if arguments.prefix_len >= arguments.input_len:
        raise ConfigError("--prefix-len must be less than --input-len: each prompt needs a token of its own.")
    if arguments.output is not None and not arguments.output.parent.is_dir():
        raise ConfigError(f"--output: there is no folder {arguments.output.parent}; make it first.")
    if arguments.rate is not None:
        loads: tuple[Load, ...] = (Load(rate=arguments.rate),)
    else:
        loads = tuple(Load(concurrency=number) for number in arguments.concurrency or (1,))
    return Plan(
        url=arguments.url,
        endpoint=arguments.endpoint,
        model=arguments.model,
        api_key=arguments.api_key,
        shape=Shape(
            num_requests=arguments.num_requests,
            input_tokens=arguments.input_len,
            output_tokens=arguments.output_len,
            length_spread=arguments.spread,
            prefix_tokens=arguments.prefix_len,
            num_prefixes=arguments.num_prefixes,
        ),
        loads=loads,
        num_warmup=arguments.warmup,
        seed=arguments.seed,
        temperature=arguments.temperature,
        ignore_eos=arguments.ignore_eos,
        prompt_kind=arguments.prompt_kind,
        timeout_s=arguments.timeout,
        objective_ms=dict(arguments.slo),
    )


def run(arguments: argparse.Namespace) -> int:
    """Loads a server; fails if any request did."""
    from rich.console import Console

    from jaxserve.bench import report
    from jaxserve.bench.serve import run_plan
    from jaxserve.launch.progress import ProgressDisplay
    from jaxserve.telemetry import logging

    logging.install(level="warning" if arguments.json else "info")
    plan = plan_of(arguments)
    with ProgressDisplay() as progress:
        reports = run_plan(plan, progress)
    text = json.dumps({"url": plan.url, "runs": [each.as_json() for each in reports]}, indent=2)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n")
    if arguments.json:
        print(text)
    else:
        console = Console()
        console.print(report.table(reports))
        for each in reports:
            for reason, count in each.failures.items():
                console.print(f"{each.load}: {count} failed: {reason}", style="red", markup=False)
            if each.client_cores > BUSY_CORES:
                busy = (
                    f"{each.load}: the load generator kept a core busy, so these may be its figures, not the server's"
                )
                console.print(busy, style="yellow", markup=False)
    return 1 if any(each.num_failed for each in reports) else 0
