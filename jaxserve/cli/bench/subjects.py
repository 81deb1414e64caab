"""`jaxserve bench WHAT`: measure a server from outside or abuse it, a part of the engine, or kernels; tune kernels.

One module a subject, as with commands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxserve.cli.bench import abuse, engine, kernels, serve, step, tune

if TYPE_CHECKING:
    from jaxserve.cli.parsing import Commands


def add_command(commands: Commands) -> None:
    """Adds the command and what it can measure."""
    parser = commands.add_parser("bench", help="measure a server, the engine or kernels", description="Measure.")
    subjects = parser.add_subparsers(title="what to measure", metavar="WHAT", required=True)
    for subject in (serve, engine, step, kernels, tune, abuse):
        subject.add_command(subjects)
