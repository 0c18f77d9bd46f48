"""Whether what is written of a sequence can be true, and whether pools fit a cache."""

from collections.abc import Sequence

from quire.cache.allocator import PageAllocator
from quire.cache.prefix_tree import TOKEN_BYTES
from quire.cache.sequence import SequenceState
from quire.cache.table import PageTable
from quire.errors import CacheError, CacheInvariantError
from quire.layout import Area, CacheLayout, pages_for
from quire.pages import PagePool

__all__ = ["check_kinds", "check_sequence", "require_pools"]


def check_sequence(layout: CacheLayout, handle: int, state: SequenceState) -> None:
    """Raise CacheInvariantError unless tables, length and chain of a sequence fit together."""
    _check_tables(layout, handle, state)
    if state.chain is not None:
        _check_chain(layout, handle, state)
    if state.dropped < 0 or (state.dropped and state.chain is not None):
        raise CacheInvariantError(
            f"sequence {handle} dropped {state.dropped} tokens, and the prefix index offers it"
        )


def check_kinds(
    page_size: int, handle: int, length: int, table: PageTable, allocator: PageAllocator
) -> None:
    """Raise CacheInvariantError unless whole pages but the first are packed, and no others."""
    for number, page in enumerate(table.pages, table.first_page):
        whole = 0 < number < length // page_size
        if allocator.is_open(page) == whole:
            raise CacheInvariantError(
                f"page {number} of sequence {handle} of {length} tokens is {page}, which is "
                f"{'an open' if whole else 'a packed'} one"
            )


def _check_tables(layout: CacheLayout, handle: int, state: SequenceState) -> None:
    size = layout.page_size
    for group, table in zip(layout.groups, state.tables, strict=True):
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


def _check_chain(layout: CacheLayout, handle: int, state: SequenceState) -> None:
    assert state.chain is not None
    chain, tail = state.chain, len(state.chain.tail) // TOKEN_BYTES
    if chain.whole * layout.page_size + tail != state.length:
        raise CacheInvariantError(
            f"sequence {handle} of {state.length} tokens stands behind {chain.whole} pages and "
            f"{tail} tokens in the prefix index"
        )
    node = chain.node
    while node.parent is not None:
        for group, table in enumerate(state.tables):
            if node.depth >= table.first_page and table.page(node.depth) != node.pages[group]:
                raise CacheInvariantError(
                    f"page {node.depth} of sequence {handle} is {table.page(node.depth)}, but "
                    f"{node.pages[group]} in the prefix index (group {group})"
                )
        node = node.parent


def require_pools(
    layout: CacheLayout, num_pages: Sequence[int], pools: Sequence[PagePool]
) -> list[tuple[int, int]]:
    """(pages, open pages) of each group; CacheError if pools and page counts do not fit it."""
    if len(num_pages) != len(layout.areas) or len(pools) != len(layout.shapes):
        areas = f" ({len(layout.areas)} areas with open ones)" if True in layout.packs else ""
        raise CacheError(
            f"{len(num_pages)} page counts and {len(pools)} pools for "
            f"{len(layout.groups)} groups{areas} and {len(layout.shapes)} layers"
        )
    counts = dict(zip(layout.areas, num_pages, strict=True))
    wanted = [
        (counts[Area(g)], counts[Area(g, is_open=True)] if packs else 0)
        for g, packs in enumerate(layout.packs)
    ]
    for layer, pool in enumerate(pools):
        pages, opened = wanted[layout.group_of_layer[layer]]
        fits = pool.num_pages >= pages
        if layout.packs[layout.group_of_layer[layer]]:
            fits = pool.num_pages == pages and pool.open_pages >= opened > 0
        if pool.shape != layout.shapes[layer] or not fits:
            raise CacheError(
                f"layer {layer}: a pool of {pool.num_pages} pages of {pool.shape} does not "
                f"fit {pages} pages of {layout.shapes[layer]}"
                + (f"; it has {pool.open_pages} open pages for {opened}" if opened else "")
            )
    return wanted
