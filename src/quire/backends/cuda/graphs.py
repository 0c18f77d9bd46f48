"""A step that only decodes, in static buffers: captured once as a CUDA graph, then replayed.

Launching the kernels of a step one by one takes the host longer than a GPU computes a small one. A
graph is launched as a whole, but reads and writes the addresses, and has the grids, that it was
captured with. So sequences are padded to a bucket, lists of pages and splits of the context to a
power of two, and every step of such a shape replays one graph. What a padding row stores lies at
slot -1, which is skipped, and nobody reads what it computes. On CPU tensors the same step runs
without a graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from quire.backends.base import Compute
from quire.backends.cuda.device import Device, aligned
from quire.backends.cuda.pool import CudaPool
from quire.backends.cuda.sampling import CudaLogits, best_of
from quire.backends.cuda.steps import Taken, static_step
from quire.backends.cuda.stored import power_of_two
from quire.backends.cuda.tiles import SPLIT
from quire.batch import NO_OPEN_PAGES, Candidates, GroupBatch, OpenPages, PagedBatch

__all__ = ["MOST", "StepGraph", "StepShape", "shape_of"]

IntArray = npt.NDArray[np.int64]
Tensor = Any

MOST = 256  # sequences of the largest bucket
_PAGES = 64  # page ids of the smallest


@dataclass(frozen=True)
class StepShape:
    """What a graph is captured for: numbers of sequences, splits of SPLIT places and page ids.

    choosing   where tokens choose pages: the most that a sequence has, the most that a head reads,
               and KV heads
    """

    sequences: int
    reach: int
    pages: int
    choosing: tuple[int, int, int] | None = None


def shape_of(batch: PagedBatch) -> StepShape | None:
    """The bucket of a step; None unless it has one new token of each of 1 to MOST sequences."""
    count = batch.num_sequences
    if (
        not 0 < count <= MOST
        or batch.num_tokens != count
        or (np.diff(batch.query_indptr) != 1).any()
    ):
        return None
    pages = sum(len(group.indices) for group in batch.groups)
    reach = int(batch.places.max()) // SPLIT + 1
    choosing, candidates = None, batch.candidates
    if candidates is not None:
        if len(candidates.fresh) > count:  # behind a prompt
            return None
        shared = any(candidates.indices is group.indices for group in batch.groups)
        pages += 0 if shared else len(candidates.indices)
        heads = len(candidates.chosen.places) // count
        choosing = power_of_two(candidates.longest), power_of_two(candidates.most), heads
    ids = power_of_two(max(_PAGES, pages))
    return StepShape(power_of_two(count), power_of_two(reach), ids, choosing)


class Computes(Protocol):
    """What a graph needs of the backend."""

    device: Device

    def computed(
        self, compute: Compute, tokens: IntArray, taken: Taken, pools: Sequence[Any]
    ) -> Tensor:
        """[T, hidden] of a step whose arrays, tokens too, have copies there."""

    def product(self, out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """``x @ weight.T`` in the memory of ``out``, float32."""


class StepGraph:
    """Decode steps of one shape, over one engine's pools. ``like`` is the first of them."""

    def __init__(
        self,
        backend: Computes,
        compute: Compute,
        head: Tensor,
        pools: Sequence[CudaPool],
        shape: StepShape,
        like: PagedBatch,
    ) -> None:
        self._backend, self._model, self._head = backend, compute, head
        self._pools, self.shape = pools, shape
        self._buffers = _Buffers(backend.device, shape, like)
        self._logits = backend.device.logits(shape.sequences, len(head))
        self._graph: Any = None
        self._best: Tensor = None

    def run(self, tokens: Sequence[int] | Tensor, batch: PagedBatch) -> CudaLogits:
        """Logits of ``batch`` [T, vocab], on the device until any graph runs. Waits for nothing."""
        device = self._backend.device
        device.replays += 1  # a capture overwrites what others gave, even one that fails
        now = device.replays
        self._buffers.fill(tokens, batch)
        if not device.hardware:
            self._best = self._compute()
        else:
            if self._graph is None:
                self._graph = self._capture()
            self._graph.replay()
        logits, best = (each[: len(tokens)] for each in (self._logits, self._best))
        return CudaLogits(device, logits, best, lambda: device.replays != now)

    def _compute(self) -> Tensor:
        """Logits, and which of each row is the likeliest: most steps need no more than that."""
        held = self._buffers
        hidden = self._backend.computed(self._model, held.tokens, held.taken, self._pools)
        logits = self._backend.product(self._logits, hidden, self._head)
        return best_of(self._backend.device, logits)

    def _capture(self) -> Any:
        """Runs the step once, so that kernels are compiled and libraries ready, then captures it.

        The replay stores the same numbers in the same places again.
        """
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(beside):
                self._compute()
        finally:  # if it fails, what it has launched still reads what is let go now
            torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        device = self._backend.device
        with (
            device.streams.submitting,  # a thread that moves pages hands nothing over meanwhile
            torch.cuda.graph(graph, pool=device.graph_memory, capture_error_mode="thread_local"),
        ):
            self._best = self._compute()
        return graph


class _Buffers:
    """A step's integers at fixed addresses: one array on the host, pinned, and its copy.

    ``tokens`` and the arrays of ``step.batch`` are parts of the host's, whose copies ``taken`` has.
    """

    def __init__(self, device: Device, shape: StepShape, like: PagedBatch) -> None:
        n = shape.sequences
        lengths = [n, n, n, n + 1]  # tokens, positions, places, query_indptr
        for group in like.groups:
            lengths += [n, n + 1, n]
            lengths += [n + 1, n, n, n, n] if group.open.are_used else []
        if shape.choosing is not None:
            rows = n * shape.choosing[2]
            lengths += [n + 1, n, n, rows, rows + 1, rows + 1, rows]
        self._device = device
        starts = [0, *accumulate(map(aligned, lengths))]
        self._fixed, self._copied = starts[-1], None
        self._host, self._there = device.mirrored(self._fixed + shape.pages)
        parts = [slice(at, at + n) for at, n in zip(starts, [*lengths, shape.pages], strict=True)]
        here = self._host.numpy()
        copies = [(here[part], self._there[part]) for part in parts]
        arrays = iter([array for array, _ in copies])
        self.tokens = next(arrays)
        self._indices = copies[-1][0]
        none = NO_OPEN_PAGES.indptr, self._there[:0]
        batch = self._static(arrays, like)
        candidates = _candidates(arrays, self._indices, shape, like)
        self.batch = replace(batch, candidates=candidates)
        self.taken = _taken(self.batch, [*copies, none], shape.reach)

    def _static(self, parts: Any, like: PagedBatch) -> PagedBatch:
        positions, places, query_indptr = next(parts), next(parts), next(parts)
        groups = []
        for group in like.groups:
            slots, indptr, first_page = next(parts), next(parts), next(parts)
            opened = NO_OPEN_PAGES
            if group.open.are_used:
                opened = OpenPages(*(next(parts) for _ in range(5)))
            tables = group.page_size, group.window, slots, indptr, self._indices, first_page
            groups.append(GroupBatch(*tables, first_page, opened))
        return PagedBatch(positions, query_indptr, tuple(groups), like.group_of_layer, places)

    def fill(self, tokens: Sequence[int] | Tensor, batch: PagedBatch) -> None:
        """Put a step into the buffers, those of the device too: in one copy of what is used."""
        self._device.wait(self._copied)
        into, ids = self.batch, _Ids(self._indices)
        there = isinstance(tokens, torch.Tensor)  # chosen by the step before
        _put(self.tokens, () if there else tokens, 0)
        _put(into.positions, batch.positions, 0)
        _put(into.places, batch.places, 0)
        _put(into.query_indptr, batch.query_indptr, len(tokens))
        for to, group in zip(into.groups, batch.groups, strict=True):
            ids.put(to.indptr, group.indptr, group.indices)
            _put(to.slots, group.slots, -1)
            _put(to.first_page, group.first_page, 0)
            if to.open.are_used:
                opened = group.open
                _put(to.open.indptr, opened.indptr, len(opened.indices))
                _put(to.open.indices, opened.indices, 0)
                _put(to.open.first, opened.first, 0)
                _put(to.open.seal_from, opened.seal_from, -1)
                _put(to.open.seal_to, opened.seal_to, -1)
        if batch.candidates is not None and into.candidates is not None:
            ids.put(into.candidates.indptr, batch.candidates.indptr, batch.candidates.indices)
            _fill(into.candidates, batch.candidates)
        self._device.renew(self._there, self._host, self._fixed + ids.used)
        self._copied = self._device.mark()
        if there:
            self._there[: len(tokens)].copy_(tokens)


class _Ids:
    """Lists of page ids in one static buffer, one behind the other; the same array once."""

    def __init__(self, into: IntArray) -> None:
        self._into, self._starts, self.used = into, dict[int, int](), 0

    def put(self, to: IntArray, indptr: IntArray, indices: IntArray) -> None:
        """``indptr`` as it is there goes into ``to``."""
        at = self._starts.setdefault(id(indices), self.used)
        if at == self.used:
            self.used += len(indices)
            self._into[at : self.used] = indices
        _put(to, indptr + at, at + len(indices))


def _taken(batch: PagedBatch, copies: list[tuple[IntArray, Tensor]], reach: int) -> Taken:
    """A step of static buffers, and of what its tokens choose."""
    whole, candidates = static_step(batch, copies, reach), batch.candidates
    if candidates is None:
        return Taken(whole)
    places = candidates.most * candidates.chosen.groups[0].page_size
    return Taken(whole, others=(static_step(candidates.chosen, copies, -(-places // SPLIT)),))


def _candidates(
    parts: Any, indices: IntArray, shape: StepShape, like: PagedBatch
) -> Candidates | None:
    """Those of static buffers, whose ids lie behind those of the batch."""
    if shape.choosing is None or like.candidates is None:
        return None
    longest, most, _ = shape.choosing
    [table] = like.candidates.chosen.groups
    indptr, counts, fresh, places, rows, starts, zeros = (next(parts) for _ in range(7))
    group = GroupBatch(table.page_size, None, zeros, starts, NO_OPEN_PAGES.indptr, places, zeros)
    chosen = PagedBatch(places, rows, (group,), (0,))
    return Candidates(indptr, indices, counts, fresh, chosen, longest, most)


def _fill(into: Candidates, candidates: Candidates) -> None:
    """Put all but their ids into static buffers."""
    [to], [table] = into.chosen.groups, candidates.chosen.groups
    places = candidates.chosen.places
    _put(into.counts, candidates.counts, 0)
    _put(into.fresh, candidates.fresh, -1)
    _put(into.chosen.places, places, 0)
    _put(into.chosen.query_indptr, candidates.chosen.query_indptr, len(places))
    _put(to.indptr, table.indptr, table.indptr[-1])


def _put(into: IntArray, numbers: Any, rest: int) -> None:
    into[: len(numbers)] = numbers
    into[len(numbers) :] = rest
