"""Storage of one layer's pages in the layout that the native kernels read."""

import contextlib
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.backends.native import _native
from quire.errors import BackendError
from quire.pages import PAGE_FORMATS, PageFormat, PageShape, export_rows, import_rows

__all__ = ["DTYPES", "NativePool", "require_formats"]

Array = npt.NDArray[Any]

# The extension's dtype codes.
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}

_PLAIN = tuple(name for name, format in PAGE_FORMATS.items() if format.lossless)


class NativePool:
    """K and V of one layer, keys dimension-major inside a page.

    interleaved  bf16 with pages of a multiple of 16 tokens: K ``[page, head, dim / 2, token, 2]``
                 and V ``[page, head, token / 2, dim, 2]``: pairs that are multiplied together lie
                 side by side
    plain        else: K ``[page, head, dim, token]`` and V ``[page, head, token, dim]``
    """

    def __init__(self, shape: PageShape, num_pages: int) -> None:
        require_formats(shape.key_format, shape.value_format)
        self.shape, self.num_pages = shape, num_pages
        heads, size, dtype = shape.num_kv_heads, shape.page_size, shape.key_format.dtype
        try:
            key, self.key = _zeros((num_pages, heads * size * shape.key_dim), dtype)
            value, self.value = _zeros((num_pages, heads * size * shape.value_dim), dtype)
        except (OSError, OverflowError, ValueError) as error:
            raise BackendError(
                f"no memory for {num_pages} pages of {shape.bytes_per_page} bytes; lower kv_memory"
            ) from error
        self._memory = (key, value)
        self.handle = _native.Pool(
            self.key.reshape(-1).view(np.uint8),
            self.value.reshape(-1).view(np.uint8),
            DTYPES[dtype.name],
            [num_pages, size, heads, shape.key_dim, shape.value_dim],
        )

    def copy_pages(self, source: Sequence[int], target: Sequence[int]) -> None:
        """See :class:`quire.pages.PagePool`."""
        self.key[list(target)] = self.key[list(source)]
        self.value[list(target)] = self.value[list(source)]

    def gather_tokens(self, source: Array, target: Array) -> None:
        """See :class:`quire.pages.PagePool`."""
        shape, bits = self.shape, f"u{self.shape.key_format.dtype.itemsize}"
        size, heads = shape.page_size, np.arange(shape.num_kv_heads)
        key: Array = self.key.view(bits)
        value: Array = self.value.view(bits)
        (page, slot), (to_page, to_slot) = (
            np.divmod(source.T, size),
            np.divmod(target[:, None], size),
        )
        if self.handle.interleaved:
            key = key.reshape(-1, len(heads), shape.key_dim // 2, size, 2)
            key[to_page, heads, :, to_slot] = key[page, heads, :, slot]
            value = value.reshape(-1, len(heads), size // 2, shape.value_dim, 2)
            moved = value[page, heads, slot // 2, :, slot % 2]
            value[to_page, heads, to_slot // 2, :, to_slot % 2] = moved
        else:
            key = key.reshape(-1, len(heads), shape.key_dim, size)
            key[to_page, heads, :, to_slot] = key[page, heads, :, slot]
            value = value.reshape(-1, len(heads), size, shape.value_dim)
            value[to_page, heads, to_slot] = value[page, heads, slot]

    def discard(self) -> None:
        """See :class:`quire.pages.PagePool`."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for memory in self._memory:
                memory.madvise(mmap.MADV_DONTNEED)  # private pages: they read as zero from now on

    def export_pages(self, pages: Sequence[int]) -> npt.NDArray[np.uint8]:
        """See :class:`quire.pages.PagePool`."""
        return export_rows((self.key, self.value), pages)

    def import_pages(self, pages: Sequence[int], data: npt.NDArray[np.uint8]) -> None:
        """See :class:`quire.pages.PagePool`."""
        import_rows((self.key, self.value), pages, data)

    def blank_slots(self, data: npt.NDArray[np.uint8], first: int) -> None:
        """See :class:`quire.pages.PagePool`."""
        heads, size, shape = self.shape.num_kv_heads, self.shape.page_size, self.shape
        bits = f"u{shape.key_format.dtype.itemsize}"
        for page in data:
            key, value = page[: self.key[0].nbytes], page[self.key[0].nbytes :]
            if self.handle.interleaved:
                key.view(bits).reshape(heads, shape.key_dim // 2, size, 2)[:, :, first:] = 0
                values = value.view(bits).reshape(heads, size // 2, shape.value_dim, 2)
                for token in range(first, size):
                    values[:, token // 2, :, token % 2] = 0
            else:
                key.view(bits).reshape(heads, shape.key_dim, size)[..., first:] = 0
                value.view(bits).reshape(heads, size, shape.value_dim)[:, first:] = 0

    def read_pages(self, pages: Sequence[int]) -> tuple[Array, Array]:
        """See :class:`quire.pages.PagePool`."""
        ids = np.asarray(pages, dtype=np.int64)
        heads, size = self.shape.num_kv_heads, self.shape.page_size
        key, value = self.key[ids], self.value[ids]
        if self.handle.interleaved:
            key = key.reshape(-1, heads, self.shape.key_dim // 2, size, 2).transpose(0, 3, 1, 2, 4)
            value = value.reshape(-1, heads, size // 2, self.shape.value_dim, 2)
            value = value.transpose(0, 2, 4, 1, 3)
        else:
            key = key.reshape(-1, heads, self.shape.key_dim, size).transpose(0, 3, 1, 2)
            value = value.reshape(-1, heads, size, self.shape.value_dim).transpose(0, 2, 1, 3)
        return (
            key.reshape(-1, size, heads, self.shape.key_dim),
            value.reshape(-1, size, heads, self.shape.value_dim),
        )


def require_formats(key: PageFormat, value: PageFormat) -> None:
    """Raise BackendError unless there are kernels for these formats of keys and values."""
    if not key.lossless or key.name != value.name:
        raise BackendError(
            f"the native backend stores keys and values alike in {', '.join(_PLAIN)}, and cannot "
            f"store k={key.name},v={value.name} yet; choose one of those, or backend 'reference'"
        )


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
