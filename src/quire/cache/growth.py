"""The pages that sequences take to grow: how many, which, and what becomes of those not needed.

In a group that packs its pages new tokens go into open ones; a page that becomes whole, but for the
first of a sequence, takes a packed one as well, which is its place in the table from then on.
"""

import operator
from collections.abc import Sequence

from quire.cache.allocator import OPEN, PageAllocator
from quire.cache.prefix import PrefixIndex
from quire.cache.prefix_tree import PrefixMatch
from quire.cache.sequence import Growth, Growths, SequenceState, extended, sealed
from quire.errors import CacheFull
from quire.layout import CacheLayout, packed_pages, pages_for
from quire.pages import PagePool

__all__ = ["Grower", "Need"]

# Of one group: pages behind the last, whether the last is copied first, pages that are packed.
Need = tuple[int, bool, int]


class Grower:
    """Takes pages for sequences; works on the allocators, the pools and the index of one cache."""

    def __init__(
        self,
        layout: CacheLayout,
        allocators: Sequence[PageAllocator],
        pools: Sequence[PagePool],
        index: PrefixIndex | None,
    ) -> None:
        self._layout, self._size = layout, layout.page_size
        self._allocators, self._pools, self._index = allocators, pools, index
        self._packs = layout.packs
        self._room = layout.page_size - any(layout.packs)  # in a page, before another is taken
        self._nothing = (0,) * len(layout.areas)

    def needs(self, state: SequenceState, count: int) -> list[Need]:
        """What ``count`` more tokens take in each group; empty if they take nothing in any."""
        size = self._size
        offset = state.length % size
        copies = [
            count > 0 and offset > 0 and self._must_copy(group, table.pages[-1], offset)
            for group, table in enumerate(state.tables)
        ]
        if offset and offset + count <= self._room and True not in copies:
            return []
        end = state.length + count
        end_page = pages_for(end, size)
        packed = packed_pages(end, size) - packed_pages(state.length, size)
        needs = [
            (max(0, end_page - table.end_page), copy, packed if packs else 0)
            for table, copy, packs in zip(state.tables, copies, self._packs, strict=True)
        ]
        return needs if any(map(any, needs)) else []

    def cost(self, state: SequenceState, count: int) -> tuple[int, ...]:
        """Pages of each area that ``count`` more tokens take."""
        needs = self.needs(state, count)
        if not needs:
            return self._nothing
        return tuple([n for group, need in enumerate(needs) for n in self._by_area(group, need)])

    def cost_of_new(self, count: int) -> tuple[int, ...]:
        """Pages of each area that ``count`` tokens take of a sequence that begins with them."""
        groups = range(len(self._layout.groups))
        return tuple(n for g in groups for n in self._layout.pages_between(g, 0, count))

    def cost_of_whole(self, match: PrefixMatch, pages: int) -> tuple[int, ...]:
        """Pages of each area that whole ones behind those of ``match`` take, and those of the match
        that no sequence holds.
        """
        counts: list[int] = []
        for group, (allocator, held) in enumerate(zip(self._allocators, match.pages, strict=True)):
            new = self.whole(group, match.tokens, pages)
            taken = allocator.count(page for page in held if allocator.references(page) == 0)
            counts += map(operator.add, new, taken)
        return tuple(counts)

    def growth(self, state: SequenceState | None, count: int) -> tuple[int, ...]:
        """As :meth:`cost`, growing token by token so that windows give pages back on the way.

        None stands for a sequence that is yet to be created. Pages that others hold, too, do not
        count as held.
        """
        layout, groups = self._layout, range(len(self._layout.groups))
        if state is None:
            held, own, cost = 0, self._nothing, self.cost_of_new(count)
        else:
            held, own, cost = state.length, self.freed_by_release(state), self.cost(state, count)
        peaks = (n for g in groups for n in layout.most_pages(g, held + count, 1))
        most = (max(0, peak - holds) for peak, holds in zip(peaks, own, strict=True))
        return tuple(map(min, most, cost))

    def freed_by_release(self, state: SequenceState) -> tuple[int, ...]:
        """Pages of each area that only this sequence holds."""
        return tuple(
            count
            for allocator, table in zip(self._allocators, state.tables, strict=True)
            for count in allocator.count(p for p in table.pages if allocator.references(p) == 1)
        )

    def take(
        self,
        chunks: Sequence[tuple[int, int]],
        states: Sequence[SequenceState],
        needs: Sequence[Sequence[Need]],
    ) -> list[Growths]:
        """Allocate all that is needed; CacheFull, with nothing changed, if pages run out."""
        wanted: list[tuple[int, int, int]] = []
        for group in range(len(self._allocators)):
            counts = [self._by_area(group, need[group]) for need in needs if need]
            sums = enumerate(map(sum, zip(*counts, strict=True)))
            wanted += [(group, area, count) for area, count in sums]
        for group, area, count in wanted:
            self._require(chunks, group, area, count)
        for group, area, count in wanted:  # for all at once: what goes is told of in one go
            self._allocators[group].make_room(count, area)
        return [
            [self._grow(group, state.length, *each) for group, each in enumerate(need)]
            if need
            else ()
            for state, need in zip(states, needs, strict=True)
        ]

    def take_whole(self, sequence: int, state: SequenceState, count: int) -> list[Growth]:
        """Allocate ``count`` whole pages behind those of ``state``, in the form that they keep.

        CacheFull, with nothing changed, if pages run out.
        """
        end = state.length + count * self._size
        for group in range(len(self._allocators)):
            for area, wanted in enumerate(self.whole(group, state.length, count)):
                self._require([(sequence, end - state.length)], group, area, wanted)
        growths = []
        for group, allocator in enumerate(self._allocators):
            plain, *opened = self.whole(group, state.length, count)
            first = allocator.allocate(opened[0], OPEN) if opened else []
            growths.append(Growth([*first, *allocator.allocate(plain)]))
        return growths

    def whole(self, group: int, length: int, count: int) -> tuple[int, ...]:
        """Pages of each area of a group that ``count`` whole ones behind ``length`` tokens are.

        ``length`` is a multiple of the page size. Only a first page stays open.
        """
        if not self._packs[group]:
            return (count,)
        opened = int(length == 0 and count > 0)
        return count - opened, opened

    def copy_shared(self, states: Sequence[SequenceState], growth: Sequence[Growths]) -> None:
        """Fill the pages that are private copies of unfinished ones."""
        for index, group in enumerate(self._layout.groups):
            source, target = [], []
            for state, growths in zip(states, growth, strict=True):
                copy_to = growths[index].copy_to if growths else None
                if copy_to is not None:
                    source.append(state.tables[index].pages[-1])
                    target.append(copy_to)
            for layer in group.layers if source else ():
                self._pools[layer].copy_pages(source, target)

    def trim(self, state: SequenceState, growths: Growths, count: int) -> None:
        """Give back what was reserved for more than ``count`` tokens."""
        end = state.length + count
        for group, growth in enumerate(growths):
            allocator = self._allocators[group]
            needed = max(0, pages_for(end, self._size) - state.tables[group].end_page)
            allocator.release(growth.new_pages[needed:])
            del growth.new_pages[needed:]
            whole = max(0, end // self._size - growth.first_packed)
            allocator.release(growth.packed[whole:])
            del growth.packed[whole:]
            if count == 0 and growth.copy_to is not None:
                allocator.release([growth.copy_to])
                growth.copy_to = None

    def give_back(self, growth: Sequence[Growths]) -> None:
        """Release all that was taken."""
        for growths in growth:
            for group, taken in enumerate(growths):
                self._allocators[group].release(taken.pages)

    def settle(self, state: SequenceState, growths: Growths) -> None:
        """Put what was taken into the tables, and release the pages that it takes the place of."""
        for group, growth in enumerate(growths):
            table, allocator = state.tables[group], self._allocators[group]
            if growth.copy_to is not None:
                allocator.release([table.pages[-1]])
            if growth.copy_to is not None or growth.new_pages:
                table = state.tables[group] = extended(table, growth)
            if growth.packed:
                state.tables[group] = sealed(table, growth)
                start = growth.first_packed - table.first_page
                allocator.release(table.pages[start : start + len(growth.packed)])

    # -- inside ------------------------------------------------------------------------------

    def _must_copy(self, group: int, page: int, offset: int) -> bool:
        """True if others need ``page`` as it is from token ``offset`` on."""
        allocator = self._allocators[group]
        if allocator.is_private(page):
            return False
        return allocator.references(page) > 1 or (
            self._index is not None and self._index.is_read(group, page, offset)
        )

    def _by_area(self, group: int, need: Need) -> tuple[int, ...]:
        adds, copy, packed = need
        return (packed, adds + copy) if self._packs[group] else (adds + copy,)

    def _require(
        self, chunks: Sequence[tuple[int, int]], group: int, area: int, wanted: int
    ) -> None:
        place = self._allocators[group].areas[area]
        if wanted > place.available:
            tokens = sum(count for _, count in chunks)
            kind = "open pages" if area == OPEN else "pages"
            raise CacheFull(
                f"{tokens} tokens of {len(chunks)} sequences need {wanted} {kind} of "
                f"{self._size} tokens ({self._layout.groups[group].name()}), but "
                f"{place.available} of {place.num_pages} are free; raise kv_memory or "
                "num_pages, or release a sequence"
            )

    def _grow(self, group: int, length: int, adds: int, copy: bool, packed: int) -> Growth:
        allocator = self._allocators[group]
        area = OPEN if self._packs[group] else 0
        copy_to = allocator.allocate(1, area)[0] if copy else None
        new_pages = allocator.allocate(adds, area)
        if not packed:
            return Growth(new_pages, copy_to)
        first = max(1, length // self._size)
        return Growth(new_pages, copy_to, allocator.allocate(packed), first)
