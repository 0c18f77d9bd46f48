"""Page formats: how a page's numbers are stored, and what they cost in bytes.

The NumPy ``encode``/``decode`` here are the definition of each format; kernels are tested against
them. A format is a row of :data:`PAGE_FORMATS`, never a subclass of the cache. This module does
not know which page belongs to whom.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from quire.errors import ConfigError, did_you_mean

__all__ = [
    "PAGE_FORMATS",
    "PageFormat",
    "PagePool",
    "PageShape",
    "export_rows",
    "import_rows",
    "page_format",
]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class PageFormat:
    """One way to store keys and values.

    name       as in ``--kv-format``
    dtype      NumPy dtype of a stored element
    lossless   True if numbers of ``dtype`` come back as they went in
    """

    name: str
    dtype: np.dtype[Any]
    lossless: bool

    @property
    def bits(self) -> int:
        """Bits a stored number."""
        return self.dtype.itemsize * 8

    def encode(self, values: Array) -> Array:
        """``values`` (float32, any shape) as stored: rounded to nearest, ties to even.

        Infinities and NaNs are kept; a finite number beyond the format's range becomes infinite.
        """
        with np.errstate(over="ignore", invalid="ignore"):  # a signalling NaN stays a NaN
            return np.asarray(values).astype(self.dtype)

    def decode(self, stored: Array) -> Array:
        """Stored numbers (dtype ``self.dtype``, any shape) as float32; exact."""
        return stored.astype(np.float32)


PAGE_FORMATS: dict[str, PageFormat] = {
    name: PageFormat(name, np.dtype(dtype), True)
    for name, dtype in (
        ("fp32", np.float32),
        ("bf16", ml_dtypes.bfloat16),
        ("fp16", np.float16),
    )
}


def page_format(name: str) -> PageFormat:
    """The format called ``name``; ConfigError, naming the nearest, if there is none."""
    if name not in PAGE_FORMATS:
        raise ConfigError(
            f"unknown page format {name!r}{did_you_mean(name, PAGE_FORMATS)} "
            f"(formats: auto, {', '.join(PAGE_FORMATS)})"
        )
    return PAGE_FORMATS[name]


@dataclass(frozen=True)
class PageShape:
    """One layer's share of a page: ``page_size`` tokens, K and V of every KV head."""

    page_size: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    format: PageFormat

    @property
    def bytes_per_token(self) -> int:
        """Bytes that K and V of one token take in this layer."""
        numbers = self.num_kv_heads * (self.key_dim + self.value_dim)
        return numbers * self.format.bits // 8

    @property
    def bytes_per_page(self) -> int:
        """Bytes that a whole page takes in this layer."""
        return self.page_size * self.bytes_per_token


def export_rows(arrays: Sequence[Array], pages: Sequence[int]) -> npt.NDArray[np.uint8]:
    """Rows ``pages`` of C-contiguous arrays, the bytes of each array's row behind the other's."""
    ids = np.asarray(pages, dtype=np.int64)
    rows = [array.reshape(len(array), -1).view(np.uint8) for array in arrays]
    out = np.empty((len(ids), sum(row.shape[1] for row in rows)), np.uint8)
    start = 0
    for row in rows:
        np.take(row, ids, axis=0, out=out[:, start : start + row.shape[1]])
        start += row.shape[1]
    return out


def import_rows(arrays: Sequence[Array], pages: Sequence[int], data: npt.NDArray[np.uint8]) -> None:
    """Overwrite rows ``pages`` with what :func:`export_rows` gave."""
    ids = np.asarray(pages, dtype=np.int64)
    start = 0
    for array in arrays:
        row = array.reshape(len(array), -1).view(np.uint8)
        row[ids] = data[:, start : start + row.shape[1]]
        start += row.shape[1]


class PagePool(Protocol):
    """The storage of all pages of one layer, owned by a backend in a layout of its own."""

    @property
    def shape(self) -> PageShape:
        """What one page holds."""

    @property
    def num_pages(self) -> int:
        """Pages in this pool; valid ids are 0 to ``num_pages - 1``."""

    def copy_pages(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Copy whole pages, ``source[i]`` to ``target[i]``; no page is in both lists."""

    def discard(self) -> None:
        """Forget what all pages hold, and give their memory back to the system if it can be."""

    def read_pages(self, pages: Sequence[int]) -> tuple[Array, Array]:
        """Copies of K ``[n, page_size, num_kv_heads, key_dim]`` and V, in the stored dtype.

        Slots that hold no token have undefined content.
        """

    def export_pages(self, pages: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Copies of whole pages as they lie in the pool, uint8 ``[n, shape.bytes_per_page]``.

        Keys, then values, in the backend's own layout: for :meth:`import_pages` of a pool of the
        same backend, variant and shape, and for nobody else.
        """

    def import_pages(self, pages: Sequence[int], data: npt.NDArray[np.uint8]) -> None:
        """Overwrite whole pages with what :meth:`export_pages` gave."""

    def blank_slots(self, data: npt.NDArray[np.uint8], first: int) -> None:
        """Zero the slots from ``first`` on in what :meth:`export_pages` gave, in place."""
