"""The scheduler: continuous batching under a token budget, as pure host bookkeeping.

`schedule` fills a step with decodes first, then with chunks of prompts that are under way, then with admissions from
the queue, and `commit` turns the step's tokens into events. A step may be scheduled while the one before still runs:
a sequence whose token is in flight goes on from it unseen. Whatever makes a result void (an end, a preemption) raises
the sequence's epoch, and the result is dropped when it comes; pages are free at once, for the device runs steps in
order.

Its parts: `queue` (who waits), `slots` (who runs), `admission` (from one to the other), `preemption` (and back).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice
from random import Random

from jaxserve.core.errors import InvalidRequestError
from jaxserve.core.types import FinishReason, Request, TokenEvent
from jaxserve.engine.admission import Admission
from jaxserve.engine.api import EngineStats
from jaxserve.engine.events import collect_prompt_logprobs, token_event
from jaxserve.engine.fairness import VirtualTokenCounter
from jaxserve.engine.intake import Load, check_fits, check_room, new_sequences, seed_of
from jaxserve.engine.pace import Pace
from jaxserve.engine.policy import SchedulerConfig, chunk_tokens
from jaxserve.engine.preemption import Preemption
from jaxserve.engine.queue import WaitingQueue
from jaxserve.engine.sequence import Sequence, SequenceStatus
from jaxserve.engine.slots import Slots
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
        self._fair = VirtualTokenCounter(config.fairness, clock)
        self._waiting = WaitingQueue(self._fair, config.aging_s, clock)
        self._slots = Slots(config.max_num_seqs)
        self._preemption = Preemption(kv, self._slots, self._waiting, self._fair)
        self._admission = Admission(config, kv, self._slots, self._waiting, self._preemption, self._fair, clock)
        self._requests: dict[str, list[Sequence]] = {}
        self._pace = Pace()
        self._committed_s = 0.0
        self._next_seq_id = 0
        self._next_step_id = 0

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no slot."""
        return len(self._waiting) + self._waiting.num_blocked

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._slots)

    @property
    def has_work(self) -> bool:
        """Whether any sequence has not ended."""
        return bool(self._slots or self._waiting)

    def stats(self) -> EngineStats:
        """Load and counters; what only the loop knows is left at zero."""
        kv = self._kv.stats()
        return EngineStats(
            num_waiting=self.num_waiting,
            num_running=self.num_running,
            kv_cache_usage=kv.usage,
            prefix_cache_queries_tokens=kv.query_tokens,
            prefix_cache_hits_tokens=kv.hit_tokens,
            num_preemptions=self._preemption.num_preemptions,
        )

    def submit(self, request: Request) -> None:
        """Queues a request's sequences.

        Raises:
            InvalidRequestError: Its priority is out of range, its id is in use, or it has too many sequences for ever.
            ContextLengthError: It fits neither the context nor the pool.
            QueueFullError: The slots are taken and the queue is at its bound, or the client's share of it is used up.
        """
        if request.request_id in self._requests:
            raise InvalidRequestError(f"A request with id {request.request_id} is in flight.", param="request_id")
        check_fits(request, self._config, self._kv)
        self._check_room(request)
        sequences = new_sequences(
            request,
            self._config,
            self._kv,
            eos=self._eos,
            seed=seed_of(request.sampling, self._random),
            arrival_s=self._clock(),
            first_id=self._next_seq_id,
            account=self._fair.open(request.client, request.n),
        )
        self._next_seq_id += request.n
        self._requests[request.request_id] = sequences
        self._waiting.arrive(sequences[0], sequences[1:])

    def abort(self, request_id: str) -> list[TokenEvent]:
        """Ends a request's sequences in whatever state they are; unknown ids give no events."""
        return [self._end(s, FinishReason.ABORT) for s in tuple(self._requests.get(request_id, ()))]

    def schedule(self) -> ScheduledStep | None:
        """The next step, or None if nothing can run now."""
        plan = Plan(self._config.step_tokens)
        self._plan_decodes(plan)
        self._plan_chunks(plan)
        self._admission.admit(plan)
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
        now = self._clock()
        self._pace.note_step(step.num_tokens, now - max(step.scheduled_s, self._committed_s))
        self._committed_s = now
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
                sequence.terms.account.output_tokens += 1
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
        for sequence in tuple(self._slots.sequences):
            self._preemption.preempt(sequence)
        for sequence in self._waiting:
            self._preemption.surrender(sequence)
        self._kv.clear_cache()

    def check_integrity(self) -> None:
        """Raises AssertionError unless sequences, slots and pages agree."""
        live = [s for sequences in self._requests.values() for s in sequences]
        self._kv.check_integrity(s.table for s in live)
        self._fair.check_integrity()
        self._slots.check_integrity()
        self._waiting.check_integrity(live)
        assert len(live) <= self._config.capacity
        for sequence in live:
            assert sequence.status is not SequenceStatus.FINISHED
            assert (sequence.slot >= 0) == (sequence in self._slots.sequences)
            assert 0 <= sequence.num_in_flight <= 1
            assert len(sequence.pages) >= self._kv.pages_for(sequence.num_computed)

    def _check_room(self, request: Request) -> None:
        config, account = self._config, self._fair.find(request.client) if request.client else None
        load = Load(
            num_waiting=self.num_waiting,
            num_running=self.num_running,
            client_waiting=0 if account is None else account.num_waiting,
        )
        capacity = config.client_capacity if request.client else config.capacity
        check_room(request.n, load, config, seconds_until=self._seconds_until, capacity=capacity)

    def _seconds_until(self, num_ends: int) -> float:
        """Seconds until so many sequences have ended, of those that run and those that are about to."""
        num_free = self._config.max_num_seqs - len(self._slots)
        return self._pace.seconds_until(num_ends, (*self._slots.sequences, *islice(self._waiting, num_free)))

    def _plan_decodes(self, plan: Plan) -> None:
        """Every decoding sequence goes on by one token; if pages run out, some make room for the others."""
        for sequence in tuple(self._slots.sequences):
            if sequence.status is not SequenceStatus.DECODING:
                continue  # its prompt is under way, or it has just made room
            position = sequence.num_computed
            if len(sequence.token_ids) + sequence.num_in_flight >= sequence.terms.max_len:
                continue  # the token in flight is its last
            while (copies := self._kv.make_writable(sequence.table, position)) is None:
                victim = self._preemption.make_room()
                if victim is sequence:
                    break
                if victim is not None:
                    plan.drop(victim)
            else:
                plan.add(sequence, position, 1, copies)

    def _plan_chunks(self, plan: Plan) -> None:
        """Prompts that are under way get what is left of the budget, none more than its share while others wait."""
        prefilling = [s for s in self._slots.sequences if s.status is SequenceStatus.PREFILLING]
        for sequence in prefilling:
            if plan.budget == 0:
                return
            contended = len(prefilling) > 1 or bool(self._waiting)
            size = chunk_tokens(sequence.num_uncomputed, plan.budget, self._config, contended=contended)
            plan.add(sequence, sequence.num_computed, size, ())

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
                    self._admission.fork(sequence, self._requests[sequence.request.request_id])
        step_id = self._next_step_id
        self._next_step_id += 1
        return ScheduledStep(
            step_id=step_id,
            items=(*singles, *longer),
            num_decodes=len(singles),
            num_tokens=plan.num_tokens,
            admitted=tuple(plan.admitted),
            scheduled_s=self._clock(),
            page_copies=tuple(copy for copies in plan.copies.values() for copy in copies),
        )

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
            self._forget(sequence, stopped=reason is FinishReason.STOP)
        return event

    def _end(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> TokenEvent:
        self._forget(sequence)
        return TokenEvent(
            request_id=sequence.request.request_id, index=sequence.index, finish_reason=reason, error=error
        )

    def _forget(self, sequence: Sequence, *, stopped: bool = False) -> None:
        """Takes a sequence out of every place that holds it."""
        if sequence.slot < 0:
            self._waiting.remove(sequence)
        else:
            self._slots.leave(sequence)
        self._pace.note_end(sequence, stopped=stopped)
        self._fair.close(sequence.account, self._waiting.floor)
        self._kv.release(sequence.table)
        sequence.status = SequenceStatus.FINISHED
        sequence.epoch += 1
        siblings = self._requests[sequence.request.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._requests[sequence.request.request_id]
