"""One sequence's pages in one layer group, in order of position."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from quire.batch import GroupBatch

__all__ = ["PageTable", "flatten"]

_IntArray = npt.NDArray[np.int64]


@dataclass
class PageTable:
    """Page ids of a sequence; ``pages[0]`` is page number ``first_page`` counted from position 0.

    Pages in front of ``first_page`` left the sliding window and were given back.
    """

    pages: "array[int]" = field(default_factory=lambda: array("q"))
    first_page: int = 0

    @property
    def end_page(self) -> int:
        """The page number one past the last page."""
        return self.first_page + len(self.pages)

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
    ends: _IntArray,
    tokens: tuple[_IntArray, _IntArray],
    geometry: tuple[int, int | None],
) -> GroupBatch:
    """The tables of a batch's sequences in CSR form.

    ends      int64 [S]: length of each sequence, new tokens included
    tokens    (position, index of its sequence) of each new token, int64 [T] each
    geometry  (page_size, window)
    """
    page_size, window = geometry
    indptr = np.cumsum([0, *(len(table.pages) for table in tables)], dtype=np.int64)
    rows = [np.frombuffer(table.pages, np.int64) for table in tables if table.pages]
    indices = np.concatenate(rows) if rows else np.empty(0, np.int64)
    first = np.array([table.first_page for table in tables], dtype=np.int64)
    held = np.diff(indptr)
    last = np.where(held > 0, ends - (first + held - 1) * page_size, 0)
    position, owner = tokens
    page, offset = np.divmod(position, page_size)
    slots = indices[indptr[owner] + page - first[owner]] * page_size + offset
    return GroupBatch(page_size, window, slots, indptr, indices, last, first)
