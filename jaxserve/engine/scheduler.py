"""The scheduler: continuous batching under a token budget, as pure host bookkeeping.

`schedule` fills a step with decodes first, then with chunks of prompts that are under way, then with admissions from
the queue, and `commit` turns the step's tokens into events. A step may be scheduled while the one before still runs:
a sequence whose token is in flight goes on from it unseen. Whatever makes a result void (an end, a preemption) raises
the sequence's epoch, and the result is dropped when it comes; pages are free at once, for the device runs steps in
order.

When pages run out, forks that wait give theirs back first, then the running sequence of the worst rank starts over
(recompute): it keeps its tokens, and its noise is keyed by position, so it goes on as if nothing had happened.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable
from random import Random

from jaxserve.core.errors import InvalidRequestError
from jaxserve.core.types import FinishReason, Request, TokenEvent
from jaxserve.engine.api import EngineStats
from jaxserve.engine.events import collect_prompt_logprobs, token_event
from jaxserve.engine.intake import Departures, check_fits, check_room, new_sequences
from jaxserve.engine.logprobs import PromptLogprobs
from jaxserve.engine.policy import SchedulerConfig, admission_reserve
from jaxserve.engine.sequence import Sequence, SequenceStatus, rank_of
from jaxserve.engine.steps import Plan, ScheduledSequence, ScheduledStep, StepResult
from jaxserve.kv.manager import KVManager


class Scheduler:
    """Decides which tokens each step computes; owns every sequence.

    Args:
        config: Limits.
        kv: Pages.
        eos_token_ids: Tokens that end a sequence unless it ignores them.
        clock: Seconds, monotonic.
        random: Seeds of requests that bring none come from here.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        kv: KVManager,
        eos_token_ids: tuple[int, ...],
        *,
        clock: Callable[[], float] = time.monotonic,
        random: Random | None = None,
    ) -> None:
        self._config = config
        self._kv = kv
        self._eos = frozenset(eos_token_ids)
        self._clock = clock
        self._random = random or Random()
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._requests: dict[str, list[Sequence]] = {}
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._departures = Departures()
        self._num_blocked = 0
        self._num_preemptions = 0
        self._next_seq_id = 0
        self._next_step_id = 0

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no slot."""
        return len(self._waiting) + self._num_blocked

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """Whether any sequence has not ended."""
        return bool(self._running or self._waiting)

    def stats(self) -> EngineStats:
        """Load and counters; what only the loop knows is left at zero."""
        kv = self._kv.stats()
        return EngineStats(
            num_waiting=self.num_waiting,
            num_running=self.num_running,
            kv_cache_usage=kv.usage,
            prefix_cache_queries_tokens=kv.query_tokens,
            prefix_cache_hits_tokens=kv.hit_tokens,
            num_preemptions=self._num_preemptions,
        )

    def submit(self, request: Request) -> None:
        """Queues a request's sequences.

        Raises:
            InvalidRequestError: Its priority is out of range, its id is in use, or it has too many sequences for ever.
            ContextLengthError: It fits neither the context nor the pool.
            QueueFullError: The slots are taken and the queue is at its bound.
        """
        if request.request_id in self._requests:
            raise InvalidRequestError(f"A request with id {request.request_id} is in flight.", param="request_id")
        check_fits(request, self._config, self._kv)
        wait_s = self._departures.retry_after_s(self.num_waiting, self._clock())
        check_room(request.n, self.num_waiting + self.num_running, self._config, retry_after_s=wait_s)
        seed = request.sampling.seed
        sequences = new_sequences(
            request,
            self._config,
            self._kv,
            eos=self._eos,
            seed=self._random.getrandbits(63) if seed is None else seed,
            arrival_s=self._clock(),
            first_id=self._next_seq_id,
        )
        self._next_seq_id += request.n
        self._requests[request.request_id] = sequences
        self._num_blocked += request.n - 1
        insort(self._waiting, sequences[0], key=rank_of)

    def abort(self, request_id: str) -> list[TokenEvent]:
        """Ends a request's sequences in whatever state they are; unknown ids give no events."""
        return [self._end(s, FinishReason.ABORT) for s in tuple(self._requests.get(request_id, ()))]

    def schedule(self) -> ScheduledStep | None:
        """The next step, or None if nothing can run now."""
        plan = Plan(self._config.step_tokens)
        self._plan_decodes(plan)
        self._plan_chunks(plan)
        self._admit(plan)
        if not plan.chunks:
            return None
        plan.trim(self._config)
        return self._dispatch(plan)

    def commit(self, step: ScheduledStep, result: StepResult) -> list[TokenEvent]:
        """Takes over a step's tokens.

        Args:
            step: A step from `schedule`; steps are committed in order.
            result: What the device yielded.

        Returns:
            An event for each sequence that got a token.
        """
        events: list[TokenEvent] = []
        offset = 0
        for index, item in enumerate(step.items):
            row, offset = offset, offset + item.num_tokens
            sequence = item.sequence
            if item.epoch != sequence.epoch:
                continue
            if sequence.prompt_logprobs is not None:
                collect_prompt_logprobs(sequence, item, result.prompt, row)
            if item.samples:
                sequence.num_in_flight -= 1
                sequence.token_ids.append(result.token_ids[index])
            computed = item.start + item.num_tokens
            if computed // self._kv.page_size > sequence.table.num_registered:
                self._kv.register(sequence.table, sequence.token_ids, computed)
            if item.samples:
                events.append(self._advance(sequence, result, index))
        return events

    def fail(self, step: ScheduledStep, message: str) -> list[TokenEvent]:
        """Ends the sequences of a step that failed on the device, and whatever waits for their prompts."""
        alive = [item.sequence for item in step.items if item.epoch == item.sequence.epoch]
        failed = dict.fromkeys(alive)
        for sequence in alive:
            siblings = self._requests[sequence.request.request_id]
            failed.update(dict.fromkeys(s for s in siblings if s.status is SequenceStatus.BLOCKED))
        return [self._end(sequence, FinishReason.ERROR, message) for sequence in failed]

    def fail_all(self, message: str) -> list[TokenEvent]:
        """Ends every sequence, because the device is lost."""
        everything = [s for sequences in self._requests.values() for s in sequences]
        return [self._end(sequence, FinishReason.ERROR, message) for sequence in everything]

    def restart(self) -> None:
        """Forgets all KV, because the device's pool was made anew; what was running is computed again."""
        for sequence in tuple(self._running):
            self._preempt(sequence)
        for sequence in self._waiting:
            self._surrender(sequence)
        self._kv.clear_cache()

    def check_integrity(self) -> None:
        """Raises AssertionError unless sequences, slots and pages agree."""
        live = [s for sequences in self._requests.values() for s in sequences]
        self._kv.check_integrity(s.table for s in live)
        slots = [s.slot for s in self._running]
        assert sorted([*slots, *self._free_slots]) == list(range(self._config.max_num_seqs))
        assert self._running == sorted(self._running, key=rank_of)
        assert self._waiting == sorted(self._waiting, key=rank_of)
        assert len(live) <= self._config.capacity
        states = [s.status for s in live]
        assert states.count(SequenceStatus.BLOCKED) == self._num_blocked
        assert states.count(SequenceStatus.WAITING) == len(self._waiting)
        assert SequenceStatus.FINISHED not in states
        for sequence in live:
            assert (sequence.slot >= 0) == (sequence in self._running)
            assert 0 <= sequence.num_in_flight <= 1
            assert len(sequence.pages) >= self._kv.pages_for(sequence.num_computed)

    def _plan_decodes(self, plan: Plan) -> None:
        """Every decoding sequence goes on by one token; those of the worst rank make room for the others."""
        index = 0
        running = self._running
        while index < len(running):
            sequence = running[index]
            index += 1
            if sequence.status is not SequenceStatus.DECODING:
                continue
            position = sequence.num_computed
            if len(sequence.token_ids) + sequence.num_in_flight >= sequence.terms.max_len:
                continue  # the token in flight is its last
            copies = self._kv.make_writable(sequence.table, position)
            while copies is None:
                if not self._make_room(sequence):
                    break
                copies = self._kv.make_writable(sequence.table, position)
            if copies is None:
                self._preempt(sequence)
                break  # it was the last one
            plan.add(sequence, position, 1, copies)

    def _plan_chunks(self, plan: Plan) -> None:
        """Prompts that are under way get what is left of the budget, none more than its share while others wait."""
        prefilling = [s for s in self._running if s.status is SequenceStatus.PREFILLING]
        for sequence in prefilling:
            if plan.budget == 0:
                return
            contended = len(prefilling) > 1 or bool(self._waiting)
            plan.add(sequence, sequence.num_computed, self._chunk(sequence, plan.budget, contended), ())

    def _chunk(self, sequence: Sequence, budget: int, contended: bool) -> int:
        size = min(sequence.num_uncomputed, budget)
        return min(size, self._config.long_prefill_token_threshold) if contended else size

    def _admit(self, plan: Plan) -> None:
        """Sequences leave the queue in order of rank while there are slots, pages and budget."""
        while self._waiting and self._free_slots and plan.budget > 0:
            sequence = self._waiting[0]
            copies = self._begin(sequence)
            if copies is None:
                if self._running or not self._reclaim_forks(sequence):
                    return
                continue
            self._waiting.pop(0)
            sequence.slot = self._free_slots.pop()
            if sequence.first.started_s < 0:
                sequence.first.started_s = self._clock()
            sequence.status = SequenceStatus.PREFILLING
            insort(self._running, sequence, key=rank_of)
            plan.admitted.append(sequence)
            contended = bool(self._waiting) or len(plan.chunks) > plan.num_single
            plan.add(sequence, sequence.num_computed, self._chunk(sequence, plan.budget, contended), copies)

    def _begin(self, sequence: Sequence) -> tuple[tuple[int, int], ...] | None:
        """Gets the pages a sequence needs to start; the copies they ask for, or None if there are too few."""
        kv, first = self._kv, sequence.first
        reserve = admission_reserve(len(self._running), kv.num_pages, self._config.watermark)
        if sequence.pages:
            return kv.make_writable(sequence.table, sequence.num_computed, reserve=reserve)
        cached = kv.begin(
            sequence.table,
            sequence.token_ids,
            reserve=reserve,
            use_cache=sequence.prompt_logprobs is None,
            count=first.num_cached_tokens < 0,
        )
        if cached is None:
            return None
        sequence.num_computed = cached
        if first.num_cached_tokens < 0:
            first.num_cached_tokens = min(cached, sequence.num_prompt)
        return ()

    def _dispatch(self, plan: Plan) -> ScheduledStep:
        """Writes the plan into the sequences: from here on the step counts as computed."""
        singles: list[ScheduledSequence] = []
        longer: list[ScheduledSequence] = []
        for sequence, start, num_tokens in plan.chunks:
            pages = sequence.table.pages
            stop = start + num_tokens
            samples = stop >= len(sequence.token_ids)
            sequence.num_computed = stop
            # One page at most is new to a table: the one a decode has moved into, or a copy on write.
            index = (stop - 1) // self._kv.page_size
            target = singles if num_tokens == 1 else longer
            target.append(
                ScheduledSequence(
                    sequence, sequence.epoch, sequence.slot, start, num_tokens, samples, pages[index], index
                )
            )
            if samples:
                sequence.num_in_flight += 1
                if sequence.status is SequenceStatus.PREFILLING:
                    sequence.status = SequenceStatus.DECODING
                    self._fork_siblings(sequence)
        step_id = self._next_step_id
        self._next_step_id += 1
        return ScheduledStep(
            step_id=step_id,
            items=(*singles, *longer),
            num_decodes=len(singles),
            num_tokens=plan.num_tokens,
            admitted=tuple(plan.admitted),
            page_copies=tuple(plan.copies),
        )

    def _fork_siblings(self, parent: Sequence) -> None:
        """Lets the request's other sequences share the prompt computed now; they sample their own first token."""
        for child in self._requests[parent.request.request_id]:
            if child.status is SequenceStatus.BLOCKED:
                self._kv.fork(parent.table, child.table, child.num_prompt)
                child.num_computed = child.num_prompt - 1
                child.first.num_cached_tokens = parent.first.num_cached_tokens
                child.status = SequenceStatus.WAITING
                self._num_blocked -= 1
                insort(self._waiting, child, key=rank_of)

    def _make_room(self, sequence: Sequence) -> bool:
        """Frees pages for a running sequence; False if only its own are left."""
        if self._reclaim_forks(None):
            return True
        victim = self._running[-1]
        if victim is sequence:
            return False
        self._preempt(victim)
        return True

    def _reclaim_forks(self, keep: Sequence | None) -> bool:
        """Takes the pages of the worst-ranked fork that waits; it will look for its prompt in the prefix cache."""
        for sequence in reversed(self._waiting):
            if sequence.pages and sequence is not keep:
                self._surrender(sequence)
                return True
        return False

    def _surrender(self, sequence: Sequence) -> None:
        self._kv.release(sequence.table)
        sequence.num_computed = 0

    def _preempt(self, sequence: Sequence) -> None:
        """Takes slot and pages from a running sequence; it queues again and keeps its tokens."""
        self._num_preemptions += 1
        self._leave(sequence)
        self._surrender(sequence)
        sequence.num_in_flight = 0
        sequence.epoch += 1
        sequence.status = SequenceStatus.WAITING
        if sequence.prompt_logprobs is not None:
            sequence.prompt_logprobs = PromptLogprobs()
        insort(self._waiting, sequence, key=rank_of)

    def _leave(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._free_slots.append(sequence.slot)
        sequence.slot = -1

    def _advance(self, sequence: Sequence, result: StepResult, index: int) -> TokenEvent:
        """Reports a sequence's new token and ends the sequence if it was its last."""
        terms, token_ids = sequence.terms, sequence.token_ids
        length, token_id = len(token_ids), token_ids[-1]
        reason = None
        if token_id in terms.stop_ids and length >= terms.min_len:
            reason = FinishReason.STOP
        elif length >= terms.max_len:
            reason = FinishReason.LENGTH
        event = token_event(sequence, result, index, reason, self._clock)
        if reason is not None:
            self._forget(sequence)
        return event

    def _end(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> TokenEvent:
        self._forget(sequence)
        return TokenEvent(
            request_id=sequence.request.request_id, index=sequence.index, finish_reason=reason, error=error
        )

    def _forget(self, sequence: Sequence) -> None:
        """Takes a sequence out of every place that holds it."""
        match sequence.status:
            case SequenceStatus.BLOCKED:
                self._num_blocked -= 1
            case SequenceStatus.WAITING:
                self._waiting.remove(sequence)
            case _:
                self._leave(sequence)
        self._kv.release(sequence.table)
        self._departures.note(self._clock())
        sequence.status = SequenceStatus.FINISHED
        sequence.epoch += 1
        siblings = self._requests[sequence.request.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._requests[sequence.request.request_id]
