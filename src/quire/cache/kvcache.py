"""KVCache: which pages hold which sequence. Bookkeeping in ints; numbers live in backend pools.

A step prepares with :meth:`KVCache.reserve` and finishes with :meth:`KVCache.commit`; only commit
changes a sequence. Between the two, :meth:`KVCache.rollback` leaves the cache as it was.
With a prefix index, whole pages of sequences whose token ids are told at the commit are found by
later sequences that begin with the same tokens (:meth:`KVCache.match`).
Where a format packs whole pages, a sequence holds its first page and its unfinished one open and
the others packed; each is packed once, in the step that completes it.
Not thread-safe.
"""

import operator
from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from quire.cache.allocator import PageAllocator
from quire.cache.batches import BatchBuilder
from quire.cache.books import check_kinds, check_sequence, require_pools
from quire.cache.compaction import Compactor, Keep, require_compactable, require_keep
from quire.cache.export import KVArrays, layer_arrays, require_layout
from quire.cache.growth import Grower
from quire.cache.prefix import PrefixIndex
from quire.cache.prefix_tree import PrefixMatch, PrefixQuery
from quire.cache.raw import RawPages
from quire.cache.restoring import fill_tables
from quire.cache.sequence import Growths, Reservation, SequenceState
from quire.cache.sharing import PrefixSharing
from quire.cache.table import PageTable
from quire.cache.truncating import require_truncatable
from quire.cache.usage import CacheUsage, count_bytes, filled_pages
from quire.errors import CacheError
from quire.layout import CacheLayout, LayerGroup, pages_for
from quire.pages import PagePool

__all__ = ["KVCache", "Reservation"]


class KVCache:
    """Paged keys and values of many sequences.

    layout     layer groups and page shapes
    num_pages  pages of each area (:attr:`CacheLayout.areas`): of each group, and open ones
    pools      one pool a layer, each with at least its group's number of pages; with just so many
               where there are open ones, too
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
        counts = require_pools(layout, num_pages, pools)
        self.layout = layout
        self.pools = tuple(pools)
        self.raw = RawPages(layout, self.pools)
        self._allocators = tuple(
            PageAllocator(count, partial(self._on_evict, group), opened)
            for group, (count, opened) in enumerate(counts)
        )
        self._areas = tuple(area for allocator in self._allocators for area in allocator.areas)
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
        self._grower = Grower(layout, self._allocators, self.pools, self.prefix)
        self._next = 0
        self._windowed = [(g, group) for g, group in enumerate(layout.groups) if group.window]

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

        ``data[a]``: uint8 ``[pages, layout.area_bytes[a]]``, what ``raw.read`` gave of the pages
        that a next token would see, of each area (:meth:`CacheLayout.held_pages`). Raises
        CacheFull, with nothing changed, if they do not fit; CacheError without a prefix index.
        """
        if self._sharing is None:
            raise CacheError("this cache has no prefix index to restore a sequence into")
        tables = fill_tables(self.layout, self._allocators, self.raw, query.num_tokens, data)
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
        sliding window gave back pages that a token at position ``length`` would see, if that is
        inside a packed page, whose tokens cannot be parted, or if tokens were dropped: what is
        left may lie behind ``length`` for some heads and not for others.
        """
        state = self._idle(sequence)
        require_truncatable(self.layout, sequence, state, length)
        size = self.layout.page_size
        end_page = pages_for(length, size)
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
        """Pages of each area that can be taken: free ones and cached ones that nobody holds."""
        return tuple([area.available for area in self._areas])

    @property
    def cached_pages(self) -> tuple[int, ...]:
        """Pages of each area that nobody holds and that the prefix index keeps."""
        return tuple(len(area.cached) for area in self._areas)

    @property
    def num_pages(self) -> tuple[int, ...]:
        """All pages of each area: of each group, and of open ones where pages are packed."""
        return tuple(area.num_pages for area in self._areas)

    def generations(self, group: int) -> npt.NDArray[np.int64]:
        """For each page of ``group`` a count that grows before it is written to; a live view."""
        return np.frombuffer(self._allocators[group].generations, np.int64)

    def cost(self, sequence: int | PrefixMatch | None, new_tokens: int) -> tuple[int, ...]:
        """Pages of each area that reserving ``new_tokens`` more tokens would take.

        None, or a match, stands for a sequence that is yet to be created (from that match).
        """
        if isinstance(sequence, PrefixMatch):
            if self._sharing is not None:
                return self._sharing.cost(sequence, new_tokens)
            sequence = None
        if sequence is None:
            return self._grower.cost_of_new(new_tokens)
        return self._grower.cost(self._get(sequence), new_tokens)

    def cost_of_whole(self, match: PrefixMatch, pages: int) -> tuple[int, ...]:
        """Pages of each area that :meth:`reserve_whole` would take, behind a match of whole ones,
        those of the match that nobody holds included.
        """
        return self._grower.cost_of_whole(match, pages)

    def shareable(self, tokens: int) -> int:
        """How many of ``tokens`` leading tokens others can use while their sequence is open."""
        return 0 if self.prefix is None else tokens // self.layout.page_size * self.layout.page_size

    def growth(self, sequence: int | PrefixMatch | None, new_tokens: int) -> tuple[int, ...]:
        """Free pages of each area that growing token by token takes at most.

        At most :meth:`cost`; less where a sliding window gives pages back on the way. Pages that a
        fork shares are not counted as held: they are copied, or stay with the fork.
        """
        if isinstance(sequence, PrefixMatch):
            if self._sharing is not None:
                return self._sharing.growth(sequence, new_tokens)
            sequence = None
        return self._grower.growth(None if sequence is None else self._get(sequence), new_tokens)

    def freed_by_release(self, sequence: int) -> tuple[int, ...]:
        """Pages of each area that only this sequence holds."""
        return self._grower.freed_by_release(self._get(sequence))

    def reserve(self, chunks: Sequence[tuple[int, int]]) -> Reservation:
        """Set pages aside for ``(sequence, new_tokens)`` pairs, all or none.

        An unfinished page that a fork shares is copied first (copy-on-write). The tokens count
        only after :meth:`commit`. Raises CacheFull, with nothing changed, when pages run out, and
        CacheError for an unknown, repeated or already reserved sequence or a negative count.
        """
        states = self._validated(chunks)
        counts = [count for _, count in chunks]
        needs = list(map(self._grower.needs, states, counts))
        growth: Sequence[Growths] = [()] * len(chunks)
        if any(needs):
            growth = self._grower.take(chunks, states, needs)
        try:
            if any(growth):
                self._grower.copy_shared(states, growth)
            batch = self._batches.build(chunks, states, growth)
            made = Reservation(tuple(chunks), batch, states, growth)
        except BaseException:
            self._grower.give_back(growth)
            raise
        for state, count in zip(states, counts, strict=True):
            if count and state.length % self.layout.page_size:  # an unfinished page is written to
                for allocator, table in zip(self._allocators, state.tables, strict=True):
                    allocator.rewrite(table.pages[-1])
        return self._opened(made)

    def reserve_whole(self, sequence: int, pages: int) -> Reservation:
        """Set whole pages aside behind those of a sequence, to be filled with what was stored.

        No new token goes through them, so that where pages are packed no open ones are needed. The
        sequence must end with a whole page. Raises CacheFull and CacheError as :meth:`reserve`.
        """
        size = self.layout.page_size
        [state] = self._validated([(sequence, pages * size)])
        if state.length % size:
            raise CacheError(f"sequence {sequence} of {state.length} tokens ends inside a page")
        growth = self._grower.take_whole(sequence, state, pages)
        try:
            batch = self._batches.build([(sequence, 0)], [state], [growth])
            made = Reservation(((sequence, pages * size),), batch, [state], [growth])
        except BaseException:
            self._grower.give_back([growth])
            raise
        return self._opened(made)

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
                self._grower.trim(state, growths, count)
            state.length += count
            if growths:
                self._grower.settle(state, growths)
            if count and self._sharing is not None:
                self._sharing.extend(state, told[at])
            for index, group in self._windowed:
                moved = self._leave_window(state, index, group) or moved
        if not moved:
            self._batches.committed(reservation, counts)

    def rollback(self, reservation: Reservation) -> None:
        """Give the reserved pages back; every sequence is as it was before :meth:`reserve`."""
        self._close(reservation)
        self._grower.give_back(reservation._growth)

    # -- what is held ------------------------------------------------------------------------

    def allocated_bytes(self, sequence: int) -> int:
        """Bytes of the pages a sequence references: shared and reserved ones included."""
        state = self._get(sequence)
        counts = [
            allocator.count(table.pages)
            for allocator, table in zip(self._allocators, state.tables, strict=True)
        ]
        for group, growth in enumerate(state.growth or ()):
            taken = self._allocators[group].count(growth.pages)
            counts[group] = tuple(map(operator.add, counts[group], taken))
        pages = [count for group in counts for count in group]
        return sum(map(operator.mul, pages, self.layout.area_bytes))

    def usage(self, sequence: int | None = None) -> CacheUsage:
        """Bytes of one sequence, or of all of them with every shared page counted once."""
        states = self._sequences.values() if sequence is None else [self._get(sequence)]
        filled = [
            page
            for group, allocator in enumerate(self._allocators)
            for page in filled_pages(self.layout, states, group, allocator)
        ]
        cached = self.cached_pages if sequence is None else ()
        tokens = sum(state.length for state in states)
        return count_bytes(self.layout, self.num_pages, filled, cached, tokens)

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
                layer_arrays(
                    pool,
                    state.tables[groups[layer]],
                    (self.layout.groups[groups[layer]].first_needed(state.length), state.length),
                    layout,
                )
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
        than one page. Where pages are packed, all whole ones but the first are, and no others.
        """
        for handle, state in self._sequences.items():
            check_sequence(self.layout, handle, state)
            for allocator, table, packs in zip(
                self._allocators, state.tables, self.layout.packs, strict=True
            ):
                if packs:
                    check_kinds(self.layout.page_size, handle, state.length, table, allocator)
        for index, allocator in enumerate(self._allocators):
            allocator.check(self._references(index))
        if self.prefix is not None:
            self.prefix.check()

    # -- inside ------------------------------------------------------------------------------

    def _on_evict(self, group: int, pages: Sequence[int]) -> None:
        if self.prefix is not None:
            self.prefix.evict(group, pages)

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

    def _opened(self, reservation: Reservation) -> Reservation:
        for state, growths in zip(reservation._states, reservation._growth, strict=True):
            state.growth = growths
        self._reservations.append(reservation)
        return reservation

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

    def _references(self, group: int) -> list[int]:
        held: list[int] = []
        for state in self._sequences.values():
            held.extend(state.tables[group].pages)
        for reservation in self._reservations:
            for growth in (growths[group] for growths in reservation._growth if growths):
                held.extend(growth.pages)
        return held
