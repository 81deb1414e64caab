"""The loop over a device that checks every page it reads: small enough to follow each step, and told when to fail."""

from __future__ import annotations

from dataclasses import dataclass, field

from scheduler_device import EOS, VOCAB_SIZE, PageDevice, next_token

from jaxserve.core.types import Request, SamplingParams
from jaxserve.engine.api import EngineInfo
from jaxserve.engine.loop import LocalEngine
from jaxserve.engine.policy import SchedulerConfig
from jaxserve.engine.scheduler import Scheduler
from jaxserve.engine.steps import ScheduledStep, StepResult
from jaxserve.engine.watchdog import Watchdog
from jaxserve.kv.manager import KVManager
from jaxserve.sampling.validate import SamplingLimits

PAGE_SIZE, NUM_SLOTS, MAX_LEN = 4, 4, 32


@dataclass
class Handle:
    """A step on the device; it may turn out to have failed."""

    runner: PageRunner
    number: int
    computed: StepResult
    bucket: str = "none"

    def result(self) -> StepResult:
        self.runner.log.append(("result", self.number))
        if self.number in self.runner.failing:
            raise RuntimeError("the step failed")
        return self.computed


@dataclass
class PageRunner:
    """Runs steps on a `PageDevice` and writes down what happens in which order.

    Attributes:
        failing: The steps that fail, counted from 0.
        log: ("dispatch" or "result", step) and ("reset", 0).
        members: Requests of each step.
    """

    failing: tuple[int, ...] = ()
    log: list[tuple[str, int]] = field(default_factory=list)
    members: list[set[str]] = field(default_factory=list)
    device: PageDevice = field(default_factory=lambda: PageDevice(PAGE_SIZE, NUM_SLOTS))

    def execute(self, step: ScheduledStep) -> Handle:
        number = len(self.members)
        self.log.append(("dispatch", number))
        self.members.append({item.sequence.request.request_id for item in step.items})
        return Handle(self, number, self.device.execute(step))

    def reset(self) -> None:
        self.log.append(("reset", 0))
        self.device = PageDevice(PAGE_SIZE, NUM_SLOTS)

    def close(self) -> None:
        """There is no device memory."""


def new_engine(runner: PageRunner, *, num_pages: int = 64, watchdog: Watchdog | None = None) -> LocalEngine:
    config = SchedulerConfig(
        max_num_seqs=NUM_SLOTS, max_num_batched_tokens=8, max_model_len=MAX_LEN, token_buckets=(4, 8)
    )
    info = EngineInfo(
        model="pages",
        max_model_len=MAX_LEN,
        vocab_size=VOCAB_SIZE,
        page_size=PAGE_SIZE,
        num_pages=num_pages,
        eos_token_ids=(EOS,),
        max_num_seqs=NUM_SLOTS,
    )
    scheduler = Scheduler(config, KVManager(num_pages=num_pages, page_size=PAGE_SIZE), (EOS,))
    limits = SamplingLimits(vocab_size=VOCAB_SIZE, max_model_len=MAX_LEN)
    return LocalEngine(scheduler, runner, info=info, limits=limits, watchdog=watchdog)


def requests() -> list[Request]:
    """Six, whose prompts take more than one step together."""
    return [
        Request(
            request_id=f"r{number}",
            prompt=tuple((number * 5 + i) % VOCAB_SIZE for i in range(5 + number)),
            sampling=SamplingParams(seed=number, max_tokens=6, ignore_eos=True),
            n=1 + number % 2,
        )
        for number in range(6)
    ]


def alone(request: Request, index: int) -> list[int]:
    history = list(request.prompt)
    assert request.sampling.seed is not None
    for _ in range(request.sampling.max_tokens or 0):
        history.append(next_token(history, request.sampling.seed + index))
    return history[len(request.prompt) :]
