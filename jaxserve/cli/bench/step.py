"""`jaxserve bench step`: a decode step on the device beside the least it can take."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from jaxserve.cli.console import console
from jaxserve.cli.parsing import DefaultsFormatter, add_switch, positive, positives

if TYPE_CHECKING:
    from jaxserve.cli.parsing import Commands


def add_command(subjects: Commands) -> None:
    """Adds the subject."""
    from jaxserve.core.config import add_arguments

    parser = subjects.add_parser(
        "step",
        help="a decode step on the device",
        description="Time the decode step of a model on this machine's devices beside the time that reading its "
        "weights, keys and values takes at the memory bandwidth measured in the same run. Takes the flags of serve.",
        formatter_class=DefaultsFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="random:PRESET, or any model that can be served")
    parser.add_argument("--seqs", type=positives, default="1,8,64", metavar="N,...", help="sequences, a step each")
    parser.add_argument("--context", type=positive, default=1024, metavar="N", help="tokens each sequence sees")
    add_switch(parser, "--json", help="print JSON instead of the table")
    add_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measures the steps."""
    from jaxserve.bench.step import measure_steps, table
    from jaxserve.cli.serve import config_of
    from jaxserve.core.environment import warn_of_service_links
    from jaxserve.engine.compile import compile_holders
    from jaxserve.launch.build import find_model, plan_replica
    from jaxserve.launch.loading import load_weights
    from jaxserve.launch.progress import ProgressDisplay
    from jaxserve.sharding.mesh import make_mesh
    from jaxserve.telemetry import logging

    arguments.config = None
    config = config_of(arguments)
    if config.max_model_len is None:
        config = replace(config, max_model_len=arguments.context)
    logging.install(level="warning" if arguments.json else "info")
    warn_of_service_links()
    shape = config.mesh
    with ProgressDisplay() as progress:
        model = find_model(config, progress)
        mesh = make_mesh(data=shape.data, expert=shape.expert, tensor=shape.tensor)
        replica, _ = plan_replica(config, model.spec, mesh)
        hold = partial(replica.hold, executables=compile_holders(replica))
        params = load_weights(model.source, model.spec, replica, hold, seed=config.seed, progress=progress)
        times = measure_steps(replica, params, [(number, arguments.context) for number in arguments.seqs])
    if arguments.json:
        print(json.dumps({"steps": [each.as_json() for each in times]}, indent=2))
    else:
        console().print(table(times))
    return 0
