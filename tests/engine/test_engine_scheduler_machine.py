"""The scheduler under random traffic, two steps in flight, against a device that checks every page it reads."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduler_device import EOS, VOCAB_SIZE, PageDevice, next_token, prompt_scores

from jaxserve.core.errors import ContextLengthError, QueueFullError
from jaxserve.core.types import FinishReason, Request, SamplingParams, TokenEvent
from jaxserve.engine.fairness import FairnessConfig
from jaxserve.engine.policy import SchedulerConfig
from jaxserve.engine.scheduler import Scheduler
from jaxserve.engine.steps import ScheduledStep, StepResult
from jaxserve.kv.manager import KVManager

MAX_LEN = 40


def alone(request: Request, index: int) -> list[int]:
    """What a sequence yields when nothing else runs."""
    sampling = request.sampling
    assert sampling.seed is not None
    history = list(request.prompt)
    limit = min(MAX_LEN, len(history) + (sampling.max_tokens or MAX_LEN))
    stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else {EOS})
    while len(history) < limit:
        history.append(next_token(history, sampling.seed + index))
        if history[-1] in stops and len(history) >= len(request.prompt) + sampling.min_tokens:
            break
    return history[len(request.prompt) :]


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_pages=st.integers(10, 24),
        page_size=st.sampled_from([4, 5, 8]),
        slots=st.integers(1, 5),
        cache=st.booleans(),
        half_life_s=st.sampled_from([0.0, 0.0, 0.05]),
    )
    def start(self, num_pages: int, page_size: int, slots: int, cache: bool, half_life_s: float) -> None:
        self.now = 0.0
        config = SchedulerConfig(
            max_num_seqs=slots,
            max_num_batched_tokens=16,
            max_model_len=MAX_LEN,
            token_buckets=(4, 8, 16),
            max_waiting=12,
            long_prefill_token_threshold=6,
            step_overhead_tokens=1,
            aging_s=0.05,
            fairness=FairnessConfig(half_life_s=half_life_s, shares={"b": 2.0}, max_idle=2),
        )
        self.kv = KVManager(num_pages=num_pages, page_size=page_size, enable_prefix_cache=cache)
        self.scheduler = Scheduler(config, self.kv, (EOS,), clock=lambda: self.now)
        self.device = PageDevice(page_size, slots)
        self.requests: dict[str, Request] = {}
        self.tokens: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
        self.ended: dict[tuple[str, int], FinishReason] = {}
        self.flight: tuple[ScheduledStep, StepResult] | None = None

    def take(self, events: list[TokenEvent]) -> None:
        for event in events:
            key = (event.request_id, event.index)
            assert key not in self.ended, f"{key} goes on after its end"
            request = self.requests[event.request_id]
            num_top = request.sampling.prompt_logprobs
            if event.index == 0 and num_top is not None and event.token_ids and not self.tokens[key]:
                assert event.prompt_logprobs == prompt_scores(request.prompt, num_top)
                assert event.num_cached_tokens == 0
            else:
                assert event.prompt_logprobs is None
            self.tokens[key].extend(event.token_ids)
            if event.finish_reason is not None:
                self.ended[key] = event.finish_reason

    @rule(
        prefix=st.integers(0, 2),
        prompt=st.lists(st.integers(0, 3), min_size=1, max_size=20),
        n=st.integers(1, 3),
        priority=st.integers(-2, 2),
        max_tokens=st.one_of(st.none(), st.integers(1, 12)),
        salt=st.sampled_from(["", "a"]),
        plain=st.booleans(),
        prompt_logprobs=st.sampled_from([None, None, 0, 1]),
        client=st.sampled_from(["", "a", "b", "c"]),
    )
    def submit(
        self,
        *,
        prefix: int,
        prompt: list[int],
        n: int,
        priority: int,
        max_tokens: int | None,
        salt: str,
        plain: bool,
        prompt_logprobs: int | None,
        client: str,
    ) -> None:
        sampling = SamplingParams(
            seed=prefix,
            max_tokens=max_tokens,
            min_tokens=0 if plain else 3,
            ignore_eos=not plain,
            stop_token_ids=() if plain else (11, 13),
            prompt_logprobs=prompt_logprobs,
        )
        name = f"r{len(self.requests)}"
        # Prompts begin alike, so that prefixes are shared.
        request = Request(
            request_id=name,
            prompt=tuple([prefix] * 9 + prompt)[: MAX_LEN - 1],
            sampling=sampling,
            n=n,
            priority=priority,
            cache_salt=salt,
            client=client,
        )
        try:
            self.scheduler.submit(request)
        except (ContextLengthError, QueueFullError):
            return
        self.requests[name] = request

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.requests)))
        self.take(self.scheduler.abort(name))

    @rule(steps=st.integers(1, 6))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.now += 0.01
            step = self.scheduler.schedule()
            following = None if step is None else (step, self.device.execute(step))
            self.land()
            self.flight = following

    @rule()
    def fail(self) -> None:
        """A step fails on the device: the pool is made anew, and what was dispatched on top is lost too."""
        step = self.scheduler.schedule()
        self.land()
        if step is not None:
            self.take(self.scheduler.fail(step, "broken"))
            self.device.pages.clear()
            self.scheduler.restart()

    @rule()
    def restart(self) -> None:
        """The pool is made anew between steps: whatever runs starts over, prompts under way too."""
        self.land()
        self.device.pages.clear()
        self.scheduler.restart()

    def land(self) -> None:
        if self.flight is not None:
            step, result = self.flight
            self.flight = None
            self.take(self.scheduler.commit(step, result))

    @invariant()
    def pages_and_slots_agree(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(3000):
            if not self.scheduler.has_work and self.flight is None:
                break
            self.run(1)
        assert not self.scheduler.has_work, "something never ends"
        self.scheduler.check_integrity()
        stats = self.kv.stats()
        assert stats.num_owned == 0
        for name, request in self.requests.items():
            for index in range(request.n):
                key = (name, index)
                assert key in self.ended, f"{key} never ended"
                expected = alone(request, index)
                if self.ended[key] in (FinishReason.STOP, FinishReason.LENGTH):
                    capacity = self.kv.capacity_tokens - len(request.prompt)
                    assert self.tokens[key] == expected[:capacity]
                else:
                    assert self.tokens[key] == expected[: len(self.tokens[key])]


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)


def test_tokens_stay_in_the_vocabulary() -> None:
    assert all(0 <= next_token([i], 0) < VOCAB_SIZE for i in range(100))
