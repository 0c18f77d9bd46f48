"""Dropping tokens of a live sequence: those that it keeps are gathered into its first pages.

Which tokens are kept is others' to decide. Each layer and each KV head may keep its own, the same
number everywhere, so that one page table goes on to serve them all. Keys are rotated for their
position already, so a slot may hold different tokens for different heads.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from quire.cache.allocator import PageAllocator
from quire.cache.prefix import PrefixIndex
from quire.cache.sequence import SequenceState
from quire.errors import CacheError, CacheFull
from quire.layout import CacheLayout, pages_for
from quire.pages import PagePool

__all__ = ["Compactor", "Keep", "require_compactable", "require_keep"]

Keep = Sequence[npt.NDArray[np.int64]]


def require_compactable(layout: CacheLayout) -> None:
    """Raise CacheError, with the reason, unless single tokens can be dropped in this layout."""
    for group in layout.groups:
        if group.window is not None:
            raise CacheError(
                f"tokens cannot be dropped where layers keep a {group.name()}: what they gave back "
                "is counted by position; evict only models whose layers all keep every token"
            )
    for layer, shape in enumerate(layout.shapes):
        for format in (shape.key_format, shape.value_format):
            if format.kind == "page":
                raise CacheError(
                    f"tokens cannot be dropped from {format.name} pages (layer {layer}), which "
                    "store tokens together; choose a format that stores each on its own, such as "
                    "int8"
                )


def require_keep(layout: CacheLayout, length: int, keep: Keep) -> None:
    """Raise CacheError unless ``keep`` is what :meth:`KVCache.evict` takes for ``length`` tokens"""
    if len(keep) != len(layout.shapes):
        raise CacheError(f"places to keep for {len(keep)} layers, not {len(layout.shapes)}")
    kept = keep[0].shape[-1]
    for layer, (places, shape) in enumerate(zip(keep, layout.shapes, strict=True)):
        if places.dtype != np.int64 or places.shape != (shape.num_kv_heads, kept) or kept == 0:
            raise CacheError(
                f"layer {layer}: places to keep must be int64 [{shape.num_kv_heads}, {kept}], one "
                f"row a KV head and at least one place, not {places.dtype} {list(places.shape)}"
            )
        if (np.diff(places) <= 0).any() or places.min() < 0 or places.max() >= length:
            raise CacheError(
                f"layer {layer}: places to keep must ascend and lie in the {length} tokens of the "
                "sequence"
            )


class Compactor:
    """Gathers kept tokens; works on the pools, the allocator and the index of one cache."""

    def __init__(
        self,
        layout: CacheLayout,
        pools: Sequence[PagePool],
        allocator: PageAllocator,
        index: PrefixIndex | None,
    ) -> None:
        self._size, self._pools = layout.page_size, pools
        self._allocator, self._index = allocator, index

    def compact(self, state: SequenceState, keep: Keep) -> None:
        """Keep ``keep`` alone. CacheFull, with nothing changed, if a page that others hold would
        have to be replaced and none is free.

        If anything else raises on the way, books balance but the numbers of the sequence are
        undefined: release it.
        """
        table, kept = state.tables[0], keep[0].shape[1]
        end = pages_for(kept, self._size)
        first = _unchanged(keep) // self._size
        before = np.array(table.pages, np.int64)
        replaced = self._replacements(table.pages[first:end])
        try:
            written = [p for p in table.pages[first:end] if p not in replaced]
            self._leave_index(state, written)
            for page in written:
                self._allocator.rewrite(page)
            after = before[:end].copy()
            after[first:] = [replaced.get(page, page) for page in after[first:].tolist()]
            moved = np.arange(first * self._size, kept)
            target = after[moved // self._size] * self._size + moved % self._size
            for pool, places in zip(self._pools, keep, strict=True) if len(moved) else ():
                source = places[:, len(places[0]) - len(moved) :]
                pool.gather_tokens(
                    before[source // self._size] * self._size + source % self._size, target
                )
        except BaseException:
            self._allocator.release(replaced.values())
            raise
        self._allocator.release([*replaced, *table.drop_back(end)])
        for at in range(first, end):
            table.pages[at] = int(after[at])
        state.dropped += state.length - kept
        state.length = kept

    def _replacements(self, pages: Sequence[int]) -> dict[int, int]:
        """New pages for those of ``pages`` that must not be written.

        A page that only the index keeps beside the sequence is replaced while there is room.
        """
        allocator = self._allocator
        shared = [page for page in pages if allocator.references(page) > 1]
        cached = [p for p in pages if allocator.references(p) == 1 and not allocator.is_private(p)]
        if len(shared) > allocator.available:
            raise CacheFull(
                f"dropping tokens writes {len(shared)} pages that other sequences hold, too, but "
                f"{allocator.available} of {allocator.num_pages} are free to take their place"
            )
        cached = cached[: allocator.available - len(shared)]
        moved = [*shared, *cached]
        return dict(zip(moved, allocator.allocate(len(moved)), strict=True))

    def _leave_index(self, state: SequenceState, written: Sequence[int]) -> None:
        """Nothing of ``state`` is offered from now on, nor what ``written`` is about to lose."""
        if self._index is None:
            return
        if state.chain is not None:
            self._index.leave(state.chain.node)
            state.chain = None
        self._index.evict(0, written)


def _unchanged(keep: Keep) -> int:
    """How many leading places every layer and head keeps where they are."""
    kept = keep[0].shape[1]
    moved = [np.flatnonzero((places != np.arange(kept)).any(axis=0)) for places in keep]
    return min((int(at[0]) for at in moved if len(at)), default=kept)
