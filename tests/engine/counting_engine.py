"""The real engine on a device that computes nothing: nothing is compiled, and contexts are longer than any test."""

from __future__ import annotations

import time
from dataclasses import dataclass

from jaxserve.engine.api import EngineInfo
from jaxserve.engine.loop import LocalEngine
from jaxserve.engine.policy import SchedulerConfig
from jaxserve.engine.scheduler import Scheduler
from jaxserve.engine.steps import ScheduledStep, StepResult
from jaxserve.kv.manager import KVManager
from jaxserve.sampling.validate import SamplingLimits

EOS = 1


@dataclass(frozen=True)
class Counted:
    """A dispatched step: each sequence that samples gets the number of the step for a token."""

    number: int
    step: ScheduledStep
    bucket: str = "none"

    def result(self) -> StepResult:
        time.sleep(0.001)
        return StepResult(token_ids=[self.number % 64 for item in self.step.items if item.samples])


class CountingRunner:
    """A device without memory, so that a context may be longer than anybody can wait for."""

    def __init__(self) -> None:
        self.num_steps = 0

    def execute(self, step: ScheduledStep) -> Counted:
        self.num_steps += 1
        return Counted(self.num_steps, step)

    def reset(self) -> None:
        """There is nothing to reset."""

    def close(self) -> None:
        """There is nothing to free."""


def counting_engine(*, vocab_size: int = 64) -> LocalEngine:
    """The real loop, scheduler and prefix cache, over a million pages of four tokens."""
    num_pages, page_size, num_slots, max_len = 1 << 20, 4, 4, 1 << 21
    config = SchedulerConfig(
        max_num_seqs=num_slots, max_num_batched_tokens=16, max_model_len=max_len, token_buckets=(4, 8, 16)
    )
    info = EngineInfo(
        model="counting",
        max_model_len=max_len,
        vocab_size=vocab_size,
        page_size=page_size,
        num_pages=num_pages,
        eos_token_ids=(EOS,),
        max_num_seqs=num_slots,
    )
    return LocalEngine(
        Scheduler(config, KVManager(num_pages=num_pages, page_size=page_size), (EOS,)),
        CountingRunner(),
        info=info,
        limits=SamplingLimits(vocab_size=vocab_size, max_model_len=max_len),
    )
