"""Clients share the service: simulations on the scheduler's clock, with every token counted."""

from __future__ import annotations

import itertools
from collections import Counter
from random import Random
from typing import Any

import pytest
from scheduler_bench import Bench
from scheduler_device import PageDevice

from jaxserve.core.errors import QueueFullError
from jaxserve.core.types import TokenEvent
from jaxserve.engine.fairness import FairnessConfig
from jaxserve.engine.sequence import Sequence
from jaxserve.engine.steps import ScheduledStep, StepResult


class InstantDevice(PageDevice):
    """Answers any step, and looks at nothing."""

    def execute(self, step: ScheduledStep) -> StepResult:
        return StepResult(token_ids=[1] * len(step.items))


class Service(Bench):
    """A scheduler of which each step takes a second, and clients that send requests.

    Attributes:
        served: Service of each client, by the weights of the counters.
        ended: Request ids, in the order they ended.
        preempted: How often each client's sequences were.
    """

    def __init__(self, **config: Any) -> None:
        settings = {"max_model_len": 1000, "num_pages": 4000, "max_num_batched_tokens": 64, "token_buckets": (64,)}
        super().__init__(**{**settings, **config})
        self.check_every = 100
        self.device = InstantDevice(self.kv.page_size, 0)
        self.step_s = lambda num_tokens: 1.0
        self.served: Counter[str] = Counter()
        self.ended: list[str] = []
        self.preempted: Counter[str] = Counter()
        self._numbers = itertools.count()
        self._sent: dict[str, dict[str, Any]] = {}
        self._again: set[str] = set()
        preemption = vars(self.scheduler)["_preemption"]
        preempt = preemption.preempt

        def counted(sequence: Sequence) -> None:
            self.preempted[sequence.request.client] += 1
            preempt(sequence)

        preemption.preempt = counted

    def send(
        self, client: str, count: int = 1, *, prompt: int = 1, max_tokens: int = 10, again: bool = False, **more: Any
    ) -> None:
        """Requests of a client; with `again`, each that ends is followed by another."""
        what = {"prompt": prompt, "max_tokens": max_tokens, **more}
        for _ in range(count):
            name = f"{client} {next(self._numbers)}"
            self._sent[name] = what
            if again:
                self._again.add(name)
            # All prompts differ, so none is found in the prefix cache.
            self.submit(name, [next(self._numbers) + 100] * prompt, client=client, max_tokens=max_tokens, **more)

    def step(self) -> bool:
        stepped = super().step()
        events, self.events = self.events, []
        for event in events:
            self._take(event)
        return stepped

    def _take(self, event: TokenEvent) -> None:
        name = event.request_id
        client = name.split()[0]
        self.served[client] += 2 * len(event.token_ids)
        if event.num_cached_tokens is not None and event.index == 0:
            self.served[client] += self._sent[name]["prompt"] - event.num_cached_tokens
        if event.finish_reason is not None:
            self.ended.append(name)
            what = self._sent[name]
            if name in self._again:
                self._again.remove(name)
                self.send(client, again=True, **what)

    def run(self, num_steps: int) -> Counter[str]:
        """What each client was served in so many steps."""
        before = Counter(self.served)
        for _ in range(num_steps):
            assert self.step()
        return self.served - before


def flood_and_guest(*, flood: int = 512, guest: int = 8, **config: Any) -> Service:
    service = Service(max_num_seqs=4, **config)
    service.send("flood", flood, again=True)
    service.run(100)
    service.send("guest", guest, again=True)
    return service


def test_a_flood_leaves_half_to_another() -> None:
    """512 in flight against 8: as much service for each."""
    served = flood_and_guest().run(1000)
    assert served["guest"] / served.total() == pytest.approx(0.5, abs=0.03)


def test_a_guest_who_needs_little_hardly_waits() -> None:
    """One request at a time gets the next slot that is free, whatever the flood has waiting."""
    service = Service(max_num_seqs=4)
    service.send("flood", 512, again=True, max_tokens=8)
    service.run(50)
    for _ in range(20):
        start = service.now
        service.send("guest", max_tokens=2)
        while not service.ended[-1].startswith("guest"):
            service.step()
        assert service.now - start <= 8 + 2 + 2, "longer than until a slot is free, and its own two tokens"


def test_shares_weigh() -> None:
    service = Service(max_num_seqs=4, fairness=FairnessConfig(shares={"heavy": 3.0}))
    service.send("heavy", 40, again=True)
    service.send("light", 40, again=True)
    served = service.run(2000)
    assert served["heavy"] / served["light"] == pytest.approx(3.0, rel=0.05)


@pytest.mark.parametrize("half_life_s", [0.0, 600.0])
@pytest.mark.parametrize("seed", range(3))
def test_backlogged_clients_differ_by_no_more_than_the_bound(seed: int, half_life_s: float) -> None:
    """Long prompts against long answers against both, requests of any size: VTC's bound, at every moment."""
    rng = Random(seed)
    slots, longest_prompt, most_tokens = 4, 60, 40
    service = Service(max_num_seqs=slots, fairness=FairnessConfig(half_life_s=half_life_s))
    for client, (prompt, max_tokens) in {"reads": (60, 2), "writes": (2, 40), "both": (30, 20)}.items():
        for _ in range(60):
            what = {"prompt": rng.randint(1, prompt), "max_tokens": rng.randint(1, max_tokens)}
            service.send(client, again=True, **what)
    bound = 2 * max(longest_prompt, 2 * slots * most_tokens)
    start = Counter(service.served)
    widest = 0
    for _ in range(1500):
        service.run(1)
        gained = [service.served[client] - start[client] for client in ("reads", "writes", "both")]
        widest = max(widest, max(gained) - min(gained))
    assert widest <= bound
    assert min(gained) > 5 * bound, "too short to tell"


def test_cached_prompts_cost_nothing() -> None:
    """Two clients with long prompts; those of one are all alike."""
    service = Service(max_num_seqs=2, page_size=4, max_num_batched_tokens=256, token_buckets=(256,))
    numbers = itertools.count()
    alike = list(range(200))

    def send(client: str, prompt: list[int]) -> None:
        name = f"{client} {next(numbers)}"
        vars(service)["_sent"][name] = {"prompt": len(prompt)}
        service.submit(name, prompt, client=client, max_tokens=2)

    send("alike", alike)
    service.run(2)
    for _ in range(100):
        send("alike", alike)
        send("unlike", [1000 + next(numbers)] * 200)
    service.run(60)
    ended = Counter(name.split()[0] for name in service.ended)
    assert ended["alike"] > 5 * ended["unlike"]
    assert abs(service.served["alike"] - service.served["unlike"]) <= 2 * 200


def test_without_clients_the_first_to_come_is_the_first_served() -> None:
    service = Service(max_num_seqs=1)
    for number in range(30):
        service.submit(f"anonymous {number}", [number], max_tokens=1 + number % 7)
        vars(service)["_sent"][f"anonymous {number}"] = {"prompt": 1}
    while service.step():
        pass
    assert [name.split()[1] for name in service.ended] == [str(number) for number in range(30)]


def test_a_stream_of_new_clients_does_not_starve_who_was_served_much() -> None:
    """Each comes once, with one request, and they keep all slots busy: there is no end of them."""
    service = Service(max_num_seqs=2)
    service.send("heavy", 2, prompt=60, max_tokens=200)
    service.run(3)
    service.send("new0", 5)
    service.run(190)
    service.send("heavy", max_tokens=1)
    last = list(vars(service)["_sent"])[-1]
    for number in itertools.count(1):
        service.send(f"new{number}")
        service.run(4)
        if service.ended.count(last):
            break
        assert number < 100, "whoever waits longest is passed over for ever"


@pytest.mark.parametrize("worst", [1, 100])
def test_priorities_delay_nobody_for_ever(worst: int) -> None:
    """A flood of the best priority against one request of the worst: it waits 2 * worst * aging_s, and its share."""
    aging_s = 2.0
    service = Service(max_num_seqs=2, aging_s=aging_s)
    service.send("flood", 40, again=True, priority=-worst)
    service.run(20)
    start = service.now
    service.send("patient", priority=worst)
    while not any(name.startswith("patient") for name in service.ended):
        service.step()
        assert service.now - start <= 2 * worst * aging_s + 40, "it starves"
    assert service.now - start > 2 * worst * aging_s, "its priority meant nothing"


@pytest.mark.parametrize("priority", [0, -1, -5])
def test_better_priority_never_waits_longer(priority: int) -> None:
    """Though all of the flood has waited so long that a level or two make no difference."""
    service = Service(max_num_seqs=1, aging_s=10.0)
    service.send("flood", 100)
    service.run(200)
    service.send("guest", priority=priority)
    num_ended = len(service.ended)
    while not any(name.startswith("guest") for name in service.ended):
        service.step()
    assert len(service.ended) - num_ended <= 2


def test_being_kept_back_by_priority_earns_no_credit() -> None:
    """Once it has waited long enough it is an equal: the urgent client does not stand still in its turn."""
    service = Service(max_num_seqs=4, aging_s=500.0)
    service.send("urgent", 100, again=True, priority=-1)
    service.run(10)
    service.send("other", 100, again=True)
    kept_back = service.run(480)
    assert kept_back["other"] == 0
    service.run(30)
    served = service.run(160)
    assert served["other"] / served.total() == pytest.approx(0.5, abs=0.1)


def test_priority_goes_before_shares() -> None:
    service = Service(max_num_seqs=2, aging_s=1000.0)
    service.send("urgent", 20, priority=-1)
    service.send("other", 20)
    while service.step():
        pass
    assert [name.split()[0] for name in service.ended[:20]] == ["urgent"] * 20


def test_who_came_first_does_not_evict_the_others_for_ever() -> None:
    """Pages for half of what runs. By rank alone each of the guest's sequences would give way to all of the flood's."""
    service = Service(max_num_seqs=8, num_pages=40, page_size=4, watermark=0.0)
    service.send("flood", 200, again=True, max_tokens=40)
    service.run(60)
    service.send("guest", 8, again=True, max_tokens=40)
    service.run(300)
    before = Counter(service.preempted)
    served = service.run(1500)
    lost = service.preempted - before
    assert lost.total() > 50, "the pool was large enough"
    assert served["guest"] / served.total() == pytest.approx(0.5, abs=0.06)
    assert lost["guest"] <= 0.65 * lost.total()


def test_eviction_in_the_middle_of_a_step_takes_the_victim_out_of_it() -> None:
    """The victim may stand before the one that needs the page, and have its token planned already."""
    service = Service(max_num_seqs=4, num_pages=8, page_size=2, watermark=0.0)
    service.send("flood", 3, prompt=2, max_tokens=12)
    service.step()
    service.send("guest", prompt=2, max_tokens=12)
    while service.step():
        pass
    assert service.preempted["flood"] > 0
    assert service.preempted["guest"] == 0
    assert service.ended[0].startswith("guest")


def test_a_flood_leaves_room_in_the_queue() -> None:
    service = Service(max_num_seqs=4, max_waiting=100)
    service.send("anybody", 4, max_tokens=500)
    service.step()

    def flood(client: str) -> int:
        """How many are let in."""
        before = service.scheduler.num_waiting
        # A list of more prompts than this capacity can never be taken.
        with pytest.raises(QueueFullError, match=r"in the queue already.*try again later") as error:
            service.send(client, 101)
        assert error.value.capacity == 4 + 72
        return service.scheduler.num_waiting - before

    admitted = [flood(f"flood{number}") for number in range(9)]
    assert admitted[:3] == [72, 15, 3]
    assert admitted[3:] == [1] * 6, "whoever has nothing in the queue gets a place"
    for number in range(100 - sum(admitted)):
        service.send(f"guest{number}")
    with pytest.raises(QueueFullError, match="no room"):
        service.send("late")


def test_a_request_of_many_sequences_is_not_refused_for_ever() -> None:
    """Its share would be too small; but nothing of the client waits, so it has any place that is left."""
    service = Service(max_num_seqs=2, max_waiting=20)
    service.send("client", n=22)
    with pytest.raises(QueueFullError):
        service.send("client")
    while service.step():
        pass
    assert len(service.ended) == 22


def test_without_clients_the_whole_queue_is_there() -> None:
    bench = Bench(max_num_seqs=4, max_waiting=20)
    for number in range(24):
        bench.submit(str(number), [1])
    with pytest.raises(QueueFullError) as error:
        bench.submit("late", [1])
    assert error.value.capacity == 24


def test_thousands_of_clients_leave_nothing_behind() -> None:
    service = Service(max_num_seqs=4)
    fair = vars(service.scheduler)["_fair"]
    most = 0
    live = service.scheduler
    for number in range(3000):
        service.send(f"address{number}", max_tokens=1 + number % 3)
        if number % 4 == 3:
            service.run(2)
        most = max(most, fair.num_accounts - live.num_waiting - live.num_running)
    while service.step():
        pass
    assert len(service.ended) == 3000
    assert most < 50
    assert fair.num_accounts < 50
