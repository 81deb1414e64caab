"""Admission: sequences leave the queue while there are slots, pages and budget, and start to compute their tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from jaxserve.engine.fairness import VirtualTokenCounter
from jaxserve.engine.policy import SchedulerConfig, admission_reserve, chunk_tokens
from jaxserve.engine.preemption import Preemption
from jaxserve.engine.queue import WaitingQueue
from jaxserve.engine.sequence import Sequence, SequenceStatus
from jaxserve.engine.slots import Slots
from jaxserve.engine.steps import Plan
from jaxserve.kv.manager import KVManager


class Admission:
    """Lets waiting sequences run.

    Args:
        config: Limits.
        kv: Pages.
        slots: Where sequences run.
        waiting: Where they come from.
        preemption: Takes pages from forks that wait.
        fair: Is told which prompts are computed for whom.
        clock: Seconds, monotonic.
    """

    __slots__ = ("_clock", "_config", "_fair", "_kv", "_preemption", "_slots", "_waiting")

    def __init__(
        self,
        config: SchedulerConfig,
        kv: KVManager,
        slots: Slots,
        waiting: WaitingQueue,
        preemption: Preemption,
        fair: VirtualTokenCounter,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._kv = kv
        self._slots = slots
        self._waiting = waiting
        self._preemption = preemption
        self._fair = fair
        self._clock = clock

    def admit(self, plan: Plan) -> None:
        """Fills what is left of a step with sequences from the queue."""
        waiting, slots = self._waiting, self._slots
        while slots.num_free and plan.budget > 0:
            sequence = waiting.first()
            if sequence is None:
                return
            copies = self._begin(sequence)
            if copies is None:
                if slots.sequences or not self._preemption.reclaim_fork(sequence):
                    return
                continue
            waiting.remove(sequence)
            slots.enter(sequence)
            if sequence.first.started_s < 0:
                sequence.first.started_s = self._clock()
            sequence.status = SequenceStatus.PREFILLING
            plan.admitted.append(sequence)
            contended = bool(waiting) or len(plan.chunks) > plan.num_single
            size = chunk_tokens(sequence.num_uncomputed, plan.budget, self._config, contended=contended)
            plan.add(sequence, sequence.num_computed, size, copies)

    def fork(self, parent: Sequence, siblings: Iterable[Sequence]) -> None:
        """Lets a request's other sequences share the prompt that the first computes now.

        They sample their own first token, so they compute the prompt's last token.
        """
        for child in siblings:
            if child.status is SequenceStatus.BLOCKED:
                self._kv.fork(parent.table, child.table, child.num_prompt)
                child.num_computed = child.num_prompt - 1
                child.first.num_cached_tokens = parent.first.num_cached_tokens
                self._waiting.remove(child)
                self._waiting.add(child)

    def _begin(self, sequence: Sequence) -> tuple[tuple[int, int], ...] | None:
        """Gets the pages a sequence needs to start; the copies they ask for, or None if there are too few."""
        kv, first = self._kv, sequence.first
        reserve = admission_reserve(len(self._slots), kv.num_pages, self._config.watermark)
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
            self._fair.charge_input(sequence.account, sequence.num_prompt - first.num_cached_tokens)
        return ()
