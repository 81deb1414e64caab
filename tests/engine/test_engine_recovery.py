"""While the device's state is made anew, which may take long, nobody else stands still."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from dataclasses import dataclass, field

import pytest
from engine_conformance import collect, terminal, tokens
from page_engine import PageRunner, alone, new_engine, requests
from tiny_engine import check_books, serving

from jaxserve.core.errors import UnavailableError
from jaxserve.core.types import FinishReason, Request, SamplingParams
from jaxserve.engine.loop import LocalEngine

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL + 1)


@dataclass
class SlowReset(PageRunner):
    """A device whose reset ends when the test says so, and may fail then."""

    lost: bool = False
    begun: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    may_end: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def reset(self) -> None:
        self.begun.release()
        assert self.may_end.acquire(timeout=60), "the test has ended without letting the reset end"
        if self.lost:
            raise RuntimeError("nobody answers")
        super().reset()


def endless(name: str) -> Request:
    """A request that runs to the end of the context."""
    return Request(request_id=name, prompt=(3, 4), sampling=SamplingParams(seed=1, ignore_eos=True))


async def in_reset(runner: SlowReset, engine: LocalEngine) -> None:
    """Waits until a reset has begun; then nobody may hold the lock that requests, aborts and `/metrics` take."""
    assert await asyncio.to_thread(runner.begun.acquire, True, 20), "no reset has begun"

    def is_free() -> bool:
        with contextlib.ExitStack() as stack:
            if engine._work.acquire(timeout=5):
                stack.callback(engine._work.release)
                return True
        return False

    if not await asyncio.to_thread(is_free):
        runner.may_end.release(9)
        pytest.fail("the lock is held while the device is waited for")


@pytest.mark.parametrize("failing", [(2,), (2, 4), (2, 5)])
async def test_everybody_is_served_during_a_reset(failing: tuple[int, ...]) -> None:
    """Requests are taken, aborted and counted, also if a step soon after the reset fails in its turn."""
    runner = SlowReset(failing)
    early = requests()[:3]
    late = [
        Request(request_id=f"late {i}", prompt=(i, 2), sampling=SamplingParams(seed=i, max_tokens=4, ignore_eos=True))
        for i in range(len(failing))
    ]
    given_up = early[2].request_id
    async with serving(new_engine(runner)) as engine:
        with engine._work:
            streams = {request.request_id: engine.stream(request) for request in early}
        for request in late:
            await in_reset(runner, engine)
            assert engine.stats().num_running == 0
            streams[request.request_id] = engine.stream(request)
            engine.abort(given_up)
            assert engine.health().ready
            runner.may_end.release()
        async with asyncio.timeout(30):
            results = {name: await collect(stream) for name, stream in streams.items()}
    hit = set().union(*(runner.members[number] for number in failing))
    assert runner.log.count(("reset", 0)) == len(failing)
    for request in (*early, *late):
        events = results[request.request_id]
        for index in range(request.n):
            match terminal(events, index).finish_reason:
                case FinishReason.LENGTH:
                    assert tokens(events, index) == alone(request, index)
                case FinishReason.ABORT:
                    assert request.request_id == given_up
                case _:
                    assert request.request_id in hit
    assert terminal(results[late[-1].request_id]).finish_reason is FinishReason.LENGTH


async def test_abort_during_a_reset_is_honoured() -> None:
    runner = SlowReset((1,))
    async with serving(new_engine(runner)) as engine:
        stream = engine.stream(endless("runs"))
        await in_reset(runner, engine)
        waits = engine.stream(endless("waits"))
        engine.abort("waits")
        runner.may_end.release()
        async with asyncio.timeout(30):
            assert terminal(await collect(waits)).finish_reason is FinishReason.ABORT
            assert terminal(await collect(stream)).finish_reason is FinishReason.ERROR


async def test_close_during_a_reset_ends_everything() -> None:
    runner = SlowReset((2,))
    engine = new_engine(runner)
    streams = [engine.stream(endless(f"r{i}")) for i in range(8)]
    await in_reset(runner, engine)
    closing = asyncio.create_task(engine.close())
    await asyncio.sleep(0.05)
    assert not closing.done()
    with pytest.raises(UnavailableError, match="closed"):
        engine.stream(endless("late"))
    runner.may_end.release()
    async with asyncio.timeout(30):
        await closing
        reasons = {terminal(await collect(stream)).finish_reason for stream in streams}
    assert reasons == {FinishReason.ERROR, FinishReason.ABORT}
    assert runner.log[-1] == ("reset", 0), "a step ran although the engine was closed"
    check_books(engine)


async def test_device_lost_during_a_reset_ends_what_came_meanwhile() -> None:
    runner = SlowReset((2,), lost=True)
    engine = new_engine(runner)
    stream = engine.stream(endless("early"))
    await in_reset(runner, engine)
    meanwhile = engine.stream(endless("meanwhile"))
    runner.may_end.release()
    async with asyncio.timeout(30):
        assert terminal(await collect(stream)).finish_reason is FinishReason.ERROR
        end = terminal(await collect(meanwhile))
    assert end.error == "The device is lost (nobody answers); restart the process."
    assert not engine.health().alive
    await engine.close()
    check_books(engine)
