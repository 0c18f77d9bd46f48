"""Which pages of a layer group are free, held or cached, and how often each held one is referenced.

Ints only; knows nothing of sequences or of what a page holds.
"""

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable

from quire.errors import CacheError, CacheFull, CacheInvariantError

__all__ = ["PageAllocator"]


class PageAllocator:
    """A free list, reference counts and a queue of cached pages over ids 0 to ``num_pages - 1``.

    Conservation: every page is held (referenced at least once), cached (kept, and referenced by
    nobody) or free. Cached pages are given up when free ones are not enough: least recently
    released first, and of those released together the last first, so that a prefix loses its tail
    before its head. ``on_evict`` is told of each before it is taken.

    generations   of each page a count that grows before anything is written to it: who remembers
                  something of a page's numbers remembers its generation, too
    """

    def __init__(self, num_pages: int, on_evict: Callable[[int], None] | None = None) -> None:
        self.num_pages = num_pages
        self._on_evict = on_evict
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages
        self._kept = bytearray(num_pages)
        self._cached: OrderedDict[int, None] = OrderedDict()  # the first is the next to go
        self.generations = array("q", bytes(8 * num_pages))

    @property
    def num_free(self) -> int:
        """Pages that nobody references and that are not kept."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Kept pages that nobody references."""
        return len(self._cached)

    @property
    def available(self) -> int:
        """Pages that can be allocated: free and cached ones."""
        return len(self._free) + len(self._cached)

    def references(self, page: int) -> int:
        """How many holders ``page`` has."""
        return self._references[page]

    def is_kept(self, page: int) -> bool:
        """True if ``page`` stays when its last holder leaves."""
        return bool(self._kept[page])

    def is_private(self, page: int) -> bool:
        """True if ``page`` has one holder and is not kept: nobody else reads it."""
        return self._references[page] == 1 and not self._kept[page]

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` pages, one reference each; CacheFull (nothing taken) if too few."""
        if count > self.available:
            raise CacheFull(
                f"{count} pages wanted, {self.available} of {self.num_pages} are free or cached"
            )
        while count > len(self._free):
            self._evict()
        pages = self._free[len(self._free) - count :][::-1]
        del self._free[len(self._free) - count :]
        for page in pages:
            self._references[page] = 1
            self.generations[page] += 1
        return pages

    def rewrite(self, page: int) -> None:
        """A held page is about to be written to."""
        self.generations[page] += 1

    def retain(self, pages: Iterable[int]) -> None:
        """Add a reference to each page; all must be held or cached."""
        for page in pages:
            if self._references[page] < 1:
                if not self._kept[page]:
                    raise CacheError(f"page {page} is free and cannot be shared")
                del self._cached[page]
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drop a reference to each page; those without any are cached if kept, else free.

        Free ones are the next to be taken, in the order given: a run of pages stays a run, which
        reads faster than scattered pages.
        """
        unused: list[int] = []
        try:
            for page in pages:
                if self._references[page] < 1:
                    raise CacheError(f"page {page} is already free")
                self._references[page] -= 1
                if self._references[page] == 0:
                    unused.append(page)
        finally:
            for page in reversed(unused):
                if self._kept[page]:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def keep(self, page: int) -> None:
        """Let a held page stay, cached, when its last holder leaves."""
        if self._references[page] < 1:
            raise CacheError(f"page {page} is not held and cannot be kept")
        self._kept[page] = 1

    def forget(self, page: int) -> None:
        """Keep ``page`` no longer; a cached one is free at once."""
        if self._kept[page]:
            self._kept[page] = 0
            if self._references[page] == 0:
                del self._cached[page]
                self._free.append(page)

    def evict_all(self) -> None:
        """Give up every cached page."""
        while self._cached:
            self._evict()

    def check(self, held: Iterable[int]) -> None:
        """Compare with ``held``, every reference listed once; CacheInvariantError on a mismatch."""
        expected = [0] * self.num_pages
        for page in held:
            if not 0 <= page < self.num_pages:
                raise CacheInvariantError(
                    f"a table holds page {page}; pages are 0 to {self.num_pages - 1}"
                )
            expected[page] += 1
        if expected != self._references:
            wrong = [p for p, n in enumerate(expected) if n != self._references[p]]
            raise CacheInvariantError(
                f"reference counts differ from what tables hold, first at page {wrong[0]}: "
                f"counted {self._references[wrong[0]]}, held {expected[wrong[0]]}"
            )
        unused = [p for p, n in enumerate(expected) if n == 0]
        if sorted(self._free) != [p for p in unused if not self._kept[p]]:
            raise CacheInvariantError(
                f"the free list ({len(self._free)} pages) is not the set of pages without a "
                f"reference ({len(unused)}) that are not kept"
            )
        if sorted(self._cached) != [p for p in unused if self._kept[p]]:
            raise CacheInvariantError(
                f"the queue of cached pages ({len(self._cached)}) is not the set of kept pages "
                "without a reference"
            )

    def _evict(self) -> None:
        """Give up the cached page that is next to go; it is free then."""
        page = next(iter(self._cached))
        if self._on_evict is not None:
            self._on_evict(page)
        self.forget(page)
