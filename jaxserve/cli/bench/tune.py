"""`jaxserve bench tune`: tile sizes of the TPU kernels, tuned by their schedules or by this machine's clock."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from jaxserve.cli.console import console
from jaxserve.cli.parsing import DefaultsFormatter, add_switch
from jaxserve.cli.signals import terminable

if TYPE_CHECKING:
    from jaxserve.bench.tuner import Scorer, Tuning
    from jaxserve.cli.parsing import Commands
    from jaxserve.sharding.chips import Chip


def add_command(subjects: Commands) -> None:
    """Adds the subject."""
    parser = subjects.add_parser(
        "tune",
        help="tile sizes of the attention kernels",
        description="With --topology, try tile sizes of the attention kernels by the schedules that the compiler makes "
        "for a TPU that need not be here. Without, by the time they take on this machine's TPU. Each starts from the "
        "heuristic's tiles; those that beat them by more than 3 % are written with --write.",
        formatter_class=DefaultsFormatter,
    )
    parser.add_argument(
        "--topology", action="append", default=[], metavar="NAME", help="read schedules for it; may be repeated"
    )
    parser.add_argument(
        "--problem", action="append", default=[], metavar="TEXT", help="only problems whose names hold it; repeatable"
    )
    add_switch(parser, "--write", help="write the tables that the kernels read")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="write them there, not into the package")
    add_switch(parser, "--json", help="print JSON instead of tables")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Tunes, a chip after the other."""
    from importlib.metadata import version

    from jaxserve.bench.kernels import score_tiles
    from jaxserve.core.errors import ConfigError
    from jaxserve.sharding.topology import parse_topology, require_compiler
    from jaxserve.telemetry import logging

    if arguments.folder is not None and not (arguments.write and arguments.folder.is_dir()):
        raise ConfigError("--folder must be a folder that exists, and needs --write.")
    logging.install(level="warning" if arguments.json else "info")
    topologies = [parse_topology(name) for name in arguments.topology]
    for topology in topologies:
        if topology.chip.platform != "tpu":
            raise ConfigError(f"--topology: only TPUs' kernels have tiles to tune, and {topology} has no TPU.")
        require_compiler(topology)
    results = {}
    for topology in topologies:
        by = f"schedule, libtpu {version('libtpu')}"
        results[topology.chip.name] = _tune_chip(arguments, topology.chip, score_tiles(topology), by)
    if not topologies:
        from jaxserve.bench.kernel_clock import clock_tiles, tpu_here

        results[tpu_here().name] = _tune_chip(arguments, tpu_here(), clock_tiles, f"clock, jax {version('jax')}")
    if arguments.json:
        print(json.dumps({chip: [each.as_json() for each in tunings] for chip, tunings in results.items()}, indent=2))
    return 0


def _tune_chip(arguments: argparse.Namespace, chip: Chip, score: Scorer, by: str) -> list[Tuning]:
    from jaxserve.bench.tuner import merged, table, tune
    from jaxserve.cli.bench.kernels import chosen
    from jaxserve.launch.progress import ProgressDisplay
    from jaxserve.pallas.paged_attention.shapes import TUNED_SHAPES
    from jaxserve.pallas.tuning import FOLDER, read_tuned, write_tuned

    shapes, what = chosen(TUNED_SHAPES, arguments.problem), f"Tuning for {chip.title}"
    folder = arguments.folder or FOLDER
    tunings: list[Tuning] = []
    with terminable(), ProgressDisplay() as progress:
        progress(what, 0, len(shapes))
        for name, shape in shapes.items():
            tunings.append(tune(name, shape, chip, score))
            if arguments.write:
                # After each problem: a run takes long.
                write_tuned(chip.name, merged(read_tuned(chip.name, folder), tunings, by), folder)
            progress(what, len(tunings), len(shapes))
    if not arguments.json:
        terminal = console()
        terminal.print(table(f"{chip.title}: tiles, {by}", tunings))
    return tunings
