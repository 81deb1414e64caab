"""`jaxserve serve MODEL`: serve a model through the OpenAI API until told to stop."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from jaxserve.core.config import ServeConfig, add_arguments, load
from jaxserve.core.environment import warn_of_service_links

if TYPE_CHECKING:
    from jaxserve.cli.parsing import Commands


def add_command(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "serve",
        help="serve a model through the OpenAI API",
        description="Serve a model through the OpenAI API. Each flag is also a key of the YAML file "
        "(max_num_seqs: 8) and an "
        "environment variable (JAXSERVE_MAX_NUM_SEQS=8); a flag goes before the environment, and that before the file.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="a preset, a Hugging Face id, a folder, a .gguf file, or random:PRESET (default: smollm2-135m)",
    )
    parser.add_argument("--config", metavar="FILE", type=Path, help="YAML file of these settings")
    add_arguments(parser)
    parser.set_defaults(run=run)


def config_of(arguments: argparse.Namespace) -> ServeConfig:
    """The configuration that flags, environment and file amount to.

    Raises:
        ConfigError: Unknown names or wrong values.
    """
    given = vars(arguments)
    return load({setting.name: given[setting.name] for setting in fields(ServeConfig)}, file=arguments.config)


def run(arguments: argparse.Namespace) -> int:
    """Serves until SIGTERM, SIGINT or SIGHUP."""
    config = config_of(arguments)
    from jaxserve.telemetry import logging

    logging.install(level=config.log_level, as_json=config.log_format == "json")
    warn_of_service_links()
    from jaxserve.launch import serve
    from jaxserve.launch.progress import ProgressDisplay

    with ProgressDisplay() as progress:
        serve.run(config, progress)
    return 0
