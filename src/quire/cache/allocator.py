"""Which pages of a layer group are free, and how often each of the others is referenced.

Ints only; knows nothing of sequences or of what a page holds.
"""

from collections.abc import Iterable

from quire.errors import CacheError, CacheFull, CacheInvariantError

__all__ = ["PageAllocator"]


class PageAllocator:
    """A free list and reference counts over page ids 0 to ``num_pages - 1``.

    Conservation: every page is either free, with no reference, or held, with at least one.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages

    @property
    def num_free(self) -> int:
        """Pages that nobody references."""
        return len(self._free)

    def references(self, page: int) -> int:
        """How many holders ``page`` has."""
        return self._references[page]

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` free pages, one reference each; CacheFull (nothing taken) if too few."""
        if count > len(self._free):
            raise CacheFull(f"{count} pages wanted, {len(self._free)} of {self.num_pages} are free")
        pages = self._free[len(self._free) - count :][::-1]
        del self._free[len(self._free) - count :]
        for page in pages:
            self._references[page] = 1
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """Add a reference to each page; all must be held already."""
        for page in pages:
            if self._references[page] < 1:
                raise CacheError(f"page {page} is free and cannot be shared")
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drop a reference to each page; those without any are free again.

        They are the next to be taken, in the order given: a run of pages stays a run, which reads
        faster than scattered pages.
        """
        freed: list[int] = []
        try:
            for page in pages:
                if self._references[page] < 1:
                    raise CacheError(f"page {page} is already free")
                self._references[page] -= 1
                if self._references[page] == 0:
                    freed.append(page)
        finally:
            self._free.extend(reversed(freed))

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
        if sorted(self._free) != [p for p, n in enumerate(expected) if n == 0]:
            raise CacheInvariantError(
                f"the free list ({len(self._free)} pages) is not the set of pages without a "
                f"reference ({expected.count(0)})"
            )
