"""Whether a model fits a slice, in words: a sentence, what would do instead, and what to know besides."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain

from jaxserve.core.config import MeshShape, ServeConfig
from jaxserve.launch.aot import AotReport
from jaxserve.launch.estimate import Workload
from jaxserve.launch.fit import candidate, held, pages_for, tensor_sizes
from jaxserve.models.spec import ModelSpec
from jaxserve.sharding.mesh import abstract_mesh
from jaxserve.sharding.rules import kv_repeat
from jaxserve.sharding.topology import Topology, slices

GIB = 1 << 30

RUNTIME_SHARE = 0.025
"""Share of a device's memory that the runtime keeps: of a v6e's 32 GiB libtpu's compiler may use 31.24."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """One device's memory, in bytes.

    Attributes:
        weights: Parameters.
        kv: The KV pool.
        temporaries: What the hungriest program needs besides, and the sampler's state.
        code: The programs; those that were not compiled count as the largest of their name.
        capacity: What there is.
        usable: What the runtime leaves of it.
    """

    weights: int
    kv: int
    temporaries: int
    code: int
    capacity: int
    usable: int

    @property
    def total(self) -> int:
        """All that is needed."""
        return self.weights + self.kv + self.temporaries + self.code


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be planned.

    Attributes:
        model: As it was named.
        spec: Its mathematics.
        topology: The slice.
        workload: What users send.
        config: What was asked of serve, with its mesh.
        mesh_chosen: Whether the mesh is ours to choose.
    """

    model: str
    spec: ModelSpec
    topology: Topology
    workload: Workload
    config: ServeConfig
    mesh_chosen: bool


def too_heavy(question: Question, weights: int) -> str:
    """That the weights leave no room, and what would do.

    Args:
        question: What was asked.
        weights: Their bytes on a device.
    """
    topology, tensor = question.topology, question.config.mesh.tensor
    devices = "one device" if tensor == 1 else f"each of {tensor} devices"
    would = " or ".join(_remedies(question))
    return (
        f"{question.model} does not fit {topology}: its weights take {weights / GIB:.1f} GiB on {devices} of "
        f"{topology.chip.hbm_bytes / GIB:.0f} GiB, which leaves too little room for sequences"
        f"{f'; it would {would}' if would else ''}."
    )


def answer(question: Question, report: AotReport, memory: Memory, at_once: int) -> str:
    """Whether compiled programs fit.

    Args:
        question: What was asked.
        report: The programs.
        memory: What they take.
        at_once: How many of the workload's requests can run at once.
    """
    model, topology, workload = question.model, question.topology, question.workload
    if report.failures:
        first = report.failures[0]
        return f"{model} does not compile for {topology}: {first.name} {first.bucket}: {first.failure}"
    if memory.total > memory.usable:
        smaller = _smaller_pool(question, report, memory)
        would = " or ".join(_remedies(question) if smaller is None else [f"with {smaller}, a smaller KV cache"])
        return (
            f"{model} does not fit {topology} so: a device needs {memory.total / GIB:.1f} GiB and has "
            f"{memory.usable / GIB:.1f}{f'; it would {would}' if would else ''}."
        )
    kv_tokens = report.num_pages * report.page_size
    if at_once == 0:
        would = " or ".join([f"with sequences of at most {kv_tokens} tokens", *_remedies(question)])
        return (
            f"{model} fits {topology} but not one sequence of {workload.longest} tokens does: the pool holds "
            f"{kv_tokens}; it would {would}."
        )
    asked = f" (of the {workload.concurrency} asked for)" if at_once < workload.concurrency else ""
    return (
        f"{model} fits {topology}: {at_once} {'sequence' if at_once == 1 else 'sequences'} of {workload.longest} "
        f"tokens at once{asked}, {memory.total / GIB:.1f} of {memory.capacity / GIB:.0f} GiB a device."
    )


def notes(question: Question) -> Iterator[str]:
    """What to know besides, a sentence each."""
    spec, topology, shape = question.spec, question.topology, question.config.mesh
    replicas, idle = divmod(topology.num_devices, shape.num_devices)
    if replicas > 1:
        yield (
            f"The slice holds {replicas} replicas of {shape.num_devices} "
            f"{'device' if shape.num_devices == 1 else 'devices'}; memory and times are of one, tokens a second of all."
        )
    if idle:
        yield f"{idle} of the slice's {topology.num_devices} devices {'is' if idle == 1 else 'are'} left over."
    heads = spec.num_kv_heads * kv_repeat(spec.num_heads, spec.num_kv_heads, abstract_mesh(tensor=shape.tensor))
    if heads % shape.tensor:
        yield (
            f"tensor={shape.tensor} does not split the model's {spec.num_heads} query and {spec.num_kv_heads} KV heads "
            "evenly: every device computes all of attention and holds all of the KV cache."
        )
    if topology.chip.platform == "tpu" and topology.chip.cores > 1:
        yield (
            f"A {topology.chip.title} has {topology.chip.cores} TensorCores, of which the attention kernels use one; "
            "times are those of the whole chip."
        )


def _smaller_pool(question: Question, report: AotReport, memory: Memory) -> str | None:
    """The flag of serve that leaves room for what programs take; None if no sequence of the workload had any."""
    config = question.config
    page_bytes = memory.kv // report.num_pages
    room = memory.usable - memory.temporaries - memory.code  # for weights and pool together
    share = math.floor(100 * room / memory.capacity) / 100
    if config.num_pages is None:
        room = int(share * memory.capacity)
    num_pages = (room - memory.weights) // page_bytes
    longest = max(question.workload.longest, config.max_model_len or 0)
    if num_pages < pages_for(longest, report.page_size):
        return None
    return f"--memory-fraction {share:.2f}" if config.num_pages is None else f"--num-pages {num_pages}"


def _remedies(question: Question) -> Iterator[str]:
    """What would hold the model and the workload, or one of its sequences."""
    spec, topology, workload, config = question.spec, question.topology, question.workload, question.config
    if config.quantization is None:
        small = replace(config, quantization="int8")
        if question.mesh_chosen:
            found = held(spec, topology, workload, small)
        else:
            found = candidate(spec, topology, replace(workload, concurrency=1), small, config.mesh)
        if found is not None:
            yield f"with --quantization int8 ({found.weight_bytes / GIB:.1f} GiB)"
    wider = _wider(question)
    if wider is not None:
        yield wider


def _wider(question: Question) -> str | None:
    """More devices that share the model, on this slice or the next that has them; replicas more would hold no more."""
    spec, workload, config = question.spec, question.workload, question.config
    one = replace(workload, concurrency=1)
    larger = [each for each in slices(question.topology.chip) if each.num_chips > question.topology.num_chips]
    for topology in (question.topology, *larger):
        chosen = held(spec, topology, workload, config)
        meshes = [MeshShape(tensor=size) for size in tensor_sizes(spec, topology)]
        for found in chain([chosen], (candidate(spec, topology, one, config, mesh) for mesh in meshes)):
            if found is None or found.tensor <= config.mesh.tensor:
                continue
            place = [] if topology is question.topology else [f"on {topology}"]
            # What is chosen there anyway needs no flag.
            flag = [] if found is chosen and question.mesh_chosen else [f"with --mesh tensor={found.tensor}"]
            return f"{' '.join(place + flag)} ({found.weight_bytes / GIB:.1f} GiB a device)"
    return None
