"""Steps that fail, a lost device, a scheduler with a bug: whoever waits gets an answer, and the books balance."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import pytest
from engine_conformance import make_request, terminal, tokens, until_idle
from tiny_engine import Compiled, check_books, compiled, generate_all, new_runner, serving, start, tokens_by_index

from jaxserve.core.errors import UnavailableError
from jaxserve.core.types import FinishReason, Request, SamplingParams, TokenEvent
from jaxserve.engine.loop import LocalEngine
from jaxserve.engine.programs import Decoded
from jaxserve.engine.runner import DeviceRunner, StepHandle
from jaxserve.engine.scheduler import Scheduler
from jaxserve.engine.steps import ScheduledStep, StepResult
from jaxserve.launch.build import new_scheduler

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL + 1)


@dataclass
class Faults:
    """When the device fails, counted over the steps of a runner.

    Attributes:
        at_dispatch: Steps whose `execute` raises.
        at_result: Steps whose `result` raises.
        at_reset: Whether `reset` raises.
        requests: Ids of the requests in each failed step.
        num_steps: Steps so far.
        num_resets: Resets so far.
    """

    at_dispatch: Sequence[int] = ()
    at_result: Sequence[int] = ()
    at_reset: bool = False
    requests: list[set[str]] = field(default_factory=list)
    num_steps: int = 0
    num_resets: int = 0


@dataclass
class FailedHandle:
    """A dispatched step that computes and then turns out to have failed."""

    handle: StepHandle

    @property
    def bucket(self) -> str:
        return self.handle.bucket

    def result(self) -> StepResult:
        self.handle.result()
        raise RuntimeError("the step failed")


class FaultyRunner:
    """A device that fails when it is told to."""

    def __init__(self, runner: DeviceRunner, faults: Faults) -> None:
        self.runner = runner
        self.faults = faults

    def execute(self, step: ScheduledStep) -> StepHandle:
        faults = self.faults
        number = faults.num_steps
        faults.num_steps += 1
        if number in faults.at_dispatch or number in faults.at_result:
            faults.requests.append({item.sequence.request.request_id for item in step.items})
        if number in faults.at_dispatch:
            raise RuntimeError("the step was refused")
        handle = self.runner.execute(step)
        return FailedHandle(handle) if number in faults.at_result else handle

    def reset(self) -> None:
        self.faults.num_resets += 1
        if self.faults.at_reset:
            raise RuntimeError("nobody answers")
        self.runner.reset()

    def close(self) -> None:
        self.runner.close()


@pytest.fixture(scope="module")
def tiny() -> Compiled:
    return compiled()


def requests() -> list[Request]:
    """Twelve: some greedy, some sampled, some of several sequences, some longer than a step's budget."""
    made = []
    for number in range(12):
        prompt = tuple(10 + (number * 31 + place * 7) % 250 for place in range(5 + 6 * number))
        sampling = SamplingParams(
            temperature=float(number % 2), seed=number, max_tokens=8 + number, ignore_eos=True, repetition_penalty=1.1
        )
        made.append(Request(request_id=f"r{number}", prompt=prompt, sampling=sampling, n=1 + (number % 5 == 4)))
    return made


def all_tokens(results: list[list[TokenEvent]]) -> list[dict[int, list[int]]]:
    return [tokens_by_index(events) for events in results]


@pytest.fixture(scope="module")
def undisturbed(tiny: Compiled) -> list[dict[int, list[int]]]:
    async def generate() -> list[dict[int, list[int]]]:
        async with serving(start(tiny)) as engine:
            return all_tokens(await generate_all(engine, requests()))

    return asyncio.run(generate())


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
@pytest.mark.parametrize(
    ("at_dispatch", "at_result"),
    [((0,), ()), ((), (0,)), ((3,), ()), ((), (3,)), ((4,), (3,)), ((), (3, 4)), ((), (2, 5, 9)), ((2, 3, 4, 5), ())],
)
async def test_failed_steps_end_their_own_sequences_only(
    tiny: Compiled,
    undisturbed: list[dict[int, list[int]]],
    at_dispatch: tuple[int, ...],
    at_result: tuple[int, ...],
    enable_prefix_caching: bool,
) -> None:
    faults = Faults(at_dispatch=at_dispatch, at_result=at_result)
    engine = start(
        tiny,
        runner=FaultyRunner(new_runner(tiny), faults),
        # Not all at once, so that each failure leaves somebody to go on.
        max_num_seqs=4,
        enable_prefix_caching=enable_prefix_caching,
    )
    async with serving(engine):
        results = await asyncio.wait_for(generate_all(engine, requests()), 60)
        assert engine.health().alive
        assert engine.health().ready
        assert tokens((await generate_all(engine, [make_request("after")]))[0])
    assert faults.num_resets >= 1
    hit = set().union(*faults.requests)
    num_failed = 0
    for request, events, expected in zip(requests(), results, undisturbed, strict=True):
        for index in range(request.n):
            end = terminal(events, index)
            if end.finish_reason is FinishReason.ERROR:
                num_failed += 1
                assert request.request_id in hit
                assert end.error == "A step failed on the device; try the request again."
                got = tokens(events, index)
                assert got == expected[index][: len(got)]
                assert len(got) < len(expected[index])
            else:
                assert end.finish_reason is FinishReason.LENGTH
                assert tokens(events, index) == expected[index]
    assert 1 <= num_failed < sum(request.n for request in requests())


async def test_device_that_is_lost_ends_everything(tiny: Compiled) -> None:
    faults = Faults(at_result=(5,), at_reset=True)
    engine = start(tiny, runner=FaultyRunner(new_runner(tiny), faults), max_num_seqs=4)
    results = await asyncio.wait_for(generate_all(engine, requests()), 60)
    for request, events in zip(requests(), results, strict=True):
        for index in range(request.n):
            end = terminal(events, index)
            assert end.finish_reason in {FinishReason.ERROR, FinishReason.LENGTH}
    reason = "The device is lost (nobody answers); restart the process."
    assert sum(events[-1].error == reason for events in results) > 4
    await refuses_and_closes(engine, reason)
    check_books(engine)


async def refuses_and_closes(engine: LocalEngine, reason: str) -> None:
    health = engine.health()
    assert (health.alive, health.ready, health.reason) == (False, False, reason)
    with pytest.raises(UnavailableError, match="restart the process"):
        engine.stream(make_request("late"))
    engine.abort("late")
    assert await asyncio.wait_for(engine.drain(5.0), 10) is True
    await asyncio.wait_for(engine.close(), 10)
    await asyncio.wait_for(engine.close(), 10)
    assert not engine.health().alive


def break_method(scheduler: Scheduler, name: str, *, after_calls: int, too_late: bool = False) -> None:
    """Gives a method a bug: it raises once it has been called so many times, `too_late` after it has done its work."""
    method = getattr(scheduler, name)
    num_calls = 0

    def broken(*args: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        result = method(*args) if too_late or num_calls <= after_calls else None
        if num_calls > after_calls:
            raise AssertionError(f"a bug in {name}")
        return result

    setattr(scheduler, name, broken)


class AbortingRunner(FaultyRunner):
    """Some requests are aborted just when a step that admits them is being dispatched."""

    engine: LocalEngine
    victims: frozenset[str]

    def execute(self, step: ScheduledStep) -> StepHandle:
        for sequence in step.admitted:
            if sequence.request.request_id in self.victims:
                self.engine.abort(sequence.request.request_id)
        return super().execute(step)


async def test_abort_between_scheduling_and_dispatch_harms_nobody(
    tiny: Compiled, undisturbed: list[dict[int, list[int]]]
) -> None:
    runner = AbortingRunner(new_runner(tiny), Faults())
    runner.victims = frozenset({"r1", "r4", "r6", "r9"})
    # All slots are taken, and so are the pages that a wrong table would point to.
    async with serving(start(tiny, runner=runner, max_num_seqs=16, enable_prefix_caching=False)) as engine:
        runner.engine = engine
        results = await asyncio.wait_for(generate_all(engine, [*requests(), *again()]), 60)
    for request, events, expected in zip([*requests(), *again()], results, undisturbed * 2, strict=True):
        for index in range(request.n):
            if request.request_id in runner.victims:
                assert terminal(events, index).finish_reason is FinishReason.ABORT
            else:
                assert tokens(events, index) == expected[index]


def again() -> list[Request]:
    """The same twelve under other names."""
    return [replace(request, request_id=f"again {request.request_id}") for request in requests()]


@pytest.mark.parametrize("sane_at_the_end", [True, False])
@pytest.mark.parametrize(
    ("name", "after_calls", "too_late", "faults"),
    [
        ("schedule", 4, False, Faults()),
        ("schedule", 4, True, Faults()),
        ("commit", 4, False, Faults()),
        ("commit", 4, True, Faults()),
        ("fail", 0, False, Faults(at_result=(4,))),
        ("fail", 0, True, Faults(at_dispatch=(4,))),
        ("restart", 0, False, Faults(at_result=(4,))),
    ],
)
async def test_bug_in_the_scheduler_leaves_nobody_waiting(
    tiny: Compiled, name: str, after_calls: int, too_late: bool, faults: Faults, sane_at_the_end: bool
) -> None:
    scheduler = new_scheduler(tiny.resolved, tiny.replica.blueprint.spec.eos_token_ids)
    break_method(scheduler, name, after_calls=after_calls, too_late=too_late)
    if not sane_at_the_end:
        break_method(scheduler, "fail_all", after_calls=0)
    runner = FaultyRunner(new_runner(tiny), replace(faults, requests=[]))
    engine = start(tiny, runner=runner, scheduler=scheduler)
    results = await asyncio.wait_for(generate_all(engine, requests()), 60)
    for request, events in zip(requests(), results, strict=True):
        for index in range(request.n):
            end = terminal(events, index)
            assert end.finish_reason is FinishReason.ERROR
            assert end.error is not None
    assert f"a bug in {name}" in engine.health().reason
    await refuses_and_closes(engine, engine.health().reason)


async def test_failing_observer_leaves_nobody_waiting(tiny: Compiled) -> None:
    class Observer:
        def observe_step(self, program: str, bucket: str, seconds: float) -> None:
            raise ValueError("the disk is full")

        def observe_step_host(self, seconds: float) -> None: ...

    engine = start(tiny, observer=Observer())
    [events] = await asyncio.wait_for(generate_all(engine, [make_request()]), 60)
    assert terminal(events).finish_reason is FinishReason.ERROR
    await refuses_and_closes(engine, "The engine failed (the disk is full); restart the process.")


async def test_second_drain_cuts_the_first_short(tiny: Compiled) -> None:
    """What the server does when a second signal comes."""
    engine = start(tiny)
    streams = [engine.stream(make_request(f"r{i}", max_tokens=124, n=2)) for i in range(40)]
    draining = asyncio.create_task(engine.drain(600.0))
    await asyncio.sleep(0.01)
    assert not draining.done()
    assert await asyncio.wait_for(engine.drain(0.0), 10) is False
    await asyncio.wait_for(draining, 10)
    reasons = set()
    for stream in streams:
        events = [event async for event in stream]
        reasons |= {terminal(events, index).finish_reason for index in range(2)}
    assert FinishReason.ABORT in reasons
    await until_idle(engine)
    check_books(engine)
    await engine.close()


async def test_drain_of_an_idle_engine_is_immediate(tiny: Compiled) -> None:
    engine = start(tiny)
    assert await asyncio.wait_for(engine.drain(0.0), 5) is True
    assert engine.health().reason.startswith("The engine is draining")
    await engine.close()


def test_a_reset_gives_the_old_pool_up_first(tiny: Compiled) -> None:
    """A device has room for one only."""
    runner = new_runner(tiny)
    old = runner._kv_pages
    alive_when_allocated = []

    def allocate() -> jax.Array:
        alive_when_allocated.append(not old.is_deleted())
        return tiny.executables["allocate", 0]()

    runner._executables = {**tiny.executables, ("allocate", 0): allocate}
    runner.reset()
    assert alive_when_allocated == [False]


@dataclass
class Late:
    """An array that is computed when somebody waits for it."""

    waited_for: bool = False

    def block_until_ready(self) -> None:
        self.waited_for = True


def test_a_step_without_tokens_is_waited_for(tiny: Compiled) -> None:
    """The middle of a prompt: if the loop did not wait, all of the prompt would be dispatched at once."""
    runner, late = new_runner(tiny), Late()

    def decode(*args: Any) -> tuple[jax.Array, Decoded]:
        pool, decoded = tiny.executables["decode", 64](*args)
        return pool, replace(decoded, last=late)

    runner._executables = {**tiny.executables, ("decode", 64): decode}
    scheduler = new_scheduler(tiny.resolved, ())
    scheduler.submit(make_request("r", prompt=tuple(range(5, 105))))
    step = scheduler.schedule()
    assert step is not None
    assert [item.samples for item in step.items] == [False]
    handle = runner.execute(step)
    assert not late.waited_for
    assert handle.result().token_ids == []
    assert late.waited_for
