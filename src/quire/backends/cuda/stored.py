"""Pages of one shape, keys and values of one layer, in the layout that the Triton kernels read."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quire.backends.cuda.device import Device
from quire.errors import BackendError
from quire.formats import GROUP, Coding
from quire.pages import PAGE_FORMATS, PageFormat, PageShape

__all__ = ["Side", "StoredPages", "power_of_two"]

Array = npt.NDArray[Any]
Tensor = Any

# What the numbers of a format lie in. Bfloat16 are bits, the narrower ones bytes: see codec.py.
DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.int16,
    "fp8": torch.uint8,
    "int8": torch.uint8,
    "int4": torch.uint8,
    "int2": torch.uint8,
}


class Side:
    """Keys, or values: the arrays of ``formats.py`` with heads in front of tokens.

    A head's tokens lie one behind the other, so that a program reads one piece of each page.

    numbers   ``[pages, heads, page_size, dim]``; packed keys ``[.., page_size * bits / 8, dim]``,
              packed values ``[.., page_size, ceil(dim * bits / 8)]``
    scale     int16 ``[pages, heads, page_size]``, bits of bfloat16; of packed keys, whose steps
              they are, ``[.., page_size / GROUP, dim]``, of values ``[.., ceil(dim / GROUP)]``
    least     int16, minima as steps

    Scales and minima are the numbers themselves where a format has none: kernels do not read them.
    """

    def __init__(self, device: Device, format: PageFormat, dim: int, arrays: list[Tensor]) -> None:
        self.device, self.format, self.dim, self.arrays = device, format, dim, arrays
        self.numbers = arrays[0]
        self.least = arrays[1] if len(arrays) == 3 else self.numbers
        self.scale = arrays[-1]

    def read(self, coding: Coding, pages: Tensor) -> Array:
        """[n, page_size, heads, dim] of pages int64 [n] on the device, as ``read_pages`` has it."""
        held = [self.device.to_host(array[pages].transpose(1, 2)).numpy() for array in self.arrays]
        numbers = np.ascontiguousarray(held[0]).view(self.format.dtype)
        if len(held) == 1:
            return numbers
        scales = [np.ascontiguousarray(bits).view(PAGE_FORMATS["bf16"].dtype) for bits in held[1:]]
        return coding.decode((numbers, *scales), self.dim)


class StoredPages:
    """``count`` zeroed pages of one shape."""

    def __init__(self, device: Device, shape: PageShape, count: int) -> None:
        self.device, self.shape, self.count = device, shape, count
        key, value = shape.key_format, shape.value_format
        try:
            self.key = Side(device, key, shape.key_dim, self._zeros(key, shape.key_parts))
            self.value = Side(device, value, shape.value_dim, self._zeros(value, shape.value_parts))
        except (torch.OutOfMemoryError, RuntimeError) as error:  # the latter on a CPU
            raise BackendError(
                f"no memory for {count} pages of {shape.bytes_per_page} bytes on {device.name}, "
                f"of which {device.memory()} are free; lower kv_memory"
            ) from error

    def _zeros(self, format: PageFormat, parts: Sequence[Any]) -> list[Tensor]:
        kinds = [DTYPES[format.name], torch.int16, torch.int16]
        shapes = [(self.count, heads, tokens, *rest) for (tokens, heads, *rest), _ in parts]
        return [self.device.zeros(*each) for each in zip(shapes, kinds, strict=False)]

    @property
    def arrays(self) -> list[Tensor]:
        """In the order in which pages are exported."""
        return [*self.key.arrays, *self.value.arrays]

    def rows(self) -> list[Tensor]:
        """The arrays as words ``[pages, words of a page]``, as wide as they can be."""
        flat = [array.flatten(1).view(torch.uint8) for array in self.arrays]
        return [each.view(torch.int32) if each.shape[1] % 4 == 0 else each for each in flat]

    def read(self, pages: Array) -> tuple[Array, Array]:
        """See :meth:`quire.pages.PagePool.read_pages`."""
        ids, shape = self.device.integers(pages), self.shape
        key = self.key.read(shape.key_format.key, ids)
        return key, self.value.read(shape.value_format.value, ids)

    def gather_tokens(self, source: Array, target: Array) -> None:
        """See :class:`quire.pages.PagePool`."""
        size, heads = self.shape.page_size, np.arange(self.shape.num_kv_heads)[:, None]
        page, slot = np.divmod(source, size)
        to_page, to_slot = np.divmod(target[None, :], size)
        read, write = (
            tuple(self.device.integers(index) for index in np.broadcast_arrays(*each))
            for each in ((page, heads, slot), (to_page, heads, to_slot))
        )
        for array in self.arrays:
            array[write] = array[read]

    def discard(self) -> None:
        """Zeros everywhere; the memory stays."""
        for array in self.arrays:
            array.zero_()

    def export(self, pages: Array) -> npt.NDArray[np.uint8]:
        """See :class:`quire.pages.PagePool`."""
        ids = self.device.integers(pages)
        rows = [array[ids].flatten(1).view(torch.uint8) for array in self.arrays]
        return self.device.to_host(torch.cat(rows, dim=1)).numpy()

    def put(self, pages: Array, data: npt.NDArray[np.uint8]) -> None:
        """See :meth:`quire.pages.PagePool.import_pages`."""
        with self.device.streams.submitting:  # a thread may do it while another captures a graph
            ids = self.device.integers(pages)
            rows, start = self.device.to_device(data), 0
            for array in self.arrays:
                width = math.prod(array.shape[1:]) * array.element_size()
                part = rows[:, start : start + width].contiguous().view(array.dtype)
                array[ids] = part.view(len(ids), *array.shape[1:])
                start += width

    def blank_slots(self, data: npt.NDArray[np.uint8], first: int) -> None:
        """See :class:`quire.pages.PagePool`; not of packed pages."""
        size, heads, start = self.shape.page_size, self.shape.num_kv_heads, 0
        for array in self.arrays:
            width = math.prod(array.shape[1:]) * array.element_size()
            page = data[:, start : start + width].reshape(len(data), heads, size, -1)  # a copy
            page[:, :, first:] = 0
            data[:, start : start + width] = page.reshape(len(data), width)
            start += width


def power_of_two(n: int) -> int:
    """The least power of two that is not below ``n``."""
    return 1 << (n - 1).bit_length()


assert GROUP & (GROUP - 1) == 0  # kernels take it for the size of a tile
