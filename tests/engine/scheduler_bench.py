"""A scheduler and a device that a test drives step by step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from scheduler_device import EOS, PageDevice, next_token

from jaxserve.core.types import Request, SamplingParams, TokenEvent
from jaxserve.engine.policy import SchedulerConfig
from jaxserve.engine.scheduler import Scheduler
from jaxserve.engine.steps import ScheduledStep
from jaxserve.kv.manager import KVManager


class Bench:
    """A scheduler and a device, run step by step.

    Attributes:
        now: The scheduler's clock.
        step_s: Seconds a step of so many tokens takes.
        check_every: Steps from one look into the books to the next.
        tokens: By request id and index.
        events: All of them.
        steps: All of them.
    """

    def __init__(self, *, num_pages: int = 64, page_size: int = 4, **config: Any) -> None:
        settings = {
            "max_num_seqs": 4,
            "max_num_batched_tokens": 16,
            "max_model_len": 64,
            "token_buckets": (4, 8, 16),
            "step_overhead_tokens": 0,
            **config,
        }
        self.now = 0.0
        self.step_s: Callable[[int], float] = lambda num_tokens: 0.0
        self.kv = KVManager(num_pages=num_pages, page_size=page_size)
        self.scheduler = Scheduler(SchedulerConfig(**settings), self.kv, (EOS,), clock=lambda: self.now)
        self.device = PageDevice(page_size, settings["max_num_seqs"])
        self.check_every = 1
        self.tokens: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
        self.events: list[TokenEvent] = []
        self.steps: list[ScheduledStep] = []

    def submit(
        self,
        name: str,
        prompt: list[int],
        *,
        n: int = 1,
        priority: int = 0,
        salt: str = "",
        client: str = "",
        **sampling: Any,
    ) -> None:
        params = SamplingParams(**{"seed": 0, "ignore_eos": True, "max_tokens": 4, **sampling})
        self.scheduler.submit(
            Request(
                request_id=name,
                prompt=tuple(prompt),
                sampling=params,
                n=n,
                priority=priority,
                cache_salt=salt,
                client=client,
            )
        )

    def step(self) -> bool:
        step = self.scheduler.schedule()
        if step is None:
            return False
        self.steps.append(step)
        result = self.device.execute(step)
        self.now += self.step_s(step.num_tokens)
        for event in self.scheduler.commit(step, result):
            self.tokens[event.request_id, event.index].extend(event.token_ids)
            self.events.append(event)
        if len(self.steps) % self.check_every == 0:
            self.scheduler.check_integrity()
        return True

    def finish(self) -> None:
        while self.step():
            pass
        assert not self.scheduler.has_work
        assert self.kv.stats().num_owned == 0

    def first(self, name: str) -> TokenEvent:
        return next(event for event in self.events if event.request_id == name)


def expected(prompt: list[int], count: int, seed: int = 0) -> list[int]:
    history = list(prompt)
    for _ in range(count):
        history.append(next_token(history, seed))
    return history[len(prompt) :]
