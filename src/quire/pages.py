"""Pages: what one holds and costs in bytes, and the verbs of the pools that hold them.

How numbers are stored is in ``formats.py``. This module does not know which page belongs to whom.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from quire.formats import PAGE_FORMATS, PageFormat, Part, page_format

__all__ = [
    "PAGE_FORMATS",
    "Groups",
    "Incoming",
    "PageBytes",
    "PageFormat",
    "PageMover",
    "PagePool",
    "PageShape",
    "Pending",
    "PlainMover",
    "export_rows",
    "import_rows",
    "page_format",
    "whole",
]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class PageShape:
    """One layer's share of a page: ``page_size`` tokens, K and V of every KV head.

    Raises ConfigError for a page size that a format cannot do with.
    """

    page_size: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    key_format: PageFormat
    value_format: PageFormat

    def __post_init__(self) -> None:
        self.key_parts, self.value_parts  # noqa: B018  (they refuse page sizes)

    @property
    def by_page(self) -> bool:
        """True if keys or values are packed a whole page at once, from an open page."""
        return "page" in (self.key_format.kind, self.value_format.kind)

    @property
    def rotated(self) -> bool:
        """True if keys of all pages, open ones too, are turned (:mod:`quire.rotation`)."""
        return self.key_format.rotated

    @property
    def open_shape(self) -> "PageShape":
        """A page that still takes tokens: bf16 where whole pages are packed, else as it is."""
        if not self.by_page:
            return self
        formats = self.key_format, self.value_format
        bf16 = page_format("bf16")
        key, value = (replace(bf16, rotated=f.rotated) if f.kind == "page" else f for f in formats)
        return replace(self, key_format=key, value_format=value)

    @property
    def key_parts(self) -> tuple[Part, ...]:
        """Shape and dtype of each array that keys of one page are stored as."""
        return self.key_format.key.parts(self.page_size, self.num_kv_heads, self.key_dim)

    @property
    def value_parts(self) -> tuple[Part, ...]:
        """Shape and dtype of each array that values of one page are stored as."""
        return self.value_format.value.parts(self.page_size, self.num_kv_heads, self.value_dim)

    @property
    def key_bytes_per_page(self) -> int:
        """Bytes that keys of a whole page take, scales included."""
        return self.key_format.key.page_bytes(self.page_size, self.num_kv_heads, self.key_dim)

    @property
    def bytes_per_page(self) -> int:
        """Bytes that a whole page takes in this layer, scales included; a finished one."""
        value = self.value_format.value
        return self.key_bytes_per_page + value.page_bytes(
            self.page_size, self.num_kv_heads, self.value_dim
        )

    @property
    def bytes_per_token(self) -> float:
        """Bytes that K and V of one token take in this layer: exactly, and an int if whole."""
        return whole(Fraction(self.bytes_per_page, self.page_size))


def whole(number: Fraction) -> float:
    """``number`` as an int if it is one, else as a float: bytes a token are exact as floats."""
    return number.numerator if number.denominator == 1 else float(number)


def export_rows(arrays: Sequence[Array], pages: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """Rows ``pages`` of C-contiguous arrays, the bytes of each array's row behind the other's."""
    ids = np.asarray(pages, dtype=np.int64)
    rows = [array.reshape(len(array), -1).view(np.uint8) for array in arrays]
    out = np.empty((len(ids), sum(row.shape[1] for row in rows)), np.uint8)
    start = 0
    for row in rows:
        np.take(row, ids, axis=0, out=out[:, start : start + row.shape[1]])
        start += row.shape[1]
    return out


def import_rows(arrays: Sequence[Array], pages: npt.ArrayLike, data: npt.NDArray[np.uint8]) -> None:
    """Overwrite rows ``pages`` with what :func:`export_rows` gave."""
    ids = np.asarray(pages, dtype=np.int64)
    start = 0
    for array in arrays:
        row = array.reshape(len(array), -1).view(np.uint8)
        row[ids] = data[:, start : start + row.shape[1]]
        start += row.shape[1]


class PagePool(Protocol):
    """The storage of all pages of one layer, owned by a backend in a layout of its own.

    Ids below ``num_pages`` are pages of ``shape``; the ``open_pages`` ids from there on are pages
    of ``shape.open_shape``, in groups of layers of which one packs whole pages. Tokens are stored
    in open pages then, and reach the others by :meth:`seal` alone.
    """

    @property
    def shape(self) -> PageShape:
        """What one page holds."""

    @property
    def num_pages(self) -> int:
        """Pages of ``shape`` in this pool; their ids are 0 to ``num_pages - 1``."""

    @property
    def open_pages(self) -> int:
        """Pages of ``shape.open_shape``; ids ``num_pages`` to ``num_pages + open_pages - 1``."""

    @property
    def arrays(self) -> Sequence[Array]:
        """All that pages are stored in, for those who measure; none where it is no host memory."""

    def seal(self, source: npt.NDArray[np.int64], target: npt.NDArray[np.int64]) -> None:
        """Pack whole open pages ``source[i]`` into the pages ``target[i]``, which are not open.

        Numbers of a format that stores each token on its own are copied as they lie. The open
        pages stay as they are. int64 ``[n]`` each.
        """

    def copy_pages(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Copy whole pages, ``source[i]`` to ``target[i]``; no page is in both lists.

        All are open, or none is.
        """

    def gather_tokens(self, source: npt.NDArray[np.int64], target: npt.NDArray[np.int64]) -> None:
        """Move the stored bytes of single tokens, all read before any is written.

        source   int64 ``[num_kv_heads, n]``: for each KV head, the slot of each token
        target   int64 ``[n]``: the slot that it goes to, the same for all heads; each once

        BackendError for a format that does not store each token on its own.
        """

    def discard(self) -> None:
        """Forget what all pages hold, and give their memory back to the system if it can be."""

    def read_pages(self, pages: Sequence[int]) -> tuple[Array, Array]:
        """Copies of K ``[n, page_size, num_kv_heads, key_dim]`` and V.

        In the stored dtype; decoded to float32 where the format is a quantised one, or that of
        one of the pages is. Rotated keys are given as they are stored, turned. Slots that hold no
        token have undefined content.
        """

    def export_pages(self, pages: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Copies of whole pages as they lie in the pool, uint8 ``[n, shape.bytes_per_page]``.

        All are open, which have ``shape.open_shape.bytes_per_page``, or none is. Keys, then
        values, scales included, in the backend's own layout: for :meth:`import_pages` of a pool of
        the same backend, variant and shape, and for nobody else.
        """

    def import_pages(self, pages: Sequence[int], data: npt.NDArray[np.uint8]) -> None:
        """Overwrite whole pages with what :meth:`export_pages` gave of pages of the same kind."""

    def blank_slots(self, data: npt.NDArray[np.uint8], first: int) -> None:
        """Zero the slots from ``first`` on in what :meth:`export_pages` gave, in place.

        Of open pages, where there are such: others have no empty slots.
        """

    def mover(self, groups: "Groups") -> "PageMover":
        """What moves pages of all layers of each group to and from host memory.

        ``groups``: the pools of each group's layers, all of this backend.
        """


Groups = Sequence[Sequence[PagePool]]
PageBytes = npt.NDArray[np.uint8] | Sequence[npt.NDArray[np.uint8]]  # bytes of a page each


class Pending(Protocol):
    """Copies of pages on their way to host memory, as the pages were when the copying was begun."""

    @property
    def ready(self) -> bool:
        """True if :meth:`take` would not wait."""

    def take(self) -> npt.NDArray[np.uint8]:
        """The copies, uint8 ``[n, bytes of a page]``, once; waits for them.

        The array is the caller's until the next :meth:`PageMover.begin_export`, no longer.
        """


class Incoming(Protocol):
    """Pages that are being overwritten with bytes from host memory, in the order they are put."""

    def put(self, group: int, pages: Sequence[int], data: PageBytes) -> None:
        """Overwrite pages, all open or none, with a row of ``data`` each, which is copied first.

        From any one thread beside the one that drives steps. Nobody else may read or write the
        pages before :meth:`end`.
        """

    def end(self) -> None:
        """Whatever is computed or moved from now on comes after all that was put; does not wait.

        From the thread that drives steps, when no more is put.
        """


class PageMover(Protocol):
    """Whole pages of all layers of a group between the pool and host memory, beside the steps.

    Bytes of a page are those of :meth:`PagePool.export_pages`, layer after layer. But for
    :meth:`Incoming.put` all is called by the thread that drives steps.
    """

    @property
    def depth(self) -> int:
        """How many exports may be on their way before :meth:`begin_export` waits for the oldest."""

    def piece(self, group: int, page: int) -> int:
        """Most pages of one export, of those of the kind of ``page``."""

    def begin_export(self, group: int, pages: Sequence[int]) -> Pending:
        """Begin to copy pages, all open or none. They may be written to when this returns."""

    def begin_import(self) -> Incoming:
        """Begin to overwrite pages, behind all that was begun before."""

    def close(self) -> None:
        """Let memory go; exports that were not taken are lost."""


class PlainMover:
    """See :class:`PageMover`: for pools in host memory, where all is done when it is begun."""

    depth = 1

    def __init__(self, groups: Groups) -> None:
        self._groups = groups

    def piece(self, group: int, page: int) -> int:
        """So few that no copy of many pages is made beside the one that is kept."""
        return 8

    def begin_export(self, group: int, pages: Sequence[int]) -> "_Copied":
        """See :class:`PageMover`."""
        rows = [pool.export_pages(pages) for pool in self._groups[group]]
        return _Copied(np.concatenate(rows, axis=1))

    def begin_import(self) -> "PlainMover":
        """See :class:`PageMover`."""
        return self

    def put(self, group: int, pages: Sequence[int], data: PageBytes) -> None:
        """See :class:`Incoming`."""
        if isinstance(data, np.ndarray):
            self._put(group, pages, data)
            return
        for page, row in zip(pages, data, strict=True):  # not put together first: a copy less
            self._put(group, [page], row[None])

    def _put(self, group: int, pages: Sequence[int], data: npt.NDArray[np.uint8]) -> None:
        start = 0
        for pool in self._groups[group] if len(pages) else ():
            is_open = pages[0] >= pool.num_pages
            size = (pool.shape.open_shape if is_open else pool.shape).bytes_per_page
            pool.import_pages(pages, data[:, start : start + size])
            start += size

    def end(self) -> None:
        """See :class:`Incoming`."""

    def close(self) -> None:
        """See :class:`PageMover`."""


@dataclass(frozen=True)
class _Copied:
    """An export that is done."""

    data: npt.NDArray[np.uint8]
    ready: bool = True

    def take(self) -> npt.NDArray[np.uint8]:
        """See :class:`Pending`."""
        return self.data
