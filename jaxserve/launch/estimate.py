"""From a step's counted work to the least time it can take on a chip, and from steps to what users see.

A step takes at least as long as the longest of its arithmetic, its memory traffic and its exchanges with other devices:
that is what it takes if all three go on at once. Compilers of today put exchanges between the rest, during which little
else is done; `in_turn_s` adds them up. Both are floors (a roofline, doi:10.1145/1498765.1498785): a real step is slower
by what kernels, dispatch and the exchanges' algorithms lose.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from jaxserve.models.costs import CostModel, StepShape, StepWork
from jaxserve.sharding.chips import Chip
from jaxserve.sharding.interconnect import Wiring


class Bound(enum.StrEnum):
    """What a step waits for most."""

    COMPUTE = "compute"
    MEMORY = "memory"
    INTERCONNECT = "interconnect"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepEstimate:
    """The least a step can take.

    Attributes:
        name: What the step is.
        shape: What it computes.
        compute_s: Arithmetic at the chip's peak.
        memory_s: Memory traffic at its bandwidth.
        interconnect_s: Exchanges with other devices, as fast as their wiring allows.
    """

    name: str
    shape: StepShape
    compute_s: float
    memory_s: float
    interconnect_s: float

    @property
    def seconds(self) -> float:
        """The whole step if exchanges hide behind the rest, or the rest behind them."""
        return max(self.compute_s, self.memory_s, self.interconnect_s)

    @property
    def in_turn_s(self) -> float:
        """The whole step if nothing else is done during exchanges."""
        return max(self.compute_s, self.memory_s) + self.interconnect_s

    @property
    def bound(self) -> Bound:
        """What takes longest."""
        parts = {
            Bound.COMPUTE: self.compute_s,
            Bound.MEMORY: self.memory_s,
            Bound.INTERCONNECT: self.interconnect_s,
        }
        return max(parts, key=lambda part: parts[part])


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What users send.

    Attributes:
        input_len: Tokens of a prompt.
        output_len: Tokens generated for it.
        concurrency: Requests that run at once.
    """

    input_len: int
    output_len: int
    concurrency: int

    @property
    def longest(self) -> int:
        """Tokens of a finished request."""
        return self.input_len + self.output_len


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceEstimate:
    """What users see at best.

    Attributes:
        workload: What they send.
        ttft_s: Prefill of a prompt on an idle replica.
        tpot_s: A decode step with all requests running.
        output_tokens_per_s: In the steady state, prefills of newcomers included.
    """

    workload: Workload
    ttft_s: float
    tpot_s: float
    output_tokens_per_s: float


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """Estimates steps of a model on a chip.

    Attributes:
        costs: Counts the steps.
        chip: What one device can do.
        wiring: What connects the devices that share the model.
        weight_format: Number format of the weights' matmuls: "bfloat16", "int8", ....
        chunk_tokens: Most tokens of a prefill step.
    """

    costs: CostModel
    chip: Chip
    wiring: Wiring
    weight_format: str
    chunk_tokens: int

    def step(self, name: str, shape: StepShape) -> StepEstimate:
        """The least a step can take."""
        work: StepWork = self.costs.work(shape)
        chip = self.chip
        activation = self.costs.blueprint.dtype.name
        return StepEstimate(
            name=name,
            shape=shape,
            compute_s=work.matmul_flops / chip.peak_flops(self.weight_format)
            + work.attention_flops / chip.peak_flops(activation),
            memory_s=work.memory_bytes / chip.hbm_bytes_per_s,
            interconnect_s=sum(self.wiring.seconds(exchange) for exchange in work.exchanges),
        )

    def prefill_s(self, num_tokens: int, *, in_turn: bool = False) -> float:
        """A whole prompt, chunk after chunk."""
        starts = range(0, num_tokens, self.chunk_tokens)
        chunks = (StepShape.prefill(min(self.chunk_tokens, num_tokens - start), start) for start in starts)
        return sum(self._seconds(chunk, in_turn=in_turn) for chunk in chunks)

    def service(self, workload: Workload, *, in_turn: bool = False) -> ServiceEstimate:
        """What users see when `concurrency` requests run at any time.

        Each request costs its prefill, during which nobody decodes, and its share of `output_len` decode steps, taken
        at the context in the middle of its generation.

        Args:
            workload: What users send.
            in_turn: Nothing else is done during exchanges between devices.
        """
        middle = workload.input_len + workload.output_len // 2
        decode_s = self._seconds(StepShape.decode(workload.concurrency, middle), in_turn=in_turn)
        prefill_s = self.prefill_s(workload.input_len, in_turn=in_turn)
        round_s = workload.concurrency * prefill_s + workload.output_len * decode_s
        return ServiceEstimate(
            workload=workload,
            ttft_s=prefill_s,
            tpot_s=decode_s,
            output_tokens_per_s=workload.concurrency * workload.output_len / round_s,
        )

    def _seconds(self, shape: StepShape, *, in_turn: bool) -> float:
        step = self.step("", shape)
        return step.in_turn_s if in_turn else step.seconds
