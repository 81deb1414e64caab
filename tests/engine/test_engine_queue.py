"""Whose turn it is, against a model that looks at everybody."""

from __future__ import annotations

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxserve.core.types import Request, SamplingParams
from jaxserve.engine.fairness import FairnessConfig, VirtualTokenCounter
from jaxserve.engine.queue import WaitingQueue
from jaxserve.engine.sequence import Sequence, SequenceStatus, Terms, rank_of
from jaxserve.kv.pages import PageTable

AGING_S = 10.0


class QueueMachine(RuleBasedStateMachine):
    @initialize(half_life_s=st.sampled_from([0.0, 7.0]))
    def start(self, half_life_s: float) -> None:
        self.now = 0.0
        self.fair = VirtualTokenCounter(FairnessConfig(half_life_s=half_life_s), lambda: self.now)
        self.queue = WaitingQueue(self.fair, AGING_S, lambda: self.now)
        self.waiting: list[Sequence] = []
        self.blocked: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_made = 0

    @rule(client=st.sampled_from("abcd"), priority=st.integers(-2, 2), n=st.integers(1, 3))
    def arrive(self, client: str, priority: int, n: int) -> None:
        account = self.fair.open(client, n)
        was_idle = not account.num_waiting
        before = self.fair.counter(account)
        counters = [self.fair.counter(s.account) for s in self.waiting]
        request = Request(
            request_id=str(self.num_made), prompt=(1,), sampling=SamplingParams(), n=n, priority=priority, client=client
        )
        first, *others = (
            Sequence(
                request,
                index,
                seq_id=self.num_made + index,
                seed=0,
                table=PageTable(b""),
                terms=Terms(
                    account=account,
                    rank=(self.now + priority * AGING_S, self.num_made + index),
                    arrival_s=self.now,
                    max_len=9,
                    min_len=0,
                    stop_ids=frozenset(),
                ),
            )
            for index in range(n)
        )
        self.num_made += n
        self.queue.arrive(first, others)
        self.waiting.append(first)
        self.blocked += others
        after = self.fair.counter(account)
        if was_idle and counters:
            assert max(before, min(counters)) <= after <= max(before, *counters)
        elif not was_idle:
            assert after == before

    @precondition(lambda self: self.waiting)
    @rule(prompt=st.integers(0, 50))
    def admit(self, prompt: int) -> None:
        sequence = self.queue.first()
        assert sequence is not None
        self.queue.remove(sequence)
        self.waiting.remove(sequence)
        sequence.status = SequenceStatus.DECODING
        sequence.slot = 1
        self.fair.charge_input(sequence.account, prompt)
        self.running.append(sequence)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), num_tokens=st.integers(1, 9))
    def generate(self, data: st.DataObject, num_tokens: int) -> None:
        data.draw(st.sampled_from(self.running)).account.output_tokens += num_tokens
        self.now += 1.0

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.running))
        self.running.remove(sequence)
        sequence.slot = -1
        self.queue.add(sequence)
        self.waiting.append(sequence)

    @precondition(lambda self: self.blocked)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.blocked))
        self.blocked.remove(sequence)
        self.queue.remove(sequence)
        sequence.table.pages.append(sequence.seq_id)
        self.queue.add(sequence)
        self.waiting.append(sequence)

    @precondition(lambda self: self.waiting or self.blocked or self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from([*self.waiting, *self.blocked, *self.running]))
        if sequence.slot < 0:
            self.queue.remove(sequence)
        for place in (self.waiting, self.blocked, self.running):
            if sequence in place:
                place.remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        self.fair.close(sequence.account, self.queue.floor)

    @rule(seconds=st.sampled_from([1.0, 9.0, 25.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def the_right_one_is_next(self) -> None:
        if not hasattr(self, "queue"):
            return
        self.queue.check_integrity([*self.waiting, *self.blocked, *self.running])
        self.fair.check_integrity()
        if not self.waiting:
            assert self.queue.first() is None
            return
        best = min(s.request.priority for s in self.waiting)
        aged = [
            s.request.priority for s in self.waiting if self.now - s.arrival_s >= (s.request.priority - best) * AGING_S
        ]
        open_to = max(aged, default=best)
        client, least = "", math.inf
        for priority in sorted({s.request.priority for s in self.waiting if s.request.priority <= open_to}):
            band = [s for s in self.waiting if s.request.priority == priority]
            sequence = min(band, key=lambda s: (self.fair.counter(s.account), rank_of(s)))
            counter = self.fair.counter(sequence.account)
            if counter <= least:
                client = sequence.request.client
            if priority == best:
                least = counter
        mine = [s for s in self.waiting if s.request.client == client and s.request.priority <= open_to]
        assert self.queue.first() is min(mine, key=rank_of)
        holders = [s for s in self.waiting if s.pages]
        worst = max(holders, key=lambda s: (self.fair.counter(s.account), rank_of(s)), default=None)
        assert self.queue.worst_holder(None) is worst


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
