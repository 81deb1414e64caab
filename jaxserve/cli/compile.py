"""`jaxserve compile MODEL --topology T --out DIR`: executables for `jaxserve serve --bundle DIR`."""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from jaxserve.cli.parsing import add_switch
from jaxserve.cli.signals import terminable
from jaxserve.core.config import PLAN_SETTINGS, add_arguments

if TYPE_CHECKING:
    from jaxserve.cli.parsing import Commands


def add_command(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "compile",
        usage="%(prog)s MODEL --out DIR [--topology T] [options]",
        help="compile a model's programs into a bundle that serve loads",
        description="Compile a model's programs for this machine's CPUs or for a slice that is not here, and write "
        "them to a folder for `jaxserve serve --bundle`. No weights are read. Takes the flags of serve that decide "
        "shapes. A bundle holds machine code: load only what you trust, or sign it.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a preset, a Hugging Face id, a folder, a .gguf file, or random:PRESET"
    )
    parser.add_argument("--topology", metavar="T", default="cpu", help="cpu, or a slice such as v6e:2x4 (default: cpu)")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="the bundle's folder")
    parser.add_argument("--key", metavar="FILE", type=Path, help="sign the manifest with this file's content")
    add_switch(parser, "--json", help="print JSON")
    add_arguments(parser.add_argument_group("shapes"), PLAN_SETTINGS)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compiles."""
    from jaxserve.launch.compile import CPU, compile_bundle
    from jaxserve.launch.progress import ProgressDisplay
    from jaxserve.telemetry import logging

    logging.install(level="warning")
    given = vars(arguments)
    # Compiling in this process cannot be interrupted; nothing is left behind if the signal ends it.
    leaving = nullcontext() if arguments.topology == CPU else terminable()
    with leaving, ProgressDisplay() as progress:
        written = compile_bundle(
            arguments.model,
            arguments.topology,
            arguments.out,
            settings={name: given[name] for name in PLAN_SETTINGS if given[name] is not None},
            key=arguments.key,
            progress=progress,
        )
    if arguments.json:
        print(json.dumps({**asdict(written), "out": str(arguments.out)}, indent=2))
    else:
        print(
            f"{arguments.out}: {written.num_programs} programs for {written.topology}, "
            f"{written.num_bytes / (1 << 20):.1f} MiB."
        )
        signed = "" if arguments.key is None else f" --bundle-key {arguments.key}"
        print(f"jaxserve serve {arguments.model} --bundle {arguments.out}{signed}")
    return 0
