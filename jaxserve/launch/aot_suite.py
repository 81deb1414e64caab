"""All presets compiled for all slices that are looked after: what `make aot` runs.

A file of `configs/topologies/` names a slice and the presets to compile for it. Each is compiled with serve's defaults,
split over all the slice's devices, and checked: every program compiles, a decode step changes the pool in place, and
devices exchange what the sharding calls for and nothing else.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.checkpoint.presets import default_presets_dir
from jaxserve.checkpoint.sources import spec_of
from jaxserve.core.errors import ConfigError
from jaxserve.core.json_file import read_object
from jaxserve.core.resolution import MEMORY_FRACTION
from jaxserve.engine.programs import SCORED_ROWS
from jaxserve.launch.aot import AotReport, ProgramReport, aot_report, config_for
from jaxserve.launch.build import Progress
from jaxserve.launch.fit import costs_of
from jaxserve.models.costs import CostModel, StepShape
from jaxserve.sharding.topology import Topology, parse_topology

MAX_DECODE_TEMPORARY_BYTES = 64 << 20
"""What a step of one token a sequence may need besides its arguments: no second pool, no layer of it."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A preset on a slice.

    Attributes:
        model: The preset.
        topology: The slice.
    """

    model: str
    topology: Topology


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a case.

    Attributes:
        case: The case.
        seconds: How long it took.
        weight_bytes: Weights on a device.
        report: What was compiled, None if the weights do not fit.
        problems: What is wrong, a sentence each.
    """

    case: Case
    seconds: float
    weight_bytes: int
    report: AotReport | None
    problems: tuple[str, ...]

    @property
    def decode_temporary_bytes(self) -> int:
        """What the hungriest decode step needs besides its arguments."""
        return 0 if self.report is None else max((r.temporary_bytes for r in _decodes(self.report)), default=0)

    def as_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "case": {"model": self.case.model, "topology": str(self.case.topology)},
            "seconds": self.seconds,
            "weight_bytes": self.weight_bytes,
            "report": None if self.report is None else self.report.as_json(),
            "problems": list(self.problems),
        }


def default_topologies_dir() -> Path:
    """The slices that came with jaxserve, beside the presets."""
    return default_presets_dir().parent / "topologies"


def read_cases(folder: Path) -> list[Case]:
    """The cases that a folder's files name.

    Raises:
        CheckpointError: A file is no JSON object.
        ConfigError: A file is malformed or names no slice.
    """
    cases = []
    for path in sorted(folder.glob("*.json")):
        match read_object(path):
            case {"topology": str(topology), "models": list(models)}:
                cases += [Case(model=str(model), topology=parse_topology(topology)) for model in models]
            case _:
                raise ConfigError(f'{path} needs "topology" (a slice) and "models" (a list of presets).')
    return cases


def run_cases(
    cases: Sequence[Case], *, largest_only: bool = False, progress: Progress | None = None
) -> Iterator[Outcome]:
    """Compiles and checks one case after another.

    Args:
        cases: What to compile.
        largest_only: Of each program only its largest size, and the decoder also at the size of a full decode step.
        progress: Told how far each is.
    """
    for case in cases:
        started = time.monotonic()
        config = config_for(case.model, {}, case.topology)
        costs = costs_of(spec_of(case.model), config.mesh.tensor, config, case.topology.chip.platform)
        weights = costs.weight_bytes()
        if weights > MEMORY_FRACTION * case.topology.chip.serving_bytes:
            yield Outcome(case=case, seconds=0.0, weight_bytes=weights, report=None, problems=())
            continue
        report = aot_report(case.model, case.topology, largest_only=largest_only, progress=progress)
        yield Outcome(
            case=case,
            seconds=time.monotonic() - started,
            weight_bytes=report.weight_bytes,
            report=report,
            problems=tuple(problems_of(report, costs)),
        )


def problems_of(report: AotReport, costs: CostModel) -> Iterator[str]:
    """What is wrong with a replica's programs, a sentence each.

    Args:
        report: The programs.
        costs: Counts what their steps must exchange.
    """
    for each in report.failures:
        yield f"{each.name} {each.bucket} does not compile: {each.failure}"
    for each in _decodes(report):
        if each.temporary_bytes >= MAX_DECODE_TEMPORARY_BYTES:
            yield f"decode {each.bucket} needs {each.temporary_bytes >> 20} MiB besides its arguments"
    for each in report.programs:
        if each.failure is None:
            found = Counter[tuple[str, int]]()
            for exchange in each.collectives:
                found[exchange.kind, exchange.num_bytes] += exchange.count
            wanted = expected_collectives(each, costs)
            if found != wanted:
                yield f"{each.name} {each.bucket} exchanges {dict(found)}, and its sharding calls for {dict(wanted)}"


def expected_collectives(program: ProgramReport, costs: CostModel) -> Counter[tuple[str, int]]:
    """How often a program must exchange arrays, by kind and bytes.

    The decoder sums the residual stream after each split projection and after a split embedding, with int8 weights in
    other numbers and with their scales (`models/costs`); the head and the scorer gather the logits of a split
    vocabulary, the scorer a block of rows at a time.
    """
    size, times = program.bucket, 1
    match program.name:
        case "decode":
            shape = _rows(size, 0)
        case "head":
            shape = _rows(0, size)
        case "score":
            rows = min(SCORED_ROWS, size)
            shape, times = _rows(0, rows), -(-size // rows)
        case _:
            return Counter()
    return Counter({(each.kind.value, each.num_bytes): times * each.count for each in costs.work(shape).exchanges})


def _rows(num_tokens: int, num_scored: int) -> StepShape:
    return StepShape(num_tokens=num_tokens, num_scored=num_scored, read_tokens=0, pairs=0)


def _decodes(report: AotReport) -> list[ProgramReport]:
    """The decoder at sizes that a step of one token a sequence can have."""
    return [each for each in report.programs if each.name == "decode" and each.bucket <= report.seq_buckets[-1]]
