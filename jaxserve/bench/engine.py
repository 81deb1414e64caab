"""Host time of a step: the real loop, scheduler, page tables and batch packing, with a device that takes no time.

The device's part is to answer at once with made-up tokens, so what a step takes is what the host does: schedule,
pack, commit, and hand events to the requests' event loop, whose own work competes for the interpreter as it does in a
server. What JAX takes to dispatch a program is the device's part here, and not counted. As in a server that is ready,
what exists before the first request is kept out of garbage collection.

`measure_host_time` splits the time of a step by phase; `endure` pushes many requests through and looks for what stays
behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rich.table import Table

from jaxserve.bench.report import PERCENTILES, Spread
from jaxserve.core.types import FinishReason, Request, SamplingParams, TokenEvent
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

PHASES = ("schedule", "pack", "commit", "deliver")
"""Parts of a step: choosing its tokens; laying them out for the device; taking the sampled ones over; and the rest,
mostly handing events to the requests' event loop.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostTime:
    """What steps of a size took.

    Attributes:
        num_seqs: Sequences that decode in each step.
        num_steps: Steps measured.
        step: Time of a step, in milliseconds.
        phases: Of that, by phase.
    """

    num_seqs: int
    num_steps: int
    step: Spread
    phases: Mapping[str, Spread]

    def as_json(self) -> dict[str, object]:
        """As a JSON object."""
        phases = {f"{name}_ms": _figures(spread) for name, spread in self.phases.items()}
        return {
            "num_seqs": self.num_seqs,
            "num_steps": self.num_steps,
            "step_ms": _figures(self.step),
            "phases": phases,
        }


def _figures(spread: Spread) -> dict[str, float]:
    return {"mean": spread.mean, **{f"p{point}": value for point, value in spread.percentiles.items()}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Endurance:
    """What many requests left behind.

    Attributes:
        num_requests: How many were sent.
        num_answered: How many of them got all their tokens and one end.
        seconds: For all of them.
        grown_blocks: Python's memory blocks in use after the last request, less those after the first half.
        num_left: Sequences that wait or run at the end.
        kv_cache_usage: Share of the pool's pages that somebody owns at the end.
    """

    num_requests: int
    num_answered: int
    seconds: float
    grown_blocks: int
    num_left: int
    kv_cache_usage: float

    @property
    def clean(self) -> bool:
        """Whether everybody was answered and nothing stayed behind; a leak is at least a block for each request.

        Of the second half, that is; what a sequence or two take that come or go is noise.
        """
        left = self.num_left or self.kv_cache_usage or self.num_answered != self.num_requests
        return not left and self.grown_blocks <= 500 + self.num_requests // 10

    def as_json(self) -> dict[str, object]:
        """As a JSON object."""
        return {
            "num_requests": self.num_requests,
            "num_answered": self.num_answered,
            "seconds": self.seconds,
            "grown_blocks": self.grown_blocks,
            "num_left": self.num_left,
            "kv_cache_usage": self.kv_cache_usage,
            "clean": self.clean,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answer:
    """A step that is done already."""

    num_items: int
    bucket: str = "none"

    def result(self) -> StepResult:
        """A token for each item."""
        return StepResult(token_ids=[TOKEN] * self.num_items)


@dataclass(frozen=True, slots=True)
class _Recorder:
    """Keeps the seconds of each step and of its phases, in the order of the steps."""

    host_s: list[float] = field(default_factory=list)
    schedule_s: list[float] = field(default_factory=list)
    pack_s: list[float] = field(default_factory=list)
    commit_s: list[float] = field(default_factory=list)
    num_decodes: list[int] = field(default_factory=list)

    def observe_step(self, program: str, bucket: str, seconds: float) -> None:
        """The device's time is of no interest."""

    def observe_step_host(self, seconds: float) -> None:
        """Keeps it."""
        self.host_s.append(seconds)

    def phases_of(self, index: int) -> tuple[float, ...]:
        """Seconds of a step's phases, as in `PHASES`."""
        known = self.schedule_s[index], self.pack_s[index], self.commit_s[index]
        return *known, self.host_s[index] - sum(known)


class _TimedScheduler(Scheduler):
    """Notes how long it takes."""

    recorder: _Recorder | None = None

    def schedule(self) -> ScheduledStep | None:
        """See `Scheduler.schedule`."""
        started = time.perf_counter()
        step = super().schedule()
        if step is not None and self.recorder is not None:
            self.recorder.schedule_s.append(time.perf_counter() - started)
        return step

    def commit(self, step: ScheduledStep, result: StepResult) -> list[TokenEvent]:
        """See `Scheduler.commit`."""
        started = time.perf_counter()
        events = super().commit(step, result)
        if self.recorder is not None:
            self.recorder.commit_s.append(time.perf_counter() - started)
        return events


class _InstantRunner:
    """Packs each step as for a device and answers at once.

    Args:
        new_builder: Makes what packs steps.
        recorder: Is told how long that takes.
    """

    def __init__(self, new_builder: Callable[[], BatchBuilder], recorder: _Recorder | None) -> None:
        self._new_builder = new_builder
        self._builder = new_builder()
        self._recorder = recorder

    def execute(self, step: ScheduledStep) -> StepHandle:
        """Packs the step, and notes how many sequences decode if all do."""
        started = time.perf_counter()
        for sequence in step.admitted:
            self._builder.admit(sequence)
        self._builder.build(step)
        if self._recorder is not None:
            self._recorder.pack_s.append(time.perf_counter() - started)
            self._recorder.num_decodes.append(step.num_decodes if step.num_decodes == len(step.items) else 0)
        return _Answer(num_items=len(step.items))

    def reset(self) -> None:
        """Forgets the page tables."""
        self._builder = self._new_builder()

    def close(self) -> None:
        """There is no device memory to give back."""


def measure_host_time(num_seqs: int, *, prompt_tokens: int = 128, output_tokens: int = 256) -> HostTime:
    """Lets sequences decode together and measures the steps in which all of them do.

    Args:
        num_seqs: How many.
        prompt_tokens: Length of each prompt.
        output_tokens: Tokens each generates.
    """
    recorder = _Recorder()

    async def generate() -> None:
        engine = _engine(num_seqs, prompt_tokens + output_tokens, recorder)
        numbers = iter(range(num_seqs))
        await asyncio.gather(*(_send(engine, numbers, prompt_tokens, output_tokens) for _ in range(num_seqs)))
        await engine.close()

    with _settled_heap():
        asyncio.run(generate())
    measured = [index for index, num_decodes in enumerate(recorder.num_decodes) if num_decodes == num_seqs]
    by_phase = zip(PHASES, zip(*map(recorder.phases_of, measured), strict=True), strict=True)
    return HostTime(
        num_seqs=num_seqs,
        num_steps=len(measured),
        step=Spread.of([recorder.host_s[index] for index in measured]),
        phases={name: Spread.of(seconds) for name, seconds in by_phase},
    )


def endure(num_requests: int, *, num_seqs: int = 64, prompt_tokens: int = 32, output_tokens: int = 8) -> Endurance:
    """Pushes many requests through the engine, four times as many at once as run.

    Args:
        num_requests: How many.
        num_seqs: Slots.
        prompt_tokens: Length of each prompt; all differ.
        output_tokens: Tokens each generates.
    """

    async def generate() -> Endurance:
        engine = _engine(num_seqs, prompt_tokens + output_tokens, None)
        started, num_answered, blocks = time.perf_counter(), 0, [0]
        for first, last in ((0, num_requests // 2), (num_requests // 2, num_requests)):
            numbers = iter(range(first, last))
            senders = (_send(engine, numbers, prompt_tokens, output_tokens) for _ in range(4 * num_seqs))
            num_answered += sum(await asyncio.gather(*senders))
            # The engine may hold the sequences of its last step until the next: let that be one of one sequence.
            await _send(engine, iter((num_requests + last,)), prompt_tokens, output_tokens)
            gc.collect()
            blocks.append(sys.getallocatedblocks())
        stats = engine.stats()
        await engine.close()
        return Endurance(
            num_requests=num_requests,
            num_answered=num_answered,
            seconds=time.perf_counter() - started,
            grown_blocks=blocks[-1] - blocks[-2],
            num_left=stats.num_waiting + stats.num_running,
            kv_cache_usage=stats.kv_cache_usage,
        )

    with _settled_heap():
        return asyncio.run(generate())


@contextlib.contextmanager
def _settled_heap() -> Iterator[None]:
    """What exists now is no garbage, as `launch` says of a server that is ready."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _engine(num_seqs: int, max_model_len: int, recorder: _Recorder | None) -> LocalEngine:
    budget = max(512, num_seqs)
    pages_per_seq = -(-max_model_len // PAGE_SIZE)
    num_pages = 2 * num_seqs * pages_per_seq
    buckets = Buckets(tokens=(num_seqs, budget) if num_seqs < budget else (budget,), seqs=(num_seqs,))
    config = SchedulerConfig(
        max_num_seqs=num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=max_model_len,
        token_buckets=buckets.tokens,
        max_waiting=4 * num_seqs,
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
    scheduler = _TimedScheduler(config, kv, ())
    scheduler.recorder = recorder
    runner = _InstantRunner(lambda: BatchBuilder(buckets, pages_per_seq=pages_per_seq), recorder)
    limits = SamplingLimits(vocab_size=VOCAB_SIZE, max_model_len=max_model_len)
    return LocalEngine(scheduler, runner, info=info, limits=limits, observer=recorder)


def table(results: Sequence[HostTime]) -> Table:
    """A table with a row for the steps of each number of sequences, and one for each of their phases."""
    grid = Table("sequences", "steps", "phase", "mean, ms", *(f"p{point}, ms" for point in PERCENTILES))
    for result in results:
        for name, spread in {"all": result.step, **result.phases}.items():
            what = (str(result.num_seqs), str(result.num_steps)) if name == "all" else ("", "")
            figures = (spread.mean, *spread.percentiles.values())
            grid.add_row(*what, name, *(f"{figure:.3f}" for figure in figures), end_section=name == PHASES[-1])
    return grid


def endurance_table(result: Endurance) -> Table:
    """A table of what many requests left behind."""
    grid = Table("requests", "answered", "seconds", "memory blocks grown by", "sequences left", "pages left")
    grid.add_row(
        *(str(result.num_requests), str(result.num_answered), f"{result.seconds:.1f}", str(result.grown_blocks)),
        *(str(result.num_left), f"{result.kv_cache_usage:.0%}"),
    )
    return grid


async def _send(engine: LocalEngine, numbers: Iterator[int], prompt_tokens: int, output_tokens: int) -> int:
    """Sends one request after another; how many got all their tokens and one end."""
    sampling = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
    num_answered = 0
    for number in numbers:
        prompt = tuple((number * prompt_tokens + i) % VOCAB_SIZE for i in range(prompt_tokens))
        num_tokens, ends = 0, []
        async for event in engine.stream(Request(request_id=str(number), prompt=prompt, sampling=sampling)):
            num_tokens += len(event.token_ids)
            if event.finish_reason is not None:
                ends.append(event.finish_reason)
        num_answered += num_tokens == output_tokens and ends == [FinishReason.LENGTH]
    return num_answered
