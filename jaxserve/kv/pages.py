"""Pages of KV memory: who refers to each, which are free, and the list of pages of one sequence.

A page id is in [0, num_pages); every id is an ordinary page. A page with references belongs to at least one
`PageTable`; a page without is either on the free list or idle in the prefix cache (`kv/prefix.py`). `kv/manager.py`
moves pages between these three places; nothing else does.
"""

from __future__ import annotations


class PageTable:
    """The pages of one sequence, in the order of its tokens, and the hash chain over its full pages.

    Attributes:
        pages: Page ids; page i holds tokens [i * page_size, (i + 1) * page_size).
        digests: Digests of the first full pages of tokens; a prefix of the chain, extended on demand.
        num_registered: Leading pages that have been offered to the prefix cache.
        root: Parent digest of the first page; differs for each cache salt.
    """

    __slots__ = ("digests", "num_registered", "pages", "root")

    def __init__(self, root: bytes) -> None:
        self.pages: list[int] = []
        self.digests: list[bytes] = []
        self.num_registered = 0
        self.root = root


class PagePool:
    """Reference counts and the free list.

    Args:
        num_pages: Pages in the pool, >= 1.
    """

    __slots__ = ("free", "num_pages", "refs")

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"a page pool needs at least one page, got {num_pages}")
        self.num_pages = num_pages
        self.refs = [0] * num_pages
        self.free = list(range(num_pages - 1, -1, -1))

    def share(self, page: int) -> None:
        """Adds a reference."""
        self.refs[page] += 1

    def drop(self, page: int) -> bool:
        """Removes a reference; returns whether it was the last, in which case the caller must place the page."""
        count = self.refs[page] - 1
        assert count >= 0, f"page {page} dropped more often than shared"
        self.refs[page] = count
        return count == 0
