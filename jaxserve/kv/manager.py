"""KV manager: gives pages to sequences, shares them, and takes them back.

A sequence's `PageTable` is opened with `begin` (cached prefix plus fresh pages for the rest), grows page by page, may
be forked (n > 1: the copy shares all pages and gets its own last partial page when it starts to write), and is
released. A call that cannot be met changes nothing and says so; the scheduler then makes room. Full pages are offered
to the prefix cache once the step that filled them has succeeded. Host bookkeeping only: the device arrays live in the
runner.

Invariant, after every call: free + cached (idle in the prefix cache) + owned (referenced) = num_pages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jaxserve.kv.pages import PagePool, PageTable
from jaxserve.kv.prefix import PageHasher, PrefixCache


@dataclass(frozen=True, kw_only=True, slots=True)
class KVStats:
    """A snapshot of the pool.

    Attributes:
        num_pages: Pages in the pool.
        num_free: Pages that hold nothing.
        num_cached: Idle pages of the prefix cache.
        num_owned: Pages that sequences refer to.
        query_tokens: Tokens looked up in the prefix cache since start.
        hit_tokens: Of those, tokens found.
    """

    num_pages: int
    num_free: int
    num_cached: int
    num_owned: int
    query_tokens: int
    hit_tokens: int

    @property
    def usage(self) -> float:
        """Share of the pool that sequences refer to, 0 to 1."""
        return self.num_owned / self.num_pages


class KVManager:
    """The pages of one pool.

    Args:
        num_pages: Pages in the pool, >= 1.
        page_size: Tokens a page holds, >= 1.
        enable_prefix_cache: Whether full pages are kept for later prompts.
    """

    def __init__(self, *, num_pages: int, page_size: int, enable_prefix_cache: bool = True) -> None:
        if page_size < 1:
            raise ValueError(f"a page holds at least one token, got {page_size}")
        self.num_pages = num_pages
        self.page_size = page_size
        self.enable_prefix_cache = enable_prefix_cache
        self._pool = PagePool(num_pages)
        self._prefix = PrefixCache()
        self._hasher = PageHasher(page_size)
        self._query_tokens = 0
        self._hit_tokens = 0

    @property
    def num_available(self) -> int:
        """Pages that can be given out: free or idle in the prefix cache."""
        return len(self._pool.free) + self._prefix.num_idle

    @property
    def capacity_tokens(self) -> int:
        """Tokens the whole pool holds."""
        return self.num_pages * self.page_size

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def new_table(self, salt: str) -> PageTable:
        """An empty table for a sequence whose pages are shared within `salt` only."""
        return PageTable(self._hasher.root(salt))

    def begin(
        self,
        table: PageTable,
        token_ids: Sequence[int],
        *,
        reserve: int = 0,
        use_cache: bool = True,
        count: bool = True,
    ) -> int | None:
        """Gives an empty table the pages of all `token_ids`, the longest cached prefix first.

        The last token is never taken from the cache, so that at least one is computed.

        Args:
            table: An empty table.
            token_ids: The sequence's tokens, at least one.
            reserve: Pages that must stay available afterwards.
            use_cache: Whether to look into the prefix cache.
            count: Whether the look-up counts in the statistics.

        Returns:
            How many tokens came from the cache; None if there are too few pages (nothing changed then).
        """
        assert not table.pages, "the table already holds pages"
        use_cache = use_cache and self.enable_prefix_cache
        hits = self._lookup(table, token_ids) if use_cache else []
        num_new = self.pages_for(len(token_ids)) - len(hits)
        num_idle_hits = sum(map(self._prefix.is_idle, hits))
        if self.num_available - num_idle_hits - num_new < reserve:
            return None
        for page in hits:
            self._share(page)
        table.pages.extend(hits)
        table.num_registered = len(hits)
        table.pages.extend(self._take() for _ in range(num_new))
        if count and use_cache:
            self._query_tokens += len(token_ids)
            self._hit_tokens += len(hits) * self.page_size
        return len(hits) * self.page_size

    def num_cached(self, table: PageTable, token_ids: Sequence[int]) -> int:
        """How many tokens `begin` would take from the cache now."""
        return len(self._lookup(table, token_ids)) * self.page_size if self.enable_prefix_cache else 0

    def grow(self, table: PageTable, num_tokens: int) -> bool:
        """Appends pages until the table holds `num_tokens`; False, and nothing changed, if there are too few."""
        num_new = self.pages_for(num_tokens) - len(table.pages)
        if num_new > self.num_available:
            return False
        for _ in range(num_new):
            table.pages.append(self._take())
        return True

    def fork(self, parent: PageTable, child: PageTable, num_tokens: int) -> None:
        """Lets an empty table share the pages of the parent's first `num_tokens` tokens, a partial page included."""
        assert not child.pages, "the child already holds pages"
        for page in parent.pages[: self.pages_for(num_tokens)]:
            self._share(page)
            child.pages.append(page)
        full = num_tokens // self.page_size
        child.digests = parent.digests[:full]
        child.num_registered = min(parent.num_registered, full)

    def make_writable(self, table: PageTable, position: int, *, reserve: int = 0) -> tuple[tuple[int, int], ...] | None:
        """Makes the page of `position` exist and belong to this table alone, so that a step may write it.

        Args:
            table: A table whose pages hold at least the tokens before `position`.
            position: Index of the token about to be written.
            reserve: Pages that must stay available if one has to be taken.

        Returns:
            The (source, destination) pages to copy before the step: none or one; None if there are too few pages
            (nothing changed then).
        """
        index = position // self.page_size
        shared = index < len(table.pages)
        if shared and self._pool.refs[table.pages[index]] == 1 and not self._prefix.knows(table.pages[index]):
            return ()
        if self.num_available - 1 < reserve:
            return None
        page = self._take()
        if not shared:
            table.pages.append(page)
            return ()
        source, table.pages[index] = table.pages[index], page
        self._drop(source)
        return ((source, page),)

    def register(self, table: PageTable, token_ids: Sequence[int], num_tokens: int) -> None:
        """Offers the table's full pages among its first `num_tokens` tokens to the prefix cache.

        Call it only when the KV of these tokens is certain to be in the pages.
        """
        num_full = num_tokens // self.page_size
        if not self.enable_prefix_cache or num_full <= table.num_registered:
            return
        self._hasher.extend(table.digests, table.root, token_ids, num_full)
        for index in range(table.num_registered, num_full):
            self._prefix.store(table.digests[index], table.pages[index])
        table.num_registered = num_full

    def release(self, table: PageTable) -> None:
        """Drops all references of a table, last page first, and empties it; its digests stay valid."""
        while table.pages:
            self._drop(table.pages.pop())
        table.num_registered = 0

    def clear_cache(self) -> None:
        """Forgets every cached prefix, for instance because the device's pool was lost."""
        self._pool.free.extend(self._prefix.clear())

    def stats(self) -> KVStats:
        """A snapshot of the pool."""
        num_free, num_cached = len(self._pool.free), self._prefix.num_idle
        return KVStats(
            num_pages=self.num_pages,
            num_free=num_free,
            num_cached=num_cached,
            num_owned=self.num_pages - num_free - num_cached,
            query_tokens=self._query_tokens,
            hit_tokens=self._hit_tokens,
        )

    def check_integrity(self, tables: Iterable[PageTable]) -> None:
        """Raises AssertionError unless free + cached + owned = total and the counts are those of the given tables.

        Args:
            tables: Every table that holds pages.
        """
        pool, prefix = self._pool, self._prefix
        prefix.check_integrity()
        expected = Counter(page for table in tables for page in table.pages)
        free = set(pool.free)
        assert len(free) == len(pool.free), "a page is free twice"
        num_owned = 0
        for page, count in enumerate(pool.refs):
            assert count == expected[page], f"page {page} has {count} references, {expected[page]} tables hold it"
            places = (count > 0) + (page in free) + prefix.is_idle(page)
            assert places == 1, f"page {page} is in {places} places"
            assert not (page in free and prefix.knows(page)), f"free page {page} is known to the prefix cache"
            num_owned += count > 0
        assert len(free) + prefix.num_idle + num_owned == self.num_pages

    def _lookup(self, table: PageTable, token_ids: Sequence[int]) -> list[int]:
        max_pages = (len(token_ids) - 1) // self.page_size
        self._hasher.extend(table.digests, table.root, token_ids, max_pages)
        return self._prefix.find(table.digests, max_pages)

    def _share(self, page: int) -> None:
        if self._prefix.is_idle(page):
            self._prefix.revive(page)
        self._pool.share(page)

    def _take(self) -> int:
        page = self._pool.free.pop() if self._pool.free else self._prefix.evict_one()
        self._pool.refs[page] = 1
        return page

    def _drop(self, page: int) -> None:
        if self._pool.drop(page):
            if self._prefix.knows(page):
                self._prefix.retire(page)
            else:
                self._pool.free.append(page)
