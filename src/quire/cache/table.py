"""One sequence's pages in one layer group, in order of place."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from quire.batch import NO_OPEN_PAGES, GroupBatch, OpenPages

__all__ = ["PageTable", "flatten", "open_pages"]

_IntArray = npt.NDArray[np.int64]

FEW_TOKENS = 16  # for so many a loop is faster than a dozen calls of NumPy


@dataclass
class PageTable:
    """Page ids of a sequence; ``pages[0]`` is page number ``first_page`` counted from place 0.

    Pages in front of ``first_page`` left the sliding window and were given back.
    """

    pages: "array[int]" = field(default_factory=lambda: array("q"))
    first_page: int = 0

    @property
    def end_page(self) -> int:
        """The page number one past the last page."""
        return self.first_page + len(self.pages)

    def page(self, number: int, given_back: int = -1) -> int:
        """The id of page number ``number``; ``given_back`` if a window gave it back."""
        return self.pages[number - self.first_page] if number >= self.first_page else given_back

    def copy(self) -> "PageTable":
        """An independent table of the same pages."""
        return PageTable(self.pages[:], self.first_page)

    def drop_front(self, first_page: int) -> list[int]:
        """Forget the pages before page number ``first_page``; returns their ids."""
        count = min(max(0, first_page - self.first_page), len(self.pages))
        dropped = list(self.pages[:count])
        del self.pages[:count]
        self.first_page += count
        return dropped

    def drop_back(self, end_page: int) -> list[int]:
        """Forget the pages from page number ``end_page`` on; returns their ids."""
        keep = max(0, end_page - self.first_page)
        dropped = list(self.pages[keep:])
        del self.pages[keep:]
        return dropped


def flatten(
    tables: Sequence[PageTable],
    ends: Sequence[int],
    tokens: tuple[_IntArray, _IntArray],
    geometry: tuple[int, int | None],
    through: "tuple[Sequence[PageTable], OpenPages] | None" = None,
) -> GroupBatch:
    """The tables of a batch's sequences in CSR form.

    ends      [S]: length of each sequence, new tokens included
    tokens    (place, index of its sequence) of each new token, int64 [T] each
    geometry  (page_size, window)
    through   where pages are packed: the tables with the open pages that new tokens go into, and
              those pages
    """
    page_size, window = geometry
    held = [len(table.pages) for table in tables]
    first = [table.first_page for table in tables]
    indptr = np.array([0, *accumulate(held)], dtype=np.int64)
    indices = _joined(tables)
    last = [
        end - (start + count - 1) * page_size if count else 0
        for end, start, count in zip(ends, first, held, strict=True)
    ]
    if through is None:
        slots, opened = _slots(tables, tokens, page_size, indptr, indices), NO_OPEN_PAGES
    else:
        slots = _slots(through[0], tokens, page_size, indptr, _joined(through[0]))
        opened = through[1]
    return GroupBatch(
        page_size,
        window,
        slots,
        indptr,
        indices,
        np.array(last, dtype=np.int64),
        np.array(first, dtype=np.int64),
        opened,
    )


def open_pages(
    tables: Sequence[PageTable],
    spans: Sequence[tuple[int, int]],
    seals: Sequence[tuple[int, int]],
    page_size: int,
) -> OpenPages:
    """The open pages of a step.

    tables  with the open pages that new tokens go into
    spans   [S]: places ``[start, end)`` of each sequence's new tokens
    seals   (open id, packed id) of each page that becomes whole
    """
    ids: list[int] = []
    indptr, first = [0], []
    for table, (start, end) in zip(tables, spans, strict=True):
        number = start // page_size
        if end > start:
            held = slice(number - table.first_page, (end - 1) // page_size + 1 - table.first_page)
            ids += table.pages[held]
        indptr.append(len(ids))
        first.append(number)
    sources, targets = [source for source, _ in seals], [target for _, target in seals]
    return OpenPages(*(np.array(a, np.int64) for a in (indptr, ids, first, sources, targets)))


def _joined(tables: Sequence[PageTable]) -> _IntArray:
    joined = bytearray().join([table.pages for table in tables])  # cheaper than many small arrays
    return np.frombuffer(joined, np.int64) if joined else np.empty(0, np.int64)


def _slots(
    tables: Sequence[PageTable],
    tokens: tuple[_IntArray, _IntArray],
    page_size: int,
    indptr: _IntArray,
    indices: _IntArray,
) -> _IntArray:
    place, owner = tokens
    if len(place) <= FEW_TOKENS:
        slots = []
        for at, who in zip(place.tolist(), owner.tolist(), strict=True):
            page, offset = divmod(at, page_size)
            table = tables[who]
            slots.append(table.pages[page - table.first_page] * page_size + offset)
        return np.array(slots, dtype=np.int64)
    first = np.array([table.first_page for table in tables], dtype=np.int64)
    page, offset = np.divmod(place, page_size)
    return np.asarray(indices[indptr[owner] + page - first[owner]] * page_size + offset)
