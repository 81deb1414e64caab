"""What a model needs and does on a slice, before anybody rents it: `jaxserve plan`.

The programs are compiled for the slice where there is none (`launch/aot`), which gives the memory they take. Time comes
from counted work and the chip's published rates (`launch/estimate`). What does not fit is said in a sentence, with what
would.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax.numpy as jnp

from jaxserve.checkpoint.sources import spec_of
from jaxserve.core.errors import ConfigError
from jaxserve.launch.aot import AotReport, aot_report, config_for
from jaxserve.launch.build import Progress
from jaxserve.launch.estimate import Estimator, ServiceEstimate, StepEstimate, Workload
from jaxserve.models.costs import CostModel, StepShape
from jaxserve.models.decoder import Blueprint
from jaxserve.models.spec import ModelSpec
from jaxserve.sharding.chips import CHIPS
from jaxserve.sharding.mesh import TENSOR, abstract_mesh
from jaxserve.sharding.rules import kv_repeat
from jaxserve.sharding.topology import Topology, slices

GIB = 1 << 30

RUNTIME_SHARE = 0.025
"""Share of a device's memory that the runtime keeps: of a v6e's 32 GiB libtpu's compiler may use 31.24."""

ROOM_SHARE = 0.85
"""Share of a device's memory that weights may take, lest nothing be left for sequences."""

POOL_SHARE = 0.9
"""Share of a device's memory that weights and pool take together by default."""

DEFAULT_BATCHED_TOKENS = 2048
"""Tokens of a step by default on accelerators."""

LENGTHS = (1024, 4096, 16384, 65536)
"""Lengths at which sequences are counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """One device's memory, in bytes.

    Attributes:
        weights: Parameters.
        kv: The KV pool.
        temporaries: What the hungriest program needs besides, and the sampler's state.
        code: The programs; those that were not compiled count as the largest of their name.
        capacity: What there is.
    """

    weights: int
    kv: int
    temporaries: int
    code: int
    capacity: int

    @property
    def total(self) -> int:
        """All that is needed."""
        return self.weights + self.kv + self.temporaries + self.code

    @property
    def usable(self) -> int:
        """What the runtime leaves."""
        return int(self.capacity * (1 - RUNTIME_SHARE))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A model on a slice.

    Attributes:
        model: As it was named.
        topology: The slice.
        fits: Whether it can be served there.
        sentence: The answer in words.
        settings: Flags of serve that the plan stands for.
        replicas: Engines that share the slice, each on its part of it.
        memory: One device's, None if the weights alone are too much.
        report: What was compiled, None likewise.
        kv_tokens: Tokens the pool holds, of one replica.
        sequences: How many sequences of a length fit at once, by length.
        steps: The least that typical steps take.
        service: What users of one replica see at best.
    """

    model: str
    topology: Topology
    fits: bool
    sentence: str
    settings: Mapping[str, str]
    replicas: int
    memory: Memory | None = None
    report: AotReport | None = None
    kv_tokens: int = 0
    sequences: Mapping[int, int]
    steps: tuple[StepEstimate, ...] = ()
    service: ServiceEstimate | None = None


def plan(
    model: str,
    topology: Topology,
    workload: Workload,
    *,
    settings: Mapping[str, str],
    offline: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Plans a model on a slice.

    Args:
        model: A preset, a folder, a .gguf file or a hub id; no weights are read.
        topology: The slice.
        workload: What users send; of its concurrency no more is planned than fits.
        settings: Flags of serve as text, by setting name; without "mesh" one is chosen.
        offline: Fetch nothing.
        progress: Told how far compiling is.

    Raises:
        ConfigError: A setting is wrong, or the slice cannot be compiled for.
        CheckpointError: There is no such model.
        DevicelessError: The compiler died.
    """
    spec = spec_of(model, offline=offline)
    settings = dict(settings)
    if "mesh" not in settings:
        settings["mesh"] = f"tensor={choose_tensor(spec, topology, settings)}"
    config = config_for(model, settings, topology)
    replicas = topology.num_devices // config.mesh.num_devices
    if replicas == 0:
        raise ConfigError(
            f"The mesh {config.mesh} needs {config.mesh.num_devices} devices and {topology} has "
            f"{topology.num_devices}; ask for a smaller mesh or a larger slice.",
            param="mesh",
        )
    weights = weight_bytes(spec, config.mesh.tensor, settings)
    if weights > ROOM_SHARE * topology.chip.hbm_bytes:
        return Plan(
            model=model,
            topology=topology,
            fits=False,
            sentence=_too_heavy(model, spec, topology, weights, config.mesh.tensor, settings),
            settings=settings,
            replicas=replicas,
            sequences={},
        )
    report = aot_report(model, topology, settings=settings, largest_only=True, progress=progress)
    return _plan_compiled(spec, topology, workload, report, settings, replicas)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A slice that holds a model by arithmetic; nothing was compiled.

    Attributes:
        topology: The slice.
        tensor: Devices that share a model.
        replicas: Engines that share the slice.
        weight_bytes: Weights on a device.
        kv_tokens: Tokens the pool of a replica can hold.
        service: What users of one replica see at best.
    """

    topology: Topology
    tensor: int
    replicas: int
    weight_bytes: int
    kv_tokens: int
    service: ServiceEstimate


def fit(model: str, workload: Workload, *, settings: Mapping[str, str], offline: bool = False) -> list[Candidate]:
    """The smallest slice of each chip that holds a model and the workload's sequences.

    Args:
        model: As for `plan`.
        workload: What must fit: `concurrency` sequences of `input_len + output_len` tokens.
        settings: As for `plan`.
        offline: Fetch nothing.
    """
    spec = spec_of(model, offline=offline)
    smallest = []
    for chip in CHIPS.values():
        candidates = (_candidate(spec, topology, workload, settings) for topology in slices(chip))
        smallest += [next((each for each in candidates if each is not None), None)]
    return [each for each in smallest if each is not None]


def _candidate(
    spec: ModelSpec, topology: Topology, workload: Workload, settings: Mapping[str, str]
) -> Candidate | None:
    """A slice, or None if it is too small."""
    tensor = choose_tensor(spec, topology, settings)
    costs = _costs(spec, tensor, settings)
    weights, capacity = costs.weight_bytes(), topology.chip.hbm_bytes
    # What resolve() gives to weights and pool together.
    kv_tokens = int((POOL_SHARE * capacity - weights) // costs.kv_bytes_per_token)
    if weights > ROOM_SHARE * capacity or kv_tokens < workload.concurrency * (workload.input_len + workload.output_len):
        return None
    estimator = Estimator(
        costs=costs,
        chip=topology.chip,
        weight_format=settings.get("quantization", costs.blueprint.dtype.name),
        chunk_tokens=int(settings.get("max_num_batched_tokens", DEFAULT_BATCHED_TOKENS)),
    )
    return Candidate(
        topology=topology,
        tensor=tensor,
        replicas=topology.num_devices // tensor,
        weight_bytes=weights,
        kv_tokens=kv_tokens,
        service=estimator.service(workload),
    )


def choose_tensor(spec: ModelSpec, topology: Topology, settings: Mapping[str, str]) -> int:
    """How many devices share a model: as many as have a KV head each, more if the weights need them."""
    possible = [
        size
        for size in (1 << power for power in range(topology.num_devices.bit_length()))
        if topology.num_devices % size == 0 and spec.num_heads % size == 0
    ]
    whole_heads = max(size for size in possible if size <= spec.num_kv_heads)
    room = ROOM_SHARE * topology.chip.hbm_bytes
    larger = [size for size in possible if size >= whole_heads and weight_bytes(spec, size, settings) <= room]
    return larger[0] if larger else possible[-1]


def weight_bytes(spec: ModelSpec, tensor: int, settings: Mapping[str, str]) -> int:
    """Weights that one of `tensor` devices holds."""
    return _costs(spec, tensor, settings).weight_bytes()


def _costs(spec: ModelSpec, tensor: int, settings: Mapping[str, str]) -> CostModel:
    dtype = jnp.dtype(settings.get("dtype", spec.dtype))
    mesh = abstract_mesh(tensor=tensor)
    repeat = kv_repeat(spec.num_heads, spec.num_kv_heads, mesh)
    heads = spec.num_kv_heads * repeat
    blueprint = Blueprint.of(spec, dtype=dtype, quantization=settings.get("quantization"), kv_repeat=repeat)
    kv_dtype = jnp.dtype(settings.get("kv_cache_dtype", dtype.name))
    held = heads // tensor if heads % tensor == 0 else heads
    per_token = spec.num_layers * 2 * held * spec.head_dim * kv_dtype.itemsize
    return CostModel(blueprint=blueprint, mesh=mesh, kv_bytes_per_token=per_token, kv_heads=heads)


def _plan_compiled(
    spec: ModelSpec,
    topology: Topology,
    workload: Workload,
    report: AotReport,
    settings: Mapping[str, str],
    replicas: int,
) -> Plan:
    memory = Memory(
        weights=report.weight_bytes,
        kv=report.kv_bytes,
        temporaries=report.temporary_bytes + report.state_bytes,
        code=_code_bytes(report),
        capacity=topology.chip.hbm_bytes,
    )
    kv_tokens = report.num_pages * report.page_size
    lengths = [length for length in LENGTHS if length <= report.max_model_len]
    sequences = {length: report.num_pages // -(-length // report.page_size) for length in lengths}
    longest = workload.input_len + workload.output_len
    at_once = min(workload.concurrency, report.num_pages // -(-longest // report.page_size), report.seq_buckets[-1])
    fits = not report.failures and memory.total <= memory.usable and at_once > 0
    estimator = Estimator(
        costs=_costs(spec, report.mesh[TENSOR], settings),
        chip=topology.chip,
        weight_format=settings.get("quantization", report.dtype),
        chunk_tokens=report.token_buckets[-1],
    )
    served = replace(workload, concurrency=at_once)
    return Plan(
        model=report.model,
        topology=topology,
        fits=fits,
        sentence=_answer(report, memory, topology, longest, at_once),
        settings=settings,
        replicas=replicas,
        memory=memory,
        report=report,
        kv_tokens=kv_tokens,
        sequences=sequences,
        steps=_steps(estimator, served) if fits else (),
        service=estimator.service(served) if fits else None,
    )


def _steps(estimator: Estimator, served: Workload) -> tuple[StepEstimate, ...]:
    """Steps with one sequence and with all of them, in the middle of their generation, and a prefill."""
    middle, chunk = served.input_len + served.output_len // 2, min(served.input_len, estimator.chunk_tokens)
    decodes = [
        estimator.step(f"decode, {count} sequences", StepShape.decode(count, middle))
        for count in dict.fromkeys((1, served.concurrency))
    ]
    return (*decodes, estimator.step(f"prefill, {chunk} tokens", StepShape.prefill(chunk)))


def _code_bytes(report: AotReport) -> int:
    sizes = {"head": len(report.seq_buckets), "decode": len(report.token_buckets), "score": len(report.token_buckets)}
    largest: dict[str, int] = {}
    for each in report.programs:
        largest[each.name] = max(largest.get(each.name, 0), each.code_bytes)
    return sum(size * sizes.get(name, 1) for name, size in largest.items())


def _answer(report: AotReport, memory: Memory, topology: Topology, longest: int, at_once: int) -> str:
    if report.failures:
        first = report.failures[0]
        return f"{report.model} does not compile for {topology}: {first.name} {first.bucket}: {first.failure}"
    if memory.total > memory.usable:
        return (
            f"{report.model} does not fit {topology}: a device needs {memory.total / GIB:.1f} GiB and has "
            f"{memory.usable / GIB:.1f}; lower --memory-fraction or --max-num-batched-tokens."
        )
    if at_once == 0:
        return (
            f"{report.model} fits {topology} but not one sequence of {longest} tokens does: the pool holds "
            f"{report.num_pages * report.page_size}; use more chips, --quantization int8, or shorter sequences."
        )
    return (
        f"{report.model} fits {topology}: {at_once} sequences of {longest} tokens at once, "
        f"{memory.total / GIB:.1f} of {memory.capacity / GIB:.0f} GiB a device."
    )


def _too_heavy(
    model: str, spec: ModelSpec, topology: Topology, weights: int, tensor: int, settings: Mapping[str, str]
) -> str:
    """That the weights do not fit, and what would."""
    room = ROOM_SHARE * topology.chip.hbm_bytes
    advice = []
    small = {**settings, "quantization": "int8"}
    if "quantization" not in settings and weight_bytes(spec, tensor, small) <= room:
        advice.append(f"--quantization int8 ({weight_bytes(spec, tensor, small) / GIB:.1f} GiB)")
    for larger in slices(topology.chip):
        free = {name: value for name, value in settings.items() if name != "mesh"}
        if larger.num_chips > topology.num_chips:
            needed = weight_bytes(spec, choose_tensor(spec, larger, free), free)
            if needed <= room:
                advice.append(f"{larger} ({needed / GIB:.1f} GiB a device)")
                break
    would = f"; it would with {' or on '.join(advice)}" if advice else ""
    return (
        f"{model} does not fit {topology}: its weights take {weights / GIB:.1f} GiB on each of {tensor} devices, which "
        f"have {topology.chip.hbm_bytes / GIB:.0f} GiB and need room for sequences{would}."
    )
