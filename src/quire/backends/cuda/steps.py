"""A step's batch on the device: one transfer, sliced there, kept for all layers."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from quire.backends.cuda.device import Device
from quire.batch import GroupBatch, PagedBatch

__all__ = ["Step", "StepGroup", "to_device"]

IntArray = npt.NDArray[np.int64]
EVERY = 1 << 30  # the window of a group without one


@dataclass(frozen=True)
class StepGroup:
    """A GroupBatch on the device; see there.

    at, first   int64 [n] on the host: of sequences with one new token, its place and the first
                place that it sees
    last_page   the greatest page id; -1 if there is none
    """

    window: int
    slots: torch.Tensor
    indptr: torch.Tensor
    indices: torch.Tensor
    first_page: torch.Tensor
    at: IntArray
    first: IntArray
    last_page: int
    known: dict[int, int] = field(default_factory=dict)

    def splits(self, length: int) -> int:
        """The most splits of ``length`` places that one of these sequences has."""
        if length not in self.known:
            counts = self.at // length - self.first // length + 1
            self.known[length] = int(counts.max(initial=0))
        return self.known[length]


@dataclass(frozen=True)
class Step:
    """A PagedBatch on the device; see there.

    single    True if some sequence has one new token
    several   True if some sequence has more
    """

    batch: PagedBatch
    positions: torch.Tensor
    places: torch.Tensor
    query_indptr: torch.Tensor
    groups: tuple[StepGroup, ...]
    single: bool
    several: bool

    def find(self, array: IntArray) -> torch.Tensor | None:
        """The device's copy of one of the batch's own arrays; None for another array."""
        if array is self.batch.positions:
            return self.positions
        for group, held in zip(self.batch.groups, self.groups, strict=True):
            if array is group.slots:
                return held.slots
        return None


def to_device(batch: PagedBatch, device: Device) -> Step:
    """All arrays of ``batch`` in one int64 tensor on the device, in slices."""
    arrays = [batch.positions, batch.places, batch.query_indptr]
    for group in batch.groups:
        arrays += [group.slots, group.indptr, group.indices, group.first_page]
    packed = device.integers(np.concatenate(arrays))
    parts = iter(packed.split([len(array) for array in arrays]))
    positions, places, query_indptr = next(parts), next(parts), next(parts)
    counts = np.diff(batch.query_indptr)
    alone = np.flatnonzero(counts == 1)
    at = batch.places[batch.query_indptr[alone]]
    groups = []
    for group in batch.groups:
        window = EVERY if group.window is None else group.window
        four = next(parts), next(parts), next(parts), next(parts)
        first, last_page = _first_seen(group, at, alone, window), int(group.indices.max(initial=-1))
        groups.append(StepGroup(window, *four, at, first, last_page))
    single, several = len(alone) > 0, bool((counts > 1).any())
    return Step(batch, positions, places, query_indptr, tuple(groups), single, several)


def _first_seen(group: GroupBatch, at: IntArray, alone: IntArray, window: int) -> IntArray:
    stored = group.first_page[alone] * group.page_size
    return np.maximum(stored, np.maximum(at - window + 1, 0))
