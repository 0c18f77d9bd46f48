"""Whole pages between the device and host memory, beside the steps.

Down: pages are gathered into staging memory on the stream that computes, so that what comes next
may overwrite them, and copied from there into pinned memory on a stream beside. Up: bytes go into
pinned memory, to the device and into their pages, all on another stream beside; the step that
first reads the pages waits for an event. Staging memory is a few slots in turn, each a piece on the
device and one that is pinned.
"""

import math
import threading
from collections import deque
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quire.backends.cuda.device import Device
from quire.backends.cuda.gathering import gather_kernel
from quire.backends.cuda.memory import tells_of_memory
from quire.backends.cuda.stored import StoredPages
from quire.backends.cuda.streams import Event
from quire.errors import BackendError
from quire.pages import PageBytes

__all__ = ["DEPTH", "SLOT", "CudaMover"]

Bytes = npt.NDArray[np.uint8]
Tensor = Any

Lying = tuple[StoredPages, int]  # pages of a layer, and the row where those of a kind begin

SLOT = 8 << 20  # bytes of a slot, unless a page is larger
DEPTH = 4  # slots each way
_MOST = 1024  # pages in a slot
_BLOCK = 4096  # words that one program copies


@tells_of_memory
class CudaMover:
    """See :class:`quire.pages.PageMover`.

    groups   for each layer group its kinds of pages: the packed or only ones, and open ones if
             there are such; of each, the first id and where it lies in every layer

    Raises BackendError where there is no memory for the slots.
    """

    depth = DEPTH

    def __init__(
        self, device: Device, groups: Sequence[Sequence[tuple[int, Sequence["Lying"]]]]
    ) -> None:
        self.device = device
        self._kinds = [[_Rows(device, *kind) for kind in kinds] for kinds in groups]
        size = max(SLOT, *(rows.bytes for kinds in self._kinds for rows in kinds))
        self._size = -(-size // 4) * 4
        self._exports: deque[_Export] = deque()  # in slots
        try:
            self._down = [_Slot(device, self._size) for _ in range(DEPTH)]
            self._up = _Ring([_Slot(device, self._size) for _ in range(DEPTH)])
        except RuntimeError as error:  # torch's OutOfMemoryError is one; pinning raises others
            raise BackendError(
                f"no memory for {2 * DEPTH} pieces of {self._size} bytes, on {device.name} and "
                f"pinned on the host, through which pages move; {device.memory()} are free there; "
                "lower kv_memory"
            ) from error
        for kinds in self._kinds:
            for rows in kinds:
                rows.compile(self._down[0])
        device.streams.now().synchronize()  # the slot's pinned ids are read no more

    def piece(self, group: int, page: int) -> int:
        """As many as fit a slot."""
        rows, _ = self._of_kind(group, [page])
        return min(_MOST, self._size // rows.bytes)

    def begin_export(self, group: int, pages: Sequence[int]) -> "_Export":
        """See :class:`quire.pages.PageMover`."""
        rows, ids = self._of_kind(group, pages)
        count, streams = len(ids), self.device.streams
        if count > self.piece(group, pages[0]):
            raise BackendError(f"{count} pages of {rows.bytes} bytes in a slot of {self._size}")
        while not self._down:
            self._exports.popleft().leave_slot()
        slot = self._down.pop()
        try:
            slot.name(ids)
            rows.move(slot, count, put=False)
            fetch = partial(slot.fetch, count * rows.bytes)
            arrived = streams.run("down", streams.now(), fetch)
        except BaseException:
            streams.run("down", streams.now(), _nothing).synchronize()  # what was queued of it
            self._down.append(slot)
            raise
        self._exports.append(_Export(self, slot, arrived, (count, rows.bytes)))
        return self._exports[-1]

    def begin_import(self) -> "_Import":
        """See :class:`quire.pages.PageMover`."""
        return _Import(self)

    def close(self) -> None:
        """See :class:`quire.pages.PageMover`; waits: what moves must not lose its memory."""
        for export in self._exports:
            export.arrived.synchronize()
        self._exports.clear()
        self._down.clear()
        self._up.close()

    def _of_kind(self, group: int, pages: Sequence[int]) -> tuple["_Rows", npt.NDArray[np.int64]]:
        """Where pages lie, all open or none, and their rows there."""
        ids, kinds = np.asarray(pages, dtype=np.int64), self._kinds[group]
        rows = kinds[-1] if (ids >= kinds[-1].first).all() else kinds[0]
        if len(kinds) > 1 and rows is kinds[0] and (ids >= kinds[-1].first).any():
            raise BackendError("pages of both kinds, open and packed, in one call")
        return rows, ids - rows.first


class _Rows:
    """Where pages of one kind lie in all layers of a group, for :func:`gather_kernel`.

    Addresses are good for ever: a pool never replaces its tensors.

    first   id of the first page
    bytes   of a page over all layers
    """

    def __init__(self, device: Device, first: int, layers: Sequence["Lying"]) -> None:
        self._device, self.first = device, first
        self._held = [(array, row) for stored, row in layers for array in stored.arrays]
        sizes = [math.prod(array.shape[1:]) * array.element_size() for array, _ in self._held]
        self.bytes = sum(sizes)
        self._wide = all(size % 4 == 0 for size in sizes)
        self._kind = torch.int32 if self._wide else torch.uint8
        widths = [size // 4 if self._wide else size for size in sizes]
        self._words, self._widest = sum(widths), max(widths)
        begins = [
            array.data_ptr() + row * size
            for (array, row), size in zip(self._held, sizes, strict=True)
        ]
        starts = list(accumulate([0, *widths[:-1]]))
        self._table = [device.to_device(np.array(n)) for n in (begins, widths, starts)]

    def compile(self, slot: "_Slot") -> None:
        """Move the first page out and back, so that no thread has to compile kernels later."""
        slot.name(np.zeros(1, np.int64))
        self.move(slot, 1, put=False)
        self.move(slot, 1, put=True)

    def move(self, slot: "_Slot", count: int, *, put: bool) -> None:
        """Launch the copy of pages that ``slot`` names into it; with ``put`` out of it."""
        grid = (count, len(self._held), -(-self._widest // _BLOCK))
        self._device.launch(
            gather_kernel, grid, *self._table, slot.ids, slot.there.view(self._kind), self._words,
            PUT=put, WIDE=self._wide, BLOCK=_BLOCK,
        )  # fmt: skip


class _Slot:
    """Staging memory: bytes on the device and pinned ones on the host, and ids of pages."""

    def __init__(self, device: Device, size: int) -> None:
        self.here = torch.empty(size, dtype=torch.uint8, pin_memory=device.hardware)
        self.there = torch.empty(size, dtype=torch.uint8, device=device.kind)
        self._named, self.ids = device.mirrored(_MOST)
        self._device = device

    def name(self, ids: npt.NDArray[np.int64]) -> None:
        """Pages that a launch behind this is about."""
        self._named.numpy()[: len(ids)] = ids
        self._device.renew(self.ids, self._named, len(ids))

    def fetch(self, used: int) -> None:
        """Queue the copy of the first bytes to the host."""
        self.here[:used].copy_(self.there[:used], non_blocking=True)

    def send(self, used: int) -> None:
        """Queue the copy of the first bytes to the device."""
        self.there[:used].copy_(self.here[:used], non_blocking=True)

    def rows(self, count: int, size: int) -> Bytes:
        """The first pinned bytes as ``[count, size]``."""
        held: Bytes = self.here.numpy()[: count * size].reshape(count, size)
        return held


class _Export:
    """See :class:`quire.pages.Pending`. Its slot is free again when it was taken."""

    def __init__(
        self, mover: CudaMover, slot: _Slot, arrived: Event, shape: tuple[int, int]
    ) -> None:
        self.arrived = arrived
        self._mover, self._slot, self._shape = mover, slot, shape
        self._left: Bytes | None = None

    @property
    def ready(self) -> bool:
        """See :class:`quire.pages.Pending`."""
        return self._left is not None or self.arrived.query()

    def take(self) -> Bytes:
        """See :class:`quire.pages.Pending`."""
        if self._left is not None:
            return self._left
        self.arrived.synchronize()
        self._mover._exports.remove(self)
        self._mover._down.append(self._slot)
        return self._slot.rows(*self._shape)

    def leave_slot(self) -> None:
        """Others need the slot: wait, and keep a copy."""
        self.arrived.synchronize()
        self._left = self._slot.rows(*self._shape).copy()
        self._mover._down.append(self._slot)


class _Import:
    """See :class:`quire.pages.Incoming`."""

    def __init__(self, mover: CudaMover) -> None:
        self._mover, self._streams = mover, mover.device.streams
        # Steps and exports that read the pages as they were are before this.
        self._after = self._streams.now()
        self._last: Event | None = None

    def put(self, group: int, pages: Sequence[int], data: PageBytes) -> None:
        """See :class:`quire.pages.Incoming`."""
        most = self._mover.piece(group, pages[0]) if len(pages) else 1
        for start in range(0, len(pages), most):
            end = start + most
            self._put(*self._mover._of_kind(group, pages[start:end]), data[start:end])

    def _put(self, rows: _Rows, ids: npt.NDArray[np.int64], data: PageBytes) -> None:
        slot = self._mover._up.take()
        done: Event | None = None
        try:
            for row, payload in zip(slot.rows(len(ids), rows.bytes), data, strict=True):
                row[:] = payload
            done = self._streams.run("up", self._after, partial(_scatter, rows, slot, ids))
        finally:  # what was queued of it must be over before slot and pages are another's
            self._last = self._streams.run("up", self._after, _nothing) if done is None else done
            self._mover._up.give(slot, self._last)

    def end(self) -> None:
        """See :class:`quire.pages.Incoming`."""
        if self._last is not None:
            self._streams.join(self._last)


def _scatter(rows: _Rows, slot: _Slot, ids: npt.NDArray[np.int64]) -> None:
    slot.name(ids)
    slot.send(len(ids) * rows.bytes)
    rows.move(slot, len(ids), put=True)


def _nothing() -> None:
    """Launches nothing: the event behind it is behind what was queued before."""


class _Ring:
    """Slots that threads take in turn: one that is free, or the one that will be so first."""

    def __init__(self, slots: Sequence[_Slot]) -> None:
        self._changed = threading.Condition()
        self._free, self._moving = list(slots), deque[tuple[_Slot, Event]]()

    def take(self) -> _Slot:
        """A slot for the caller alone; waits until there is one."""
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._moving)
            if self._free:
                return self._free.pop()
            slot, over = self._moving.popleft()
        over.synchronize()
        return slot

    def give(self, slot: _Slot, over: Event) -> None:
        """The slot is free when ``over`` has passed."""
        with self._changed:
            self._moving.append((slot, over))
            self._changed.notify()

    def close(self) -> None:
        """Wait for what moves; there are no slots afterwards."""
        for _, over in self._moving:
            over.synchronize()
        self._moving.clear()
        self._free.clear()
