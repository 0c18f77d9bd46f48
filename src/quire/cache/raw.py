"""Whole pages as raw bytes, in the backend's own layout: what tiers and session files hold."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from quire.layout import CacheLayout
from quire.pages import Incoming, PageMover, PagePool, Pending

__all__ = ["RawPages"]

Bytes = npt.NDArray[np.uint8]


class RawPages:
    """The bytes of pages over all layers of a group, layer after layer."""

    def __init__(self, layout: CacheLayout, pools: Sequence[PagePool]) -> None:
        self._layout, self._pools = layout, pools
        self._moved: PageMover | None = None

    def read(self, group: int, pages: Sequence[int]) -> Bytes:
        """Copies of pages, uint8 ``[n, page_bytes(group, page)]``; all are open, or none is."""
        if not pages:
            return np.empty((0, self._layout.page_bytes(group)), np.uint8)
        piece = self.piece(group, pages[0])
        starts = range(0, len(pages), piece)
        parts = (self.begin_read(group, pages[start : start + piece]).take() for start in starts)
        if len(starts) == 1:
            return next(parts).copy()
        out = np.empty((len(pages), self.page_bytes(group, pages[0])), np.uint8)
        for start, part in zip(starts, parts, strict=True):
            out[start : start + piece] = part
        return out

    def write(self, group: int, pages: Sequence[int], data: Bytes) -> None:
        """Overwrite pages with what :meth:`read` gave."""
        incoming = self.begin_write()
        try:
            incoming.put(group, pages, data)
        finally:
            incoming.end()

    @property
    def depth(self) -> int:
        """See :attr:`PageMover.depth`."""
        return self._mover.depth

    def piece(self, group: int, page: int) -> int:
        """See :meth:`PageMover.piece`."""
        return self._mover.piece(group, page)

    def begin_read(self, group: int, pages: Sequence[int]) -> Pending:
        """Copies of at most a piece of pages, on their way: :meth:`PageMover.begin_export`."""
        return self._mover.begin_export(group, pages)

    def begin_write(self) -> Incoming:
        """Overwrite pages beside the steps: :meth:`PageMover.begin_import`."""
        return self._mover.begin_import()

    def open(self) -> None:
        """Take the memory that moving pages needs, which is taken when it is first needed else.

        Raises BackendError if there is none.
        """
        self._mover  # noqa: B018

    def close(self) -> None:
        """Let that memory go."""
        if self._moved is not None:
            self._moved.close()
            self._moved = None

    @property
    def _mover(self) -> PageMover:
        if self._moved is None:
            layers = [[self._pools[n] for n in group.layers] for group in self._layout.groups]
            self._moved = self._pools[0].mover(layers)
        return self._moved

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
