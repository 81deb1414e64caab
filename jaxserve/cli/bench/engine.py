"""`jaxserve bench engine`: host time of a step, or what many requests leave behind."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from jaxserve.cli.console import console
from jaxserve.cli.parsing import DefaultsFormatter, add_switch, positive, positives

if TYPE_CHECKING:
    from jaxserve.cli.parsing import Commands


def add_command(subjects: Commands) -> None:
    """Adds the subject."""
    parser = subjects.add_parser(
        "engine",
        help="host time of a step",
        description="Let sequences decode on a device that takes no time, and report what the host takes for a step.",
        formatter_class=DefaultsFormatter,
    )
    parser.add_argument("--num-seqs", type=positives, default="64,256", metavar="N,...", help="sequences, a run each")
    parser.add_argument("--input-len", type=positive, default=128, metavar="N", help="tokens of a prompt")
    parser.add_argument("--output-len", type=positive, default=256, metavar="N", help="tokens to generate")
    parser.add_argument(
        "--requests",
        type=positive,
        metavar="N",
        help="instead push so many short requests through; fails if one is not answered or memory grows",
    )
    add_switch(parser, "--json", help="print JSON instead of the table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measures the host's part of a step, or what many requests leave behind."""
    from jaxserve.bench.engine import endurance_table, endure, measure_host_time, table

    if arguments.requests is not None:
        result = endure(arguments.requests)
        if arguments.json:
            print(json.dumps(result.as_json(), indent=2))
        else:
            console().print(endurance_table(result))
        return 0 if result.clean else 1
    results = [
        measure_host_time(number, prompt_tokens=arguments.input_len, output_tokens=arguments.output_len)
        for number in arguments.num_seqs
    ]
    if arguments.json:
        print(json.dumps({"runs": [result.as_json() for result in results]}, indent=2))
    else:
        console().print(table(results))
    return 0
