"""Pages of one shape, keys and values of one layer, in the layout that the native kernels read."""

import contextlib
import math
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.backends.native import _native, packed
from quire.errors import BackendError
from quire.formats import Part
from quire.pages import PageFormat, PageShape, export_rows, import_rows

__all__ = ["CODES", "DTYPES", "StoredPages"]

Array = npt.NDArray[Any]

# The extension's dtype codes, by dtype; and by page format, where pages are packed.
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "float8_e4m3fn": 4}
CODES = {"int4": 5, "int2": 6}


class StoredPages:
    """``count`` pages, keys dimension-major inside a page.

    ``n`` numbers that are multiplied together lie side by side, 2 of bf16, 4 of int8 and fp8, where
    pages are a multiple of 16 tokens and ``dim`` is one of n (of values: of 16); else n is 1:

    K  ``[page, head, dim / n, token, n]``
    V  ``[page, head, token / n, dim, n]``

    Int8 numbers are stored as bytes with 128 added. Scales are bf16 ``[page, head, token]`` in
    arrays of their own, None where there are none. Packed numbers are bytes ``[page, all]`` with
    minima and steps among them: see ``packed.py``.
    """

    def __init__(self, shape: PageShape, count: int) -> None:
        self.shape, self.count = shape, count
        self._memory: list[mmap.mmap] = []
        try:
            self.key, self.key_scale = self._zeros(shape.key_format, shape.key_parts)
            self.value, self.value_scale = self._zeros(shape.value_format, shape.value_parts)
        except (OSError, OverflowError, ValueError) as error:
            raise BackendError(
                f"no memory for {count} pages of {shape.bytes_per_page} bytes; lower kv_memory"
            ) from error

    def handle(
        self, opened: "_native.Pool | None" = None, taking: int = 0, *, by_head: bool = False
    ) -> _native.Pool:
        """For kernels: with the open pages beside packed ones, or the first that takes tokens.

        ``by_head``: each head of a page, which lie one behind the other, as a page of its own.
        """
        shape = self.shape
        pages = self.count * shape.num_kv_heads if by_head else self.count
        heads = 1 if by_head else shape.num_kv_heads
        return _native.Pool(
            _store(self.key, self.key_scale, shape.key_dim, shape.key_format),
            _store(self.value, self.value_scale, shape.value_dim, shape.value_format),
            [pages, shape.page_size, heads],
            opened,
            taking,
            shape.rotated,
        )

    def copy(self, source: Array, target: Array) -> None:
        """Whole pages, by row."""
        for array in self._arrays:
            array[target] = array[source]

    def gather_tokens(self, source: Array, target: Array, handle: _native.Pool) -> None:
        """See :class:`quire.pages.PagePool`."""
        size, n = self.shape.page_size, handle.value_beside
        heads = np.arange(self.shape.num_kv_heads)
        page, slot = np.divmod(source.T, size)
        to_page, to_slot = np.divmod(target[:, None], size)
        keys, values = self._keys(self.key, handle), self._values(self.value, handle)
        keys[to_page, to_slot, heads] = keys[page, slot, heads]
        moved = values[page, slot // n, slot % n, heads]
        values[to_page, to_slot // n, to_slot % n, heads] = moved
        for array in (self.key_scale, self.value_scale):
            if array is not None:
                scales = self._scales(array)
                scales[to_page, to_slot, heads] = scales[page, slot, heads]

    def discard(self) -> None:
        """Every page reads as zero from now on."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for memory in self._memory:
                memory.madvise(mmap.MADV_DONTNEED)  # private pages

    def export(self, rows: Array) -> npt.NDArray[np.uint8]:
        """See :meth:`quire.pages.PagePool.export_pages`."""
        return export_rows(self._arrays, rows)

    def put(self, rows: Array, data: npt.NDArray[np.uint8]) -> None:
        """See :meth:`quire.pages.PagePool.import_pages`."""
        import_rows(self._arrays, rows, data)

    def blank_slots(self, data: npt.NDArray[np.uint8], first: int, handle: _native.Pool) -> None:
        """See :class:`quire.pages.PagePool`."""
        slots = np.arange(first, self.shape.page_size)
        start = 0
        for array in self._arrays:
            rows = data[:, start : start + array[0].nbytes]
            start += array[0].nbytes
            for row in rows:  # each lies in one piece
                page = row.view(array.dtype)[None]
                if array is self.key:
                    self._keys(page, handle)[:, slots] = 0
                elif array is self.value:
                    n = handle.value_beside
                    self._values(page, handle)[:, slots // n, slots % n] = 0
                else:
                    self._scales(page)[:, slots] = 0

    def read_keys(self, rows: Array, handle: _native.Pool) -> Array:
        """[n, page_size, heads, key_dim], as stored, or decoded where there are scales."""
        shape, key = self.shape, self.key[rows]
        if shape.key_format.kind == "page":
            stored = packed.stored_keys(key, shape, handle.key_beside)
            return shape.key_format.key.decode(stored, shape.key_dim)
        key = self._keys(key, handle).reshape(-1, *self._tokens, shape.key_dim)
        if self.key_scale is None:
            return key
        scale = self._scales(self.key_scale[rows])
        return shape.key_format.key.decode((_signed(key), scale), shape.key_dim)

    def read_values(self, rows: Array, handle: _native.Pool) -> Array:
        """[n, page_size, heads, value_dim], likewise."""
        shape, value = self.shape, self.value[rows]
        if shape.value_format.kind == "page":
            stored = packed.stored_values(value, shape, handle.value_beside)
            return shape.value_format.value.decode(stored, shape.value_dim)
        value = self._values(value, handle).reshape(-1, *self._tokens, shape.value_dim)
        if self.value_scale is None:
            return value
        scale = self._scales(self.value_scale[rows])
        return shape.value_format.value.decode((_signed(value), scale), shape.value_dim)

    @property
    def _tokens(self) -> tuple[int, int]:
        return self.shape.page_size, self.shape.num_kv_heads

    @property
    def _arrays(self) -> list[Array]:
        """In the order in which :meth:`export` has them."""
        arrays = (self.key, self.key_scale, self.value, self.value_scale)
        return [array for array in arrays if array is not None]

    def _zeros(self, format: PageFormat, parts: tuple[Part, ...]) -> tuple[Array, Array | None]:
        """Zeroed numbers and scales of all pages; int8 as the bytes that kernels read."""
        if format.kind == "page":
            size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in parts)
            parts = (((size,), np.dtype(np.uint8)),)
        arrays: list[Array] = []
        for shape, dtype in parts:
            kept = np.dtype(np.uint8) if dtype == np.int8 else dtype
            memory, array = _zeros((self.count, math.prod(shape)), kept)
            self._memory.append(memory)
            arrays.append(array)
        return arrays[0], arrays[1] if len(arrays) > 1 else None

    # Views of rows of the arrays, token by token.

    def _keys(self, rows: Array, handle: _native.Pool) -> Array:
        """[n, page_size, heads, dim / beside, beside]."""
        (size, heads), n = self._tokens, handle.key_beside
        return rows.reshape(-1, heads, self.shape.key_dim // n, size, n).transpose(0, 3, 1, 2, 4)

    def _values(self, rows: Array, handle: _native.Pool) -> Array:
        """[n, page_size / beside, beside, heads, dim]."""
        (size, heads), n = self._tokens, handle.value_beside
        return rows.reshape(-1, heads, size // n, self.shape.value_dim, n).transpose(0, 2, 4, 1, 3)

    def _scales(self, rows: Array) -> Array:
        """[n, page_size, heads]."""
        size, heads = self._tokens
        return rows.reshape(-1, heads, size).transpose(0, 2, 1)


def _store(data: Array, scale: Array | None, dim: int, format: PageFormat) -> _native.Store:
    scales = None if scale is None else scale.reshape(-1).view(np.uint16)
    code = CODES[format.name] if format.kind == "page" else DTYPES[format.dtype.name]
    return _native.Store(data.reshape(-1).view(np.uint8), scales, code, dim)


def _signed(numbers: Array) -> Array:
    """Int8 numbers as the definition has them; others as they are."""
    return (numbers ^ np.uint8(128)).view(np.int8) if numbers.dtype == np.uint8 else numbers


def _zeros(shape: tuple[int, int], dtype: Any) -> tuple[mmap.mmap, Array]:
    """Memory of the system and an array of zeros in it, page-aligned, on huge pages if it has them.

    Scattered reads through 4 KiB pages wait for page walks. Raises OSError or, for sizes beyond any
    address, OverflowError or ValueError.
    """
    size = shape[0] * shape[1] * np.dtype(dtype).itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory, np.frombuffer(memory, np.uint8).view(dtype).reshape(shape)
