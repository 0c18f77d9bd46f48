"""Of which pages a backend knows what their keys are like, by page id.

What is known is of keys as they are stored, decoded, so every page format has it. It stays valid
until its page is written to again, which the page's generation tells: forks, prefix hits, pages
that come back from a tier or a session need nothing else.
"""

from collections import defaultdict
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.backends import Backend
from quire.cache import KVCache
from quire.evict_choice import EvictChoice

__all__ = ["KnownPages"]

Array = npt.NDArray[Any]


class KnownPages:
    """Of some layers of one group; made for all of them together.

    layers      those that choose pages; they share page tables
    group       their layer group
    summaries   of every layer; None of those that do not choose
    num_pages   how many there can be. Where pages are packed, none but those: the first page and
                the newest, which are not, are always read
    """

    def __init__(
        self, cache: KVCache, backend: Backend, choice: EvictChoice, layers: tuple[int, ...]
    ) -> None:
        self._cache, self.layers = cache, layers
        self.group = cache.layout.group_of_layer[layers[0]]
        self.num_pages = cache.pools[layers[0]].num_pages
        self.summaries = tuple(
            backend.summaries(pool, choice.policy, choice.bits) if layer in layers else None
            for layer, pool in enumerate(cache.pools)
        )
        self._made = np.full(self.num_pages, -1, np.int64)  # the generation that it is known of

    @cached_property
    def bytes_per_page(self) -> int:
        """Bytes of what is known of one page, in all layers."""
        return sum(each.bytes_per_page for each in self.summaries if each is not None)

    @cached_property
    def bytes_of_layers(self) -> dict[tuple[bool, int | None], float]:
        """Bytes of a token's keys and values in layers that choose pages or do not, by window."""
        layout, found = self._cache.layout, defaultdict[tuple[bool, int | None], float](float)
        for layer, shape in enumerate(layout.shapes):
            window = layout.groups[layout.group_of_layer[layer]].window
            found[layer in self.layers, window] += shape.bytes_per_token
        return dict(found)

    @property
    def bytes(self) -> int:
        """Bytes of all that is known."""
        return int((self._made >= 0).sum()) * self.bytes_per_page

    def unknown(self, indptr: Array, indices: Array) -> tuple[Array, Array]:
        """Which pages are not known as they are now, and what they are: ids and generations, int64.

        Of pages ``indices[indptr[s]:indptr[s + 1]]`` of each sequence but the first and the last,
        which are read whatever is known of them. For :meth:`note`.
        """
        now = self._cache.generations(self.group)[: self.num_pages]
        stale = np.zeros(int(indices.max()) + 1, bool)  # ids of open pages are higher
        stale[: self.num_pages] = (self._made != now)[: len(stale)]
        missing = stale[indices]
        missing[indptr[:-1]] = missing[indptr[1:] - 1] = False
        pages = np.unique(indices[missing])
        return pages, now[pages]

    def note(self, pages: Array, generations: Array) -> None:
        """They are known now, as they were in these generations."""
        self._made[pages] = generations
