"""A decode step on the device, beside the least it can take: all weights and all visible keys and values read once.

The programs are the ones that serve, with the arguments that serving gives them. Steps are dispatched one after another
without waiting, as the engine does, and the time of many is divided by their number, so that what the host takes for
dispatch shows only where it is longer than the device's work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Array
from rich.table import Table

from jaxserve.core.errors import ConfigError
from jaxserve.engine.batch import StepInput
from jaxserve.engine.compile import Executables, compile_programs
from jaxserve.engine.programs import Replica, programs
from jaxserve.models.costs import CostModel, StepShape, device_bytes

ROUNDS = 5
"""Times everything is measured; the median counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """What a decode step took.

    Attributes:
        num_seqs: Sequences that decode.
        context_len: Tokens each of them sees.
        decode_ms: The model's part.
        step_ms: Model, logits and sampler.
        memory_bytes: The least the step moves in one device's memory.
        bandwidth: Bytes a second of the device's memory, measured in the same run.
    """

    num_seqs: int
    context_len: int
    decode_ms: float
    step_ms: float
    memory_bytes: int
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
            "memory_bytes": self.memory_bytes,
            "bandwidth_bytes_per_s": self.bandwidth,
            "floor_ms": self.floor_ms,
            "step_over_floor": self.step_ms / self.floor_ms,
        }


def measure_steps(
    replica: Replica, params: Mapping[str, Array], sizes: Sequence[tuple[int, int]], *, repeats: int = 20
) -> list[StepTime]:
    """Measures decode steps.

    Args:
        replica: What fixes the programs.
        params: Loaded parameters by path; given up.
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
    run = compile_programs([each for each in programs(replica) if each.key in wanted], num_threads=2)
    bandwidth = memory_bandwidth()
    device = _Device(replica, params, run)
    return [device.measure(num_seqs, context_len, repeats, bandwidth) for num_seqs, context_len in sizes]


class _Device:
    """Holds what programs are given and give back."""

    def __init__(self, replica: Replica, params: Mapping[str, Array], run: Executables) -> None:
        self._replica = replica
        self._run = run
        self._params = replica.hold(params)
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
            decode_ms=1e3 * seconds_of(decode, repeats),
            step_ms=1e3 * seconds_of(step, repeats),
            memory_bytes=costs.work(StepShape.decode(num_seqs, context_len)).memory_bytes,
            bandwidth=bandwidth,
        )


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


def seconds_of(call: Callable[[], Array], repeats: int) -> float:
    """Median seconds of a call, each round dispatching many before it waits."""
    jax.block_until_ready(call())
    rounds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        for _ in range(repeats):
            last = call()
        jax.block_until_ready(last)
        rounds.append((time.perf_counter() - started) / repeats)
    return float(np.median(rounds))


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
    return moved / seconds_of(call, 10)


def table(times: Sequence[StepTime]) -> Table:
    """A row for each step."""
    grid = Table("sequences", "context", "decode, ms", "step, ms", "floor, ms", "step / floor", "GB/s of memory")
    for each in times:
        figures = (each.decode_ms, each.step_ms, each.floor_ms, each.step_ms / each.floor_ms, each.bandwidth / 1e9)
        grid.add_row(str(each.num_seqs), str(each.context_len), *(f"{figure:.2f}" for figure in figures))
    return grid
