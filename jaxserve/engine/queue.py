"""The waiting queue: priority levels first, fair shares between clients within them, order of arrival within a client.

A **flow** is what one client has waiting at one priority, in order of rank (arrival + priority * aging_s). A **band**
is all flows of one priority. Whose turn it is:

    1. the best band is open; so is a band of which the oldest sequence has waited `aging_s` seconds for each level
       between the two, and all bands better than that
    2. of the clients in open bands, the one with the smallest virtual token counter goes next; ties go to the worse
       band, within a band to the best rank. Those in a worse band are lifted to the counters of the best one: while
       they were kept back they did not compete, and earn no credit
    3. of that client's flows in open bands, the head of best rank

So a lower priority number goes first, and with priorities in [-p, p] it delays nobody by more than 2 * p * aging_s
seconds: from then on he is an equal and has his fair share. Within the share nobody waits for ever either, for whoever
arrives is lifted to the counter of the client that has waited longest, and goes behind. With one client all of this is
order of rank.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush, heapreplace

from jaxserve.engine.fairness import Account, VirtualTokenCounter
from jaxserve.engine.sequence import Rank, Sequence, SequenceStatus, rank_of


class _Flow:
    """One client's sequences of one priority, best rank first."""

    __slots__ = ("account", "entry", "sequences")

    def __init__(self, account: Account) -> None:
        self.account = account
        self.sequences: list[Sequence] = []
        self.entry: _Entry | None = None  # its valid entry in its band's heap


_Entry = tuple[float, Rank, _Flow]


class _Band:
    """All flows of one priority.

    Both heaps may hold what has gone; counters and ranks of heads only grow, so an entry is looked at again when it
    comes up.
    """

    __slots__ = ("_by_counter", "_by_rank", "_fair", "_members", "flows")

    def __init__(self, fair: VirtualTokenCounter) -> None:
        self._fair = fair
        self.flows: dict[str, _Flow] = {}
        self._members: set[int] = set()
        self._by_counter: list[_Entry] = []
        self._by_rank: list[tuple[Rank, Sequence]] = []

    def add(self, sequence: Sequence) -> None:
        account = sequence.account
        flow = self.flows.get(account.client)
        if flow is None:
            flow = self.flows[account.client] = _Flow(account)
        insort(flow.sequences, sequence, key=rank_of)
        self._members.add(sequence.seq_id)
        heappush(self._by_rank, (rank_of(sequence), sequence))
        if flow.sequences[0] is sequence:
            flow.entry = self._entry(flow)
            heappush(self._by_counter, flow.entry)
        self._compact()

    def remove(self, sequence: Sequence) -> None:
        flow = self.flows[sequence.account.client]
        del flow.sequences[bisect_left(flow.sequences, rank_of(sequence), key=rank_of)]
        self._members.remove(sequence.seq_id)
        if not flow.sequences:
            flow.entry = None
            del self.flows[sequence.account.client]

    def oldest(self) -> Sequence:
        """The sequence of best rank; there must be one."""
        heap = self._by_rank
        while heap[0][1].seq_id not in self._members:
            heappop(heap)
        return heap[0][1]

    def next_flow(self) -> _Flow:
        """The flow of the client with the smallest counter; there must be one."""
        heap, counter = self._by_counter, self._fair.counter
        while True:
            entry = heap[0]
            flow = entry[2]
            if flow.entry is entry:
                if (counter(flow.account), rank_of(flow.sequences[0])) == entry[:2]:
                    return flow
                flow.entry = self._entry(flow)
                heapreplace(heap, flow.entry)
            else:
                heappop(heap)

    def _entry(self, flow: _Flow) -> _Entry:
        return self._fair.counter(flow.account), rank_of(flow.sequences[0]), flow

    def _compact(self) -> None:
        if len(self._by_rank) > 2 * len(self._members) + 64:
            self._by_rank = [(rank_of(s), s) for flow in self.flows.values() for s in flow.sequences]
            heapify(self._by_rank)
        if len(self._by_counter) > 2 * len(self.flows) + 64:
            self._by_counter = [flow.entry for flow in self.flows.values() if flow.entry is not None]
            heapify(self._by_counter)


class WaitingQueue:
    """Sequences without a slot: those that wait for one, and those that wait for their prompt (n > 1).

    Args:
        fair: What each client was served.
        aging_s: Seconds of waiting that outweigh one level of priority.
        clock: Seconds, monotonic.
    """

    __slots__ = ("_aging_s", "_bands", "_clock", "_fair", "_holders", "_last_left", "_num_waiting", "num_blocked")

    def __init__(self, fair: VirtualTokenCounter, aging_s: float, clock: Callable[[], float]) -> None:
        self._fair = fair
        self._aging_s = aging_s
        self._clock = clock
        self._bands: dict[int, _Band] = {}
        self._holders: dict[int, Sequence] = {}
        self._last_left: Account | None = None
        self._num_waiting = 0
        self.num_blocked = 0

    def __len__(self) -> int:
        """Sequences that a free slot would let run."""
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        return (s for band in self._bands.values() for flow in band.flows.values() for s in flow.sequences)

    def arrive(self, first: Sequence, others: list[Sequence]) -> None:
        """A new request's first sequence waits for a slot, the others for its prompt."""
        account = first.account
        if not account.num_waiting:
            self._fair.lift(account, self._level(first.request.priority))
        self.num_blocked += len(others)
        account.num_waiting += len(others)
        self.add(first)

    def add(self, sequence: Sequence) -> None:
        """A sequence waits for a slot that has been here before: a fork, or one that was preempted."""
        sequence.status = SequenceStatus.WAITING
        sequence.account.num_waiting += 1
        self._num_waiting += 1
        if sequence.pages:
            self._holders[sequence.seq_id] = sequence
        priority = sequence.request.priority
        band = self._bands.get(priority)
        if band is None:
            band = self._bands[priority] = _Band(self._fair)
        band.add(sequence)

    def first(self) -> Sequence | None:
        """Whose turn it is; None if nobody waits."""
        bands = self._bands
        if len(bands) <= 1:
            for band in bands.values():
                return band.next_flow().sequences[0]
            return None
        fair, open_bands = self._fair, self._open_bands()
        account = open_bands[0].next_flow().account
        least = fair.counter(account)
        for band in open_bands[1:]:
            other = band.next_flow().account
            # Whoever was kept back by his priority did not compete meanwhile: he is an equal now, and goes first once.
            if fair.counter(other) <= least:
                account = other
        fair.lift(account, least)
        flows = (band.flows.get(account.client) for band in open_bands)
        return min((flow.sequences[0] for flow in flows if flow is not None), key=rank_of)

    def remove(self, sequence: Sequence) -> None:
        """A sequence no longer waits: it has ended, or got its slot, or (if it was blocked) its prompt."""
        account = sequence.account
        account.num_waiting -= 1
        if not account.num_waiting:
            self._last_left = account
        if sequence.status is SequenceStatus.BLOCKED:
            self.num_blocked -= 1
            return
        self._num_waiting -= 1
        self._holders.pop(sequence.seq_id, None)
        priority = sequence.request.priority
        band = self._bands[priority]
        band.remove(sequence)
        if not band.flows:
            del self._bands[priority]

    def worst_holder(self, keep: Sequence | None) -> Sequence | None:
        """Who gives pages back first of those that hold some while they wait, which forks do; never `keep`."""
        for seq_id in [seq_id for seq_id, sequence in self._holders.items() if not sequence.pages]:
            del self._holders[seq_id]
        holders = (sequence for sequence in self._holders.values() if sequence is not keep)
        return max(holders, key=lambda s: (self._fair.counter(s.account), rank_of(s)), default=None)

    def floor(self) -> float:
        """The least counter that whoever arrives is lifted to."""
        if not self._bands:
            return self._level(0)
        return min(self._fair.counter(band.oldest().account) for band in self._bands.values())

    def _level(self, priority: int) -> float:
        """The counter that a client which has nothing waiting is lifted to when it asks for something.

        That of the client that has waited longest among those it competes with: no less than the smallest counter and
        no more than the largest, as fairness demands, and a stream of clients that come once and never again cannot
        keep it small.
        """
        bands = self._bands
        if not bands:
            return self._fair.zero if self._last_left is None else self._fair.counter(self._last_left)
        competitors = self._open_bands() if len(bands) > 1 else list(bands.values())
        own = bands.get(priority)
        if own is not None and own not in competitors:
            competitors = [own]
        oldest = min((band.oldest() for band in competitors), key=rank_of)
        return self._fair.counter(oldest.account)

    def _open_bands(self) -> list[_Band]:
        """Bands that take turns, best first; there must be one."""
        now = self._clock()
        priorities = sorted(self._bands)
        best = open_to = priorities[0]
        for priority in priorities:
            waited_s = now - self._bands[priority].oldest().terms.arrival_s
            if waited_s >= (priority - best) * self._aging_s:
                open_to = priority
        return [self._bands[priority] for priority in priorities if priority <= open_to]

    def check_integrity(self, live: list[Sequence]) -> None:
        """Raises AssertionError unless the queue holds those of the live sequences that wait.

        Args:
            live: All sequences that have not ended.
        """
        waiting = [s for s in live if s.status is SequenceStatus.WAITING]
        assert {s.seq_id for s in self} == {s.seq_id for s in waiting}
        assert len(list(self)) == self._num_waiting == len(waiting)
        assert sum(s.status is SequenceStatus.BLOCKED for s in live) == self.num_blocked
        assert {s.seq_id for s in waiting if s.pages} <= set(self._holders)
        for priority, band in self._bands.items():
            assert band.flows
            for flow in band.flows.values():
                assert flow.sequences == sorted(flow.sequences, key=rank_of)
                assert flow.entry is not None
                assert {(s.request.priority, s.account) for s in flow.sequences} == {(priority, flow.account)}
        for account in {s.account for s in live}:
            mine = [s for s in live if s.account is account]
            assert account.num_live == len(mine)
            assert account.num_waiting == sum(s.slot < 0 for s in mine)
