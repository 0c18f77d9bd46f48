"""A step's integers on the device: one transfer, sliced there, kept for all layers."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quire.backends.base import SomeRows
from quire.backends.cuda.device import Device
from quire.batch import Candidates, ChosenPages, GroupBatch, PagedBatch

__all__ = [
    "EVERY",
    "Held",
    "Step",
    "StepGroup",
    "Taken",
    "reading",
    "static_step",
    "take",
    "to_device",
]

IntArray = npt.NDArray[np.int64]
EVERY = 1 << 30  # the window of a group without one


class Held:
    """Arrays of the host, and their copies on the device; see :meth:`find`."""

    def __init__(self, pairs: Iterable[tuple[IntArray, torch.Tensor]] = ()) -> None:
        self._pairs = {id(array): (array, tensor) for array, tensor in pairs}

    def with_copies(self, arrays: Iterable[IntArray], device: Device) -> "Held":
        """These, and copies of those of ``arrays`` that are not among them, in one transfer."""
        new = {id(array): array for array in arrays if id(array) not in self._pairs}
        if not new:
            return self
        copies = device.all_to_device(list(new.values()))
        return Held([*self._pairs.values(), *zip(new.values(), copies, strict=True)])

    def find(self, array: object) -> torch.Tensor | None:
        """The copy of this very array, or None; equal ones are not looked for."""
        pair = self._pairs.get(id(array))
        return None if pair is None else pair[1]

    def __getitem__(self, array: IntArray) -> torch.Tensor:
        return self._pairs[id(array)][1]


@dataclass(frozen=True)
class StepGroup:
    """A GroupBatch on the device; see there.

    at, first   int64 [n] on the host: of sequences with one new token, its place and the first
                place that it sees
    chunks      int64 [m, 2] on the host: of sequences with more, how many, and how many places they
                see, all together
    plans       how layers launch attention, which need not ask again what others found
    """

    window: int
    indptr: torch.Tensor
    indices: torch.Tensor
    first_page: torch.Tensor
    open_indptr: torch.Tensor
    open_indices: torch.Tensor
    open_first: torch.Tensor
    at: IntArray
    first: IntArray
    chunks: IntArray
    plans: dict[Hashable, Any] = field(default_factory=dict)

    def splits(self, length: int) -> int:
        """The most splits of ``length`` places that one of these sequences has."""
        counts = self.at // length - self.first // length + 1
        return int(counts.max(initial=0))


@dataclass(frozen=True)
class Step:
    """A PagedBatch on the device; see there.

    reach     None, or how many splits of :data:`tiles.SPLIT` places any sequence may have:
              launches do not depend on the lengths there are
    single    True if some sequence has one new token
    several   True if some sequence has more
    allowed   groups, and pools of which kind, that it was found to store and read within
    """

    batch: PagedBatch
    held: Held
    groups: tuple[StepGroup, ...]
    single: bool
    several: bool
    reach: int | None = None
    allowed: set[Hashable] = field(default_factory=set)

    @property
    def places(self) -> torch.Tensor:
        """int64 [T]."""
        return self.held[self.batch.places]

    @property
    def query_indptr(self) -> torch.Tensor:
        """int64 [S + 1]."""
        return self.held[self.batch.query_indptr]

    @property
    def chunks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [m] and [m + 1], see :class:`quire.batch.Chunks`; of a step with ``several``."""
        chunks = self.batch.chunks
        return self.held[chunks.sequences], self.held[chunks.indptr]


@dataclass(frozen=True)
class Taken:
    """What a model hands over of a step: its batch, and the rows whose logits it wants.

    tokens   int64 [T], on the host or the device; None in a step whose buffers have them
    rows     int64 [R], with ``some`` the step of these tokens alone; None where all are wanted or
             none
    others   steps of some tokens that attend apart, and of what tokens choose
    """

    whole: Step
    tokens: Any = None
    rows: IntArray | None = None
    some: Step | None = None
    others: tuple[Step, ...] = ()

    def step_of(self, batch: PagedBatch) -> Step | None:
        """The step of this very batch, if it is one of these."""
        every = (self.whole, self.some, *self.others)
        return next((step for step in every if step is not None and step.batch is batch), None)

    def step_choosing(self, chosen: ChosenPages) -> Step | None:
        """The step of these very pages, but for their ids, if it is one of these."""
        indptr = chosen.indptr
        return next((s for s in self.others if s.batch.groups[0].indptr is indptr), None)

    def selected(self, batch: PagedBatch, rows: object) -> PagedBatch | None:
        """The batch of ``rows`` alone, if these are the very rows of this batch."""
        if self.some is None or self.rows is not rows or self.whole.batch is not batch:
            return None
        return self.some.batch


def _arrays_of(batch: PagedBatch) -> list[IntArray]:
    """All that a step's kernels read of it."""
    arrays = [batch.positions, batch.places, batch.query_indptr]
    if len(batch.chunks.sequences):
        arrays += [batch.chunks.sequences, batch.chunks.indptr]
    for group in batch.groups:
        opened = group.open
        arrays += [group.slots, group.indptr, group.indices, group.first_page]
        arrays += [opened.indptr, opened.indices, opened.first, opened.seal_from, opened.seal_to]
    if batch.candidates is not None:
        arrays += _arrays_of_candidates(batch.candidates)
    return arrays


def _arrays_of_candidates(candidates: Candidates) -> list[IntArray]:
    tables = [candidates.indptr, candidates.indices, candidates.counts, candidates.fresh]
    return [*tables, *_arrays_of(candidates.chosen)]


def to_device(batch: PagedBatch, device: Device, known: Held | None = None) -> Step:
    """All arrays of ``batch`` in one int64 tensor on the device, in slices; not those ``known``."""
    held = Held() if known is None else known
    return _step_of(batch, held.with_copies(_arrays_of(batch), device))


def take(
    tokens: Sequence[int] | IntArray | torch.Tensor,
    batch: PagedBatch,
    rows: Sequence[int] | IntArray,
    device: Device,
    beside: Sequence[SomeRows] = (),
) -> Taken:
    """All integers of a step in one transfer; tokens that are on the device stay as they are."""
    arrays = _arrays_of(batch)
    if not isinstance(tokens, torch.Tensor):
        tokens = np.asarray(tokens, np.int64)
        arrays.append(tokens)
    wanted = some = None
    if 0 < len(rows) < batch.num_tokens:
        wanted = np.asarray(rows, np.int64)
        some = batch.select(wanted)  # over the same pages, whose tables go over once
        arrays += [wanted, *_arrays_of(some)]
    apart = [part for _, part in beside]
    arrays += [array for which, part in beside for array in (which, *_arrays_of(part))]
    held = Held().with_copies(arrays, device)
    chosen = [part.candidates.chosen for part in (batch, *apart) if part.candidates is not None]
    others = tuple(_step_of(each, held) for each in (*apart, *chosen))
    alone = None if some is None else _step_of(some, held)
    return Taken(_step_of(batch, held), tokens, wanted, alone, others)


def _step_of(batch: PagedBatch, held: Held) -> Step:
    alone = np.flatnonzero(np.diff(batch.query_indptr) == 1)
    at = batch.places[batch.query_indptr[alone]]
    several, new = batch.chunks.sequences, np.diff(batch.chunks.indptr)
    last = batch.places[batch.query_indptr[several + 1] - 1]
    groups = tuple(
        _group(group, held, at, alone, _chunks(group, several, new, last)) for group in batch.groups
    )
    return Step(batch, held, groups, len(alone) > 0, len(several) > 0)


def static_step(
    batch: PagedBatch, copies: Iterable[tuple[IntArray, torch.Tensor]], reach: int
) -> Step:
    """A step whose arrays, filled again and again, have these copies; one token of a sequence."""
    none, held = np.empty(0, np.int64), Held(copies)
    chunks = np.empty((0, 2), np.int64)
    groups = tuple(_group(group, held, none, none, chunks) for group in batch.groups)
    return Step(batch, held, groups, True, False, reach)


def _chunks(group: GroupBatch, several: IntArray, new: IntArray, last: IntArray) -> IntArray:
    """See StepGroup; of the sequences ``several``, their new tokens and the last one's place."""
    begin = np.maximum(
        group.first_page[several] * group.page_size, last + 1 - new - _window(group) + 1
    )
    return np.stack([new, last + 1 - np.maximum(begin, 0)], axis=1)


def _window(group: GroupBatch) -> int:
    return EVERY if group.window is None else group.window


def _group(
    group: GroupBatch, held: Held, at: IntArray, alone: IntArray, chunks: IntArray
) -> StepGroup:
    window = _window(group)
    stored = group.first_page[alone] * group.page_size
    opened = group.open
    return StepGroup(
        window=window,
        indptr=held[group.indptr],
        indices=held[group.indices],
        first_page=held[group.first_page],
        open_indptr=held[opened.indptr],
        open_indices=held[opened.indices],
        open_first=held[opened.first],
        at=at,
        first=np.maximum(stored, np.maximum(at - window + 1, 0)),
        chunks=chunks,
    )


def reading(step: Step, indices: torch.Tensor) -> Step:
    """``step``, of what tokens choose, when the ids are there.

    The last page of each is the one that its query stands in.
    """
    [only] = step.groups
    tables = {"indices": indices, "open_indices": indices}
    own = replace(only, open_indptr=only.indptr, open_first=only.first_page, **tables)
    return replace(step, groups=(own,))
