"""A decode step on the device, beside two things it cannot be faster than.

One is the time that reading all weights and all visible keys and values once takes at the bandwidth of the memory. The
other is what XLA takes for the step's matmuls alone: the same kernels, held and contracted the same way, with neither
attention nor norms nor sampler between them.

The programs are the ones that serve, with the arguments that serving gives them. Steps are dispatched one after another
without waiting, as the engine does, and the time of many is divided by their number, so that what the host takes for
dispatch shows only where it is longer than the device's work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from rich.table import Table

from jaxserve.core.errors import ConfigError
from jaxserve.engine.batch import StepInput
from jaxserve.engine.compile import Executables, compile_programs, compiles_at_once
from jaxserve.engine.programs import Replica, programs
from jaxserve.models.costs import CostModel, StepShape, device_bytes
from jaxserve.models.decoder import Blueprint, walk
from jaxserve.models.params import Held

ROUNDS = 9
"""Turns in which everything is measured; the median counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """What a decode step took.

    Attributes:
        num_seqs: Sequences that decode.
        context_len: Tokens each of them sees.
        decode_ms: The model's part.
        step_ms: Model, logits and sampler.
        matmul_ms: The step's matmuls alone, those of the logits included.
        memory_bytes: The least the step moves in one device's memory.
        bandwidth: Bytes a second of the device's memory, measured in the same run.
    """

    num_seqs: int
    context_len: int
    decode_ms: float
    step_ms: float
    matmul_ms: float
    memory_bytes: float
    bandwidth: float

    @property
    def floor_ms(self) -> float:
        """The least a step can take."""
        return 1e3 * self.memory_bytes / self.bandwidth

    def as_json(self) -> dict[str, object]:
        """As a JSON object."""
        return {
            "num_seqs": self.num_seqs,
            "context_len": self.context_len,
            "decode_ms": self.decode_ms,
            "step_ms": self.step_ms,
            "matmul_ms": self.matmul_ms,
            "memory_bytes": self.memory_bytes,
            "bandwidth_bytes_per_s": self.bandwidth,
            "floor_ms": self.floor_ms,
            "step_over_floor": self.step_ms / self.floor_ms,
            "step_over_matmuls": self.step_ms / self.matmul_ms,
        }


def measure_steps(
    replica: Replica, params: Mapping[str, Held], sizes: Sequence[tuple[int, int]], *, repeats: int = 5
) -> list[StepTime]:
    """Measures decode steps.

    Args:
        replica: What fixes the programs.
        params: Parameters by path, as programs take them.
        sizes: Sequences and context length of each step.
        repeats: Steps dispatched between two looks at the clock.

    Raises:
        ConfigError: The pool is too small for a step.
    """
    page_size = replica.layout.page_size
    for num_seqs, context_len in sizes:
        needed = num_seqs * -(-context_len // page_size)
        if needed > replica.layout.num_pages or context_len > replica.limits.max_model_len:
            raise ConfigError(
                f"{num_seqs} sequences of {context_len} tokens need {needed} pages of {replica.layout.num_pages} and "
                f"max_model_len {replica.limits.max_model_len}; ask for fewer, or for more of these.",
                param="num_pages",
            )
    buckets = replica.buckets
    wanted = {("decode", buckets.tokens_for(num)) for num, _ in sizes} | {
        ("head", buckets.seqs_for(num)) for num, _ in sizes
    }
    at_once = compiles_at_once(replica.mesh.devices.flat[0].device_kind)
    run = compile_programs([each for each in programs(replica) if each.key in wanted], num_threads=at_once)
    bandwidth = memory_bandwidth()
    device = _Device(replica, params, run)
    return [device.measure(num_seqs, context_len, repeats, bandwidth) for num_seqs, context_len in sizes]


class _Device:
    """Holds what programs are given and give back."""

    def __init__(self, replica: Replica, params: Mapping[str, Held], run: Executables) -> None:
        self._replica = replica
        self._run = run
        self._params = params
        self._pool = replica.layout.allocate(replica.mesh)
        self._state = replica.init_sampling()

    def measure(self, num_seqs: int, context_len: int, repeats: int, bandwidth: float) -> StepTime:
        replica = self._replica
        size, rows = replica.buckets.tokens_for(num_seqs), replica.buckets.seqs_for(num_seqs)
        inputs = jax.device_put(step_input(replica, num_seqs, context_len))

        def decode() -> Array:
            self._pool, decoded = self._run["decode", size](self._params, self._pool, self._state.history, inputs)
            last: Array = decoded.last
            return last

        def step() -> Array:
            self._state, sampled = self._run["head", rows](self._params, self._state, decode(), inputs.packed)
            ids: Array = sampled.token_ids
            return ids

        seconds = seconds_of([decode, step, self._matmuls(size, rows)], repeats)
        layout = replica.layout
        costs = CostModel(
            blueprint=replica.blueprint,
            mesh=replica.mesh,
            kv_bytes_per_token=device_bytes(layout.abstract(replica.mesh)) // (layout.num_pages * layout.page_size),
            kv_heads=layout.num_kv_heads,
        )
        return StepTime(
            num_seqs=num_seqs,
            context_len=context_len,
            decode_ms=1e3 * seconds[0],
            step_ms=1e3 * seconds[1],
            matmul_ms=1e3 * seconds[2],
            memory_bytes=costs.work(StepShape.decode(num_seqs, context_len)).memory_bytes,
            bandwidth=bandwidth,
        )

    def _matmuls(self, size: int, rows: int) -> Callable[[], Array]:
        """The matmuls of a step alone, as a call."""
        spec, dtype = self._replica.blueprint.spec, self._replica.blueprint.dtype
        hidden = jax.random.normal(jax.random.key(1), (size, spec.hidden_size), dtype)
        run = jax.jit(partial(matmuls, blueprint=self._replica.blueprint, num_scored=rows))
        return lambda: run(self._params, hidden)


def matmuls(
    params: Mapping[str, Held], hidden: Float[Array, "T D"], *, blueprint: Blueprint, num_scored: int
) -> Float[Array, " S"]:
    """Every matmul of a step and nothing else, each fed with what the one before it gave.

    Args:
        params: Parameters as programs hold them.
        hidden: What the first layer is given.
        blueprint: The decoder.
        num_scored: Rows that get logits.
    """
    model = blueprint.bind(params)
    graph, stacked = nnx.split(model.layers)

    def layer(x: Array, params: nnx.State[Any, Any], index: Array) -> Array:
        each = nnx.merge(graph, params)
        attended = each.attn.out(each.attn.qkv(x)[:, :, : each.attn.group])
        fed: Array = each.mlp.down(each.mlp.gate_up(attended)[:, 0])
        return fed

    last = walk(layer, hidden, stacked, blueprint.spec.num_layers, apart=blueprint.layers_apart)
    rows = last[jnp.arange(num_scored) % last.shape[0]]
    # One value a row is enough to keep the logits alive.
    return jnp.max(model.logits(rows), axis=1)


def step_input(replica: Replica, num_seqs: int, context_len: int) -> StepInput:
    """A step in which each of the first slots decodes its last token, with pages scattered over the pool."""
    size, slots = replica.max_num_seqs, np.arange(num_seqs, dtype=np.int32)
    packed = np.zeros(4 * size + 2, np.int32)
    rows = packed[:-2].reshape(4, size)
    rows[0, :num_seqs], rows[1, :num_seqs] = context_len, 1
    rows[2], rows[2, :num_seqs] = size, slots
    rows[3, :num_seqs] = 1
    packed[-2:] = num_seqs
    table = np.zeros((replica.buckets.rows_for(replica.buckets.tokens_for(num_seqs)), replica.pages_per_seq), np.int32)
    each = -(-context_len // replica.layout.page_size)
    pages = np.random.default_rng(0).permutation(replica.layout.num_pages)[: num_seqs * each]
    table[:num_seqs, :each] = pages.reshape(num_seqs, each)
    return StepInput(packed=packed, page_table=table)


def seconds_of(calls: Sequence[Callable[[], Array]], repeats: int) -> list[float]:
    """Median seconds of each call, in turns, so that a machine that is busy now and then is so for all of them.

    Args:
        calls: What to time; each dispatches work and returns what to wait for.
        repeats: How often a call is dispatched in a turn before it is waited for.
    """
    jax.block_until_ready([call() for call in calls])
    turns: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for seconds, call in zip(turns, calls, strict=True):
            started = time.perf_counter()
            for _ in range(repeats):
                last = call()
            jax.block_until_ready(last)
            seconds.append((time.perf_counter() - started) / repeats)
    return [float(np.median(seconds)) for seconds in turns]


def memory_bandwidth() -> float:
    """Bytes a second that the memory moves while an array is changed in place, read and written ones counted."""
    size = (64 if jax.default_backend() == "cpu" else 2048) << 18  # float32 values: 64 MiB on a CPU, 2 GiB elsewhere
    values: Array = jax.random.uniform(jax.random.key(0), (size,))
    negate = jax.jit(lambda x: -x, donate_argnums=0)

    def call() -> Array:
        nonlocal values
        values = negate(values)
        return values

    moved: int = 2 * values.nbytes
    return moved / seconds_of([call], 10)[0]


def table(times: Sequence[StepTime]) -> Table:
    """A row for each step."""
    grid = Table(
        "seqs", "context", "decode, ms", "step, ms", "matmuls, ms", "step / matmuls", "floor, ms", "step / floor"
    )
    for each in times:
        ratios = (each.step_ms / each.matmul_ms, each.floor_ms, each.step_ms / each.floor_ms)
        figures = (each.decode_ms, each.step_ms, each.matmul_ms, *ratios)
        grid.add_row(str(each.num_seqs), str(each.context_len), *(f"{figure:.2f}" for figure in figures))
    if times:
        grid.caption = f"Floor: weights, keys and values read once at {times[0].bandwidth / 1e9:.1f} GB/s."
    return grid
