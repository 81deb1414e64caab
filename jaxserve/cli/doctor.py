"""`jaxserve doctor`: what is wrong with this machine for serving, and what to do about it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from jaxserve.cli.console import console
from jaxserve.cli.parsing import DefaultsFormatter, above_zero, add_switch, port

if TYPE_CHECKING:
    from jaxserve.cli.parsing import Commands

COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


def add_command(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "doctor",
        help="find out what is wrong with this machine",
        description="Check versions, devices, memory, the cache directory and the models in it, the port, and the "
        "other hosts of a slice. Exits with 1 "
        "if there is a problem; warnings do not count.",
        formatter_class=DefaultsFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address the server would listen on")
    parser.add_argument("--port", type=port, default=8000, help="port it would listen on")
    parser.add_argument("--cache-dir", metavar="DIR", type=Path, help="cache directory, if not the usual one")
    parser.add_argument(
        "--timeout", type=above_zero, default=60.0, metavar="S", help="longest JAX may take to find its devices"
    )
    add_switch(parser, "--models", default=True, help="hash the models that were fetched, about a second a GB")
    add_switch(parser, "--json", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs all checks; 1 if there is a problem."""
    from jaxserve.cli import checks
    from jaxserve.cli.model_checks import check_models
    from jaxserve.core.environment import cache_dir, cluster_environment

    folder = arguments.cache_dir or cache_dir()
    findings = [
        *checks.check_versions(),
        checks.check_plugins(),
        checks.check_devices(arguments.timeout),
        checks.check_cpu(),
        checks.check_memory(),
        checks.check_folder(folder),
        *(check_models(folder) if arguments.models and folder is not None else ()),
        checks.check_port(arguments.host, arguments.port),
        *checks.check_cluster(cluster_environment()),
    ]
    if arguments.json:
        print(
            json.dumps({"healthy": _healthy(findings), "checks": [finding.as_json() for finding in findings]}, indent=2)
        )
    else:
        _print_table(findings)
    return 0 if _healthy(findings) else 1


def _healthy(findings: list[checks.Finding]) -> bool:
    return all(finding.status != "problem" for finding in findings)


def _print_table(findings: list[checks.Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("", "what", "found", "what to do", show_lines=False)
    for finding in findings:
        colour = COLOURS[finding.status]
        table.add_row(Text(finding.status, style=colour), finding.name, Text(finding.found), Text(finding.advice))
    console().print(table)


if TYPE_CHECKING:
    from jaxserve.cli import checks
