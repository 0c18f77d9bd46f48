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
        """Copies of pages, uint8 ``[n, page_bytes(group, page)]``; all are open, or none is."""
        layers = self._layout.groups[group].layers
        return np.concatenate([self._pools[n].export_pages(pages) for n in layers], axis=1)

    def write(self, group: int, pages: Sequence[int], data: Bytes) -> None:
        """Overwrite pages with what :meth:`read` gave."""
        is_open = len(pages) > 0 and self.is_open(group, pages[0])
        for layer, part in self._parts(group, data, is_open):
            self._pools[layer].import_pages(pages, part)

    def blank(self, group: int, data: Bytes, first: int) -> None:
        """Zero the slots from ``first`` on in what :meth:`read` gave of an unfinished page, in
        place.
        """
        for layer, part in self._parts(group, data, self._layout.packs[group]):
            self._pools[layer].blank_slots(part, first)

    def is_open(self, group: int, page: int) -> bool:
        """True for the id of an open page."""
        return page >= self._pools[self._layout.groups[group].layers[0]].num_pages

    def page_bytes(self, group: int, page: int) -> int:
        """Bytes of ``page`` over all layers of a group."""
        layout = self._layout
        is_open = layout.packs[group] and self.is_open(group, page)
        return layout.open_page_bytes(group) if is_open else layout.page_bytes(group)

    def _parts(self, group: int, data: Bytes, is_open: bool) -> list[tuple[int, Bytes]]:
        """(layer, its columns of ``data``)."""
        parts, start = [], 0
        for layer in self._layout.groups[group].layers:
            shape = self._layout.shapes[layer]
            size = (shape.open_shape if is_open else shape).bytes_per_page
            parts.append((layer, data[:, start : start + size]))
            start += size
        return parts
