"""What a model needs and does on a slice, before anybody rents it: `jaxserve plan`.

The programs are compiled for the slice where there is none (`launch/aot`), which gives the memory they take. Time comes
from counted work and the chip's published rates (`launch/estimate`). What does not fit is said in a sentence, with what
would (`launch/verdict`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from jaxserve.checkpoint.sources import spec_of
from jaxserve.core.errors import ConfigError
from jaxserve.launch.aot import AotReport, aot_report, config_for
from jaxserve.launch.build import Progress
from jaxserve.launch.estimate import Estimator, ServiceEstimate, StepEstimate, Workload
from jaxserve.launch.fit import (
    ROOM_SHARE,
    choose_mesh,
    costs_of,
    estimator_of,
    pages_for,
    require_length,
    settings_for,
    weight_bytes,
)
from jaxserve.launch.verdict import RUNTIME_SHARE, Memory, Question, answer, notes, too_heavy
from jaxserve.sharding.topology import Topology

LENGTHS = (1024, 4096, 16384, 65536)
"""Lengths at which sequences are counted unless others are asked for; those beyond the model's are left out."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A model on a slice.

    Attributes:
        model: As it was named.
        topology: The slice.
        fits: Whether it can be served there.
        sentence: The answer in words.
        notes: What to know besides, a sentence each.
        settings: Flags of serve that the plan stands for.
        replicas: Engines that share the slice, each on its part of it.
        memory: One device's, None if the weights alone are too much.
        report: What was compiled, None likewise.
        kv_tokens: Tokens the pool holds, of one replica.
        sequences: How many sequences of a length the pool of one replica holds, by length.
        steps: The least that typical steps take.
        service: What users of one replica see at best.
        service_in_turn: The same if nothing else is done during exchanges between devices.
    """

    model: str
    topology: Topology
    fits: bool
    sentence: str
    notes: tuple[str, ...]
    settings: Mapping[str, str]
    replicas: int
    memory: Memory | None = None
    report: AotReport | None = None
    kv_tokens: int = 0
    sequences: Mapping[int, int]
    steps: tuple[StepEstimate, ...] = ()
    service: ServiceEstimate | None = None
    service_in_turn: ServiceEstimate | None = None


def plan(
    model: str,
    topology: Topology,
    workload: Workload,
    *,
    settings: Mapping[str, str],
    lengths: Sequence[int] | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Plans a model on a slice.

    Args:
        model: A preset, a folder, a .gguf file or a hub id; no weights are read.
        topology: The slice.
        workload: What users send; of its concurrency no more is planned than fits.
        settings: Flags of serve as text, by setting name; without "mesh" one is chosen, for the workload.
        lengths: At which sequences are counted; some usual ones if None.
        offline: Fetch nothing.
        progress: Told how far compiling is.

    Raises:
        ConfigError: A setting is wrong, the workload cannot be served anywhere, or the slice cannot be compiled for.
        CheckpointError: There is no such model.
        DevicelessError: The compiler died.
    """
    settings = settings_for(workload, settings)
    config = config_for(model, settings, topology)
    spec = spec_of(model, offline=offline, passed_over=config.ignore_config_keys)
    require_length(spec, workload, config)
    chosen = "mesh" not in settings
    if chosen:
        config = replace(config, mesh=choose_mesh(spec, topology, workload, config))
        settings["mesh"] = f"tensor={config.mesh.tensor}"
    if config.mesh.num_devices > topology.num_devices:
        raise ConfigError(
            f"The mesh {config.mesh} needs {config.mesh.num_devices} devices and {topology} has "
            f"{topology.num_devices}; ask for a smaller mesh or a larger slice.",
            param="mesh",
        )
    question = Question(model=model, spec=spec, topology=topology, workload=workload, config=config, mesh_chosen=chosen)
    weights = weight_bytes(spec, config.mesh.tensor, config)
    if weights > ROOM_SHARE * topology.chip.serving_bytes:
        return Plan(
            model=model,
            topology=topology,
            fits=False,
            sentence=too_heavy(question, weights),
            notes=tuple(notes(question)),
            settings=settings,
            replicas=topology.num_devices // config.mesh.num_devices,
            sequences={},
        )
    report = aot_report(model, topology, settings=settings, largest_only=True, offline=offline, progress=progress)
    return _plan_compiled(question, report, settings, lengths)


def _plan_compiled(
    question: Question, report: AotReport, settings: Mapping[str, str], lengths: Sequence[int] | None
) -> Plan:
    config, topology, workload = question.config, question.topology, question.workload
    memory = Memory(
        weights=report.weight_bytes,
        kv=report.kv_bytes,
        temporaries=report.temporary_bytes + report.state_bytes,
        code=_code_bytes(report),
        capacity=topology.chip.hbm_bytes,
        usable=min(topology.chip.serving_bytes, int(topology.chip.hbm_bytes * (1 - RUNTIME_SHARE))),
    )
    counted = lengths or [each for each in LENGTHS if each <= report.max_model_len] or [report.max_model_len]
    at_once = min(workload.concurrency, _sequences(report, workload.longest), report.seq_buckets[-1])
    fits = not report.failures and memory.total <= memory.usable and at_once > 0
    costs = costs_of(question.spec, config.mesh.tensor, config, topology.chip.platform)
    estimator = estimator_of(costs, topology, config, step_tokens=report.token_buckets[-1])
    served = replace(workload, concurrency=at_once)
    return Plan(
        model=question.model,
        topology=topology,
        fits=fits,
        sentence=answer(question, report, memory, at_once),
        notes=tuple(notes(question)),
        settings=settings,
        replicas=topology.num_devices // config.mesh.num_devices,
        memory=memory,
        report=report,
        kv_tokens=report.num_pages * report.page_size,
        sequences={length: _sequences(report, length) for length in counted},
        steps=_steps(estimator, served) if fits else (),
        service=estimator.service(served) if fits else None,
        service_in_turn=estimator.service(served, in_turn=True) if fits else None,
    )


def _sequences(report: AotReport, length: int) -> int:
    """How many sequences of a length the pool holds; none longer than a sequence may be."""
    return 0 if length > report.max_model_len else report.num_pages // pages_for(length, report.page_size)


def _steps(estimator: Estimator, served: Workload) -> tuple[StepEstimate, ...]:
    """Steps with one sequence and with all of them, in the middle of their generation, and a prompt's first."""
    middle, prompt = served.input_len + served.output_len // 2, estimator.chunks(served.input_len)[0]
    decodes = [
        estimator.step(f"decode, {count} x {middle}", estimator.decode(count, middle))
        for count in dict.fromkeys((1, served.concurrency))
    ]
    return (*decodes, estimator.step(f"prefill, {prompt.num_tokens}", prompt))


def _code_bytes(report: AotReport) -> int:
    sizes = {"head": len(report.seq_buckets), "decode": len(report.token_buckets), "score": len(report.token_buckets)}
    largest: dict[str, int] = {}
    for each in report.programs:
        # The CUDA compiler says nothing of code; what a bundle would store holds it.
        largest[each.name] = max(largest.get(each.name, 0), each.code_bytes or each.serialized_bytes)
    return sum(size * sizes.get(name, 1) for name, size in largest.items())
