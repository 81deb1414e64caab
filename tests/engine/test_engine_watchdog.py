"""A step that is overdue: who asks is told, whatever the engine's thread hangs in."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from engine_conformance import collect, terminal, tokens
from page_engine import Handle, PageRunner, alone, new_engine
from tiny_engine import serving

from jaxserve.core.errors import UnavailableError
from jaxserve.core.types import FinishReason, Request, SamplingParams
from jaxserve.engine.api import Health
from jaxserve.engine.loop import LocalEngine
from jaxserve.engine.steps import ScheduledStep, StepResult
from jaxserve.engine.watchdog import Watchdog

LIMIT_S = 100.0
WELL = Health(alive=True, ready=True)
REQUEST = Request(request_id="r", prompt=(1, 2), sampling=SamplingParams(seed=1, max_tokens=6, ignore_eos=True))


@dataclass
class Clock:
    now: float = 5.0

    def __call__(self) -> float:
        return self.now


@dataclass
class HangingRunner(PageRunner):
    """A device that hangs once, at the third step, until the test lets it go on."""

    hangs_in: str = "result"
    begun: threading.Event = field(default_factory=threading.Event)
    may_end: threading.Event = field(default_factory=threading.Event)

    def hang(self, where: str) -> None:
        if where == self.hangs_in and len(self.members) == 3:
            self.begun.set()
            assert self.may_end.wait(60), "the test has ended without letting the device go on"

    def execute(self, step: ScheduledStep) -> Handle:
        handle = super().execute(step)
        self.hang("execute")
        return HangingHandle(self, handle.number, handle.computed)

    def reset(self) -> None:
        self.hang("reset")
        super().reset()


@dataclass
class HangingHandle(Handle):
    def result(self) -> StepResult:
        assert isinstance(self.runner, HangingRunner)
        self.runner.hang("result")
        return super().result()


@asynccontextmanager
async def hanging(runner: HangingRunner, clock: Clock) -> AsyncIterator[LocalEngine]:
    async with serving(new_engine(runner, watchdog=Watchdog(LIMIT_S, clock=clock))) as engine:
        try:
            yield engine
        finally:
            runner.may_end.set()


@pytest.mark.parametrize("where", ["result", "execute", "reset"])
async def test_overdue_step_is_not_ready_then_not_alive(where: str, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    runner = HangingRunner(failing=(1,) if where == "reset" else (), hangs_in=where)
    async with hanging(runner, clock) as engine:
        first = engine.stream(REQUEST)
        await asyncio.to_thread(runner.begun.wait, 20)
        assert engine.health() == WELL
        clock.now += LIMIT_S
        assert engine.health() == WELL
        clock.now += 1
        late = engine.health()
        assert (late.alive, late.ready) == (True, False)
        assert late.reason == ("A step has been running for 101 s, more than step_timeout_s=100: the device may hang.")
        assert engine.stats().step_age_s == 101
        waiting = engine.stream(Request(request_id="s", prompt=(3,), sampling=REQUEST.sampling))
        clock.now += LIMIT_S
        assert not engine.health().alive
        with pytest.raises(UnavailableError, match="for 201 s"):
            engine.stream(REQUEST)
        errors = [record for record in caplog.records if record.name.endswith("watchdog")]
        assert [record.levelno for record in errors] == [logging.ERROR], "it is said once"
        # The device was only slow: everything goes on.
        runner.may_end.set()
        async with asyncio.timeout(30):
            if where != "reset":
                assert tokens(await collect(first)) == alone(REQUEST, 0)
            events = await collect(waiting)
        assert terminal(events).finish_reason is FinishReason.LENGTH
        assert engine.health() == WELL
        assert "has come to its end after 201 s" in caplog.text


async def test_time_without_work_is_no_step() -> None:
    clock = Clock()
    async with serving(new_engine(PageRunner(), watchdog=Watchdog(LIMIT_S, clock=clock))) as engine:
        for number in range(3):
            clock.now += 10 * LIMIT_S
            assert (engine.health(), engine.stats().step_age_s) == (WELL, 0)
            request = Request(request_id=f"r{number}", prompt=(1,), sampling=REQUEST.sampling)
            async with asyncio.timeout(30):
                await collect(engine.stream(request))
                while engine._watchdog._since_s is not None:
                    await asyncio.sleep(0.001)
    clock.now += 10 * LIMIT_S
    assert engine.health() == Health(alive=True, ready=False, reason="The engine is closed.")


async def test_many_steps_of_little_time_are_well() -> None:
    """It is the age of one step that counts, however long the device is busy."""
    clock = Clock()

    class Ticking(PageRunner):
        def execute(self, step: ScheduledStep) -> Handle:
            clock.now += 0.9 * LIMIT_S
            worst.append(watchdog.age_s())
            return super().execute(step)

    worst: list[float] = []
    watchdog = Watchdog(LIMIT_S, clock=clock)
    async with serving(new_engine(Ticking(), watchdog=watchdog)) as engine, asyncio.timeout(30):
        await collect(engine.stream(REQUEST))
        assert engine.health() == WELL
    assert len(worst) > 5
    assert max(worst) <= LIMIT_S
