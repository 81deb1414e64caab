"""Prefix cache: full pages found again by what is in them.

Each full page has a digest over (parent digest, its token ids); the chain starts at a root that hashes the cache
salt, so a digest names the whole prefix up to and including its page, for one salt. Digests are 128-bit BLAKE2b:
stable across processes, and nobody can craft two prefixes with the same one. Pages enter when a step has filled them,
stay known while sequences use them, and become idle when the last reference goes; idle pages are evicted least
recently used first. A sequence's pages are released last page first, so a prefix outlives what was built on it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from struct import Struct

DIGEST_BYTES = 16
"""Length of a page's digest."""


class PageHasher:
    """Computes page digests.

    Args:
        page_size: Tokens a page holds.
    """

    __slots__ = ("_pack", "page_size")

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self._pack = Struct(f"<{page_size}q").pack

    def root(self, salt: str) -> bytes:
        """The parent digest of a first page; different for each salt."""
        return blake2b(
            salt.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES, person=b"jaxserve-salt"
        ).digest()

    def extend(self, chain: list[bytes], root: bytes, token_ids: Sequence[int], num_pages: int) -> None:
        """Appends digests to a chain until it covers the first `num_pages` pages of `token_ids`."""
        size = self.page_size
        parent = chain[-1] if chain else root
        for index in range(len(chain), num_pages):
            tokens = self._pack(*token_ids[index * size : (index + 1) * size])
            parent = blake2b(parent + tokens, digest_size=DIGEST_BYTES).digest()
            chain.append(parent)


class PrefixCache:
    """Which digest stands in which page, and which of these pages are idle.

    Every change of the set of known pages goes through `store`, `evict_one` and `clear`.
    """

    __slots__ = ("_digest_of", "_idle", "_page_of")

    def __init__(self) -> None:
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_idle(self) -> int:
        """Known pages that nobody refers to; they can be evicted."""
        return len(self._idle)

    @property
    def num_known(self) -> int:
        """All pages that can be found."""
        return len(self._page_of)

    def find(self, chain: Sequence[bytes], max_pages: int) -> list[int]:
        """Pages of the longest known prefix of a chain, at most `max_pages`."""
        pages: list[int] = []
        for digest in chain[:max_pages]:
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def knows(self, page: int) -> bool:
        """Whether the page can be found, idle or not; such a page must not be written."""
        return page in self._digest_of

    def is_idle(self, page: int) -> bool:
        """Whether the page is known and nobody refers to it."""
        return page in self._idle

    def store(self, digest: bytes, page: int) -> None:
        """Makes a page in use known; if the same content is known in another page, that one stays."""
        if digest not in self._page_of and page not in self._digest_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest

    def retire(self, page: int) -> None:
        """A known page lost its last reference: it becomes the most recently used idle page."""
        self._idle[page] = None

    def revive(self, page: int) -> None:
        """An idle page gets a reference."""
        del self._idle[page]

    def evict_one(self) -> int:
        """Forgets the least recently used idle page and returns it."""
        page, _ = self._idle.popitem(last=False)
        del self._page_of[self._digest_of.pop(page)]
        return page

    def clear(self) -> list[int]:
        """Forgets everything; returns the pages that were idle and are free now."""
        idle = list(self._idle)
        self._idle.clear()
        self._page_of.clear()
        self._digest_of.clear()
        return idle

    def check_integrity(self) -> None:
        """Raises AssertionError if the two directions of the index disagree."""
        assert len(self._page_of) == len(self._digest_of)
        for digest, page in self._page_of.items():
            assert self._digest_of[page] == digest, f"page {page} is known under two digests"
        for page in self._idle:
            assert page in self._digest_of, f"idle page {page} is unknown"
