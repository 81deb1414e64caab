"""Retry-After: what a refused request is told, against the time until it would really have been let in."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from random import Random

import pytest
from scheduler_bench import Bench

from jaxserve.core.errors import QueueFullError


class Queue(Bench):
    """A replica of which each step takes 50 ms and 1 ms a token."""

    def __init__(self, *, slots: int = 8, max_waiting: int = 30, step_s: float = 0.05) -> None:
        super().__init__(
            num_pages=40 * slots,
            page_size=16,
            max_num_seqs=slots,
            max_num_batched_tokens=64,
            max_model_len=600,
            token_buckets=(8, 16, 32, 64),
            max_waiting=max_waiting,
        )
        self.step_s = lambda num_tokens: step_s + 0.001 * num_tokens
        self.names = (f"r{i}" for i in itertools.count())

    def send(self, *, max_tokens: int = 100, prompt: int = 20, n: int = 1, **more: object) -> int | None:
        """Submits a request; what it is told if it is refused."""
        name = next(self.names)
        try:
            self.submit(name, [int(name[1:]) % 50] * prompt, max_tokens=max_tokens, n=n, **more)
        except QueueFullError as error:
            return error.retry_after_s
        return None

    def flood(self, **what: object) -> int:
        """Submits until one is refused; what it is told."""
        while (told := self.send(**what)) is None:
            pass
        return told

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end and self.step():
            pass
        self.now = max(self.now, end)

    def truth(self, *, n: int = 1, **what: object) -> float:
        """Seconds until a request like the refused one is let in, if nobody else comes."""
        start = self.now
        while self.send(n=n, **what) is not None:
            assert self.step()
        return self.now - start


def assert_true(told: int, truth: float) -> None:
    assert truth / 3 <= told <= max(3 * truth, 1), f"{told} s told where {truth:.1f} were true"


@pytest.mark.parametrize("max_tokens", [20, 100, 500])
@pytest.mark.parametrize("slots", [1, 8])
@pytest.mark.parametrize("num_steps", [1, 5, 30])
def test_flood_of_which_nothing_has_ended(max_tokens: int, slots: int, num_steps: int) -> None:
    queue = Queue(slots=slots)
    queue.flood(max_tokens=max_tokens)
    for _ in range(min(num_steps, max_tokens - 1)):
        queue.step()
    told = queue.flood(max_tokens=max_tokens)
    assert_true(told, queue.truth(max_tokens=max_tokens))


@pytest.mark.parametrize("step_s", [0.005, 0.05, 1.0])
def test_steps_are_as_fast_as_they_were(step_s: float) -> None:
    queue = Queue(step_s=step_s)
    queue.flood()
    queue.step()
    told = queue.flood()
    assert_true(told, queue.truth())


def test_flood_before_the_first_step() -> None:
    """Nothing is known of this device but that the others take some tokens; a guess that is not far off on a CPU."""
    queue = Queue()
    told = queue.flood(max_tokens=100)
    assert_true(told, queue.truth(max_tokens=100))


def test_aborts_are_no_departures() -> None:
    queue = Queue()
    queue.flood()
    for _ in range(5):
        queue.step()
    for number in range(8, 36):
        queue.scheduler.abort(f"r{number}")
        queue.now += 0.01
    told = queue.flood()
    assert_true(told, queue.truth())


@pytest.mark.parametrize("idle_s", [60.0, 3600.0, 1e6])
def test_idle_time_is_no_slow_time(idle_s: float) -> None:
    queue = Queue()
    for _ in range(20):
        queue.send()
    queue.finish()
    queue.now += idle_s
    queue.flood()
    for _ in range(10):
        queue.step()
    told = queue.flood()
    assert_true(told, queue.truth())


@pytest.mark.parametrize("lengths", ["limits", "stops"])
def test_steady_load(lengths: str) -> None:
    """Requests of any length, ended by their limit or by a token of theirs, as soon as there is room."""
    queue, rng = Queue(), Random(3)

    def any_request() -> dict[str, object]:
        if lengths == "limits":
            return {"max_tokens": rng.randint(1, 200)}
        # Each token is one of 50, so that a request stops after some 50 tokens, long before its limit.
        return {"max_tokens": 500, "ignore_eos": False, "seed": rng.randrange(10**6)}

    told: list[int] = []
    truths: list[float] = []
    for _ in range(25):
        queue.flood(**any_request())
        queue.run(2.0)
        request = any_request()
        told.append(queue.flood(**request))
        truths.append(queue.truth(**request))
    # One departure is chance; many are not.
    assert sum(told) / 3 <= sum(max(truth, 1.0) for truth in truths) <= 3 * sum(told)


@pytest.mark.parametrize("n", [2, 8, 20])
def test_many_sequences_want_many_places(n: int) -> None:
    queue = Queue()
    queue.flood()
    for _ in range(40):
        queue.step()
    queue.flood()
    told = queue.send(n=n)
    assert told is not None
    assert_true(told, queue.truth(n=n))


def test_share_of_a_client() -> None:
    """Refused for what it has in the queue itself, though there are places left."""
    queue = Queue()
    queue.flood(client="x")
    for _ in range(5):
        queue.step()
    told = queue.flood(client="x")
    assert queue.scheduler.num_waiting < 30
    assert_true(told, queue.truth(client="x"))


def test_the_longest_wait_is_bounded() -> None:
    queue = Queue(step_s=100.0)
    queue.flood()
    queue.step()
    assert queue.flood() == 600


def test_it_is_worked_out_only_when_somebody_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue()
    asked: list[int] = []
    pace = vars(queue.scheduler)["_pace"]
    estimate: Callable[..., float] = pace.seconds_until
    monkeypatch.setattr(pace, "seconds_until", lambda *args: asked.append(1) or estimate(*args))
    for _ in range(38):
        assert queue.send() is None
    assert not asked
    assert queue.send() is not None
    assert asked == [1]
