"""`jaxserve bench kernels`: attention kernels read from their schedules, or timed on this machine's device."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from jaxserve.cli.console import console
from jaxserve.cli.parsing import DefaultsFormatter, add_switch
from jaxserve.cli.signals import terminable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxserve.cli.parsing import Commands
    from jaxserve.pallas.paged_attention.shapes import AttentionShape


def add_command(subjects: Commands) -> None:
    """Adds the subject."""
    parser = subjects.add_parser(
        "kernels",
        help="attention kernels",
        description="With --topology, compile the attention kernels for a TPU that need not be here and read their "
        "schedules: time to compute beside time to fetch, ours beside JAX's own. Without, time them on this machine's "
        "TPU or GPU beside the rates of copies and matmuls measured in the same run.",
        formatter_class=DefaultsFormatter,
    )
    parser.add_argument(
        "--topology",
        action="append",
        default=[],
        metavar="NAME",
        help="read schedules for it, such as v6e:2x4; may be repeated",
    )
    parser.add_argument("--kernels", type=names, metavar="NAME,...", help="only these kernels, such as jaxserve")
    parser.add_argument(
        "--problem", action="append", default=[], metavar="TEXT", help="only problems whose names hold it; repeatable"
    )
    add_switch(parser, "--json", help="print JSON instead of tables")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON there")
    parser.set_defaults(run=run)


def names(text: str) -> tuple[str, ...]:
    """Comma-separated words."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def run(arguments: argparse.Namespace) -> int:
    """Reports; fails if one of our kernels did."""
    from jaxserve.core.errors import ConfigError
    from jaxserve.telemetry import logging

    if arguments.out is not None and not arguments.out.parent.is_dir():
        raise ConfigError(f"--out: there is no folder {arguments.out.parent}; make it first.")
    logging.install(level="warning" if arguments.json else "info")
    return _run_static(arguments) if arguments.topology else _run_on_device(arguments)


def _run_static(arguments: argparse.Namespace) -> int:
    from jaxserve.bench.kernel_names import OURS, STATIC
    from jaxserve.bench.kernels import Failure, report_kernels, table
    from jaxserve.launch.progress import ProgressDisplay
    from jaxserve.pallas.paged_attention.shapes import STATIC_SHAPES
    from jaxserve.sharding.topology import parse_topology

    topologies = [parse_topology(name) for name in arguments.topology]
    shapes = chosen(STATIC_SHAPES, arguments.problem)
    kernels = _kernels(STATIC, arguments.kernels)
    runs = []
    with terminable(), ProgressDisplay() as progress:
        for topology in topologies:
            runs.append((topology, report_kernels(topology, kernels, shapes, progress)))
    text = json.dumps(
        {"topologies": {str(topology): [each.as_json() for each in reports] for topology, reports in runs}}, indent=2
    )
    _write(arguments, text)
    failures = [each for _, reports in runs for each in reports if isinstance(each, Failure)]
    if not arguments.json:
        terminal = console()
        for topology, reports in runs:
            terminal.print(table(topology, reports))
        for each in failures:
            terminal.print(f"{each.shape}, {each.kernel}: {each.reason}", style="yellow", markup=False)
    return 1 if any(each.kernel == OURS for each in failures) else 0


def _run_on_device(arguments: argparse.Namespace) -> int:
    import jax

    from jaxserve.bench.kernel_clock import Ceilings, available, clock_kernels, table
    from jaxserve.bench.kernel_names import OURS, TIMED
    from jaxserve.bench.kernels import Failure
    from jaxserve.launch.progress import ProgressDisplay
    from jaxserve.pallas.paged_attention.shapes import DEVICE_SHAPES

    kernels = _kernels(TIMED, arguments.kernels)
    shapes = chosen(DEVICE_SHAPES, arguments.problem)
    available(jax.default_backend())
    with ProgressDisplay() as progress:
        progress("Measuring ceilings", 0, 1)
        ceilings = Ceilings.measure()
        progress("Measuring ceilings", 1, 1)
        reports = clock_kernels(shapes, kernels, ceilings, progress)
    text = json.dumps({**asdict(ceilings), "kernels": [each.as_json() for each in reports]}, indent=2)
    _write(arguments, text)
    failures = [each for each in reports if isinstance(each, Failure)]
    if not arguments.json:
        terminal = console()
        terminal.print(table(ceilings, reports))
        for each in failures:
            terminal.print(f"{each.shape}, {each.kernel}: {each.reason}", style="yellow", markup=False)
    return 1 if any(each.kernel == OURS for each in failures) else 0


def chosen(shapes: Mapping[str, AttentionShape], wanted: list[str]) -> dict[str, AttentionShape]:
    """The problems whose names hold one of the words; all without words.

    Raises:
        ConfigError: There is none.
    """
    from jaxserve.core.errors import ConfigError

    found = {name: shape for name, shape in shapes.items() if not wanted or any(word in name for word in wanted)}
    if not found:
        raise ConfigError(f"--problem: no problem holds {', '.join(wanted)}; there are {'; '.join(shapes)}.")
    return found


def _kernels(known: tuple[str, ...], wanted: tuple[str, ...] | None) -> tuple[str, ...]:
    from jaxserve.core.errors import ConfigError

    unknown = [name for name in wanted or () if name not in known]
    if unknown:
        raise ConfigError(f"--kernels: {', '.join(unknown)} is none of {', '.join(known)}.")
    return wanted or known


def _write(arguments: argparse.Namespace, text: str) -> None:
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")
    if arguments.json:
        print(text)
