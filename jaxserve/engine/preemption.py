"""Preemption: who gives pages back when they run out, and what becomes of him.

Forks that wait give theirs back first: they find their prompt in the prefix cache, or compute it. Then the running
sequence of the worst rank starts over (recompute): it keeps its tokens, and its noise is keyed by position, so it goes
on as if nothing had happened. Its epoch is raised, which makes the result of a step in flight void; its pages are free
at once, for the device runs steps in order.
"""

from __future__ import annotations

from jaxserve.engine.queue import WaitingQueue
from jaxserve.engine.sequence import Sequence
from jaxserve.engine.slots import Slots
from jaxserve.kv.manager import KVManager


class Preemption:
    """Takes pages from sequences.

    Args:
        kv: Pages.
        slots: Sequences that run.
        waiting: Sequences that wait.
    """

    __slots__ = ("_kv", "_slots", "_waiting", "num_preemptions")

    def __init__(self, kv: KVManager, slots: Slots, waiting: WaitingQueue) -> None:
        self._kv = kv
        self._slots = slots
        self._waiting = waiting
        self.num_preemptions = 0

    def make_room(self, sequence: Sequence) -> bool:
        """Frees pages for a running sequence; False if only its own are left."""
        if self.reclaim_fork(None):
            return True
        victim = self._slots.sequences[-1]
        if victim is sequence:
            return False
        self.preempt(victim)
        return True

    def reclaim_fork(self, keep: Sequence | None) -> bool:
        """Takes the pages of the worst-ranked fork that waits, other than `keep`; False if there is none."""
        fork = self._waiting.worst_holder(keep)
        if fork is None:
            return False
        self.surrender(fork)
        return True

    def surrender(self, sequence: Sequence) -> None:
        """Takes a sequence's pages; all of its tokens are to be computed again."""
        self._kv.release(sequence.table)
        sequence.num_computed = 0

    def preempt(self, sequence: Sequence) -> None:
        """Takes slot and pages from a running sequence; it queues again and keeps its tokens."""
        self.num_preemptions += 1
        self._slots.leave(sequence)
        self.surrender(sequence)
        sequence.num_in_flight = 0
        sequence.epoch += 1
        if sequence.prompt_logprobs is not None:
            sequence.prompt_logprobs = [None]
        self._waiting.add(sequence)
