"""A context larger than the pool: one sequence whose pages live below it.

All of its pages are kept by a store, in host memory or in a file. A forward pass goes layer by
layer: the layer's pages are brought into a staging pool, the backend appends to them and attends
over them as it always does, so that the bits are the same, and the pages that were written go back.
While one layer computes, the next one is fetched in a thread, if the budget has room for two.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, overload

import numpy as np
import numpy.typing as npt

from quire.backends import Backend
from quire.batch import PagedBatch
from quire.cache import KVCache
from quire.errors import TierError
from quire.layout import CacheLayout
from quire.pages import PagePool, PageShape

__all__ = ["FileStore", "LayerStream", "MemoryStore", "PageStore", "stream_cache"]

Bytes = npt.NDArray[np.uint8]


class PageStore(Protocol):
    """All pages of all layers of one sequence, as raw bytes."""

    def read(self, layer: int, pages: Sequence[int]) -> Bytes:
        """Copies of pages of a layer, uint8 ``[n, bytes_per_page]``."""

    def write(self, layer: int, pages: Sequence[int], data: Bytes) -> None:
        """Overwrite pages of a layer."""

    def close(self) -> None:
        """Forget everything."""


class MemoryStore:
    """Pages in host memory."""

    def __init__(self, shapes: Sequence[PageShape], num_pages: Sequence[int]) -> None:
        self._layers = [
            np.empty((count, shape.bytes_per_page), np.uint8)
            for shape, count in zip(shapes, num_pages, strict=True)
        ]

    def read(self, layer: int, pages: Sequence[int]) -> Bytes:
        """See :class:`PageStore`."""
        return self._layers[layer][pages]

    def write(self, layer: int, pages: Sequence[int], data: Bytes) -> None:
        """See :class:`PageStore`."""
        self._layers[layer][pages] = data

    def close(self) -> None:
        """See :class:`PageStore`."""
        self._layers.clear()


class FileStore:
    """Pages in a file without a name, which is gone when the process is.

    Raises TierError, in :meth:`write` too, if the disk has no room.
    """

    def __init__(
        self, directory: Path, shapes: Sequence[PageShape], num_pages: Sequence[int]
    ) -> None:
        self._sizes = [shape.bytes_per_page for shape in shapes]
        ends = np.cumsum([size * count for size, count in zip(self._sizes, num_pages, strict=True)])
        self._starts = [0, *ends.tolist()[:-1]]
        try:
            self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115  (closed by close)
            os.posix_fallocate(self._file.fileno(), 0, int(ends[-1]))
        except OSError as error:
            raise TierError(
                f"no room for {int(ends[-1])} bytes of streamed pages in {directory}: "
                f"{error.strerror}; shorten the prompt or make room"
            ) from error

    def read(self, layer: int, pages: Sequence[int]) -> Bytes:
        """See :class:`PageStore`."""
        size = self._sizes[layer]
        out = np.empty((len(pages), size), np.uint8)
        for start, count in _runs(pages):
            view = out[start : start + count].data.cast("B")
            offset = self._starts[layer] + pages[start] * size
            while view.nbytes:
                read = os.preadv(self._file.fileno(), [view], offset)
                if read == 0:
                    raise TierError("the file of streamed pages is shorter than it was made")
                view, offset = view[read:], offset + read
        return out

    def write(self, layer: int, pages: Sequence[int], data: Bytes) -> None:
        """See :class:`PageStore`."""
        size = self._sizes[layer]
        for start, count in _runs(pages):
            view = np.ascontiguousarray(data[start : start + count]).data.cast("B")
            offset = self._starts[layer] + pages[start] * size
            while view.nbytes:
                try:
                    written = os.pwritev(self._file.fileno(), [view], offset)
                except OSError as error:
                    raise TierError(
                        f"the file of streamed pages cannot be written: {error.strerror}"
                    ) from error
                view, offset = view[written:], offset + written

    def close(self) -> None:
        """See :class:`PageStore`."""
        self._file.close()


class LayerStream(Sequence[PagePool]):
    """The pools of one forward pass, each there from when it is asked for until the next is.

    staging   one pool, or two to fetch ahead, of each distinct page shape
    bytes_read, bytes_written   what went through the store since it was made
    """

    def __init__(self, layout: CacheLayout, backend: Backend, store: PageStore) -> None:
        self._layout, self._backend, self._store = layout, backend, store
        self._staging: dict[int, PagePool] = {}  # of each layer
        self._buffers = 0
        self._ahead = ThreadPoolExecutor(1)
        self._fetched: tuple[int, Future[None]] | None = None
        self._batch: PagedBatch | None = None
        self._held: list[list[int]] = []
        self._touched: list[list[int]] = []
        self._open: int | None = None
        self.bytes_read = self.bytes_written = 0

    def allocate(self, num_pages: int, buffers: int) -> None:
        """Make ``buffers`` staging pools of ``num_pages`` pages for each page shape."""
        for shape in dict.fromkeys(self._layout.shapes):
            made = [self._backend.pool(shape, num_pages) for _ in range(buffers)]
            # Layers of the shape take turns, so that the next one never meets one that is open.
            layers = [n for n, other in enumerate(self._layout.shapes) if other == shape]
            self._staging |= {n: made[turn % buffers] for turn, n in enumerate(layers)}
        self._buffers = buffers

    def begin(self, batch: PagedBatch) -> None:
        """The pass that follows computes ``batch``, which has one sequence."""
        size = self._layout.page_size
        self._batch, self._open, self._fetched = batch, None, None
        self._held, self._touched = [], []
        for group in batch.groups:
            touched = np.unique(group.slots // size).tolist()
            held = group.indices.tolist()
            before = int(batch.places[0]) // size if len(batch.places) else 0
            # Pages that hold tokens of earlier passes: those up to the first new token's.
            earlier = before - int(group.first_page[0]) + (int(batch.places[0]) % size > 0)
            self._held.append(held[: max(0, earlier)])
            self._touched.append(touched)

    def end(self) -> None:
        """The pass is over: what it wrote goes to the store."""
        self._put_back()
        if self._fetched is not None:
            self._fetched[1].result()
            self._fetched = None

    def close(self) -> None:
        """Let the staging pools go."""
        self._ahead.shutdown()
        self._staging.clear()

    def __len__(self) -> int:
        return len(self._layout.shapes)

    def __iter__(self) -> Iterator[PagePool]:
        return (self[layer] for layer in range(len(self)))

    @overload
    def __getitem__(self, layer: int) -> PagePool: ...
    @overload
    def __getitem__(self, layer: slice) -> Sequence[PagePool]: ...
    def __getitem__(self, layer: int | slice) -> PagePool | Sequence[PagePool]:
        assert isinstance(layer, int)
        self._put_back()
        if self._fetched is not None and self._fetched[0] == layer:
            self._fetched[1].result()
        else:
            self._fetch(layer)
        self._open, self._fetched = layer, None
        if self._buffers > 1 and layer + 1 < len(self):
            self._fetched = (layer + 1, self._ahead.submit(self._fetch, layer + 1))
        return self._pool(layer)

    def _pool(self, layer: int) -> PagePool:
        return self._staging[layer]

    def _group(self, layer: int) -> int:
        return self._layout.group_of_layer[layer]

    def _fetch(self, layer: int) -> None:
        pages = self._held[self._group(layer)]
        if pages:
            self._pool(layer).import_pages(pages, self._store.read(layer, pages))
            self.bytes_read += len(pages) * self._layout.shapes[layer].bytes_per_page

    def _put_back(self) -> None:
        if self._open is None:
            return
        pages = self._touched[self._group(self._open)]
        if pages:
            data = self._pool(self._open).export_pages(pages)
            self._store.write(self._open, pages, data)
            self.bytes_written += data.nbytes
        self._open = None


class _NoPool:
    """Stands for the pools in the books of a streamed sequence: shapes, and no storage."""

    def __init__(self, shape: PageShape, num_pages: int) -> None:
        self.shape, self.num_pages, self.open_pages = shape, num_pages, 0


def stream_cache(layout: CacheLayout, num_pages: Sequence[int]) -> KVCache:
    """The books of one streamed sequence; its page ids are places in the store."""
    pools = [
        _NoPool(shape, num_pages[layout.group_of_layer[layer]])
        for layer, shape in enumerate(layout.shapes)
    ]
    return KVCache(layout, num_pages, pools)  # type: ignore[arg-type]


def _runs(pages: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(index, count) of stretches of ``pages`` that are consecutive numbers."""
    start = 0
    for at in range(1, len(pages) + 1):
        if at == len(pages) or pages[at] != pages[at - 1] + 1:
            yield start, at - start
            start = at
