"""Storage of one layer's pages on the device, in the layout that the Triton kernels read."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quire.backends.cuda.device import Device
from quire.backends.cuda.storing import append_kernel, copy_kernel
from quire.errors import BackendError
from quire.formats import Coding
from quire.pages import PAGE_FORMATS, PageFormat, PageShape

__all__ = ["CudaPool", "power_of_two", "require_formats"]

Array = npt.NDArray[Any]

# What the numbers of a format lie in. Bfloat16 are bits, int8 and fp8 bytes: see codec.py.
_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.int16,
    "fp8": torch.uint8,
    "int8": torch.uint8,
}
_COPIED = 4096  # words of a page that one program copies


def require_formats(key: PageFormat, value: PageFormat) -> None:
    """Raise BackendError unless there are kernels for these formats of keys and values."""
    for format in (key, value):
        if format.name not in _DTYPES:
            known = ", ".join(name for name in PAGE_FORMATS if name in _DTYPES)
            raise BackendError(
                f"the cuda backend stores {known}, and cannot store {format.name} yet; choose "
                "among those"
            )


class _Side:
    """Keys, or values: numbers ``[pages, heads, page_size, dim]`` and, of formats that have them,
    scales int16 ``[pages, heads, page_size]`` (bits of bfloat16).

    A head's tokens lie one behind the other, so that a program reads one piece of each page.
    """

    def __init__(
        self, device: Device, format: PageFormat, coding: Coding, dim: int, shape: Sequence[int]
    ) -> None:
        self.format, self.coding, self.dim = format, coding, dim
        self.numbers = device.zeros((*shape, dim), _DTYPES[format.name])
        scaled = format.kind == "token"
        self.scale = device.zeros(shape, torch.int16) if scaled else None

    @property
    def arrays(self) -> list[Any]:
        """In the order in which pages are exported."""
        return [self.numbers] if self.scale is None else [self.numbers, self.scale]

    def read(self, pages: Any) -> Array:
        """[n, page_size, heads, dim] of pages int64 [n] on the device, as ``read_pages`` has it."""
        kept = self.format.dtype
        numbers = self.numbers[pages].permute(0, 2, 1, 3).contiguous().cpu().numpy().view(kept)
        if self.scale is None:
            return numbers
        bits = self.scale[pages].permute(0, 2, 1).contiguous().cpu().numpy()
        scale = bits.view(PAGE_FORMATS["bf16"].dtype)
        return self.coding.decode((numbers, scale), self.dim)


class CudaPool:
    """K and V of one layer; see :class:`quire.pages.PagePool` for the verbs.

    Tensors are made once and never replaced: captured launches may hold their addresses.
    """

    def __init__(self, device: Device, shape: PageShape, num_pages: int) -> None:
        require_formats(shape.key_format, shape.value_format)
        self.shape, self.num_pages, self.device = shape, num_pages, device
        slots = (num_pages, shape.num_kv_heads, shape.page_size)
        try:
            key, value = shape.key_format, shape.value_format
            self.key = _Side(device, key, key.key, shape.key_dim, slots)
            self.value = _Side(device, value, value.value, shape.value_dim, slots)
        except (torch.OutOfMemoryError, RuntimeError) as error:  # the latter on a CPU
            raise BackendError(
                f"no memory for {num_pages} pages of {shape.bytes_per_page} bytes on "
                f"{device.name}; lower kv_memory"
            ) from error

    @property
    def _arrays(self) -> list[Any]:
        return [*self.key.arrays, *self.value.arrays]

    def store(self, slots: Any, key: Any, value: Any) -> None:
        """Put key and value float32 [T, G, D] of T tokens, encoded, into ``slots`` int64 [T].

        All on the device; slots are in range.
        """
        for side, new in ((self.key, key), (self.value, value)):
            tokens, heads, dim = new.shape
            rows = 8 if self.device.hardware else 256  # an interpreter pays by the program
            self.device.launch(
                append_kernel, (-(-tokens * heads // rows),),
                new, slots, tokens, side.numbers,
                side.numbers if side.scale is None else side.scale,
                G=heads, D=dim, DP=power_of_two(dim), PAGE=self.shape.page_size,
                KIND=side.format.name, HARDWARE=self.device.hardware, ROWS=rows,
            )  # fmt: skip

    def copy_pages(self, source: Sequence[int], target: Sequence[int]) -> None:
        """See :class:`quire.pages.PagePool`."""
        read, write = (self.device.integers(pages) for pages in (source, target))
        for array in self._arrays:
            rows = array.view(self.num_pages, -1).view(torch.uint8)
            if rows.shape[1] % 4 == 0:
                rows = rows.view(torch.int32)
            words = rows.shape[1]
            grid = (len(read), -(-words // _COPIED))
            self.device.launch(copy_kernel, grid, rows, read, write, words, BLOCK=_COPIED)

    def gather_tokens(self, source: Array, target: Array) -> None:
        """See :class:`quire.pages.PagePool`."""
        size, heads = self.shape.page_size, np.arange(self.shape.num_kv_heads)[:, None]
        page, slot = np.divmod(source, size)
        to_page, to_slot = np.divmod(target[None, :], size)
        read, write = (
            tuple(self.device.integers(index) for index in np.broadcast_arrays(*each))
            for each in ((page, heads, slot), (to_page, heads, to_slot))
        )
        for array in self._arrays:
            array[write] = array[read]

    def discard(self) -> None:
        """See :class:`quire.pages.PagePool`. The memory stays the pool's."""
        for array in self._arrays:
            array.zero_()

    def read_pages(self, pages: Sequence[int]) -> tuple[Array, Array]:
        """See :class:`quire.pages.PagePool`."""
        ids = self.device.integers(pages)
        return self.key.read(ids), self.value.read(ids)

    def export_pages(self, pages: Sequence[int]) -> npt.NDArray[np.uint8]:
        """See :class:`quire.pages.PagePool`."""
        ids = self.device.integers(pages)
        rows = [array[ids].view(len(ids), -1).view(torch.uint8) for array in self._arrays]
        return self.device.to_host(torch.cat(rows, dim=1)).numpy()

    def import_pages(self, pages: Sequence[int], data: npt.NDArray[np.uint8]) -> None:
        """See :class:`quire.pages.PagePool`."""
        ids = self.device.integers(pages)
        rows, start = self.device.to_device(data), 0
        for array in self._arrays:
            width = math.prod(array.shape[1:]) * array.element_size()
            part = rows[:, start : start + width].contiguous().view(array.dtype)
            array[ids] = part.view(len(ids), *array.shape[1:])
            start += width

    def blank_slots(self, data: npt.NDArray[np.uint8], first: int) -> None:
        """See :class:`quire.pages.PagePool`."""
        size, heads, start = self.shape.page_size, self.shape.num_kv_heads, 0
        for array in self._arrays:
            width = math.prod(array.shape[1:]) * array.element_size()
            page = data[:, start : start + width].reshape(len(data), heads, size, -1)  # a copy
            page[:, :, first:] = 0
            data[:, start : start + width] = page.reshape(len(data), width)
            start += width


def power_of_two(n: int) -> int:
    """The least power of two that is not below ``n``."""
    return 1 << (n - 1).bit_length()
