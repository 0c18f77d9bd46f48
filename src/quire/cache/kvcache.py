"""KVCache: which pages hold which sequence. Bookkeeping in ints; numbers live in backend pools.

A step prepares with :meth:`KVCache.reserve` and finishes with :meth:`KVCache.commit`; only commit
changes a sequence. Between the two, :meth:`KVCache.rollback` leaves the cache as it was.
Not thread-safe.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from quire.batch import PagedBatch
from quire.cache.allocator import PageAllocator
from quire.cache.export import KVArrays, LayerKV, arrange, require_layout
from quire.cache.table import PageTable, flatten
from quire.cache.usage import CacheUsage
from quire.errors import CacheError, CacheFull, CacheInvariantError
from quire.layout import CacheLayout, pages_for
from quire.pages import PagePool

__all__ = ["KVCache", "Reservation"]


@dataclass
class _Sequence:
    tables: list[PageTable]
    length: int = 0
    growth: "list[_Growth] | None" = None  # of an open reservation


@dataclass
class _Growth:
    """What a reservation holds for one sequence in one group.

    ``copy_to`` is a private copy of the unfinished last page, when that page is shared.
    """

    new_pages: list[int] = field(default_factory=list)
    copy_to: int | None = None


@dataclass(eq=False)
class Reservation:
    """Pages set aside for one step. ``batch`` is what the step's kernels read."""

    chunks: tuple[tuple[int, int], ...]
    batch: PagedBatch
    _growth: list[list[_Growth]]
    _open: bool = True


def _grown(table: PageTable, growth: _Growth) -> PageTable:
    """The table as it is after the commit of ``growth``."""
    grown = table.copy()
    if growth.copy_to is not None:
        grown.pages[-1] = growth.copy_to
    grown.pages.extend(growth.new_pages)
    return grown


class KVCache:
    """Paged keys and values of many sequences.

    layout     layer groups and page shapes
    num_pages  pages of each group
    pools      one pool a layer, each with at least its group's number of pages
    """

    def __init__(
        self, layout: CacheLayout, num_pages: Sequence[int], pools: Sequence[PagePool]
    ) -> None:
        if len(num_pages) != len(layout.groups) or len(pools) != len(layout.shapes):
            raise CacheError(
                f"{len(num_pages)} page counts and {len(pools)} pools for "
                f"{len(layout.groups)} groups and {len(layout.shapes)} layers"
            )
        for layer, pool in enumerate(pools):
            wanted = num_pages[layout.group_of_layer[layer]]
            if pool.shape != layout.shapes[layer] or pool.num_pages < wanted:
                raise CacheError(
                    f"layer {layer}: a pool of {pool.num_pages} pages of {pool.shape} does not "
                    f"fit {wanted} pages of {layout.shapes[layer]}"
                )
        self.layout = layout
        self.pools = tuple(pools)
        self._allocators = tuple(PageAllocator(count) for count in num_pages)
        self._sequences: dict[int, _Sequence] = {}
        self._reservations: list[Reservation] = []
        self._next = 0

    # -- sequences ---------------------------------------------------------------------------

    def create(self) -> int:
        """Admit an empty sequence; returns its handle. Takes no pages."""
        tables = [PageTable() for _ in self.layout.groups]
        return self._add(_Sequence(tables))

    def fork(self, sequence: int) -> int:
        """A new sequence with the same tokens. Shares all pages; the first to write copies."""
        source = self._idle(sequence)
        for allocator, table in zip(self._allocators, source.tables, strict=True):
            allocator.retain(table.pages)
        return self._add(_Sequence([table.copy() for table in source.tables], source.length))

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the tokens from position ``length`` on (rollback).

        CacheError, with nothing changed, if ``length`` is negative or beyond the end, or if a
        sliding window gave back pages that a token at position ``length`` would see.
        """
        state = self._idle(sequence)
        if not 0 <= length <= state.length:
            raise CacheError(
                f"cannot truncate sequence {sequence} to {length} tokens: it has {state.length}"
            )
        shortest = self._shortest(state)
        if length < shortest:
            raise CacheError(
                f"cannot truncate sequence {sequence} to {length} tokens: pages that the next "
                "token would see fell out of a sliding window and were given back; the shortest "
                f"possible length is {shortest}; release it and compute it anew instead"
            )
        end_page = pages_for(length, self.layout.page_size)
        for allocator, table in zip(self._allocators, state.tables, strict=True):
            allocator.release(table.drop_back(max(end_page, table.first_page)))
        state.length = length

    def release(self, sequence: int) -> None:
        """Forget a sequence and drop its references; its handle is invalid from then on."""
        state = self._idle(sequence)
        for allocator, table in zip(self._allocators, state.tables, strict=True):
            allocator.release(table.pages)
        del self._sequences[sequence]

    def length(self, sequence: int) -> int:
        """Committed tokens of a sequence."""
        return self._get(sequence).length

    @property
    def sequences(self) -> tuple[int, ...]:
        """Handles of all sequences."""
        return tuple(self._sequences)

    # -- a step ------------------------------------------------------------------------------

    @property
    def free_pages(self) -> tuple[int, ...]:
        """Free pages of each group."""
        return tuple(allocator.num_free for allocator in self._allocators)

    @property
    def num_pages(self) -> tuple[int, ...]:
        """All pages of each group."""
        return tuple(allocator.num_pages for allocator in self._allocators)

    def cost(self, sequence: int | None, new_tokens: int) -> tuple[int, ...]:
        """Pages of each group that reserving ``new_tokens`` more tokens would take.

        None stands for a sequence that is yet to be created.
        """
        if sequence is None:
            return (pages_for(new_tokens, self.layout.page_size),) * len(self.layout.groups)
        state = self._get(sequence)
        return tuple(
            self._pages_to_add(state, group, new_tokens) + self._must_copy(state, group, new_tokens)
            for group in range(len(self.layout.groups))
        )

    def growth(self, sequence: int | None, new_tokens: int) -> tuple[int, ...]:
        """Free pages of each group that growing token by token takes at most.

        At most :meth:`cost`; less where a sliding window gives pages back on the way. Pages that a
        fork shares are not counted as held: they are copied, or stay with the fork.
        """
        own = (
            (0,) * len(self.layout.groups) if sequence is None else self.freed_by_release(sequence)
        )
        tokens = new_tokens + (0 if sequence is None else self.length(sequence))
        peaks = (group.most_pages(tokens, 1, self.layout.page_size) for group in self.layout.groups)
        most = (max(0, peak - held) for peak, held in zip(peaks, own, strict=True))
        return tuple(min(pair) for pair in zip(most, self.cost(sequence, new_tokens), strict=True))

    def freed_by_release(self, sequence: int) -> tuple[int, ...]:
        """Pages of each group that only this sequence holds."""
        tables = self._get(sequence).tables
        return tuple(
            sum(allocator.references(page) == 1 for page in table.pages)
            for allocator, table in zip(self._allocators, tables, strict=True)
        )

    def reserve(self, chunks: Sequence[tuple[int, int]]) -> Reservation:
        """Set pages aside for ``(sequence, new_tokens)`` pairs, all or none.

        An unfinished page that a fork shares is copied first (copy-on-write). The tokens count
        only after :meth:`commit`. Raises CacheFull, with nothing changed, when pages run out, and
        CacheError for an unknown, repeated or already reserved sequence or a negative count.
        """
        self._validate(chunks)
        self._require_free(chunks)
        growth = [
            [
                self._grow(self._get(sequence), group, count)
                for group in range(len(self._allocators))
            ]
            for sequence, count in chunks
        ]
        try:
            self._copy_shared(chunks, growth)
            made = Reservation(tuple(chunks), self._batch(chunks, growth), growth)
        except BaseException:
            self._give_back(growth)
            raise
        for (sequence, _), growths in zip(chunks, growth, strict=True):
            self._get(sequence).growth = growths
        self._reservations.append(made)
        return made

    def commit(self, reservation: Reservation) -> None:
        """Make the reserved tokens part of their sequences and give back pages behind windows."""
        self._close(reservation)
        for (sequence, count), growths in zip(reservation.chunks, reservation._growth, strict=True):
            state = self._get(sequence)
            state.length += count
            for index, (group, growth) in enumerate(zip(self.layout.groups, growths, strict=True)):
                table, allocator = state.tables[index], self._allocators[index]
                if growth.copy_to is not None:
                    allocator.release([table.pages[-1]])
                state.tables[index] = table = _grown(table, growth)
                first = group.first_needed(state.length) // self.layout.page_size
                allocator.release(table.drop_front(first))

    def rollback(self, reservation: Reservation) -> None:
        """Give the reserved pages back; every sequence is as it was before :meth:`reserve`."""
        self._close(reservation)
        self._give_back(reservation._growth)

    # -- what is held ------------------------------------------------------------------------

    def allocated_bytes(self, sequence: int) -> int:
        """Bytes of the pages a sequence references: shared and reserved ones included."""
        state = self._get(sequence)
        total = 0
        for group, table in enumerate(state.tables):
            pages = len(table.pages)
            if state.growth is not None:
                grown = state.growth[group]
                pages += len(grown.new_pages) + (grown.copy_to is not None)
            total += pages * self.layout.page_bytes(group)
        return total

    def usage(self, sequence: int | None = None) -> CacheUsage:
        """Bytes of one sequence, or of all of them with every shared page counted once."""
        states = self._sequences.values() if sequence is None else [self._get(sequence)]
        allocated = used = 0
        for group in range(len(self.layout.groups)):
            filled: dict[int, int] = {}
            for state in states:
                for page, tokens in self._filled(state, group):
                    filled[page] = max(tokens, filled.get(page, 0))
            allocated += len(filled) * self.layout.page_bytes(group)
            used += sum(filled.values()) * self.layout.token_bytes(group)
        groups = range(len(self.layout.groups))
        return CacheUsage(
            pool_bytes=sum(self.num_pages[g] * self.layout.page_bytes(g) for g in groups),
            allocated_bytes=allocated,
            used_bytes=used,
            tokens=sum(state.length for state in states),
            bytes_per_token=sum(self.layout.token_bytes(g) for g in groups),
        )

    def to_arrays(self, sequence: int, layout: str = "BHSD") -> KVArrays:
        """K and V of every layer in layout BHSD, BSHD, HBSD or ``"pages"``; see :class:`LayerKV`.

        B is 1 (the sequence), H KV heads, S stored tokens, D head_dim. The dtype is the page
        format's. Raises ConfigError for another layout.
        """
        require_layout(layout)
        state = self._get(sequence)
        groups = self.layout.group_of_layer
        return KVArrays(
            layout,
            tuple(
                self._layer_arrays(state, groups[layer], pool, layout)
                for layer, pool in enumerate(self.pools)
            ),
        )

    def check(self) -> None:
        """Verify the conservation law; CacheInvariantError if it does not hold.

        Every page is free or referenced as often as tables and open reservations hold it; tables
        cover exactly the tokens that can still be seen; the waste of a sequence in a group is less
        than one page.
        """
        size = self.layout.page_size
        for handle, state in self._sequences.items():
            for group, table in zip(self.layout.groups, state.tables, strict=True):
                if table.end_page != max(pages_for(state.length, size), table.first_page):
                    raise CacheInvariantError(
                        f"sequence {handle} of {state.length} tokens ends at page {table.end_page}"
                    )
                if table.first_page != group.first_needed(state.length) // size:
                    raise CacheInvariantError(
                        f"sequence {handle} of {state.length} tokens begins at page "
                        f"{table.first_page} ({group.name()})"
                    )
                waste = table.end_page * size - state.length if table.pages else 0
                if not 0 <= waste < size:
                    raise CacheInvariantError(f"sequence {handle} wastes {waste} slots")
        for index, allocator in enumerate(self._allocators):
            allocator.check(self._references(index))

    # -- inside ------------------------------------------------------------------------------

    def _add(self, state: _Sequence) -> int:
        handle, self._next = self._next, self._next + 1
        self._sequences[handle] = state
        return handle

    def _get(self, sequence: int) -> _Sequence:
        if sequence not in self._sequences:
            raise CacheError(f"sequence {sequence} is unknown (never created, or released)")
        return self._sequences[sequence]

    def _idle(self, sequence: int) -> _Sequence:
        state = self._get(sequence)
        if state.growth is not None:
            raise CacheError(f"sequence {sequence} has an open reservation; commit or roll back")
        return state

    def _shortest(self, state: _Sequence) -> int:
        """The least length at which no token that the next one sees was given back."""
        size = self.layout.page_size
        return max(
            (table.first_page * size + group.window - 1 if group.window and table.first_page else 0)
            for group, table in zip(self.layout.groups, state.tables, strict=True)
        )

    def _pages_to_add(self, state: _Sequence, group: int, count: int) -> int:
        wanted = pages_for(state.length + count, self.layout.page_size)
        return max(0, wanted - state.tables[group].end_page)

    def _must_copy(self, state: _Sequence, group: int, count: int) -> bool:
        if count == 0 or state.length % self.layout.page_size == 0:
            return False
        return self._allocators[group].references(state.tables[group].pages[-1]) > 1

    def _validate(self, chunks: Sequence[tuple[int, int]]) -> None:
        seen = set[int]()
        for sequence, count in chunks:
            self._idle(sequence)
            if sequence in seen:
                raise CacheError(f"sequence {sequence} stands twice in one reservation")
            if count < 0:
                raise CacheError(f"sequence {sequence}: cannot reserve {count} tokens")
            seen.add(sequence)

    def _require_free(self, chunks: Sequence[tuple[int, int]]) -> None:
        wanted = [0] * len(self._allocators)
        for sequence, count in chunks:
            for group, pages in enumerate(self.cost(sequence, count)):
                wanted[group] += pages
        for group, allocator in enumerate(self._allocators):
            if wanted[group] > allocator.num_free:
                tokens = sum(count for _, count in chunks)
                raise CacheFull(
                    f"{tokens} tokens of {len(chunks)} sequences need {wanted[group]} pages of "
                    f"{self.layout.page_size} tokens ({self.layout.groups[group].name()}), but "
                    f"{allocator.num_free} of {allocator.num_pages} are free; raise kv_memory or "
                    "num_pages, or release a sequence"
                )

    def _grow(self, state: _Sequence, group: int, count: int) -> _Growth:
        allocator = self._allocators[group]
        copy_to = allocator.allocate(1)[0] if self._must_copy(state, group, count) else None
        return _Growth(allocator.allocate(self._pages_to_add(state, group, count)), copy_to)

    def _give_back(self, growth: list[list[_Growth]]) -> None:
        for growths in growth:
            for allocator, grown in zip(self._allocators, growths, strict=True):
                allocator.release(grown.new_pages)
                if grown.copy_to is not None:
                    allocator.release([grown.copy_to])

    def _copy_shared(self, chunks: Sequence[tuple[int, int]], growth: list[list[_Growth]]) -> None:
        for index, group in enumerate(self.layout.groups):
            source, target = [], []
            for (sequence, _), growths in zip(chunks, growth, strict=True):
                copy_to = growths[index].copy_to
                if copy_to is not None:
                    source.append(self._get(sequence).tables[index].pages[-1])
                    target.append(copy_to)
            for layer in group.layers if source else ():
                self.pools[layer].copy_pages(source, target)

    def _batch(self, chunks: Sequence[tuple[int, int]], growth: list[list[_Growth]]) -> PagedBatch:
        states = [self._get(sequence) for sequence, _ in chunks]
        counts = [count for _, count in chunks]
        ends = [state.length + count for state, count in zip(states, counts, strict=True)]
        query_indptr = np.array([0, *accumulate(counts)], dtype=np.int64)
        if max(counts, default=0) <= 1:  # a step that only decodes
            busy = [i for i, count in enumerate(counts) if count]
            positions = np.array([ends[i] - 1 for i in busy], dtype=np.int64)
            owner = np.array(busy, dtype=np.int64)
        else:
            owner = np.repeat(np.arange(len(states)), counts)
            starts = np.array(ends) - np.array(counts) - query_indptr[:-1]
            positions = np.arange(query_indptr[-1]) + starts[owner]
        groups = tuple(
            flatten(
                [
                    _grown(state.tables[g], growths[g])
                    for state, growths in zip(states, growth, strict=True)
                ],
                ends,
                (positions, owner),
                (self.layout.page_size, group.window),
            )
            for g, group in enumerate(self.layout.groups)
        )
        return PagedBatch(positions, query_indptr, groups, self.layout.group_of_layer)

    def _close(self, reservation: Reservation) -> None:
        if not reservation._open or not any(r is reservation for r in self._reservations):
            raise CacheError("this reservation was already committed or rolled back")
        reservation._open = False
        self._reservations = [r for r in self._reservations if r is not reservation]
        for sequence, _ in reservation.chunks:
            self._get(sequence).growth = None

    def _filled(self, state: _Sequence, group: int) -> list[tuple[int, int]]:
        """(page id, tokens in it) for the pages of a sequence."""
        size, table = self.layout.page_size, state.tables[group]
        return [
            (page, min(size, state.length - (table.first_page + i) * size))
            for i, page in enumerate(table.pages)
        ]

    def _layer_arrays(self, state: _Sequence, index: int, pool: PagePool, layout: str) -> LayerKV:
        table, size = state.tables[index], self.layout.page_size
        held = table.first_page * size
        key, value = pool.read_pages(table.pages)
        if layout == "pages":
            last = state.length - (table.end_page - 1) * size if table.pages else 0
            return LayerKV(key, value, held, tuple(table.pages), last)
        start = self.layout.groups[index].first_needed(state.length)
        seen = slice(start - held, state.length - held)
        tokens = [a.reshape(-1, *a.shape[2:])[seen] for a in (key, value)]
        return LayerKV(arrange(tokens[0], layout), arrange(tokens[1], layout), start)

    def _references(self, group: int) -> list[int]:
        held: list[int] = []
        for state in self._sequences.values():
            held.extend(state.tables[group].pages)
        for reservation in self._reservations:
            for growths in reservation._growth:
                copy_to = growths[group].copy_to
                held.extend(growths[group].new_pages + ([] if copy_to is None else [copy_to]))
        return held
