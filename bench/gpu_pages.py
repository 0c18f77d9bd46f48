"""Pools of pages that are full, and page tables of sequences over them, for ``bench/gpu.py``.

Of packed formats each sequence has its first page and its newest open, as in a cache.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quire.backends import Backend
from quire.batch import GroupBatch, OpenPages, PagedBatch
from quire.format_choice import parse_formats
from quire.pages import PageFormat, PageShape

__all__ = ["FullPool", "Heads"]

IntArray = npt.NDArray[np.int64]
_AT_ONCE = 1 << 15  # tokens that are stored in one call


@dataclass(frozen=True)
class Heads:
    """Query heads, KV heads, numbers of a head."""

    query: int
    kv: int
    dim: int


class FullPool:
    """Pages of format ``name``, filled with random keys and values, on the torch device ``kind``.

    ``most``: sequences that read it at a time, which decide how many open pages there are, and
    tokens of all of them. Raises BackendError for a format that the backend does not store.
    """

    def __init__(
        self, backend: Backend, kind: str, name: str, heads: Heads, most: tuple[int, int]
    ) -> None:
        sequences, tokens = most
        pair: tuple[PageFormat, PageFormat] = parse_formats(name).of_layers(1, "bf16")[0]
        backend.require_formats(*pair)
        packed = "page" in (pair[0].kind, pair[1].kind)
        self.heads, self.backend, self.kind = heads, backend, kind
        self.shape = PageShape(32 if packed else 16, heads.kv, heads.dim, heads.dim, *pair)
        self.pages = tokens // self.shape.page_size
        self.opened = 2 * sequences if packed else 0
        self.pool = backend.pool(self.shape, self.pages, self.opened)
        self._fill()

    def _fill(self) -> None:
        size, random = self.shape.page_size, torch.Generator(self.kind).manual_seed(0)
        first = self.pages if self.opened else 0
        end = (self.pages + self.opened if self.opened else self.pages) * size
        for start in range(first * size, end, _AT_ONCE):
            slots = np.arange(start, min(start + _AT_ONCE, end), dtype=np.int64)
            shape = len(slots), self.heads.kv, self.heads.dim
            key, value = (torch.randn(shape, generator=random, device=self.kind) for _ in range(2))
            self.backend.append(self.pool, slots, key, value)
        for start in range(0, self.pages if self.opened else 0, _AT_ONCE):
            target = np.arange(start, min(start + _AT_ONCE, self.pages), dtype=np.int64)
            self.pool.seal(self.pages + target % self.opened, target)

    def batch(self, sequences: int, context: int, new: int) -> PagedBatch:
        """The last ``new`` tokens of sequences of ``context``, a multiple of a page, each."""
        each = np.arange(sequences + 1, dtype=np.int64)
        positions = np.tile(np.arange(context - new, context, dtype=np.int64), sequences)
        group = self._tables(sequences, context // self.shape.page_size)
        return PagedBatch(positions, each * new, (group,), (0,))

    def _tables(self, sequences: int, pages: int) -> GroupBatch:
        size, none = self.shape.page_size, np.zeros(sequences, np.int64)
        each = np.arange(sequences + 1, dtype=np.int64)
        ids = np.random.default_rng(0).permutation(self.pages)[: sequences * pages]
        ids = ids.astype(np.int64).reshape(sequences, pages)
        group = GroupBatch(
            size,
            None,
            np.empty(0, np.int64),
            each * pages,
            ids.reshape(-1),
            np.full(sequences, size, np.int64),
            none,
        )
        if not self.opened:
            return group
        ids[:, 0] = self.pages + each[:-1]
        own = self.pages + sequences + each[:-1]
        nothing = np.empty(0, np.int64)
        opened = OpenPages(each, own, np.full(sequences, pages - 1), nothing, nothing)
        return replace(group, indices=ids.reshape(-1), open=opened)

    def moved(self, sequences: int, context: int) -> int:
        """Bytes of pages that a decoded token of each sequence reads."""
        pages = context // self.shape.page_size
        if not self.opened:
            return sequences * pages * self.shape.bytes_per_page
        open_bytes = 2 * self.shape.open_shape.bytes_per_page
        return sequences * ((pages - 2) * self.shape.bytes_per_page + open_bytes)

    def seen(self, batch: PagedBatch) -> tuple[Any, Any]:
        """Keys and values [context, kv heads, D] of the first sequence as stored, float64."""
        group = batch.groups[0]
        last = int(group.indptr[1] - group.indptr[0]) - 1
        stored = self.pool.read_pages(group.pages_seen(0, last).tolist())
        key, value = (
            torch.from_numpy(np.asarray(side, np.float32)).to(self.kind).flatten(0, 1).double()
            for side in stored
        )
        return key, value
