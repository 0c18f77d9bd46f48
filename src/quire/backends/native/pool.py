"""Storage of one layer's pages for the native kernels, open and packed ones."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.backends.native import _native
from quire.backends.native.stored import CODES, DTYPES, StoredPages
from quire.errors import BackendError
from quire.pages import PAGE_FORMATS, Groups, PageFormat, PageShape, PlainMover

__all__ = ["DTYPES", "NativePool", "require_formats"]

Array = npt.NDArray[Any]

_FORMATS = tuple(
    name
    for name, format in PAGE_FORMATS.items()
    if (name in CODES if format.kind == "page" else format.dtype.name in DTYPES)
)


class NativePool:
    """K and V of one layer: see :class:`~quire.backends.native.stored.StoredPages`.

    Where whole pages are packed, open ones lie in arrays of their own, in the layout of theirs;
    else all pages lie in the same ones. ``kernels`` pack them.
    """

    def __init__(
        self, kernels: _native.Native, shape: PageShape, num_pages: int, open_pages: int = 0
    ) -> None:
        require_formats(shape.key_format, shape.value_format)
        if shape.by_page and open_pages < 1:
            raise BackendError(
                f"pages of k={shape.key_format.name},v={shape.value_format.name} are packed from "
                "open ones, and the pool is to have none; give open_pages"
            )
        self.shape, self.num_pages, self.open_pages = shape, num_pages, open_pages
        self._kernels = kernels
        self._pages = StoredPages(shape, num_pages + (0 if shape.by_page else open_pages))
        if shape.by_page:
            self._open = StoredPages(shape.open_shape, open_pages)
            self._open_handle = self._open.handle()
            self.handle = self._pages.handle(self._open_handle)
        else:
            self._open = self._pages
            self.handle = self._open_handle = self._pages.handle(
                taking=num_pages if open_pages else 0
            )
        # Page p's head g as page p * heads + g of one head.
        self.by_head = self._handle_by_head()
        self.key, self.key_scale = self._pages.key, self._pages.key_scale
        self.value, self.value_scale = self._pages.value, self._pages.value_scale

    @property
    def arrays(self) -> list[Array]:
        """See :class:`quire.pages.PagePool`."""
        opened = self._open.arrays if self._open is not self._pages else []
        return self._pages.arrays + opened

    def seal(self, source: npt.NDArray[np.int64], target: npt.NDArray[np.int64]) -> None:
        """See :class:`quire.pages.PagePool`; ValueError for ids of the wrong kind."""
        self._kernels.seal(self.handle, source, target)

    def copy_pages(self, source: Sequence[int], target: Sequence[int]) -> None:
        """See :class:`quire.pages.PagePool`."""
        pages, (rows, to) = self._of_kind(source, target)
        pages.copy(rows, to)

    def gather_tokens(self, source: Array, target: Array) -> None:
        """See :class:`quire.pages.PagePool`."""
        if self.open_pages:
            raise BackendError("tokens of packed pages cannot be moved one by one")
        self._pages.gather_tokens(source, target, self.handle)

    def discard(self) -> None:
        """See :class:`quire.pages.PagePool`."""
        self._pages.discard()
        self._open.discard()

    def export_pages(self, pages: Sequence[int]) -> npt.NDArray[np.uint8]:
        """See :class:`quire.pages.PagePool`."""
        stored, (rows,) = self._of_kind(pages)
        return stored.export(rows)

    def import_pages(self, pages: Sequence[int], data: npt.NDArray[np.uint8]) -> None:
        """See :class:`quire.pages.PagePool`."""
        stored, (rows,) = self._of_kind(pages)
        stored.put(rows, data)

    def mover(self, groups: Groups) -> PlainMover:
        """See :class:`quire.pages.PagePool`."""
        return PlainMover(groups)

    def blank_slots(self, data: npt.NDArray[np.uint8], first: int) -> None:
        """See :class:`quire.pages.PagePool`."""
        self._open.blank_slots(data, first, self._open_handle)

    def read_pages(self, pages: Sequence[int]) -> tuple[Array, Array]:
        """See :class:`quire.pages.PagePool`."""
        ids = np.asarray(pages, dtype=np.int64)
        opened = ids >= self.num_pages
        if not self.shape.by_page or not opened.any():
            return self._read(self._pages, ids)
        if opened.all():
            return self._read(self._open, ids - self.num_pages)
        both = zip(
            self._read(self._pages, ids[~opened]),
            self._read(self._open, ids[opened] - self.num_pages),
            strict=True,
        )
        key, value = (_interleave(opened, *sides) for sides in both)
        return key, value

    def _read(self, stored: StoredPages, rows: Array) -> tuple[Array, Array]:
        handle = self.handle if stored is self._pages else self._open_handle
        return stored.read_keys(rows, handle), stored.read_values(rows, handle)

    def _handle_by_head(self) -> _native.Pool:
        if self.shape.by_page:
            return self._pages.handle(self._open.handle(by_head=True), by_head=True)
        return self._pages.handle(by_head=True)

    def _of_kind(self, *lists: Sequence[int]) -> tuple[StoredPages, list[Array]]:
        """The pages that ids name, all open or none, and their rows there."""
        ids = [np.asarray(pages, dtype=np.int64) for pages in lists]
        opened = np.concatenate(ids) >= self.num_pages
        if not self.shape.by_page or not opened.any():
            return self._pages, ids
        if not opened.all():
            raise BackendError("pages of both kinds, open and packed, in one call")
        return self._open, [each - self.num_pages for each in ids]


def require_formats(key: PageFormat, value: PageFormat) -> None:
    """Raise BackendError unless there are kernels for these formats of keys and values."""
    if key.name not in _FORMATS or value.name not in _FORMATS:
        raise BackendError(
            f"the native backend stores {', '.join(_FORMATS)}, and cannot store "
            f"k={key.name},v={value.name} yet; choose among those"
        )


def _interleave(opened: Array, whole: Array, unfinished: Array) -> Array:
    """Pages in order, as float32."""
    out = np.empty((len(opened), *whole.shape[1:]), np.float32)
    out[~opened], out[opened] = whole, unfinished
    return out
