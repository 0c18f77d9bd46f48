"""The batch of a step, made of the page tables of its sequences."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from quire.batch import OpenPages, PagedBatch
from quire.cache.sequence import (
    Growth,
    Growths,
    Reservation,
    SequenceState,
    extended,
    grown,
)
from quire.cache.table import PageTable, flatten, open_pages
from quire.layout import CacheLayout

__all__ = ["BatchBuilder"]


class BatchBuilder:
    """Builds batches, most of a long reply's from the one before.

    While the same sequences decode and none of them needs another page, or a page that becomes
    whole is to be packed, only the positions move.
    """

    def __init__(self, layout: CacheLayout) -> None:
        self._layout, self._group_of_layer = layout, layout.group_of_layer
        self._last: Reservation | None = None

    def build(
        self,
        chunks: Sequence[tuple[int, int]],
        states: Sequence[SequenceState],
        growth: Sequence[Growths],
    ) -> PagedBatch:
        """The batch of ``chunks``, (sequence, new tokens), on their tables after ``growth``."""
        last = self._last
        if last is not None and last.chunks == tuple(chunks) and not any(growth):
            return last.batch.next_tokens()
        counts = [count for _, count in chunks]
        ends = [state.length + count for state, count in zip(states, counts, strict=True)]
        query_indptr = np.array([0, *accumulate(counts)], dtype=np.int64)
        if max(counts, default=0) <= 1:  # a step that only decodes
            busy = [i for i, count in enumerate(counts) if count]
            places = np.array([ends[i] - 1 for i in busy], dtype=np.int64)
            owner = np.array(busy, dtype=np.int64)
        else:
            owner = np.repeat(np.arange(len(states)), counts)
            starts = np.array(ends) - np.array(counts) - query_indptr[:-1]
            places = np.arange(query_indptr[-1]) + starts[owner]
        groups = tuple(
            flatten(
                [
                    grown(state.tables[g], growths[g]) if growths else state.tables[g]
                    for state, growths in zip(states, growth, strict=True)
                ],
                ends,
                (places, owner),
                (self._layout.page_size, group.window),
                self._through(g, states, growth, ends) if self._layout.packs[g] else None,
            )
            for g, group in enumerate(self._layout.groups)
        )
        dropped = [state.dropped for state in states]
        positions = places + np.array(dropped)[owner] if any(dropped) else places
        return PagedBatch(positions, query_indptr, groups, self._group_of_layer, places)

    def _through(
        self,
        group: int,
        states: Sequence[SequenceState],
        growth: Sequence[Growths],
        ends: Sequence[int],
    ) -> tuple[list[PageTable], OpenPages]:
        """The tables that new tokens go through in a group that packs its pages."""
        tables: list[PageTable] = []
        seals: list[tuple[int, int]] = []
        for state, growths in zip(states, growth, strict=True):
            grows = growths[group] if growths else Growth()
            tables.append(extended(state.tables[group], grows))
            numbers = range(grows.first_packed, grows.first_packed + len(grows.packed))
            seals += zip(map(tables[-1].page, numbers), grows.packed, strict=True)
        spans = [(state.length, end) for state, end in zip(states, ends, strict=True)]
        return tables, open_pages(tables, spans, seals, self._layout.page_size)

    def committed(self, reservation: Reservation, counts: Sequence[int]) -> None:
        """``reservation`` was committed, ``counts`` tokens of each sequence; no table was cut."""
        one_each = counts.count(1) == len(counts) == reservation.batch.num_tokens
        self._last = reservation if one_each else None

    def forget(self) -> None:
        """Tables or lengths are about to change."""
        self._last = None
