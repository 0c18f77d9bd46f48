"""Which pages of a layer group are free, held or cached, and how often each held one is referenced.

Ints only; knows nothing of sequences or of what a page holds.
"""

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

from quire.errors import CacheError, CacheFull, CacheInvariantError

__all__ = ["OPEN", "PageAllocator", "PageArea"]


OPEN = 1  # the area of open pages


class PageArea:
    """Ids ``first`` to ``first + num_pages - 1``: which are free, and a queue of cached ones."""

    def __init__(self, first: int, num_pages: int) -> None:
        self.num_pages = num_pages
        self.free = list(range(first + num_pages - 1, first - 1, -1))
        self.cached: OrderedDict[int, None] = OrderedDict()  # the first is the next to go

    @property
    def available(self) -> int:
        """Pages that can be allocated: free and cached ones."""
        return len(self.free) + len(self.cached)


class PageAllocator:
    """Free pages, reference counts and queues of cached pages.

    num_pages   ids 0 to ``num_pages - 1``
    open_pages  ids behind those, an area of their own (:data:`OPEN`): a page of one kind never
                takes the place of the other

    Conservation: every page is held (referenced at least once), cached (kept, and referenced by
    nobody) or free. Cached pages are given up when free ones are not enough: least recently
    released first, and of those released together the last first, so that a prefix loses its tail
    before its head. ``on_evict`` is told before they are taken, of as many at a time as can be.

    generations   of each page a count that grows before anything is written to it: who remembers
                  something of a page's numbers remembers its generation, too
    """

    def __init__(
        self,
        num_pages: int,
        on_evict: Callable[[Sequence[int]], None] | None = None,
        open_pages: int = 0,
    ) -> None:
        self.first_open, self.num_pages = num_pages, num_pages + open_pages
        self.areas = (
            PageArea(0, num_pages),
            *([PageArea(num_pages, open_pages)] * (open_pages > 0)),
        )
        self._on_evict = on_evict
        self._references = [0] * self.num_pages
        self._kept = bytearray(self.num_pages)
        self.generations = array("q", bytes(8 * self.num_pages))

    @property
    def num_free(self) -> int:
        """Pages that nobody references and that are not kept."""
        return sum(len(area.free) for area in self.areas)

    @property
    def num_cached(self) -> int:
        """Kept pages that nobody references."""
        return sum(len(area.cached) for area in self.areas)

    @property
    def available(self) -> int:
        """Pages that can be allocated, but for open ones: free and cached ones."""
        return self.areas[0].available

    def is_open(self, page: int) -> bool:
        """True for the id of an open page."""
        return page >= self.first_open

    def count(self, pages: Iterable[int]) -> tuple[int, ...]:
        """How many of ``pages`` are in each area."""
        ids = list(pages)
        if len(self.areas) == 1:
            return (len(ids),)
        opened = sum(page >= self.first_open for page in ids)
        return len(ids) - opened, opened

    def references(self, page: int) -> int:
        """How many holders ``page`` has."""
        return self._references[page]

    def is_kept(self, page: int) -> bool:
        """True if ``page`` stays when its last holder leaves."""
        return bool(self._kept[page])

    def is_private(self, page: int) -> bool:
        """True if ``page`` has one holder and is not kept: nobody else reads it."""
        return self._references[page] == 1 and not self._kept[page]

    def allocate(self, count: int, area: int = 0) -> list[int]:
        """Take ``count`` pages of an area, one reference each; CacheFull if too few."""
        place = self.areas[area]
        if count > place.available:
            raise CacheFull(
                f"{count} pages wanted, {place.available} of {place.num_pages} are free or cached"
            )
        self.make_room(count, area)
        free = place.free
        pages = free[len(free) - count :][::-1]
        del free[len(free) - count :]
        for page in pages:
            self._references[page] = 1
            self.generations[page] += 1
        return pages

    def make_room(self, count: int, area: int = 0) -> None:
        """Give up cached pages of an area until ``count`` are free, or none is left."""
        place = self.areas[area]
        if count > len(place.free):
            self._evict(place, count - len(place.free))

    def rewrite(self, page: int) -> None:
        """A held page is about to be written to."""
        self.generations[page] += 1

    def retain(self, pages: Iterable[int]) -> None:
        """Add a reference to each page; all must be held or cached."""
        for page in pages:
            if self._references[page] < 1:
                if not self._kept[page]:
                    raise CacheError(f"page {page} is free and cannot be shared")
                del self._area(page).cached[page]
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
                area = self._area(page)
                if self._kept[page]:
                    area.cached[page] = None
                else:
                    area.free.append(page)

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
                area = self._area(page)
                del area.cached[page]
                area.free.append(page)

    def evict_all(self) -> None:
        """Give up every cached page."""
        for area in self.areas:
            self._evict(area, len(area.cached))

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
        free = sorted(page for area in self.areas for page in area.free)
        cached = sorted(page for area in self.areas for page in area.cached)
        if any(self._area(page) is not area for area in self.areas for page in area.free):
            raise CacheInvariantError("a free page is in the list of another area")
        if free != [p for p in unused if not self._kept[p]]:
            raise CacheInvariantError(
                f"the free list ({len(free)} pages) is not the set of pages without a "
                f"reference ({len(unused)}) that are not kept"
            )
        if cached != [p for p in unused if self._kept[p]]:
            raise CacheInvariantError(
                f"the queue of cached pages ({len(cached)}) is not the set of kept pages "
                "without a reference"
            )

    def _area(self, page: int) -> PageArea:
        return self.areas[page >= self.first_open]

    def _evict(self, area: PageArea, count: int) -> None:
        """Give up the ``count`` cached pages of an area that are next to go; they are free then."""
        pages = list(islice(area.cached, count))
        if self._on_evict is not None:
            self._on_evict(pages)
        for page in pages:
            self.forget(page)
