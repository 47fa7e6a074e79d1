"""Who owns which KV page. Pages are counted, never touched: this file knows no tensor."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class PageAllocator:
    """Every page is in exactly one state: free, owned (by one request or several), or cached (no owner, kept by hash).

    A full page is published under its hash and then found by `match`. When free pages run out, the least recently
    released cached page goes first. `added` and `evicted` collect the hashes that came and went until `take_changes`.
    `epoch` counts how often all of them were forgotten.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._owners = [0] * total
        self._hash_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # pages without owner, oldest first
        self._added: list[bytes] = []
        self._evicted: list[bytes] = []
        self.epoch = 0

    @property
    def available(self) -> int:
        return len(self._free) + len(self._cached)

    @property
    def owned(self) -> int:
        return self.total - self.available

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """The pages of the longest known prefix of `hashes`; the caller owns them from now on."""
        pages = []
        for page_hash in hashes:
            page = self._page_of.get(page_hash)
            if page is None:
                break
            if self._owners[page] == 0:
                del self._cached[page]
            self._owners[page] += 1
            pages.append(page)
        return pages

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages with one owner each, or None (and no change) if so many are not available."""
        if count > self.available:
            return None
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._owners[page] = 1
        return pages

    def release(self, pages: Iterable[int]) -> None:
        """Give up one ownership of each. The end of a sequence goes first when pages run out: release it first."""
        for page in reversed(list(pages)):
            self._owners[page] -= 1
            if self._owners[page] == 0:
                if page in self._hash_of:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def publish(self, page: int, page_hash: bytes) -> None:
        """Make an owned, full page known. If another page already holds the same tokens, that one stays known."""
        if page_hash not in self._page_of and page not in self._hash_of:
            self._page_of[page_hash] = page
            self._hash_of[page] = page_hash
            self._added.append(page_hash)

    def forget(self) -> None:
        """No hash is known any more: cached pages are free, and owned ones will be once they are released."""
        self._evicted += self._page_of
        self._page_of.clear()
        self._hash_of.clear()
        self._free += self._cached
        self._cached.clear()
        self.epoch += 1

    def take_changes(self) -> tuple[list[bytes], list[bytes]]:
        """(added, evicted) since the last call. A hash in both came and went, or went and came: see `knows`."""
        changes = self._added, self._evicted
        self._added, self._evicted = [], []
        return changes

    def knows(self, page_hash: bytes) -> bool:
        return page_hash in self._page_of

    def _evict(self) -> int:
        page, _ = self._cached.popitem(last=False)
        page_hash = self._hash_of.pop(page)
        del self._page_of[page_hash]
        self._evicted.append(page_hash)
        return page

    def check(self, owners: Iterable[Iterable[int]]) -> None:
        """Assert that `owners` (each a request's pages) are all there is: free + cached + owned = total."""
        counts = [0] * self.total
        for pages in owners:
            for page in pages:
                counts[page] += 1
        assert counts == self._owners, "a page's owners are not the requests that name it"
        owned = {page for page, count in enumerate(counts) if count}
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free) and not (free & cached or free & owned or cached & owned)
        assert len(free) + len(cached) + len(owned) == self.total
        assert cached <= self._hash_of.keys()
        assert {h: p for p, h in self._hash_of.items()} == self._page_of
