"""How sequences take pages from the prefix index and leave them there."""

import operator
from array import array
from collections.abc import Sequence

from quire.cache.allocator import PageAllocator
from quire.cache.prefix import PrefixIndex
from quire.cache.prefix_tree import (
    NO_PAGE,
    TOKEN_BYTES,
    PrefixMatch,
    PrefixQuery,
    token_bytes,
)
from quire.cache.sequence import PrefixChain, SequenceState
from quire.cache.table import PageTable
from quire.errors import CacheError
from quire.layout import CacheLayout

__all__ = ["PrefixSharing"]


class PrefixSharing:
    """The traffic between the sequences of a cache and its prefix index."""

    def __init__(
        self,
        layout: CacheLayout,
        allocators: Sequence[PageAllocator],
        index: PrefixIndex,
    ) -> None:
        self.layout, self.index = layout, index
        self._allocators = tuple(allocators)
        self._step = layout.page_size * TOKEN_BYTES

    def start(self, match: PrefixMatch) -> SequenceState:
        """A sequence that holds the pages of ``match``; CacheError if the match is stale.

        Its unfinished page is copied when the sequence first writes to it, unless ``match.takes``
        and no other sequence holds it.
        """
        self._require_fresh(match)
        takes = match.takes and not self._is_held(match)
        node = self.index.root(match.salt) if match.node is None else match.node
        self.index.enter(node)  # before the page behind it leaves the index: it may be all it has
        for allocator, pages in zip(self._allocators, match.pages, strict=True):
            allocator.retain(pages)
        for group, pages in enumerate(match.pages if takes else ()):
            self.index.evict(group, pages[-1:])
        tables = [
            PageTable(array("q", pages), first)
            for pages, first in zip(match.pages, match.first_page, strict=True)
        ]
        return SequenceState(tables, match.tokens, chain=PrefixChain(node, match.tail))

    def cost(self, match: PrefixMatch, new_tokens: int) -> tuple[int, ...]:
        """Pages of each area that starting from ``match`` and adding ``new_tokens`` would take."""
        counts: list[int] = []
        copies = self._copies(match, new_tokens)
        for group, (allocator, pages) in enumerate(zip(self._allocators, match.pages, strict=True)):
            new = self.layout.pages_between(group, match.tokens, match.tokens + new_tokens)
            taken = allocator.count(p for p in pages if allocator.references(p) == 0)
            counts += map(operator.add, new, taken)
            counts[-1] += copies[group]  # an unfinished page is an open one
        return tuple(counts)

    def growth(self, match: PrefixMatch, new_tokens: int) -> tuple[int, ...]:
        """As :meth:`cost`, growing token by token so that windows give pages back on the way."""
        tokens, copies = match.tokens + new_tokens, self._copies(match, new_tokens)
        peaks: list[int] = []
        for group, (allocator, pages) in enumerate(zip(self._allocators, match.pages, strict=True)):
            most = self.layout.most_pages(group, tokens, 1)
            held = allocator.count(p for p in pages if allocator.references(p) > 0)
            peaks += map(operator.sub, most, held)
            peaks[-1] += copies[group]
        cost = self.cost(match, new_tokens)
        return tuple(min(max(0, peak), most) for peak, most in zip(peaks, cost, strict=True))

    def extend(self, state: SequenceState, tokens: Sequence[int] | None) -> None:
        """Add ``tokens``, just committed, to the chain of ``state``; index pages that are whole.

        A page that is in the index already is shared from now on and the sequence's own is given
        up: by the exactness law they hold the same bits. A sequence of unknown tokens (None) leaves
        the index for good.
        """
        chain = state.chain
        if chain is None:
            return
        if tokens is None:
            self.index.leave(chain.node)
            state.chain = None
            return
        chain.tail += token_bytes(tokens)
        if len(chain.tail) >= self._step:
            self._index_pages(state, chain)

    def _index_pages(self, state: SequenceState, chain: PrefixChain) -> None:
        step = self._step
        while len(chain.tail) >= step:
            number = chain.whole
            own = [table.page(number, NO_PAGE) for table in state.tables]
            node = self.index.insert(chain.node, chain.tail[:step], own)
            for allocator, table, page in zip(
                self._allocators, state.tables, node.pages, strict=True
            ):
                if number >= table.first_page and page != table.page(number):
                    allocator.retain([page])
                    allocator.release([table.page(number)])
                    table.pages[number - table.first_page] = page
            chain.move(self.index, node)
            chain.tail = chain.tail[step:]

    def restore(self, query: PrefixQuery, tables: list[PageTable]) -> SequenceState:
        """A sequence of all tokens of ``query`` on pages that are filled already."""
        root = self.index.root(query.salt)
        self.index.enter(root)
        chain = PrefixChain(root, query.data)
        state = SequenceState(tables, query.num_tokens, chain=chain)
        self._index_pages(state, chain)
        return state

    def fork(self, chain: PrefixChain) -> PrefixChain:
        """The chain of a fork."""
        self.index.enter(chain.node)
        return PrefixChain(chain.node, chain.tail)

    def end(self, state: SequenceState) -> None:
        """Leave the unfinished page of ``state`` in the index; it is about to be released."""
        chain = state.chain
        assert chain is not None
        if chain.tail:
            ends = [table.pages[-1] for table in state.tables]
            self.index.insert_end(chain.node, chain.tail, ends)
        self.index.leave(chain.node)

    def _copies(self, match: PrefixMatch, new_tokens: int) -> list[bool]:
        """For each group, whether the unfinished page of ``match`` must be copied to be written."""
        if match.partial is None or new_tokens == 0:
            return [False] * len(self._allocators)
        read_on = match.partial.tokens != match.tail
        if match.takes and not self._is_held(match):
            read_on = False
        return [
            read_on or allocator.references(page) > 0
            for allocator, page in zip(self._allocators, match.partial.pages, strict=True)
        ]

    def _is_held(self, match: PrefixMatch) -> bool:
        """True if a sequence holds the unfinished page of ``match``."""
        return match.partial is not None and any(
            allocator.references(page) > 0
            for allocator, page in zip(self._allocators, match.partial.pages, strict=True)
        )

    def _require_fresh(self, match: PrefixMatch) -> None:
        nodes = [] if match.partial is None else [match.partial]
        node = match.node
        while node is not None and node.parent is not None:
            nodes.append(node)
            node = node.parent
        for node in nodes:
            for group, first in enumerate(match.first_page):
                held = match.pages[group][node.depth - first] if node.depth >= first else None
                if held is not None and held != node.pages[group]:
                    raise CacheError(
                        "this prefix match is stale: the cache was changed since; match again"
                    )
