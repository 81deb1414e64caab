"""`jaxserve pull MODEL`: fetch a model, so that serving it later needs no network."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from jaxserve.cli.parsing import add_switch

if TYPE_CHECKING:
    from jaxserve.cli.parsing import Commands


def add_command(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "pull",
        help="fetch a model",
        description="Fetch a model and print where it is. What is already here is compared with its checksums and "
        "fetched again if it is damaged.",
    )
    parser.add_argument("model", metavar="MODEL", help="a preset or a Hugging Face id")
    parser.add_argument("--cache-dir", metavar="DIR", type=Path, help="where to keep it (default: the cache directory)")
    add_switch(parser, "--offline", help="only look for it on this machine")
    add_switch(parser, "--json", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Fetches the model."""
    from jaxserve.checkpoint.checksums import Check
    from jaxserve.checkpoint.sources import resolve_source
    from jaxserve.core.environment import cache_dir
    from jaxserve.launch.progress import ProgressDisplay
    from jaxserve.telemetry import logging

    logging.install()
    with ProgressDisplay() as progress:
        source = resolve_source(
            arguments.model,
            cache_dir=arguments.cache_dir or cache_dir(),
            offline=arguments.offline,
            progress=progress,
            check=Check.REPAIR,
        )
    if arguments.json:
        print(json.dumps({"name": source.name, "kind": source.kind.value, "path": str(source.path)}))
    else:
        print(source.path)
    return 0
