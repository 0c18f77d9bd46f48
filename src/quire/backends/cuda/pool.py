"""Storage of one layer's pages on the device, open and packed ones."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.backends.cuda.device import Device
from quire.backends.cuda.sealing import seal_keys_kernel, seal_values_kernel
from quire.backends.cuda.stored import DTYPES, Side, StoredPages, power_of_two
from quire.backends.cuda.storing import append_kernel, copy_kernel
from quire.backends.cuda.transfer import CudaMover
from quire.errors import BackendError
from quire.formats import GROUP
from quire.pages import Groups, PageFormat, PageShape

__all__ = ["CudaPool", "require_formats"]

Array = npt.NDArray[Any]
Tensor = Any

_COPIED = 4096  # words of a page that one program copies
_SEALED = 16  # tokens whose values one program packs


def require_formats(key: PageFormat, value: PageFormat) -> None:
    """Raise BackendError unless there are kernels for these formats of keys and values."""
    if key.name not in DTYPES or value.name not in DTYPES:
        raise BackendError(
            f"the cuda backend stores {', '.join(DTYPES)}, and cannot store "
            f"k={key.name},v={value.name} yet; choose among those"
        )


class CudaPool:
    """K and V of one layer; see :class:`quire.pages.PagePool` for the verbs.

    Where whole pages are packed, open ones lie in arrays of their own; else all lie in the same.
    Tensors are made once and never replaced: captured launches hold their addresses.
    """

    def __init__(
        self, device: Device, shape: PageShape, num_pages: int, open_pages: int = 0
    ) -> None:
        require_formats(shape.key_format, shape.value_format)
        if shape.by_page and open_pages < 1:
            raise BackendError(
                f"pages of k={shape.key_format.name},v={shape.value_format.name} are packed from "
                "open ones, and the pool is to have none; give open_pages"
            )
        self.shape, self.num_pages, self.open_pages = shape, num_pages, open_pages
        self.device = device
        self.pages = StoredPages(device, shape, num_pages + (0 if shape.by_page else open_pages))
        self.open = self.pages
        if shape.by_page:
            self.open = StoredPages(device, shape.open_shape, open_pages)
        self.graphs: dict[Any, Any] = {}  # captured steps over this and other layers' pools

    @functools.cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """What attention reads: numbers, scales and minima of K and V; of open pages the first two.

        Shapes are those of :class:`quire.backends.cuda.stored.Side`.
        """
        key, value = self.pages.key, self.pages.value
        whole = key.numbers, key.scale, key.least, value.numbers, value.scale, value.least
        key, value = self.open.key, self.open.value
        return *whole, key.numbers, key.scale, value.numbers, value.scale

    @property
    def slots(self) -> range:
        """Where tokens may be stored."""
        first = self.num_pages if self.open_pages else 0
        size = self.shape.page_size
        return range(first * size, (self.num_pages + self.open_pages) * size)

    def store(self, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Put key and value float32 [T, G, D] of T tokens, encoded, into ``slots`` int64 [T].

        All on the device; slots are in range, or below 0 for tokens that are stored nowhere.
        """
        first = self.slots.start if self.shape.by_page else 0
        for side, new in ((self.open.key, key), (self.open.value, value)):
            tokens, heads, dim = new.shape
            rows = 8 if self.device.hardware else 256  # an interpreter pays by the program
            self.device.launch(
                append_kernel, (-(-tokens * heads // rows),),
                new, slots, tokens, first, side.numbers, side.scale,
                G=heads, D=dim, DP=power_of_two(dim), PAGE=self.shape.page_size,
                KIND=side.format.name, HARDWARE=self.device.hardware, ROWS=rows,
            )  # fmt: skip

    @property
    def arrays(self) -> list[Any]:
        """See :class:`quire.pages.PagePool`; none: pages are the device's."""
        return []

    def seal(self, source: Array, target: Array) -> None:
        """See :class:`quire.pages.PagePool`. Ids below 0 are skipped."""
        taken, put = self.device.integers(source), self.device.integers(target)
        if not self.shape.by_page:
            for rows in self.pages.rows():
                self._copy(rows, rows, taken, put, 0)
            return
        for opened, packed, seal in (
            (self.open.key, self.pages.key, self._seal_keys),
            (self.open.value, self.pages.value, self._seal_values),
        ):
            if packed.format.kind == "page":
                seal(opened, packed, taken, put)
                continue
            for read, written in zip(opened.arrays, packed.arrays, strict=True):
                self._copy(read.flatten(1), written.flatten(1), taken, put, self.num_pages)

    def _seal_keys(self, opened: Side, packed: Side, source: Tensor, target: Tensor) -> None:
        size, heads = self.shape.page_size, self.shape.num_kv_heads
        self.device.launch(
            seal_keys_kernel, (len(source) * (size // GROUP), heads),
            opened.numbers, source, target, packed.numbers, packed.scale, packed.least,
            self.num_pages, G=heads, D=packed.dim, DP=power_of_two(packed.dim), PAGE=size,
            BITS=packed.format.bits, GROUP=GROUP,
        )  # fmt: skip

    def _seal_values(self, opened: Side, packed: Side, source: Tensor, target: Tensor) -> None:
        size, heads = self.shape.page_size, self.shape.num_kv_heads
        self.device.launch(
            seal_values_kernel, (len(source) * -(-size // _SEALED), heads),
            opened.numbers, source, target, packed.numbers, packed.scale, packed.least,
            self.num_pages, G=heads, D=packed.dim, GP=power_of_two(-(-packed.dim // GROUP)),
            PAGE=size, BITS=packed.format.bits, GROUP=GROUP, ROWS=_SEALED,
        )  # fmt: skip

    def _copy(
        self, read: Tensor, written: Tensor, source: Tensor, target: Tensor, first: int
    ) -> None:
        words = read.shape[1]
        grid = (len(source), -(-words // _COPIED))
        args = read, written, source, target, first, words
        self.device.launch(copy_kernel, grid, *args, BLOCK=_COPIED)

    def copy_pages(self, source: Sequence[int], target: Sequence[int]) -> None:
        """See :class:`quire.pages.PagePool`."""
        pages, ids = self._of_kind(source, target)
        read, write = self.device.all_to_device(ids)
        for rows in pages.rows():
            self._copy(rows, rows, read, write, 0)

    def gather_tokens(self, source: Array, target: Array) -> None:
        """See :class:`quire.pages.PagePool`."""
        if self.open_pages:
            raise BackendError("tokens of packed pages cannot be moved one by one")
        self.pages.gather_tokens(source, target)

    def discard(self) -> None:
        """See :class:`quire.pages.PagePool`. The memory stays the pool's."""
        self.pages.discard()
        self.open.discard()

    def read_pages(self, pages: Sequence[int]) -> tuple[Array, Array]:
        """See :class:`quire.pages.PagePool`."""
        ids = np.asarray(pages, dtype=np.int64)
        opened = ids >= self.num_pages
        if not self.shape.by_page or not opened.any():
            return self.pages.read(ids)
        if opened.all():
            return self.open.read(ids - self.num_pages)
        both = zip(
            self.pages.read(ids[~opened]),
            self.open.read(ids[opened] - self.num_pages),
            strict=True,
        )
        key, value = (_in_order(opened, *sides) for sides in both)
        return key, value

    def export_pages(self, pages: Sequence[int]) -> npt.NDArray[np.uint8]:
        """See :class:`quire.pages.PagePool`."""
        stored, (rows,) = self._of_kind(pages)
        return stored.export(rows)

    def import_pages(self, pages: Sequence[int], data: npt.NDArray[np.uint8]) -> None:
        """See :class:`quire.pages.PagePool`."""
        stored, (rows,) = self._of_kind(pages)
        stored.put(rows, data)

    def mover(self, groups: Groups) -> CudaMover:
        """See :class:`quire.pages.PagePool`."""
        kinds = []
        for pools in groups:
            ours = [pool for pool in pools if isinstance(pool, CudaPool)]
            first = ours[0].num_pages
            kinds.append([(0, [(pool.pages, 0) for pool in ours])])
            if ours[0].open_pages:  # of a layer that packs nothing they lie behind the others
                opened = [(pool.open, 0 if pool.shape.by_page else first) for pool in ours]
                kinds[-1].append((first, opened))
        return CudaMover(self.device, kinds)

    def blank_slots(self, data: npt.NDArray[np.uint8], first: int) -> None:
        """See :class:`quire.pages.PagePool`."""
        self.open.blank_slots(data, first)

    def _of_kind(self, *lists: Sequence[int]) -> tuple[StoredPages, list[Array]]:
        """The pages that ids name, all open or none, and their rows there."""
        ids = [np.asarray(pages, dtype=np.int64) for pages in lists]
        opened = np.concatenate(ids) >= self.num_pages
        if not self.shape.by_page or not opened.any():
            return self.pages, ids
        if not opened.all():
            raise BackendError("pages of both kinds, open and packed, in one call")
        return self.open, [each - self.num_pages for each in ids]


def _in_order(opened: Array, whole: Array, unfinished: Array) -> Array:
    """Pages in order, as float32."""
    out = np.empty((len(opened), *whole.shape[1:]), np.float32)
    out[~opened], out[opened] = whole, unfinished
    return out
