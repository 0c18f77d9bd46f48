"""Filling pages with what was stored of a whole sequence."""

from array import array
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from quire.cache.allocator import PageAllocator
from quire.cache.raw import RawPages
from quire.cache.table import PageTable
from quire.errors import CacheFull
from quire.layout import CacheLayout

__all__ = ["fill_tables"]

Data = Sequence[npt.NDArray[np.uint8]]


def fill_tables(
    layout: CacheLayout,
    allocators: Sequence[PageAllocator],
    raw: RawPages,
    tokens: int,
    data: Data,
) -> list[PageTable]:
    """A table in each group for a sequence of ``tokens``, on new pages that hold ``data``.

    ``data[a]``: uint8 ``[pages, layout.area_bytes[a]]``, what ``raw.read`` gave of the pages that a
    next token would see, of each area (:meth:`CacheLayout.held_pages`). Raises CacheFull, with
    nothing changed, if they do not fit.
    """
    _require_room(layout, allocators, tokens, data)
    tables: list[PageTable] = []
    rest = list(data)
    try:
        for group, allocator in enumerate(allocators):
            numbers = layout.held_pages(group, tokens)
            first = layout.groups[group].first_needed(tokens)
            found: dict[int, int] = {}
            tables.append(PageTable(first_page=first // layout.page_size))
            for kind, wanted in enumerate(numbers):
                ids = allocator.allocate(len(wanted), kind)
                found |= zip(wanted, ids, strict=True)
                tables[-1].pages = array("q", [found[n] for n in sorted(found)])
                raw.write(group, ids, rest.pop(0))
    except BaseException:
        for allocator, table in zip(allocators, tables, strict=False):
            allocator.release(table.pages)
        raise
    return tables


def _require_room(
    layout: CacheLayout, allocators: Sequence[PageAllocator], tokens: int, data: Data
) -> None:
    places = [place for allocator in allocators for place in allocator.areas]
    for area, place, pages in zip(layout.areas, places, data, strict=True):
        if len(pages) > place.available:
            raise CacheFull(
                f"{tokens} saved tokens need {len(pages)} "
                f"{'open ' if area.is_open else ''}pages of {layout.page_size} tokens "
                f"({layout.groups[area.group].name()}), but {place.available} of "
                f"{place.num_pages} are free; raise kv_memory"
            )
