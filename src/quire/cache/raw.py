"""Whole pages as raw bytes, in the backend's own layout: what tiers and session files hold."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from quire.layout import CacheLayout
from quire.pages import PagePool

__all__ = ["RawPages"]

Bytes = npt.NDArray[np.uint8]


class RawPages:
    """The bytes of pages over all layers of a group, layer after layer."""

    def __init__(self, layout: CacheLayout, pools: Sequence[PagePool]) -> None:
        self._layout, self._pools = layout, pools

    def read(self, group: int, pages: Sequence[int]) -> Bytes:
        """Copies of pages, uint8 ``[n, layout.page_bytes(group)]``."""
        layers = self._layout.groups[group].layers
        return np.concatenate([self._pools[n].export_pages(pages) for n in layers], axis=1)

    def write(self, group: int, pages: Sequence[int], data: Bytes) -> None:
        """Overwrite pages with what :meth:`read` gave."""
        for layer, part in self._parts(group, data):
            self._pools[layer].import_pages(pages, part)

    def blank(self, group: int, data: Bytes, first: int) -> None:
        """Zero the slots from ``first`` on in what :meth:`read` gave, in place."""
        for layer, part in self._parts(group, data):
            self._pools[layer].blank_slots(part, first)

    def _parts(self, group: int, data: Bytes) -> list[tuple[int, Bytes]]:
        """(layer, its columns of ``data``)."""
        parts, start = [], 0
        for layer in self._layout.groups[group].layers:
            size = self._layout.shapes[layer].bytes_per_page
            parts.append((layer, data[:, start : start + size]))
            start += size
        return parts
