"""The sequences that hold a slot, which is a row of the device's per-sequence state, and the slots that are free."""

from __future__ import annotations

from bisect import insort

from jaxserve.engine.sequence import Sequence, rank_of


class Slots:
    """Running sequences, best rank first.

    Args:
        num_slots: Most sequences that run at once.
    """

    __slots__ = ("_free", "num_slots", "sequences")

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.sequences: list[Sequence] = []
        self._free = list(range(num_slots - 1, -1, -1))

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def num_free(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)

    def enter(self, sequence: Sequence) -> None:
        """Gives a sequence a slot; one must be free."""
        sequence.slot = self._free.pop()
        insort(self.sequences, sequence, key=rank_of)

    def leave(self, sequence: Sequence) -> None:
        """Takes a sequence's slot."""
        self.sequences.remove(sequence)
        self._free.append(sequence.slot)
        sequence.slot = -1

    def check_integrity(self) -> None:
        """Raises AssertionError unless each slot is free or held by one sequence, and ranks ascend."""
        assert sorted([*(s.slot for s in self.sequences), *self._free]) == list(range(self.num_slots))
        assert self.sequences == sorted(self.sequences, key=rank_of)
