"""Storage of one layer's pages as their formats define them, in NumPy arrays."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.errors import BackendError
from quire.formats import Coding, Part, Stored
from quire.pages import Groups, PageShape, PlainMover, export_rows, import_rows

__all__ = ["ReferencePool"]

Array = npt.NDArray[Any]


class ReferencePool:
    """K and V of one layer: the arrays that their formats define, token-major.

    ``key`` and ``value`` are ``[num_pages, page_size, num_kv_heads, ...]`` each: numbers, or
    payload and scale. ``open_key`` and ``open_value`` are those of the open pages.
    """

    def __init__(self, shape: PageShape, num_pages: int, open_pages: int = 0) -> None:
        self.shape, self.num_pages, self.open_pages = shape, num_pages, open_pages
        self._open_shape = shape.open_shape
        try:
            self.discard()
        except MemoryError as error:
            raise BackendError(
                f"no memory for {num_pages} pages of {shape.bytes_per_page} bytes and {open_pages} "
                f"open ones of {self._open_shape.bytes_per_page}; lower kv_memory"
            ) from error

    def discard(self) -> None:
        """See :class:`quire.pages.PagePool`."""
        shape, open_shape = self.shape, self._open_shape
        self.key = _zeros(self.num_pages, shape.key_parts)
        self.value = _zeros(self.num_pages, shape.value_parts)
        self.open_key = _zeros(self.open_pages, open_shape.key_parts)
        self.open_value = _zeros(self.open_pages, open_shape.value_parts)

    @property
    def arrays(self) -> list[Array]:
        """See :class:`quire.pages.PagePool`."""
        return [*self.key, *self.value, *self.open_key, *self.open_value]

    def store(self, slots: Array, key: Array, value: Array) -> None:
        """Put key and value float32 [T, G, D] of T tokens, encoded, into ``slots`` int64 [T]."""
        into, shape = (self.key, self.value), self.shape
        if self.open_pages or shape.by_page:
            into, shape = (self.open_key, self.open_value), self._open_shape
            slots = slots - self.num_pages * shape.page_size
        if len(slots) and (slots.min() < 0 or slots.max() >= len(into[0][0]) * shape.page_size):
            raise BackendError("tokens are to be stored in slots that the pool does not have")
        codings = shape.key_format.key, shape.value_format.value
        for held, coding, new in zip(into, codings, (key, value), strict=True):
            for array, part in zip(held, coding.encode(new), strict=True):
                array.reshape(-1, *array.shape[2:])[slots] = part

    def seal(self, source: Array, target: Array) -> None:
        """See :class:`quire.pages.PagePool`."""
        rows = source - self.num_pages
        for side in self._sides():
            stored = tuple(array[rows] for array in side.open)
            if side.coding is not side.open_coding:
                stored = side.coding.encode(side.open_coding.decode(stored, side.dim))
            for array, part in zip(side.packed, stored, strict=True):
                array[target] = part

    def copy_pages(self, source: Sequence[int], target: Sequence[int]) -> None:
        """See :class:`quire.pages.PagePool`."""
        arrays, (rows, to) = self._of_kind(source, target)
        for array in arrays:
            array[to] = array[rows]

    def gather_tokens(self, source: Array, target: Array) -> None:
        """See :class:`quire.pages.PagePool`."""
        if self.open_pages or self.shape.by_page:
            raise BackendError("tokens of packed pages cannot be moved one by one")
        heads = np.arange(self.shape.num_kv_heads)
        for array in (*self.key, *self.value):
            tokens = array.reshape(-1, *array.shape[2:])
            tokens[target] = tokens[source.T, heads]

    def read_pages(self, pages: Sequence[int]) -> tuple[Array, Array]:
        """See :class:`quire.pages.PagePool`."""
        ids = np.asarray(pages, dtype=np.int64)
        key, value = (side.read(ids, self.num_pages) for side in self._sides())
        return key, value

    def export_pages(self, pages: Sequence[int]) -> npt.NDArray[np.uint8]:
        """See :class:`quire.pages.PagePool`."""
        arrays, (rows,) = self._of_kind(pages)
        return export_rows(arrays, rows)

    def import_pages(self, pages: Sequence[int], data: npt.NDArray[np.uint8]) -> None:
        """See :class:`quire.pages.PagePool`."""
        arrays, (rows,) = self._of_kind(pages)
        import_rows(arrays, rows, data)

    def mover(self, groups: Groups) -> PlainMover:
        """See :class:`quire.pages.PagePool`."""
        return PlainMover(groups)

    def blank_slots(self, data: npt.NDArray[np.uint8], first: int) -> None:
        """See :class:`quire.pages.PagePool`."""
        start, size, shape = 0, self.shape.page_size, self._open_shape
        for parts in (shape.key_parts, shape.value_parts):
            for dims, dtype in parts:
                page = int(np.prod(dims)) * dtype.itemsize
                data[:, start + first * (page // size) : start + page] = 0
                start += page

    def one_head(self, head: int) -> "ReferencePool":
        """The same memory as a pool of one KV head."""
        alone, of_head = copy(self), slice(head, head + 1)
        alone.shape = replace(self.shape, num_kv_heads=1)
        alone._open_shape = alone.shape.open_shape
        alone.key, alone.value, alone.open_key, alone.open_value = (
            tuple(array[:, :, of_head] for array in held)
            for held in (self.key, self.value, self.open_key, self.open_value)
        )
        return alone

    def block(self, slots: Array, offset: int, length: int) -> tuple[Array, Array]:
        """K and V of one block as float32 ``[num_kv_heads, length, dim]``.

        ``slots`` int64 [at most length - offset] fill it from ``offset`` on; the rest is zero.
        """
        page, place = np.divmod(slots, self.shape.page_size)
        pages, at = np.unique(page, return_inverse=True)
        blocks = []
        for read in self.read_pages(pages.tolist()):
            out = np.zeros((read.shape[2], length, read.shape[3]), np.float32)
            out[:, offset : offset + len(slots)] = read[at, place].transpose(1, 0, 2)
            blocks.append(out)
        return blocks[0], blocks[1]

    def _sides(self) -> tuple["_Side", "_Side"]:
        """Keys, then values."""
        shape, opened = self.shape, self._open_shape
        keys = shape.key_format.key, self.open_key, opened.key_format.key
        values = shape.value_format.value, self.open_value, opened.value_format.value
        return _Side(self.key, *keys, shape.key_dim), _Side(self.value, *values, shape.value_dim)

    def _of_kind(self, *lists: Sequence[int]) -> tuple[list[Array], list[Array]]:
        """The arrays that pages lie in, all open or none, and their rows there."""
        ids = [np.asarray(pages, dtype=np.int64) for pages in lists]
        joined = np.concatenate(ids)
        is_open = joined >= self.num_pages
        if not is_open.any():
            return [*self.key, *self.value], ids
        if not is_open.all():
            raise BackendError("pages of both kinds, open and packed, in one call")
        return [*self.open_key, *self.open_value], [each - self.num_pages for each in ids]


@dataclass(frozen=True)
class _Side:
    """Keys, or values: arrays of both kinds of pages, and how numbers are stored in them."""

    packed: Stored
    coding: Coding
    open: Stored
    open_coding: Coding
    dim: int

    def read(self, ids: Array, num_pages: int) -> Array:
        """[n, page_size, heads, dim] of pages ``ids``, of which those from ``num_pages`` are open.

        As stored if that is one array of numbers and all are of that kind, else float32.
        """
        is_open = ids >= num_pages
        rows = tuple(array[ids[is_open] - num_pages] for array in self.open)
        if len(ids) and is_open.all():
            return rows[0] if len(rows) == 1 else self.open_coding.decode(rows, self.dim)
        whole = tuple(array[ids[~is_open]] for array in self.packed)
        if not is_open.any():
            return whole[0] if len(whole) == 1 else self.coding.decode(whole, self.dim)
        out = np.empty((len(ids), *rows[0].shape[1:]), np.float32)
        out[is_open] = self.open_coding.decode(rows, self.dim)
        out[~is_open] = self.coding.decode(whole, self.dim)
        return out


def _zeros(pages: int, parts: Sequence[Part]) -> Stored:
    return tuple(np.zeros((pages, *shape), dtype) for shape, dtype in parts)
