"""Preemption: who gives pages back when they run out, and what becomes of him.

Forks that wait give theirs back first: they find their prompt in the prefix cache, or compute it. Then a running
sequence starts over (recompute): it keeps its tokens, and its noise is keyed by position, so it goes on as if nothing
had happened. Its epoch is raised, which makes the result of a step in flight void; its pages are free at once, for the
device runs steps in order.

The victim is found as the queue finds whose turn it is, upside down: the worst rank of all that run decides which
priorities are at risk, that sequence's and worse ones; of the clients that run something there, the one that was
served most loses its sequence of worst rank. By rank alone a client that came first would evict all who came later,
again and again, to let its own sequences grow.
"""

from __future__ import annotations

from jaxserve.engine.fairness import VirtualTokenCounter
from jaxserve.engine.logprobs import PromptLogprobs
from jaxserve.engine.queue import WaitingQueue
from jaxserve.engine.sequence import Sequence, rank_of
from jaxserve.engine.slots import Slots
from jaxserve.kv.manager import KVManager


class Preemption:
    """Takes pages from sequences.

    Args:
        kv: Pages.
        slots: Sequences that run.
        waiting: Sequences that wait.
        fair: What each client was served.
    """

    def __init__(self, kv: KVManager, slots: Slots, waiting: WaitingQueue, fair: VirtualTokenCounter) -> None:
        self._kv = kv
        self._slots = slots
        self._waiting = waiting
        self._fair = fair
        self.num_preemptions = 0

    def make_room(self) -> Sequence | None:
        """Frees pages; returns the running sequence that was preempted for it, if one was. Some sequence must run."""
        if self.reclaim_fork(None):
            return None
        running, counter = self._slots.sequences, self._fair.counter
        at_risk = running[-1].request.priority
        victim = max(
            (s for s in running if s.request.priority >= at_risk), key=lambda s: (counter(s.account), rank_of(s))
        )
        self.preempt(victim)
        return victim

    def reclaim_fork(self, keep: Sequence | None) -> bool:
        """Takes the pages of a fork that waits, other than `keep`; False if there is none."""
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
            sequence.prompt_logprobs = PromptLogprobs()
        self._waiting.add(sequence)
