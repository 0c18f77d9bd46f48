"""PagedBatch: all that the kernels of one step need to know about pages.

Built once a step by the cache and used by every layer. A batch is ragged: sequences lie one
behind the other with no padding, and any of them may have no new tokens. Page tables are in CSR
form with FlashInfer's names (Ye et al., 2025, arXiv:2501.01005).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "NO_OPEN_PAGES",
    "Candidates",
    "ChosenPages",
    "Chunks",
    "GroupBatch",
    "OpenPages",
    "PagedBatch",
]

IntArray = npt.NDArray[np.int64]

_AS_POSITIONS: IntArray = np.empty(0, np.int64)


def _as_positions() -> IntArray:
    return _AS_POSITIONS


@dataclass(frozen=True, eq=False)
class OpenPages:
    """Pages of a batch in a group whose format stores whole pages at once (S sequences).

    New tokens go into *open* pages, which hold them as they are; a page that a step completes is
    *sealed*: packed into another page, once. A query sees the page of its own place open and, but
    for page number 0, all others packed.

    indptr     int64 [S + 1]: sequence s has ``indices[indptr[s]:indptr[s + 1]]``
    indices    int64 [pages]: open ids of the pages that get new tokens, in order of place
    first      int64 [S]: the page number of the first of those; any where there is none
    seal_from  int64 [n]: open ids of the pages that this step completes
    seal_to    int64 [n]: the packed id that each of them is to have
    """

    indptr: IntArray
    indices: IntArray
    first: IntArray
    seal_from: IntArray
    seal_to: IntArray

    @property
    def are_used(self) -> bool:
        """False in a group of which no page is ever packed."""
        return len(self.indptr) > 0


NO_OPEN_PAGES = OpenPages(*[_AS_POSITIONS] * 5)


@dataclass(frozen=True, eq=False)
class GroupBatch:
    """One layer group's page tables for the sequences of a batch (S sequences, T new tokens).

    window         tokens that a query sees, itself included; None for all
    slots          int64 [T]: where each new token is stored, ``page_id * page_size + offset``
    indptr         int64 [S + 1]: sequence s owns ``indices[indptr[s]:indptr[s + 1]]``
    indices        int64 [pages]: page ids in order of place, as they are when the step is over
    last_page_len  int64 [S]: tokens in a sequence's last page, new ones included; 0 if it has none
    first_page     int64 [S]: how many pages, counted from place 0, were given back in front
    open           where pages are packed: the pages that the new tokens go through
    """

    page_size: int
    window: int | None
    slots: IntArray
    indptr: IntArray
    indices: IntArray
    last_page_len: IntArray
    first_page: IntArray
    open: OpenPages = NO_OPEN_PAGES

    def span(self, sequence: int) -> tuple[int, int]:
        """Places ``[start, end)`` that the pages of ``sequence`` hold, new tokens included."""
        first = int(self.first_page[sequence])
        pages = int(self.indptr[sequence + 1] - self.indptr[sequence])
        if pages == 0:
            return first * self.page_size, first * self.page_size
        end = (first + pages - 1) * self.page_size + int(self.last_page_len[sequence])
        return first * self.page_size, end

    def slots_of(self, sequence: int, start: int, end: int) -> IntArray:
        """Slots of the stored places ``[start, end)`` of ``sequence``, int64."""
        places = np.arange(start, end, dtype=np.int64)
        page, offset = np.divmod(places, self.page_size)
        at = self.indptr[sequence] + page - self.first_page[sequence]
        return self.indices[at] * self.page_size + offset

    def pages_seen(self, sequence: int, page: int) -> IntArray:
        """Ids of the pages of ``sequence`` as a new token in page number ``page`` sees them."""
        ids = self.indices[self.indptr[sequence] : self.indptr[sequence + 1]]
        if not self.open.are_used:
            return ids
        seen = ids.copy()
        own = self.open.indptr[sequence] + page - self.open.first[sequence]
        seen[page - self.first_page[sequence]] = self.open.indices[own]
        return seen

    def next_tokens(self) -> "GroupBatch":
        """See :meth:`PagedBatch.next_tokens`."""
        return GroupBatch(
            self.page_size,
            self.window,
            self.slots + 1,
            self.indptr,
            self.indices,
            self.last_page_len + 1,
            self.first_page,
            self.open,
        )


@dataclass(frozen=True, eq=False)
class ChosenPages:
    """Pages that one token of each of S sequences reads, each of G KV heads its own.

    indptr    int64 [S * G + 1]: head g of sequence s reads the pages
              ``indices[indptr[s * G + g]:indptr[s * G + g + 1]]``
    indices   int64 [pages], the backend's own array: page ids in order of place, the last with the
              newest token; all others are full
    places    int64 [S * G]: the newest token's place among those of its pages
    """

    page_size: int
    indptr: IntArray
    indices: Any
    places: IntArray

    def by_head(self) -> "PagedBatch":
        """Each head of each sequence as a sequence with one token; ids are not in that batch."""
        none, rows = np.zeros(len(self.places), np.int64), np.arange(len(self.places) + 1)
        last = self.places % self.page_size + 1
        table = GroupBatch(self.page_size, None, none, self.indptr, none[:0], last, none)
        return PagedBatch(self.places, rows, (table,), (0,))


@dataclass(frozen=True, eq=False)
class Chunks:
    """Those of a batch's sequences that have several new tokens, m of them.

    sequences  int64 [m]: their numbers
    indptr     int64 [m + 1]: where the tokens of each begin, among those of these sequences alone
    """

    sequences: IntArray
    indptr: IntArray

    @property
    def num_tokens(self) -> int:
        """New tokens of all of them."""
        return int(self.indptr[-1])


@dataclass(frozen=True, eq=False)
class PagedBatch:
    """The new tokens of one step and where their keys and values go.

    positions        int64 [T]: each new token's position in its sequence, by which it is rotated
    query_indptr     int64 [S + 1]: s has the tokens ``query_indptr[s]:query_indptr[s + 1]``
    groups           one :class:`GroupBatch` a layer group
    group_of_layer   for each layer, the index of its group
    places           int64 [T]: each new token's index among those that its sequence keeps, which
                     decides its page and what it sees; the positions if nothing was dropped
    candidates       the pages that its tokens choose from in layers that choose, if there are any
    """

    positions: IntArray
    query_indptr: IntArray
    groups: tuple[GroupBatch, ...]
    group_of_layer: tuple[int, ...]
    places: IntArray = field(default_factory=_as_positions)
    candidates: "Candidates | None" = None

    def __post_init__(self) -> None:
        if self.places is _AS_POSITIONS:
            object.__setattr__(self, "places", self.positions)

    @property
    def num_sequences(self) -> int:
        """S, sequences in the batch."""
        return len(self.query_indptr) - 1

    @property
    def num_tokens(self) -> int:
        """T, new tokens in the batch."""
        return len(self.positions)

    @cached_property
    def chunks(self) -> Chunks:
        """Always the same arrays."""
        counts = np.diff(self.query_indptr)
        several = np.flatnonzero(counts > 1)
        return Chunks(several, np.concatenate([[0], np.cumsum(counts[several])]))

    def select(self, rows: IntArray) -> "PagedBatch":
        """The batch of tokens ``rows`` (int64 [R], ascending) alone, over the same pages.

        Nothing is chosen in it.
        """
        groups = tuple(replace(group, slots=group.slots[rows]) for group in self.groups)
        indptr = np.searchsorted(rows, self.query_indptr)
        places = self.places[rows]
        return PagedBatch(self.positions[rows], indptr, groups, self.group_of_layer, places)

    def next_tokens(self) -> "PagedBatch":
        """Of a batch with one token of each sequence: that of their next ones, on the same pages.

        The last page of each must have room, and none may be sealed by these tokens or the ones
        before. Arrays that do not change are shared, and stay.
        """
        groups = tuple([group.next_tokens() for group in self.groups])
        after = self.positions + 1
        places = after if self.places is self.positions else self.places + 1
        return PagedBatch(after, self.query_indptr, groups, self.group_of_layer, places)


@dataclass(frozen=True, eq=False)
class Candidates:
    """Pages from which one token of each of S sequences chooses those that it reads.

    For each of G KV heads on its own: the first page, the newest, and of the others those with the
    highest scores, of equal ones the earlier.

    indptr    int64 [S + 1]: sequence s has ``indices[indptr[s]:indptr[s + 1]]``
    indices   int64 [pages]: page ids as its token sees them, in order of place
    counts    int64 [S]: how many each of its heads reads; 3 or more, or all that there are
    fresh     int64 [n]: those whose summaries are to be made before, of keys that are stored
    chosen    each head of each sequence as a sequence with one token, S * G of them, whose pages
              are those that are chosen: all of that batch but their ids
    longest   the most pages that a sequence has, or more
    most      the most that one of its heads reads, or more
    """

    indptr: IntArray
    indices: IntArray
    counts: IntArray
    fresh: IntArray
    chosen: PagedBatch
    longest: int
    most: int

    @classmethod
    def of(
        cls,
        page_size: int,
        heads: int,
        tables: tuple[IntArray, IntArray],
        *,
        counts: Sequence[int],
        last_page_len: Sequence[int],
        fresh: IntArray,
    ) -> "Candidates":
        """Of each sequence's pages, and how many tokens the last of them holds.

        ``heads`` is G, ``tables`` are indptr and indices, which may be those of the batch itself.
        """
        indptr, indices = tables
        read = np.array(counts, np.int64)
        each, last = np.repeat(read, heads), np.repeat(np.array(last_page_len, np.int64), heads)
        places, starts = (each - 1) * page_size + last - 1, np.concatenate([[0], np.cumsum(each)])
        chosen = ChosenPages(page_size, starts, None, places).by_head()
        longest, most = int(np.diff(indptr).max()), int(read.max())
        return cls(indptr, indices, read, fresh, chosen, longest, most)

    def choose(self, indices: Any) -> ChosenPages:
        """What is chosen, when it is: page ids, the backend's own."""
        [table] = self.chosen.groups
        return ChosenPages(table.page_size, table.indptr, indices, self.chosen.places)
