"""Host time of a step: the real loop, scheduler, page tables and batch packing, with a device that takes no time.

The device's part is to answer at once with made-up tokens, so what a step takes is what the host does: schedule,
pack, commit, and hand events to the requests' event loop, whose own work competes for the interpreter as it does in a
server. What JAX takes to dispatch a program is the device's part here, and not counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.table import Table

from jaxserve.bench.report import PERCENTILES, Spread
from jaxserve.core.types import Request, SamplingParams
from jaxserve.engine.api import EngineInfo
from jaxserve.engine.batch import BatchBuilder, Buckets
from jaxserve.engine.loop import LocalEngine
from jaxserve.engine.policy import SchedulerConfig
from jaxserve.engine.runner import StepHandle
from jaxserve.engine.scheduler import Scheduler
from jaxserve.engine.steps import ScheduledStep, StepResult
from jaxserve.kv.manager import KVManager
from jaxserve.sampling.validate import SamplingLimits

VOCAB_SIZE = 49152
PAGE_SIZE = 16
TOKEN = 7


@dataclass(frozen=True, kw_only=True, slots=True)
class HostTime:
    """What steps of a size took.

    Attributes:
        num_seqs: Sequences that decode in each step.
        num_steps: Steps measured.
        step: Time of a step, in milliseconds.
    """

    num_seqs: int
    num_steps: int
    step: Spread

    def as_json(self) -> dict[str, object]:
        """As a JSON object."""
        figures = {f"p{point}": value for point, value in self.step.percentiles.items()}
        return {"num_seqs": self.num_seqs, "num_steps": self.num_steps, "step_ms": {"mean": self.step.mean, **figures}}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answer:
    """A step that is done already."""

    num_items: int
    bucket: str = "none"

    def result(self) -> StepResult:
        """A token for each item."""
        return StepResult(token_ids=[TOKEN] * self.num_items)


class _InstantRunner:
    """Packs each step as for a device and answers at once.

    Args:
        new_builder: Makes what packs steps.
    """

    def __init__(self, new_builder: Callable[[], BatchBuilder]) -> None:
        self._new_builder = new_builder
        self._builder = new_builder()
        self.num_decodes: list[int] = []

    def execute(self, step: ScheduledStep) -> StepHandle:
        """Packs the step, and notes how many sequences decode if all do."""
        for sequence in step.admitted:
            self._builder.admit(sequence)
        self._builder.build(step)
        self.num_decodes.append(step.num_decodes if step.num_decodes == len(step.items) else 0)
        return _Answer(num_items=len(step.items))

    def reset(self) -> None:
        """Forgets the page tables."""
        self._builder = self._new_builder()

    def close(self) -> None:
        """There is no device memory to give back."""


@dataclass(frozen=True, slots=True)
class _Recorder:
    """Keeps the host time of each step, in the order of the steps."""

    host_s: list[float] = field(default_factory=list)

    def observe_step(self, program: str, bucket: str, seconds: float) -> None:
        """The device's time is of no interest."""

    def observe_step_host(self, seconds: float) -> None:
        """Keeps it."""
        self.host_s.append(seconds)


def measure_host_time(num_seqs: int, *, prompt_tokens: int = 128, output_tokens: int = 256) -> HostTime:
    """Lets sequences decode together and measures the steps in which all of them do.

    Args:
        num_seqs: How many.
        prompt_tokens: Length of each prompt.
        output_tokens: Tokens each generates.
    """
    max_model_len = prompt_tokens + output_tokens
    budget = max(512, num_seqs)
    pages_per_seq = -(-max_model_len // PAGE_SIZE)
    num_pages = 2 * num_seqs * pages_per_seq
    buckets = Buckets(tokens=(num_seqs, budget) if num_seqs < budget else (budget,), seqs=(num_seqs,))
    runner = _InstantRunner(lambda: BatchBuilder(buckets, pages_per_seq=pages_per_seq))
    recorder = _Recorder()
    config = SchedulerConfig(
        max_num_seqs=num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=max_model_len,
        token_buckets=buckets.tokens,
        max_waiting=num_seqs,
    )
    info = EngineInfo(
        model="instant",
        max_model_len=max_model_len,
        vocab_size=VOCAB_SIZE,
        page_size=PAGE_SIZE,
        num_pages=num_pages,
        eos_token_ids=(),
        max_num_seqs=num_seqs,
    )
    kv = KVManager(num_pages=num_pages, page_size=PAGE_SIZE, enable_prefix_cache=True)
    limits = SamplingLimits(vocab_size=VOCAB_SIZE, max_model_len=max_model_len)
    engine = LocalEngine(Scheduler(config, kv, ()), runner, info=info, limits=limits, observer=recorder)
    asyncio.run(_generate(engine, num_seqs, prompt_tokens, output_tokens))
    steps = zip(runner.num_decodes, recorder.host_s, strict=True)
    measured = [seconds for num_decodes, seconds in steps if num_decodes == num_seqs]
    return HostTime(num_seqs=num_seqs, num_steps=len(measured), step=Spread.of(measured))


def table(results: Sequence[HostTime]) -> Table:
    """A table with a row for each number of sequences."""
    grid = Table("sequences decoding", "steps", "mean, ms", *(f"p{point}, ms" for point in PERCENTILES))
    for result in results:
        figures = (result.step.mean, *result.step.percentiles.values())
        grid.add_row(str(result.num_seqs), str(result.num_steps), *(f"{figure:.3f}" for figure in figures))
    return grid


async def _generate(engine: LocalEngine, num_seqs: int, prompt_tokens: int, output_tokens: int) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)

    async def one(number: int) -> None:
        prompt = tuple((number * prompt_tokens + i) % VOCAB_SIZE for i in range(prompt_tokens))
        async for _ in engine.stream(Request(request_id=str(number), prompt=prompt, sampling=sampling)):
            pass

    await asyncio.gather(*(one(number) for number in range(num_seqs)))
    await engine.close()
