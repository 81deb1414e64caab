"""The command line: `jaxserve COMMAND`.

One module a command; each adds its own flags to the parser and, when chosen, imports what it needs and runs. Nothing
heavy is imported before a command is chosen, so `--help` answers at once. An error of ours becomes one sentence on
standard error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jaxserve.cli import aot, chat, doctor, plan, pull, serve, version
from jaxserve.cli import compile as compile_bundle
from jaxserve.cli.bench import subjects as bench
from jaxserve.cli.parsing import Parser
from jaxserve.core.environment import leave_out_absent_tpu, take_gpu_memory
from jaxserve.core.errors import JaxserveError

INTERRUPTED = 130
"""What a shell reports for a command ended by SIGINT."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command; a chosen command's `run` is in the namespace."""
    parser = Parser(prog="jaxserve", description="Serve large language models with JAX.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (serve, chat, compile_bundle, aot, plan, pull, doctor, bench, version):
        command.add_command(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: Arguments after the program's name; the process's own by default.

    Returns:
        The exit code: 0 on success, 1 if the command failed, 2 for wrong arguments.
    """
    arguments = build_parser().parse_args(argv)
    leave_out_absent_tpu()
    take_gpu_memory()
    try:
        code: int = arguments.run(arguments)
    except JaxserveError as error:
        print(f"jaxserve: {error.message}", file=sys.stderr)
        return 2 if error.kind == "config_error" else 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return code
