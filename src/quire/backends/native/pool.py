"""Storage of one layer's pages in the layout that the native kernels read."""

import contextlib
import math
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.backends.native import _native
from quire.errors import BackendError
from quire.formats import Part
from quire.pages import PAGE_FORMATS, PageFormat, PageShape, export_rows, import_rows

__all__ = ["DTYPES", "NativePool", "require_formats"]

Array = npt.NDArray[Any]

# The extension's dtype codes.
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "float8_e4m3fn": 4}

_FORMATS = tuple(name for name, format in PAGE_FORMATS.items() if format.dtype.name in DTYPES)


class NativePool:
    """K and V of one layer, keys dimension-major inside a page.

    ``n`` numbers that are multiplied together lie side by side, 2 of bf16, 4 of int8 and fp8, where
    pages are a multiple of 16 tokens and ``dim`` is one of n (of values: of 16); else n is 1:

    K  ``[page, head, dim / n, token, n]``
    V  ``[page, head, token / n, dim, n]``

    Int8 numbers are stored as bytes with 128 added. Scales are bf16 ``[page, head, token]`` in
    arrays of their own, None where there are none.
    """

    def __init__(self, shape: PageShape, num_pages: int, open_pages: int = 0) -> None:
        require_formats(shape.key_format, shape.value_format)
        if open_pages:
            raise BackendError("the native backend cannot store open pages yet; choose int8 or fp8")
        self.shape, self.num_pages, self.open_pages = shape, num_pages, open_pages
        self._memory: list[mmap.mmap] = []
        try:
            self.key, self.key_scale = self._stored(shape.key_parts)
            self.value, self.value_scale = self._stored(shape.value_parts)
        except (OSError, OverflowError, ValueError) as error:
            raise BackendError(
                f"no memory for {num_pages} pages of {shape.bytes_per_page} bytes; lower kv_memory"
            ) from error
        self.handle = _native.Pool(
            _store(self.key, self.key_scale, shape.key_dim, _code(shape.key_format)),
            _store(self.value, self.value_scale, shape.value_dim, _code(shape.value_format)),
            [num_pages, shape.page_size, shape.num_kv_heads],
        )

    def seal(self, source: Array, target: Array) -> None:
        """See :class:`quire.pages.PagePool`."""
        raise BackendError("the native backend cannot pack pages yet; choose int8 or fp8")

    def copy_pages(self, source: Sequence[int], target: Sequence[int]) -> None:
        """See :class:`quire.pages.PagePool`."""
        for array in self._arrays:
            array[list(target)] = array[list(source)]

    def gather_tokens(self, source: Array, target: Array) -> None:
        """See :class:`quire.pages.PagePool`."""
        size, n = self.shape.page_size, self.handle.value_beside
        heads = np.arange(self.shape.num_kv_heads)
        page, slot = np.divmod(source.T, size)
        to_page, to_slot = np.divmod(target[:, None], size)
        keys, values = self._keys(self.key), self._values(self.value)
        keys[to_page, to_slot, heads] = keys[page, slot, heads]
        moved = values[page, slot // n, slot % n, heads]
        values[to_page, to_slot // n, to_slot % n, heads] = moved
        for array in (self.key_scale, self.value_scale):
            if array is not None:
                scales = self._scales(array)
                scales[to_page, to_slot, heads] = scales[page, slot, heads]

    def discard(self) -> None:
        """See :class:`quire.pages.PagePool`."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for memory in self._memory:
                memory.madvise(mmap.MADV_DONTNEED)  # private pages: they read as zero from now on

    def export_pages(self, pages: Sequence[int]) -> npt.NDArray[np.uint8]:
        """See :class:`quire.pages.PagePool`."""
        return export_rows(self._arrays, pages)

    def import_pages(self, pages: Sequence[int], data: npt.NDArray[np.uint8]) -> None:
        """See :class:`quire.pages.PagePool`."""
        import_rows(self._arrays, pages, data)

    def blank_slots(self, data: npt.NDArray[np.uint8], first: int) -> None:
        """See :class:`quire.pages.PagePool`."""
        slots = np.arange(first, self.shape.page_size)
        start = 0
        for array in self._arrays:
            rows = data[:, start : start + array[0].nbytes]
            start += array[0].nbytes
            for row in rows:  # each lies in one piece
                page = row.view(array.dtype)[None]
                if array is self.key:
                    self._keys(page)[:, slots] = 0
                elif array is self.value:
                    n = self.handle.value_beside
                    self._values(page)[:, slots // n, slots % n] = 0
                else:
                    self._scales(page)[:, slots] = 0

    def read_pages(self, pages: Sequence[int]) -> tuple[Array, Array]:
        """See :class:`quire.pages.PagePool`."""
        ids, shape = np.asarray(pages, dtype=np.int64), self.shape
        tokens = (len(ids), shape.page_size, shape.num_kv_heads)
        key = self._keys(self.key[ids]).reshape(*tokens, shape.key_dim)
        value = self._values(self.value[ids]).reshape(*tokens, shape.value_dim)
        if self.key_scale is not None:
            scale = self._scales(self.key_scale[ids])
            key = shape.key_format.key.decode((_signed(key), scale), shape.key_dim)
        if self.value_scale is not None:
            scale = self._scales(self.value_scale[ids])
            value = shape.value_format.value.decode((_signed(value), scale), shape.value_dim)
        return key, value

    @property
    def _arrays(self) -> list[Array]:
        """In the order in which :meth:`export_pages` has them."""
        arrays = (self.key, self.key_scale, self.value, self.value_scale)
        return [array for array in arrays if array is not None]

    def _stored(self, parts: tuple[Part, ...]) -> tuple[Array, Array | None]:
        """Zeroed numbers and scales of all pages; int8 as the bytes that kernels read."""
        arrays: list[Array] = []
        for shape, dtype in parts:
            kept = np.dtype(np.uint8) if dtype == np.int8 else dtype
            memory, array = _zeros((self.num_pages, math.prod(shape)), kept)
            self._memory.append(memory)
            arrays.append(array)
        return arrays[0], arrays[1] if len(arrays) > 1 else None

    # Views of rows of the arrays, token by token.

    def _keys(self, rows: Array) -> Array:
        """[n, page_size, heads, dim / beside, beside]."""
        size, heads, n = self.shape.page_size, self.shape.num_kv_heads, self.handle.key_beside
        return rows.reshape(-1, heads, self.shape.key_dim // n, size, n).transpose(0, 3, 1, 2, 4)

    def _values(self, rows: Array) -> Array:
        """[n, page_size / beside, beside, heads, dim]."""
        size, heads, n = self.shape.page_size, self.shape.num_kv_heads, self.handle.value_beside
        return rows.reshape(-1, heads, size // n, self.shape.value_dim, n).transpose(0, 2, 4, 1, 3)

    def _scales(self, rows: Array) -> Array:
        """[n, page_size, heads]."""
        size, heads = self.shape.page_size, self.shape.num_kv_heads
        return rows.reshape(-1, heads, size).transpose(0, 2, 1)


def require_formats(key: PageFormat, value: PageFormat) -> None:
    """Raise BackendError unless there are kernels for these formats of keys and values."""
    if key.name not in _FORMATS or value.name not in _FORMATS:
        raise BackendError(
            f"the native backend stores {', '.join(_FORMATS)}, and cannot store "
            f"k={key.name},v={value.name} yet; choose among those"
        )


def _store(data: Array, scale: Array | None, dim: int, code: int) -> _native.Store:
    scales = None if scale is None else scale.reshape(-1).view(np.uint16)
    return _native.Store(data.reshape(-1).view(np.uint8), scales, code, dim)


def _code(format: PageFormat) -> int:
    return DTYPES[format.dtype.name]


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
