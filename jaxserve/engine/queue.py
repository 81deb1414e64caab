"""The sequences that hold no slot: those that wait for one, in order, and those that wait for their prompt (n > 1)."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator

from jaxserve.engine.sequence import Sequence, SequenceStatus, rank_of


class WaitingQueue:
    """Sequences without a slot, best rank first."""

    __slots__ = ("_sequences", "num_blocked")

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []
        self.num_blocked = 0

    def __len__(self) -> int:
        """Sequences that a free slot would let run."""
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def add(self, sequence: Sequence) -> None:
        """A sequence waits for a slot: a new one, a fork, or one that was preempted."""
        sequence.status = SequenceStatus.WAITING
        insort(self._sequences, sequence, key=rank_of)

    def first(self) -> Sequence | None:
        """Whose turn it is; None if nobody waits."""
        return self._sequences[0] if self._sequences else None

    def remove(self, sequence: Sequence) -> None:
        """A sequence no longer waits for a slot."""
        self._sequences.remove(sequence)

    def worst_holder(self, keep: Sequence | None) -> Sequence | None:
        """The sequence of the worst rank, other than `keep`, that holds pages while it waits: a fork."""
        return next((s for s in reversed(self._sequences) if s.pages and s is not keep), None)

    def check_integrity(self, live: list[Sequence]) -> None:
        """Raises AssertionError unless the queue holds those of the live sequences that wait.

        Args:
            live: All sequences that have not ended.
        """
        assert self._sequences == sorted(self._sequences, key=rank_of)
        states = [s.status for s in live]
        assert states.count(SequenceStatus.BLOCKED) == self.num_blocked
        assert states.count(SequenceStatus.WAITING) == len(self._sequences)
