"""The page manager against a naive model: a page's content is what was last written to it."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from jaxserve.kv.manager import KVManager
from jaxserve.kv.pages import PageTable


class Tokens:
    """A table and the tokens it stands for."""

    def __init__(self, table: PageTable, ids: list[int]) -> None:
        self.table = table
        self.ids = ids


class ManagerMachine(RuleBasedStateMachine):
    tables = Bundle("tables")

    @initialize(num_pages=st.integers(4, 16), page_size=st.integers(1, 4))
    def start(self, num_pages: int, page_size: int) -> None:
        self.kv = KVManager(num_pages=num_pages, page_size=page_size)
        self.content: dict[int, list[int | None]] = {page: [None] * page_size for page in range(num_pages)}
        self.live: list[Tokens] = []

    def write(self, table: PageTable, position: int, token: int) -> None:
        self.content[table.pages[position // self.kv.page_size]][position % self.kv.page_size] = token

    def read(self, held: Tokens) -> list[int | None]:
        size = self.kv.page_size
        return [self.content[held.table.pages[i // size]][i % size] for i in range(len(held.ids))]

    @rule(target=tables, ids=st.lists(st.integers(0, 1), min_size=1, max_size=20), salt=st.sampled_from("ab"))
    def begin(self, ids: list[int], salt: str) -> object:
        table = self.kv.new_table(salt)
        before = self.kv.num_available
        cached = self.kv.begin(table, ids)
        if cached is None:
            assert self.kv.num_available == before
            assert not table.pages
            return multiple()
        assert cached < len(ids)
        assert cached % self.kv.page_size == 0
        for position in range(cached, len(ids)):
            self.write(table, position, ids[position])
        held = Tokens(table, list(ids))
        self.kv.register(table, held.ids, len(ids))
        self.live.append(held)
        return held

    @rule(held=tables, token=st.integers(0, 1))
    def append(self, held: Tokens, token: int) -> None:
        if held not in self.live:
            return
        position = len(held.ids)
        copies = self.kv.make_writable(held.table, position)
        if copies is None:
            assert self.kv.num_available == 0
            return
        for source, target in copies:
            self.content[target] = list(self.content[source])
        held.ids.append(token)
        self.write(held.table, position, token)
        self.kv.register(held.table, held.ids, len(held.ids))

    @rule(target=tables, held=tables)
    def fork(self, held: Tokens) -> object:
        if held not in self.live:
            return multiple()
        child = self.kv.new_table("")
        self.kv.fork(held.table, child, len(held.ids))
        copy = Tokens(child, list(held.ids))
        self.live.append(copy)
        return copy

    @rule(held=consumes(tables))
    def release(self, held: Tokens) -> None:
        if held in self.live:
            self.live.remove(held)
            self.kv.release(held.table)
            assert not held.table.pages

    @rule()
    def forget(self) -> None:
        self.kv.clear_cache()
        assert self.kv.stats().num_cached == 0
        for held in self.live:
            held.table.num_registered = 0

    @invariant()
    def every_table_reads_its_own_tokens(self) -> None:
        for held in getattr(self, "live", ()):
            assert self.read(held) == held.ids

    @invariant()
    def pages_add_up(self) -> None:
        if hasattr(self, "kv"):
            self.kv.check_integrity(held.table for held in self.live)


TestManagerMachine = ManagerMachine.TestCase
TestManagerMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_the_least_recently_used_prefix_is_evicted() -> None:
    kv = KVManager(num_pages=4, page_size=2)
    for ids in ([1, 1, 1], [2, 2, 2]):
        table = kv.new_table("")
        assert kv.begin(table, ids) == 0
        kv.register(table, ids, 2)
        kv.release(table)
    assert kv.num_cached(kv.new_table(""), [1, 1, 1]) == 2
    table = kv.new_table("")
    assert kv.begin(table, [3] * 6) == 0  # three pages: two are free, one must be evicted
    assert kv.num_cached(kv.new_table(""), [1, 1, 1]) == 0
    assert kv.num_cached(kv.new_table(""), [2, 2, 2]) == 2


def test_a_reserve_is_left_alone() -> None:
    kv = KVManager(num_pages=4, page_size=2)
    table = kv.new_table("")
    assert kv.begin(table, [1] * 8, reserve=1) is None
    assert kv.begin(table, [1] * 6, reserve=1) == 0
    assert kv.num_available == 1


def test_what_was_built_on_a_prefix_is_evicted_before_it() -> None:
    """Pages are given back last first: page by page, what is left of a prompt can still be found."""
    kv = KVManager(num_pages=6, page_size=2)
    ids = list(range(9))
    table = kv.new_table("")
    kv.begin(table, ids)
    kv.register(table, ids, 8)
    kv.release(table)
    assert kv.stats().num_cached == 4
    left = []
    others = []
    for number in range(6):
        other = kv.new_table("")
        assert kv.begin(other, [100 + number]) == 0
        others.append(other)
        left.append(kv.num_cached(kv.new_table(""), ids))
    assert left == [8, 8, 6, 4, 2, 0]
