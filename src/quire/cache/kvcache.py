"""KVCache: which pages hold which sequence. Bookkeeping in ints; numbers live in backend pools.

A step prepares with :meth:`KVCache.reserve` and finishes with :meth:`KVCache.commit`; only commit
changes a sequence. Between the two, :meth:`KVCache.rollback` leaves the cache as it was.
With a prefix index, whole pages of sequences whose token ids are told at the commit are found by
later sequences that begin with the same tokens (:meth:`KVCache.match`).
Not thread-safe.
"""

import operator
from array import array
from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from quire.cache.allocator import PageAllocator
from quire.cache.batches import BatchBuilder
from quire.cache.books import check_sequence
from quire.cache.compaction import Compactor, Keep, require_compactable, require_keep
from quire.cache.export import KVArrays, LayerKV, arrange, require_layout
from quire.cache.prefix import PrefixIndex, PrefixMatch, PrefixQuery
from quire.cache.raw import RawPages
from quire.cache.sequence import Growth, Growths, Reservation, SequenceState, grown
from quire.cache.sharing import PrefixSharing
from quire.cache.table import PageTable
from quire.cache.usage import CacheUsage
from quire.errors import CacheError, CacheFull
from quire.layout import CacheLayout, LayerGroup, pages_for
from quire.pages import PagePool

__all__ = ["KVCache", "Reservation"]


class KVCache:
    """Paged keys and values of many sequences.

    layout     layer groups and page shapes
    num_pages  pages of each group
    pools      one pool a layer, each with at least its group's number of pages
    identity   of what computes the pages; None for a cache that shares no prefixes. Prefixes that
               were computed by something else are others
    """

    def __init__(
        self,
        layout: CacheLayout,
        num_pages: Sequence[int],
        pools: Sequence[PagePool],
        identity: bytes | None = None,
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
        self.raw = RawPages(layout, self.pools)
        self._allocators = tuple(
            PageAllocator(count, partial(self._on_evict, group))
            for group, count in enumerate(num_pages)
        )
        self.prefix: PrefixIndex | None = None
        self._sharing: PrefixSharing | None = None
        if identity is not None:
            self.prefix = PrefixIndex(layout, self._allocators, identity)
            self._sharing = PrefixSharing(layout, self._allocators, self.prefix)
        # Layers that all keep every token are one group, and only theirs are ever compacted.
        self._compactor = Compactor(layout, self.pools, self._allocators[0], self.prefix)
        self._sequences: dict[int, SequenceState] = {}
        self._reservations: list[Reservation] = []
        self._batches = BatchBuilder(layout)
        self._next = 0
        # What every step asks for.
        self._page_bytes = [layout.page_bytes(group) for group in range(len(layout.groups))]
        self._windowed = [(g, group) for g, group in enumerate(layout.groups) if group.window]
        self._no_pages = (0,) * len(layout.groups)

    # -- sequences ---------------------------------------------------------------------------

    def match(self, query: PrefixQuery, limit: int | None = None) -> PrefixMatch:
        """The longest cached prefix of ``query``, of at most ``limit`` tokens; changes nothing.

        Without a prefix index it is empty. Valid until the cache is changed.
        """
        if self.prefix is None:
            groups = len(self.layout.groups)
            return PrefixMatch(query.salt, 0, None, (0,) * groups, ((),) * groups)
        return self.prefix.match(query, limit)

    def create(self, match: PrefixMatch | None = None) -> int:
        """Admit a sequence; returns its handle.

        Without ``match`` it is empty, takes no pages and stays out of the prefix index. With one it
        begins with the matched tokens, on the pages of the match; an unfinished one is copied when
        it is first written to. Raises CacheError for a match that is stale.
        """
        if match is None or self._sharing is None:
            return self._add(SequenceState([PageTable() for _ in self.layout.groups]))
        return self._add(self._sharing.start(match))

    def clear(self) -> None:
        """Give up every cached page and give the pools' memory back to the system.

        CacheError, with nothing changed, while there are sequences.
        """
        if self._sequences:
            raise CacheError(f"{len(self._sequences)} sequences hold pages; release them first")
        for allocator in self._allocators:
            allocator.evict_all()
        for pool in self.pools:
            pool.discard()

    def restore(self, query: PrefixQuery, data: Sequence[npt.NDArray[np.uint8]]) -> int:
        """Admit a sequence that holds all tokens of ``query``, computed before; returns its handle.

        ``data[g]``: uint8 ``[pages, layout.page_bytes(g)]``, what ``raw.read`` gave of the
        pages that a next token would see. Raises CacheFull, with nothing changed, if they do not
        fit; CacheError without a prefix index.
        """
        if self._sharing is None:
            raise CacheError("this cache has no prefix index to restore a sequence into")
        for group, (allocator, pages) in enumerate(zip(self._allocators, data, strict=True)):
            if len(pages) > allocator.available:
                raise CacheFull(
                    f"{query.num_tokens} saved tokens need {len(pages)} pages of "
                    f"{self.layout.page_size} tokens ({self.layout.groups[group].name()}), but "
                    f"{allocator.available} of {allocator.num_pages} are free; raise kv_memory"
                )
        tables: list[PageTable] = []
        try:
            for group, (allocator, pages) in enumerate(zip(self._allocators, data, strict=True)):
                first = self.layout.groups[group].first_needed(query.num_tokens)
                ids = array("q", allocator.allocate(len(pages)))
                tables.append(PageTable(ids, first // self.layout.page_size))
                self.raw.write(group, ids, pages)
        except BaseException:
            for allocator, table in zip(self._allocators, tables, strict=False):
                allocator.release(table.pages)
            raise
        return self._add(self._sharing.restore(query, tables))

    def fork(self, sequence: int) -> int:
        """A new sequence with the same tokens. Shares all pages; the first to write copies."""
        source = self._idle(sequence)
        for allocator, table in zip(self._allocators, source.tables, strict=True):
            allocator.retain(table.pages)
        chain = source.chain
        if chain is not None and self._sharing is not None:
            chain = self._sharing.fork(chain)
        tables = [table.copy() for table in source.tables]
        forked = SequenceState(tables, source.length, chain=chain, dropped=source.dropped)
        return self._add(forked)

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the tokens from position ``length`` on (rollback).

        CacheError, with nothing changed, if ``length`` is negative or beyond the end, or if a
        sliding window gave back pages that a token at position ``length`` would see, or if tokens
        were dropped: what is left may lie behind ``length`` for some heads and not for others.
        """
        state = self._idle(sequence)
        if not 0 <= length <= state.length:
            raise CacheError(
                f"cannot truncate sequence {sequence} to {length} tokens: it has {state.length}"
            )
        if state.dropped and length < state.length:
            raise CacheError(
                f"cannot truncate sequence {sequence}: it dropped {state.dropped} tokens, and "
                "heads keep different ones; release it and compute it anew instead"
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
        self._batches.forget()
        if state.chain is not None and self.prefix is not None:
            state.chain.back_to(self.prefix, length)

    def evict(self, sequence: int, keep: Keep) -> None:
        """Drop all tokens of a sequence but those at the places ``keep``, which move together.

        keep   for each layer, int64 [num_kv_heads, kept]: places, ascending in each row. Each head
               may keep its own tokens; the number is the same everywhere

        Moves stored bytes, so that nothing is quantised again; a page that another sequence or the
        prefix index holds is left as it is. Later tokens have places behind the kept ones, and
        their own positions still (:meth:`dropped`). The sequence leaves the prefix index for good.
        Raises CacheError, with nothing changed, for places that are not the sequence's, and where
        tokens cannot be dropped one by one; CacheFull, with nothing changed, if pages that others
        hold would have to be replaced and none is free.
        """
        state = self._idle(sequence)
        require_compactable(self.layout)
        require_keep(self.layout, state.length, keep)
        if keep[0].shape[1] < state.length:
            self._batches.forget()
            self._compactor.compact(state, keep)

    def dropped(self, sequence: int) -> int:
        """Tokens that :meth:`evict` took from a sequence: its next position is length + dropped."""
        return self._get(sequence).dropped

    def release(self, sequence: int) -> None:
        """Forget a sequence and drop its references; its handle is invalid from then on.

        Pages in the prefix index, its unfinished one included, stay cached until memory is wanted.
        """
        state = self._idle(sequence)
        if state.chain is not None and self._sharing is not None:
            self._sharing.end(state)
        for allocator, table in zip(self._allocators, state.tables, strict=True):
            allocator.release(table.pages)
        del self._sequences[sequence]

    def length(self, sequence: int) -> int:
        """Committed tokens that a sequence keeps."""
        return self._get(sequence).length

    @property
    def sequences(self) -> tuple[int, ...]:
        """Handles of all sequences."""
        return tuple(self._sequences)

    # -- a step ------------------------------------------------------------------------------

    @property
    def free_pages(self) -> tuple[int, ...]:
        """Pages of each group that can be taken: free ones and cached ones that nobody holds."""
        return tuple([allocator.available for allocator in self._allocators])

    @property
    def cached_pages(self) -> tuple[int, ...]:
        """Pages of each group that nobody holds and that the prefix index keeps."""
        return tuple(allocator.num_cached for allocator in self._allocators)

    @property
    def num_pages(self) -> tuple[int, ...]:
        """All pages of each group."""
        return tuple(allocator.num_pages for allocator in self._allocators)

    def generations(self, group: int) -> npt.NDArray[np.int64]:
        """For each page of ``group`` a count that grows before it is written to; a live view."""
        return np.frombuffer(self._allocators[group].generations, np.int64)

    def cost(self, sequence: int | PrefixMatch | None, new_tokens: int) -> tuple[int, ...]:
        """Pages of each group that reserving ``new_tokens`` more tokens would take.

        None, or a match, stands for a sequence that is yet to be created (from that match).
        """
        if isinstance(sequence, PrefixMatch):
            if self._sharing is not None:
                return self._sharing.cost(sequence, new_tokens)
            sequence = None
        if sequence is None:
            return (pages_for(new_tokens, self.layout.page_size),) * len(self.layout.groups)
        needs = self._needs(self._get(sequence), new_tokens)
        return tuple([add + copy for add, copy in needs]) if needs else self._no_pages

    def shareable(self, tokens: int) -> int:
        """How many of ``tokens`` leading tokens others can use while their sequence is open."""
        return 0 if self.prefix is None else tokens // self.layout.page_size * self.layout.page_size

    def growth(self, sequence: int | PrefixMatch | None, new_tokens: int) -> tuple[int, ...]:
        """Free pages of each group that growing token by token takes at most.

        At most :meth:`cost`; less where a sliding window gives pages back on the way. Pages that a
        fork shares are not counted as held: they are copied, or stay with the fork.
        """
        if isinstance(sequence, PrefixMatch):
            if self._sharing is not None:
                return self._sharing.growth(sequence, new_tokens)
            sequence = None
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
        states = self._validated(chunks)
        counts = [count for _, count in chunks]
        needs = list(map(self._needs, states, counts))
        growth = self._take(chunks, needs) if any(needs) else [()] * len(chunks)
        try:
            if any(growth):
                self._copy_shared(states, growth)
            batch = self._batches.build(chunks, states, growth)
            made = Reservation(tuple(chunks), batch, states, growth)
        except BaseException:
            self._give_back(growth)
            raise
        for state, growths, count in zip(states, growth, counts, strict=True):
            state.growth = growths
            if count and state.length % self.layout.page_size:  # an unfinished page is written to
                for allocator, table in zip(self._allocators, state.tables, strict=True):
                    allocator.rewrite(table.pages[-1])
        self._reservations.append(made)
        return made

    def commit(
        self, reservation: Reservation, tokens: Sequence[Sequence[int] | None] | None = None
    ) -> None:
        """Make the reserved tokens part of their sequences and give back pages behind windows.

        ``tokens`` are the ids of each chunk, for the prefix index; None for all or one of them for
        tokens that are unknown or not exact: their sequence leaves the index for good, and what of
        it is in there stays. Of a chunk with fewer ids than were reserved only so many are
        committed. CacheError, with nothing changed, if there are more ids than reserved.
        """
        reserved = [count for _, count in reservation.chunks]
        told = [None] * len(reserved) if tokens is None else tokens
        counts = [
            count if part is None else len(part) for count, part in zip(reserved, told, strict=True)
        ]
        if len(counts) != len(reserved) or any(map(operator.gt, counts, reserved)):
            raise CacheError(f"ids of {counts} tokens are more than the {reserved} reserved")
        self._close(reservation)
        self._batches.forget()
        moved = False
        for at, (state, growths) in enumerate(
            zip(reservation._states, reservation._growth, strict=True)
        ):
            count = counts[at]
            if count < reserved[at]:
                self._trim(state, growths, count)
            state.length += count
            for index, growth in enumerate(growths):
                table = state.tables[index]
                if growth.copy_to is not None:
                    self._allocators[index].release([table.pages[-1]])
                if growth.copy_to is not None or growth.new_pages:
                    state.tables[index] = grown(table, growth)
            if count and self._sharing is not None:
                self._sharing.extend(state, told[at])
            for index, group in self._windowed:
                moved = self._leave_window(state, index, group) or moved
        if not moved:
            self._batches.committed(reservation, counts)

    def rollback(self, reservation: Reservation) -> None:
        """Give the reserved pages back; every sequence is as it was before :meth:`reserve`."""
        self._close(reservation)
        self._give_back(reservation._growth)

    # -- what is held ------------------------------------------------------------------------

    def allocated_bytes(self, sequence: int) -> int:
        """Bytes of the pages a sequence references: shared and reserved ones included."""
        state = self._get(sequence)
        pages = [len(table.pages) for table in state.tables]
        for group, growth in enumerate(state.growth or ()):
            pages[group] += len(growth.new_pages) + (growth.copy_to is not None)
        return sum(map(operator.mul, pages, self._page_bytes))

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
            slots = sum(filled.values())
            used += slots * self.layout.page_bytes(group) // self.layout.page_size
        groups = range(len(self.layout.groups))
        return CacheUsage(
            pool_bytes=sum(self.num_pages[g] * self.layout.page_bytes(g) for g in groups),
            allocated_bytes=allocated,
            used_bytes=used,
            tokens=sum(state.length for state in states),
            bytes_per_token=sum(self.layout.token_bytes(g) for g in groups),
            cached_bytes=0 if sequence is not None else self._cached_bytes(),
        )

    def to_arrays(self, sequence: int, layout: str = "BHSD") -> KVArrays:
        """K and V of every layer in layout BHSD, BSHD, HBSD or ``"pages"``; see :class:`LayerKV`.

        B is 1 (the sequence), H KV heads, S stored tokens, D head_dim. The dtype is the page
        format's; numbers of a quantised one are decoded to float32. Raises ConfigError for another
        layout.
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

    def page_tables(self, sequence: int) -> list[tuple[int, list[int]]]:
        """For each group, the number of a sequence's first page and the ids from there on."""
        return [(t.first_page, t.pages.tolist()) for t in self._get(sequence).tables]

    def check(self) -> None:
        """Verify the conservation law; CacheInvariantError if it does not hold.

        Every page is free or referenced as often as tables and open reservations hold it; tables
        cover exactly the tokens that can still be seen; the waste of a sequence in a group is less
        than one page.
        """
        for handle, state in self._sequences.items():
            check_sequence(self.layout, handle, state)
        for index, allocator in enumerate(self._allocators):
            allocator.check(self._references(index))
        if self.prefix is not None:
            self.prefix.check()

    # -- inside ------------------------------------------------------------------------------

    def _cached_bytes(self) -> int:
        return sum(n * self.layout.page_bytes(g) for g, n in enumerate(self.cached_pages))

    def _on_evict(self, group: int, page: int) -> None:
        if self.prefix is not None:
            self.prefix.evict(group, page)

    def _add(self, state: SequenceState) -> int:
        handle, self._next = self._next, self._next + 1
        self._sequences[handle] = state
        return handle

    def _get(self, sequence: int) -> SequenceState:
        state = self._sequences.get(sequence)
        if state is None:
            raise CacheError(f"sequence {sequence} is unknown (never created, or released)")
        return state

    def _idle(self, sequence: int) -> SequenceState:
        state = self._get(sequence)
        if state.growth is not None:
            raise CacheError(f"sequence {sequence} has an open reservation; commit or roll back")
        return state

    def _shortest(self, state: SequenceState) -> int:
        """The least length at which no token that the next one sees was given back."""
        size = self.layout.page_size
        return max(
            (table.first_page * size + group.window - 1 if group.window and table.first_page else 0)
            for group, table in zip(self.layout.groups, state.tables, strict=True)
        )

    def _needs(self, state: SequenceState, count: int) -> list[tuple[int, bool]]:
        """For each group, the pages that ``count`` more tokens add, and whether the last page is
        copied first. Empty if they take nothing in any group.
        """
        size = self.layout.page_size
        offset = state.length % size
        copies = [
            count > 0 and offset > 0 and self._must_copy(group, table.pages[-1], offset)
            for group, table in enumerate(state.tables)
        ]
        if offset and offset + count <= size and True not in copies:
            return []
        end_page = pages_for(state.length + count, size)
        adds = [max(0, end_page - table.end_page) for table in state.tables]
        return list(zip(adds, copies, strict=True)) if any(adds) or any(copies) else []

    def _must_copy(self, group: int, page: int, offset: int) -> bool:
        """True if others need ``page`` as it is from token ``offset`` on."""
        allocator = self._allocators[group]
        if allocator.is_private(page):
            return False
        return allocator.references(page) > 1 or (
            self.prefix is not None and self.prefix.is_read(group, page, offset)
        )

    def _validated(self, chunks: Sequence[tuple[int, int]]) -> list[SequenceState]:
        states = []
        seen = set[int]()
        for sequence, count in chunks:
            states.append(self._idle(sequence))
            if sequence in seen:
                raise CacheError(f"sequence {sequence} stands twice in one reservation")
            if count < 0:
                raise CacheError(f"sequence {sequence}: cannot reserve {count} tokens")
            seen.add(sequence)
        return states

    def _take(
        self, chunks: Sequence[tuple[int, int]], needs: Sequence[list[tuple[int, bool]]]
    ) -> list[Growths]:
        """Allocate all that is needed; CacheFull, with nothing changed, if pages run out."""
        for group, allocator in enumerate(self._allocators):
            wanted = sum(sum(need[group]) for need in needs if need)
            if wanted > allocator.available:
                tokens = sum(count for _, count in chunks)
                raise CacheFull(
                    f"{tokens} tokens of {len(chunks)} sequences need {wanted} pages of "
                    f"{self.layout.page_size} tokens ({self.layout.groups[group].name()}), but "
                    f"{allocator.available} of {allocator.num_pages} are free; raise kv_memory or "
                    "num_pages, or release a sequence"
                )
        return [
            [
                _grow(allocator, add, copy)
                for allocator, (add, copy) in zip(self._allocators, need, strict=True)
            ]
            if need
            else ()
            for need in needs
        ]

    def _trim(self, state: SequenceState, growths: Growths, count: int) -> None:
        """Give back what was reserved for more than ``count`` tokens."""
        end_page = pages_for(state.length + count, self.layout.page_size)
        for group, growth in enumerate(growths):
            needed = max(0, end_page - state.tables[group].end_page)
            self._allocators[group].release(growth.new_pages[needed:])
            del growth.new_pages[needed:]
            if count == 0 and growth.copy_to is not None:
                self._allocators[group].release([growth.copy_to])
                growth.copy_to = None

    def _give_back(self, growth: Sequence[Growths]) -> None:
        for growths in growth:
            for group, taken in enumerate(growths):
                self._allocators[group].release(taken.new_pages)
                if taken.copy_to is not None:
                    self._allocators[group].release([taken.copy_to])

    def _copy_shared(self, states: Sequence[SequenceState], growth: Sequence[Growths]) -> None:
        for index, group in enumerate(self.layout.groups):
            source, target = [], []
            for state, growths in zip(states, growth, strict=True):
                copy_to = growths[index].copy_to if growths else None
                if copy_to is not None:
                    source.append(state.tables[index].pages[-1])
                    target.append(copy_to)
            for layer in group.layers if source else ():
                self.pools[layer].copy_pages(source, target)

    def _leave_window(self, state: SequenceState, index: int, group: LayerGroup) -> bool:
        """Give back the pages behind a window; True if there were any."""
        first = group.first_needed(state.length) // self.layout.page_size
        dropped = state.tables[index].drop_front(first)
        self._allocators[index].release(dropped)
        return bool(dropped)

    def _close(self, reservation: Reservation) -> None:
        if not reservation._open or reservation not in self._reservations:
            raise CacheError("this reservation was already committed or rolled back")
        reservation._open = False
        self._reservations.remove(reservation)
        for state in reservation._states:
            state.growth = None

    def _filled(self, state: SequenceState, group: int) -> list[tuple[int, int]]:
        """(page id, tokens in it) for the pages of a sequence."""
        size, table = self.layout.page_size, state.tables[group]
        return [
            (page, min(size, state.length - (table.first_page + i) * size))
            for i, page in enumerate(table.pages)
        ]

    def _layer_arrays(
        self, state: SequenceState, index: int, pool: PagePool, layout: str
    ) -> LayerKV:
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
            for growth in (growths[group] for growths in reservation._growth if growths):
                held.extend(growth.new_pages)
                held.extend(() if growth.copy_to is None else (growth.copy_to,))
        return held


def _grow(allocator: PageAllocator, add: int, copy: bool) -> Growth:
    copy_to = allocator.allocate(1)[0] if copy else None
    return Growth(allocator.allocate(add), copy_to)
