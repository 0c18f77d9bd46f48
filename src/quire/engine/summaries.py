"""What is known of the keys of each page, kept by page id and made when it is first asked for.

A summary is of the keys as they are stored, decoded, so every page format has one. It stays valid
until its page is written to again, which the page's generation tells: forks, prefix hits, pages
that come back from a tier or a session need nothing else.
"""

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from quire.backends import Backend
from quire.backends.selecting import key_bounds, planes, signatures
from quire.cache import KVCache
from quire.evict_choice import EvictChoice
from quire.pages import PageShape

__all__ = ["Summaries", "summary_bytes"]

Array = npt.NDArray[Any]

WORD = 64
PAGES_AT_ONCE = 256  # that are decoded at a time


def summary_bytes(choice: EvictChoice, shape: PageShape) -> int:
    """Bytes that what ``choice`` remembers of a page takes in one layer."""
    if choice.policy == "quest":
        return 2 * 2 * shape.key_dim * shape.num_kv_heads
    return choice.bits // 8 * shape.page_size * shape.num_kv_heads


class Summaries:
    """Bounds (quest) or signatures (lsh) of the pages of some layers of one group.

    layers   those that choose pages; they share page tables
    """

    def __init__(
        self, cache: KVCache, backend: Backend, choice: EvictChoice, layers: tuple[int, ...]
    ) -> None:
        self._cache, self._backend, self._choice, self.layers = cache, backend, choice, layers
        self._group = cache.layout.group_of_layer[layers[0]]
        # Where pages are packed, none but those: the first page and the newest, which are not, are
        # always read.
        self.num_pages = pages = cache.pools[layers[0]].num_pages
        self._made = np.full(pages, -1, np.int64)  # the generation that a summary is of
        self._held = {layer: self._zeros(cache.layout.shapes[layer], pages) for layer in layers}
        self._planes: dict[int, Array] = {}

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page's summaries, in all layers."""
        return sum(array[0].nbytes for array in self._held.values())

    @property
    def bytes(self) -> int:
        """Bytes of all summaries that were made so far; memory that no page used is not touched."""
        return int((self._made >= 0).sum()) * self.bytes_per_page

    def bring(self, pages: Array) -> None:
        """See to it that there are summaries of complete ``pages``, int64 [n]."""
        now = self._cache.generations(self._group)
        missing = pages[self._made[pages] != now[pages]]
        if not len(missing):
            return
        for start in range(0, len(missing), PAGES_AT_ONCE):
            some = missing[start : start + PAGES_AT_ONCE]
            for layer, held in self._held.items():
                key, _ = self._cache.pools[layer].read_pages(some.tolist())
                held[some] = self._summary(key)
            self._made[some] = now[some]

    def scores(self, layer: int, query: Any, pages: Array) -> Array:
        """What speaks for each of ``pages`` [n], for each KV head, float32 [G, n].

        query   of one token, [1, H, D], the backend's own
        """
        held = self._held[layer]
        if self._choice.policy == "quest":
            return self._backend.score_bounds(query[0], held, pages)
        host = self._backend.to_host(query)[0]
        signs = signatures(host, self._normals(host.shape[-1]))
        return self._backend.score_signatures(signs, held, pages)

    # -- inside ------------------------------------------------------------------------------

    def _zeros(self, shape: PageShape, pages: int) -> Array:
        heads, words = shape.num_kv_heads, self._choice.bits // WORD
        if self._choice.policy == "quest":
            return np.zeros((pages, heads, 2, shape.key_dim), ml_dtypes.bfloat16)
        return np.zeros((pages, heads, shape.page_size, words), np.uint64)

    def _summary(self, key: Array) -> Array:
        """Of keys [n, page_size, G, D]."""
        if self._choice.policy == "quest":
            return key_bounds(key)
        return signatures(key, self._normals(key.shape[-1])).transpose(0, 2, 1, 3)

    def _normals(self, dim: int) -> Array:
        if dim not in self._planes:
            self._planes[dim] = planes(self._choice.bits, dim)
        return self._planes[dim]
