"""`jaxserve version`: this release and the versions of what it stands on."""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from jaxserve.cli.parsing import add_switch

if TYPE_CHECKING:
    from jaxserve.cli.parsing import Commands

PACKAGES = ("jaxserve", "jax", "jaxlib", "flax", "numpy")
"""Packages whose versions matter in a report."""


def add_command(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "version", help="print versions", description="Print this release and what it stands on."
    )
    add_switch(parser, "--json", help="print JSON")
    parser.set_defaults(run=run)


def versions() -> dict[str, str | None]:
    """Package name to its installed version, or None if it is not installed."""
    return {"python": platform.python_version(), **{name: installed_version(name) for name in PACKAGES}}


def run(arguments: argparse.Namespace) -> int:
    """Prints the versions."""
    found = versions()
    if arguments.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name} {value or 'not installed'}")
    return 0


def installed_version(name: str) -> str | None:
    """Version of an installed package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
