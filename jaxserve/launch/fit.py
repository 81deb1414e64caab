"""How a model lies on a slice, by arithmetic alone: how many devices share it, what they hold, which slices do.

Nothing is compiled here, so all slices of all chips are gone through in a second; `launch/plan` compiles for one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax.numpy as jnp

from jaxserve.checkpoint.sources import spec_of
from jaxserve.core.config import MAX_NUM_SEQS, MeshShape, ServeConfig, load
from jaxserve.core.errors import ConfigError
from jaxserve.core.resolution import (
    ACCELERATOR_SEQS,
    ACCELERATOR_TOKENS,
    MEMORY_FRACTION,
    Facts,
    ResolvedConfig,
    auto_dtype,
    resolve,
)
from jaxserve.kv.pool import tiled
from jaxserve.launch.estimate import Estimator, ServiceEstimate, Workload
from jaxserve.models.costs import CostModel
from jaxserve.models.decoder import Blueprint
from jaxserve.models.spec import ModelSpec
from jaxserve.pallas.dispatch import preference
from jaxserve.sharding.chips import CHIPS
from jaxserve.sharding.interconnect import wiring
from jaxserve.sharding.mesh import abstract_mesh
from jaxserve.sharding.rules import kv_repeat
from jaxserve.sharding.topology import Topology, slices

ROOM_SHARE = 0.85
"""Share of a device's memory that weights may take, lest nothing be left for sequences."""

_BOUNDLESS = 1 << 60
"""Bytes of a device on which any pool fits."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A slice that holds a model by arithmetic; nothing was compiled.

    Attributes:
        topology: The slice.
        tensor: Devices that share a model.
        replicas: Engines that share the slice.
        weight_bytes: Weights on a device.
        kv_tokens: Tokens the pool of a replica holds.
        service: What users of one replica see at best.
    """

    topology: Topology
    tensor: int
    replicas: int
    weight_bytes: int
    kv_tokens: int
    service: ServiceEstimate


def fit(model: str, workload: Workload, *, settings: Mapping[str, str], offline: bool = False) -> list[Candidate]:
    """The smallest slice of each chip that runs a model's attention as asked and holds it and the workload's sequences.

    Args:
        model: As for `plan`.
        workload: What must fit: `concurrency` sequences of `input_len + output_len` tokens, as far as serve has slots.
        settings: As for `plan`.
        offline: Fetch nothing.

    Raises:
        ConfigError: A setting is wrong, or no slice can serve such a workload.
        CheckpointError: There is no such model.
    """
    settings = settings_for(workload, settings)
    config = load({**settings, "model": model}, environ={})
    spec = spec_of(model, offline=offline, passed_over=config.ignore_config_keys)
    require_length(spec, workload, config)
    smallest = []
    for chip in CHIPS.values():
        if config.attention is not None and config.attention not in preference(chip.platform):
            continue
        mesh = config.mesh if "mesh" in settings else None
        candidates = (candidate(spec, topology, workload, config, mesh) for topology in slices(chip))
        smallest += [next((each for each in candidates if each is not None), None)]
    return [each for each in smallest if each is not None]


def settings_for(workload: Workload, settings: Mapping[str, str]) -> dict[str, str]:
    """Flags of serve with what a workload needs besides: as many slots as it has requests at once.

    Raises:
        ConfigError: No replica runs so many requests at once.
    """
    if workload.concurrency > MAX_NUM_SEQS:
        raise ConfigError(
            f"A replica runs at most {MAX_NUM_SEQS} requests at once, not {workload.concurrency}; lower --concurrency "
            "to what one replica gets.",
            param="concurrency",
        )
    needed: dict[str, str] = {}
    if workload.concurrency > ACCELERATOR_SEQS and "max_num_seqs" not in settings:
        needed["max_num_seqs"] = str(workload.concurrency)
        if workload.concurrency > ACCELERATOR_TOKENS:
            needed["max_num_batched_tokens"] = str(workload.concurrency)
    return {**needed, **settings}


def require_length(spec: ModelSpec, workload: Workload, config: ServeConfig) -> None:
    """Makes sure that sequences as long as the workload's can be served at all.

    Raises:
        ConfigError: They cannot.
    """
    most = min(spec.max_position, config.max_model_len or spec.default_max_len)
    if workload.longest > most:
        whose = (
            "the model has positions for; " if most == spec.max_position else "--max-model-len allows; raise it, or "
        )
        raise ConfigError(
            f"Sequences of {workload.input_len} + {workload.output_len} tokens are longer than the {most} that {whose}"
            "lower --input-len or --output-len.",
            param="input_len",
        )


def held(spec: ModelSpec, topology: Topology, workload: Workload, config: ServeConfig) -> Candidate | None:
    """A slice that holds a workload or, if no mesh there does, one of its sequences; None if it is too small for that.

    Args:
        spec: The model.
        topology: The slice.
        workload: What is to be held.
        config: What was asked of serve, but for its mesh.
    """
    one = replace(workload, concurrency=1)
    return candidate(spec, topology, workload, config) or candidate(spec, topology, one, config)


def choose_mesh(spec: ModelSpec, topology: Topology, workload: Workload, config: ServeConfig) -> MeshShape:
    """How devices share a model: as `held` has it, or as its weights alone want it.

    Args:
        spec: The model.
        topology: The slice.
        workload: What is to be held.
        config: What was asked of serve, but for its mesh.
    """
    found = held(spec, topology, workload, config)
    return MeshShape(tensor=choose_tensor(spec, topology, config) if found is None else found.tensor)


def candidate(
    spec: ModelSpec, topology: Topology, workload: Workload, config: ServeConfig, mesh: MeshShape | None = None
) -> Candidate | None:
    """A slice, or None if it is too small.

    Args:
        spec: The model.
        topology: The slice.
        workload: What must fit into a replica's KV pool.
        config: What was asked of serve, but for its mesh.
        mesh: How devices share the model; if None, the first of `tensor_sizes` that holds the workload.
    """
    meshes = [MeshShape(tensor=size) for size in tensor_sizes(spec, topology)] if mesh is None else [mesh]
    found = (_candidate(spec, topology, workload, config, each) for each in meshes)
    return next((each for each in found if each is not None), None)


def _candidate(
    spec: ModelSpec, topology: Topology, workload: Workload, config: ServeConfig, mesh: MeshShape
) -> Candidate | None:
    if mesh.num_devices > topology.num_devices:
        return None
    limits = limits_of(spec, config, topology.chip.platform)
    costs = costs_of(spec, mesh.tensor, config, topology.chip.platform)
    weights, capacity = costs.weight_bytes(), topology.chip.serving_bytes
    # What resolve() gives to weights and pool together.
    room = int((config.memory_fraction or MEMORY_FRACTION) * capacity) - weights
    page_bytes = limits.page_size * costs.kv_bytes_per_token
    num_pages = config.num_pages or room // page_bytes
    served = replace(workload, concurrency=min(workload.concurrency, limits.max_num_seqs))
    needed = max(
        served.concurrency * pages_for(served.longest, limits.page_size),
        pages_for(config.max_model_len or 1, limits.page_size),
    )
    if weights > ROOM_SHARE * capacity or num_pages * page_bytes > room or num_pages < needed:
        return None
    estimator = estimator_of(costs, topology, config, step_tokens=limits.max_num_batched_tokens)
    return Candidate(
        topology=topology,
        tensor=mesh.tensor,
        replicas=topology.num_devices // mesh.num_devices,
        weight_bytes=weights,
        kv_tokens=num_pages * limits.page_size,
        service=estimator.service(served),
    )


def pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that hold a sequence."""
    return -(-num_tokens // page_size)


def limits_of(spec: ModelSpec, config: ServeConfig, platform: str) -> ResolvedConfig:
    """What serve makes of its settings on a device that lacks no memory; its pool means nothing.

    Raises:
        ConfigError: The settings contradict each other or the model.
    """
    return resolve(
        config,
        Facts(
            platform=platform,
            max_position=spec.max_position,
            default_max_len=spec.default_max_len,
            checkpoint_dtype=spec.dtype,
            device_memory_bytes=_BOUNDLESS,
            weight_bytes=0,
            kv_bytes_per_token=1,
        ),
    )


def tensor_sizes(spec: ModelSpec, topology: Topology) -> list[int]:
    """How many devices may share a model, ascending: from as many as have a KV head each.

    With more of them, each keeps a KV head whole and less of the weights, which leaves more room for sequences.
    """
    possible = [
        size
        for size in (1 << power for power in range(topology.num_devices.bit_length()))
        if topology.num_devices % size == 0 and spec.num_heads % size == 0
    ]
    whole_heads = max(size for size in possible if size <= spec.num_kv_heads)
    return [size for size in possible if size >= whole_heads]


def choose_tensor(spec: ModelSpec, topology: Topology, config: ServeConfig) -> int:
    """How many devices share a model whatever the workload: as few of `tensor_sizes` as have room for the weights."""
    sizes = tensor_sizes(spec, topology)
    room = ROOM_SHARE * topology.chip.serving_bytes
    return next((size for size in sizes if weight_bytes(spec, size, config) <= room), sizes[-1])


def weight_bytes(spec: ModelSpec, tensor: int, config: ServeConfig) -> int:
    """Weights that one of `tensor` devices holds."""
    return costs_of(spec, tensor, config, "").weight_bytes()


def costs_of(spec: ModelSpec, tensor: int, config: ServeConfig, platform: str) -> CostModel:
    """Counts the steps of a model that `tensor` devices share.

    Args:
        spec: The model.
        tensor: How many devices share it.
        config: What was asked of serve.
        platform: JAX's name of their kind; a TPU pads heads in the KV pool.
    """
    dtype = jnp.dtype(config.dtype or auto_dtype(platform, spec.dtype))
    mesh = abstract_mesh(tensor=tensor)
    repeat = kv_repeat(spec.num_heads, spec.num_kv_heads, mesh)
    heads = spec.num_kv_heads * repeat
    blueprint = Blueprint.of(spec, dtype=dtype, quantization=config.quantization, kv_repeat=repeat)
    kv_dtype = jnp.dtype(config.kv_cache_dtype or dtype)
    rows, lanes = 2 * (heads // tensor if heads % tensor == 0 else heads), spec.head_dim
    if platform == "tpu":
        rows, lanes = tiled(rows, lanes, kv_dtype)
    per_token = spec.num_layers * rows * lanes * kv_dtype.itemsize
    return CostModel(blueprint=blueprint, mesh=mesh, kv_bytes_per_token=per_token, kv_heads=heads)


def estimator_of(costs: CostModel, topology: Topology, config: ServeConfig, *, step_tokens: int) -> Estimator:
    """Estimates steps of a model on a slice.

    Args:
        costs: Counts them.
        topology: The slice.
        config: What was asked of serve.
        step_tokens: Most tokens of a step.
    """
    return Estimator(
        costs=costs,
        chip=topology.chip,
        wiring=wiring(topology, costs.mesh.size),
        weight_format=config.quantization or costs.blueprint.dtype.name,
        step_tokens=step_tokens,
    )
