"""`jaxserve plan MODEL --topology T`: whether a model fits a slice, and how fast it is there at best."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from jaxserve.cli.console import console
from jaxserve.cli.parsing import DefaultsFormatter, above_zero, add_switch, positive, positives
from jaxserve.cli.signals import terminable
from jaxserve.core.config import PLAN_SETTINGS, add_arguments
from jaxserve.core.errors import ConfigError
from jaxserve.sharding.chips import chip_named

if TYPE_CHECKING:
    from jaxserve.cli.parsing import Commands
    from jaxserve.launch.estimate import Workload
    from jaxserve.sharding.topology import Topology


def add_command(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "plan",
        usage="%(prog)s MODEL (--topology T | --fit) [options]",
        help="does a model fit a slice, and how fast is it there",
        description="Compile a model's programs for a slice that is not here, and say what memory they take, how many "
        "sequences fit, and the least time steps can take. Times are floors: counted work over the chip's published "
        "rates. No weights are read. Takes the flags of serve that decide shapes.",
        formatter_class=DefaultsFormatter,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a preset, a Hugging Face id, a folder, a .gguf file, or random:PRESET"
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--topology", metavar="T", action="append", default=[], help="a slice, such as v6e:2x4; may repeat"
    )
    where.add_argument(
        "--fit",
        action="store_true",
        help="name the smallest slice of each chip that holds model and load, by arithmetic",
    )
    load = parser.add_argument_group("load")
    load.add_argument("--input-len", type=positive, default=1024, metavar="N", help="tokens of a prompt")
    load.add_argument("--output-len", type=positive, default=256, metavar="N", help="tokens generated for it")
    load.add_argument("--concurrency", type=positive, default=64, metavar="N", help="requests at once, if they fit")
    load.add_argument(
        "--lengths",
        type=positives,
        metavar="N,...",
        help="lengths at which to count the sequences that fit (default: 1024,4096,16384,65536)",
    )
    load.add_argument(
        "--price",
        type=_prices,
        metavar="$",
        default={},
        help="dollars a chip costs an hour: one price for all, or v6e=2.70,h100=3.00",
    )
    add_switch(parser, "--offline", help="fetch nothing")
    add_switch(parser, "--json", help="print JSON")
    add_arguments(parser.add_argument_group("shapes"), PLAN_SETTINGS)
    parser.set_defaults(run=run)


def _prices(text: str) -> Mapping[str, float]:
    """Prices by chip; the one for all others under an empty name."""
    prices = {}
    for part in text.split(","):
        name, _, price = part.strip().rpartition("=")
        try:
            prices[chip_named(name).name if name else ""] = above_zero(price)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(error.message) from error
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{error}; write 2.70, or v6e=2.70,h100=3") from error
    return prices


def price_of(prices: Mapping[str, float], topology: Topology) -> float | None:
    """What a chip of a slice costs."""
    return prices.get(topology.chip.name, prices.get(""))


def settings_of(arguments: argparse.Namespace) -> dict[str, str]:
    """The flags of serve that were given, as text by setting name."""
    given = vars(arguments)
    return {name: given[name] for name in PLAN_SETTINGS if given[name] is not None}


def run(arguments: argparse.Namespace) -> int:
    """Plans; 1 if a slice that was asked for does not hold the model."""
    from jaxserve.launch.estimate import Workload
    from jaxserve.telemetry import logging

    logging.install(level="warning")
    workload = Workload(
        input_len=arguments.input_len, output_len=arguments.output_len, concurrency=arguments.concurrency
    )
    return _fit(arguments, workload) if arguments.fit else _plan(arguments, workload)


def _plan(arguments: argparse.Namespace, workload: Workload) -> int:
    from jaxserve.launch.plan import plan
    from jaxserve.launch.plan_report import as_json, tables
    from jaxserve.launch.progress import ProgressDisplay
    from jaxserve.sharding.topology import parse_topology, require_compiler

    topologies = [parse_topology(name) for name in arguments.topology]
    _require_priced(arguments.price, topologies)
    if len(topologies) > 1:
        # Before the first is compiled; a single one may turn out to need no compiler.
        for topology in topologies:
            require_compiler(topology)
    with terminable(), ProgressDisplay() as progress:
        plans = [
            plan(
                arguments.model,
                topology,
                workload,
                settings=settings_of(arguments),
                lengths=arguments.lengths,
                offline=arguments.offline,
                progress=progress,
            )
            for topology in topologies
        ]
    if arguments.json:
        shown = [as_json(each, price_of(arguments.price, each.topology)) for each in plans]
        print(
            json.dumps(shown[0] if len(shown) == 1 else {"fits": all(p.fits for p in plans), "plans": shown}, indent=2)
        )
    else:
        terminal = console()
        for each in plans:
            terminal.print(*tables(each, price_of(arguments.price, each.topology)), sep="\n")
    return 0 if all(each.fits for each in plans) else 1


def _require_priced(prices: Mapping[str, float], topologies: Sequence[Topology]) -> None:
    chips = {topology.chip.name for topology in topologies}
    others = [name for name in prices if name and name not in chips]
    if others:
        raise ConfigError(
            f"--price: none of the slices asked for is of {' or '.join(others)}; add one with --topology, or leave the "
            "price out.",
            param="price",
        )


def _fit(arguments: argparse.Namespace, workload: Workload) -> int:
    from jaxserve.launch.fit import fit
    from jaxserve.launch.plan_report import fit_json, fit_table

    candidates = fit(arguments.model, workload, settings=settings_of(arguments), offline=arguments.offline)
    prices = [price_of(arguments.price, each.topology) for each in candidates]
    if arguments.json:
        print(json.dumps(fit_json(arguments.model, candidates, prices), indent=2))
    elif candidates:
        console().print(fit_table(arguments.model, workload, candidates, prices))
    else:
        print(f"No slice holds {arguments.model} {_why_none(arguments, workload)}.")
    return 0 if candidates else 1


def _why_none(arguments: argparse.Namespace, workload: Workload) -> str:
    """Whether it is the load or the model that is too large, and what helps: each advice has been tried."""
    from jaxserve.launch.fit import fit

    settings = settings_of(arguments)

    def fits(workload: Workload, settings: Mapping[str, str]) -> bool:
        return bool(fit(arguments.model, workload, settings=settings, offline=arguments.offline))

    others = {"--quantization int8": {**settings, "quantization": "int8"}}
    for name, flag in (("mesh", "another --mesh"), ("num_pages", "another --num-pages")):
        if name in settings:
            others[flag] = {each: value for each, value in settings.items() if each != name}
    helpful = [flag for flag, other in others.items() if other != settings and fits(workload, other)]
    requests = "1 request" if workload.concurrency == 1 else f"{workload.concurrency} requests"
    if fits(replace(workload, input_len=1, output_len=1, concurrency=1), settings):
        advice = " or ".join(["fewer or shorter ones", *helpful])
        return f"with {requests} of {workload.longest} tokens at once; try {advice}"
    return f"so, whatever the load; try {' or '.join(helpful)}" if helpful else "so, whatever the load"
