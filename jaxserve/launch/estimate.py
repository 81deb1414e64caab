"""From a step's counted work to the least time it can take on a chip, and from steps to what users see.

A step takes at least as long as the longest of its arithmetic, its memory traffic and its exchanges with other devices:
that is what it takes if all three go on at once. Compilers of today put exchanges between the rest, during which little
else is done; `in_turn_s` adds them up. Both are floors (a roofline, doi:10.1145/1498765.1498785): a real step is slower
by what kernels, dispatch, padding to compiled sizes and the exchanges' algorithms lose.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from jaxserve.models.costs import CostModel, StepShape, StepWork, visible_pairs
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
        tpot_s: A step in which all requests decode and no prompt is computed.
        output_tokens_per_s: In the steady state, in which newcomers' prompts fill the steps that others decode in.
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
        step_tokens: Most tokens of a step.
    """

    costs: CostModel
    chip: Chip
    wiring: Wiring
    weight_format: str
    step_tokens: int

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

    def decode(self, num_seqs: int, context_len: int) -> StepShape:
        """One token for each sequence, each with a context of `context_len` tokens."""
        return StepShape.decode(num_seqs, context_len, window=self._window)

    def chunks(self, num_tokens: int) -> list[StepShape]:
        """A prompt in as few steps as hold it."""
        most = self.step_tokens
        return [
            StepShape.prefill(
                min(most, num_tokens - start), start, last=start + most >= num_tokens, window=self._window
            )
            for start in range(0, num_tokens, most)
        ]

    def prefill_s(self, num_tokens: int, *, in_turn: bool = False) -> float:
        """A whole prompt, chunk after chunk."""
        return sum(self._seconds(chunk, in_turn=in_turn) for chunk in self.chunks(num_tokens))

    def service(self, workload: Workload, *, in_turn: bool = False) -> ServiceEstimate:
        """What users see when `concurrency` requests run at any time, whose prompts have nothing in common.

        Args:
            workload: What users send.
            in_turn: Nothing else is done during exchanges between devices.
        """
        middle = workload.input_len + workload.output_len // 2
        steps, average = self.steady_state(workload)
        round_s = steps * self._seconds(average, in_turn=in_turn)
        return ServiceEstimate(
            workload=workload,
            ttft_s=self.prefill_s(workload.input_len, in_turn=in_turn),
            tpot_s=self._seconds(self.decode(workload.concurrency, middle), in_turn=in_turn),
            output_tokens_per_s=workload.concurrency * workload.output_len / round_s,
        )

    def steady_state(self, workload: Workload) -> tuple[float, StepShape]:
        """The fewest steps in which as many requests end as run at once, and what such a step computes on average.

        A request takes part in a step for each chunk of its prompt, the last of which gives its first token, and in one
        for each token after that; a step has room for `step_tokens` tokens. Each step reads the weights, whatever it
        holds, so none is faster than the fewest; and as what else a step takes grows no slower than what it holds,
        nothing is gained by filling some steps more than others.
        """
        chunks, num_decodes = self.chunks(workload.input_len), workload.output_len - 1
        num_tokens = workload.input_len + num_decodes
        steps = max(len(chunks) + num_decodes, workload.concurrency * num_tokens / self.step_tokens)
        pairs = visible_pairs(num_tokens, self._window)
        decoded = pairs - visible_pairs(workload.input_len, self._window)
        share = workload.concurrency / steps
        return steps, StepShape(
            num_tokens=share * num_tokens,
            num_scored=share * workload.output_len,
            read_tokens=share * (sum(chunk.read_tokens for chunk in chunks) + decoded),
            pairs=share * pairs,
        )

    @property
    def _window(self) -> int | None:
        return self.costs.blueprint.spec.sliding_window

    def _seconds(self, shape: StepShape, *, in_turn: bool) -> float:
        step = self.step("", shape)
        return step.in_turn_s if in_turn else step.seconds
