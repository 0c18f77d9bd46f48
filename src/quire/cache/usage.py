"""What a cache, or one sequence in it, takes in bytes."""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from quire.cache.allocator import PageAllocator
from quire.cache.sequence import SequenceState
from quire.layout import Area, CacheLayout

__all__ = ["CacheUsage", "count_bytes", "filled_pages"]


@dataclass(frozen=True)
class CacheUsage:
    """Bytes of keys and values. Pages shared by forks count once in the total.

    pool_bytes       all pages that exist, free ones included
    allocated_bytes  pages of the sequences; those of an open reservation are not yet theirs
    used_bytes       slots of those pages that hold a token
    waste_bytes      ``allocated_bytes - used_bytes``: the empty slots of unfinished pages
    tokens           tokens of the sequences, each sequence counted on its own
    bytes_per_token  of one token in all layers, before any window gives pages back; a whole number
                     but where tokens of a page share scales; in packed pages where pages are
    cached_bytes     pages of no sequence that are kept for prompts that begin as theirs did; they
                     are given up when memory is wanted; 0 in the account of one sequence
    """

    pool_bytes: int
    allocated_bytes: int
    used_bytes: int
    tokens: int
    bytes_per_token: float
    cached_bytes: int = 0

    @property
    def waste_bytes(self) -> int:
        """Bytes of allocated slots that hold no token."""
        return self.allocated_bytes - self.used_bytes


def filled_pages(
    layout: CacheLayout, states: Iterable[SequenceState], group: int, allocator: PageAllocator
) -> list[tuple[int, int]]:
    """(area, tokens in it) for each page of sequences in a group, each page once."""
    size, filled = layout.page_size, dict[int, int]()
    for state in states:
        table = state.tables[group]
        for number, page in enumerate(table.pages, table.first_page):
            tokens = min(size, state.length - number * size)
            filled[page] = max(tokens, filled.get(page, 0))
    first = layout.areas.index(Area(group))
    return [(first + allocator.is_open(page), tokens) for page, tokens in filled.items()]


def count_bytes(
    layout: CacheLayout,
    num_pages: Sequence[int],
    filled: Sequence[tuple[int, int]],
    cached: Sequence[int],
    tokens: int,
) -> CacheUsage:
    """The account of a cache, or of one sequence.

    num_pages  of each area
    filled     (area, tokens in it) of each page that sequences hold
    cached     pages of each area that are kept and not held; empty for one sequence
    """
    sizes = layout.area_bytes
    slots = [0] * len(sizes)
    for area, count in filled:
        slots[area] += count
    return CacheUsage(
        pool_bytes=sum(map(operator.mul, num_pages, sizes)),
        allocated_bytes=sum(sizes[area] for area, _ in filled),
        used_bytes=sum(
            held * size // layout.page_size for held, size in zip(slots, sizes, strict=True)
        ),
        tokens=tokens,
        bytes_per_token=sum(layout.token_bytes(g) for g in range(len(layout.groups))),
        cached_bytes=sum(map(operator.mul, cached, sizes)),
    )
