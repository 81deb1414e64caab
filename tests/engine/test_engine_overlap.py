"""A step that fails while the next one is on the device already: the loop over a device that checks every page."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

import pytest
from scheduler_device import EOS, VOCAB_SIZE, PageDevice, next_token
from tiny_engine import generate_all, serving, tokens_by_index

from jaxserve.core.types import FinishReason, Request, SamplingParams
from jaxserve.engine.api import EngineInfo
from jaxserve.engine.loop import LocalEngine
from jaxserve.engine.policy import SchedulerConfig
from jaxserve.engine.scheduler import Scheduler
from jaxserve.engine.steps import ScheduledStep, StepResult
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
        if self.number == self.runner.failing:
            raise RuntimeError("the step failed")
        return self.computed


@dataclass
class PageRunner:
    """Runs steps on a `PageDevice` and writes down what happens in which order.

    Attributes:
        failing: The step that fails, counted from 0.
        log: ("dispatch" or "result", step) and ("reset", 0).
        members: Requests of each step.
    """

    failing: int
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


def new_engine(runner: PageRunner, *, num_pages: int) -> LocalEngine:
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
    return LocalEngine(
        scheduler, runner, info=info, limits=SamplingLimits(vocab_size=VOCAB_SIZE, max_model_len=MAX_LEN)
    )


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


@pytest.mark.parametrize("num_pages", [64, 12])
@pytest.mark.parametrize("failing", range(8))
async def test_step_fails_while_the_next_is_dispatched(
    failing: int, num_pages: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL + 1)
    runner = PageRunner(failing)
    async with serving(new_engine(runner, num_pages=num_pages)) as engine:
        results = await asyncio.wait_for(generate_all(engine, requests()), 30)
        assert engine.health().ready
    # The next step was dispatched before the failure was known, and nobody asked what it had computed.
    moment = runner.log.index(("result", failing))
    assert runner.log[moment - 1 : moment + 2] == [("dispatch", failing + 1), ("result", failing), ("reset", 0)]
    assert ("result", failing + 1) not in runner.log
    hit, num_failed = runner.members[failing], 0
    for request, events in zip(requests(), results, strict=True):
        tokens = tokens_by_index(events)
        for index in range(request.n):
            ends = [e for e in events if e.index == index and e.finish_reason is not None]
            assert len(ends) == 1
            assert [e for e in events if e.index == index][-1] is ends[0]
            expected, got = alone(request, index), tokens[index]
            if ends[0].finish_reason is FinishReason.ERROR:
                num_failed += 1
                assert request.request_id in hit
                assert got == expected[: len(got)]
            else:
                assert ends[0].finish_reason is FinishReason.LENGTH
                assert got == expected
    assert len(hit) <= num_failed < sum(request.n for request in requests())
