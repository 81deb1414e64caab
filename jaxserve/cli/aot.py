"""`jaxserve aot`: every preset's programs compiled for every slice of `configs/topologies`, and checked."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from jaxserve.cli.console import console
from jaxserve.cli.parsing import add_switch
from jaxserve.cli.signals import terminable
from jaxserve.core.errors import ConfigError

if TYPE_CHECKING:
    from jaxserve.cli.parsing import Commands
    from jaxserve.launch.aot_suite import Case, Outcome

GIB = 1 << 30
MIB = 1 << 20


def add_command(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "aot",
        help="compile the presets for TPU slices that are not here, and check them",
        description="Compile every program of the presets for the slices in configs/topologies, with serve's defaults, "
        "and print what memory they take. Checks that a decode step changes the KV pool in place and that devices "
        "exchange nothing that the sharding does not call for.",
    )
    parser.add_argument("--topologies", metavar="DIR", type=Path, help="folder of slices (default: configs/topologies)")
    parser.add_argument(
        "--only",
        metavar="NAME",
        action="append",
        default=[],
        help="only this slice (v6e:2x4) or this preset; given again, only what all of them name",
    )
    add_switch(parser, "--largest", help="each program in its largest size only")
    add_switch(parser, "--json", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compiles and checks; 1 if something is wrong."""
    from jaxserve.launch.aot_suite import default_topologies_dir, read_cases, run_cases
    from jaxserve.launch.progress import ProgressDisplay
    from jaxserve.telemetry import logging

    logging.install(level="info")
    folder = arguments.topologies or default_topologies_dir()
    cases = chosen(read_cases(folder), arguments.only, folder)
    started = time.monotonic()
    with terminable(), ProgressDisplay() as progress:
        outcomes = list(run_cases(cases, largest_only=arguments.largest, progress=progress))
    if arguments.json:
        print(json.dumps([outcome.as_json() for outcome in outcomes], indent=1))
    else:
        terminal = console()
        terminal.print(_table(outcomes, time.monotonic() - started))
        for outcome in outcomes:
            for problem in outcome.problems:
                terminal.print(f"{outcome.case.model} on {outcome.case.topology}: {problem}", markup=False)
    return 1 if any(outcome.problems for outcome in outcomes) else 0


def chosen(cases: list[Case], names: list[str], folder: Path) -> list[Case]:
    """The cases that every name is the slice or the preset of.

    Args:
        cases: What there is.
        names: Slices and presets.
        folder: Where the cases are from.

    Raises:
        ConfigError: There are none.
    """
    if not cases:
        raise ConfigError(f"--topologies: {folder} has no .json file of a slice and its presets; name another folder.")
    slices = dict.fromkeys(str(case.topology) for case in cases)
    models = dict.fromkeys(case.model for case in cases)
    wrong = [name for name in names if name not in slices and name not in models]
    if wrong:
        raise ConfigError(
            f"--only: {', '.join(map(repr, wrong))} is none of the slices {', '.join(slices)} and none of the presets "
            f"{', '.join(models)}."
        )
    found = [case for case in cases if {str(case.topology), case.model}.issuperset(names)]
    if not found:
        raise ConfigError(f"--only: nothing is at once {' and '.join(names)}; name a slice, a preset, or one of each.")
    return found


def _table(outcomes: list[Outcome], seconds: float) -> object:
    from rich.table import Column, Table

    grid = Table(
        *(Column(name, no_wrap=True) for name in ("slice", "model")),
        *(
            "programs",
            "weights",
            "pool",
            "temporaries",
            "decode's MiB",
            "code MiB",
            "files MiB",
            "HBM",
            "s",
        ),
        title="A device's memory, GiB",
        caption=f"{sum(len(o.report.programs) for o in outcomes if o.report)} programs in {seconds / 60:.1f} minutes.",
    )
    for outcome in outcomes:
        report, case = outcome.report, outcome.case
        if report is None:
            weights = f"{outcome.weight_bytes / GIB:.1f}"
            grid.add_row(str(case.topology), case.model, "does not fit", weights)
            continue
        state = "" if not outcome.problems else " (!)"
        grid.add_row(
            str(case.topology),
            case.model,
            f"{len(report.programs)}{state}",
            *(f"{size / GIB:.2f}" for size in (report.weight_bytes, report.kv_bytes, report.temporary_bytes)),
            *(
                f"{size / MIB:.1f}"
                for size in (outcome.decode_temporary_bytes, report.code_bytes, report.serialized_bytes)
            ),
            f"{report.total_bytes / GIB:.1f} of {case.topology.chip.hbm_bytes / GIB:.0f}",
            f"{outcome.seconds:.0f}",
        )
    return grid
