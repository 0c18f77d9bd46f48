"""PagedBatch and page tables against a worked example."""

from array import array

import numpy as np
import pytest

from quire.batch import GroupBatch, PagedBatch
from quire.cache.table import PageTable, flatten


def table(pages: list[int], first_page: int = 0) -> PageTable:
    return PageTable(array("q", pages), first_page)


def ints(*values: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(values, dtype=np.int64)


@pytest.fixture
def worked() -> GroupBatch:
    """Pages of 4 tokens. A: 5 tokens and 2 new. B: empty. C: 15 and 3 new, two pages given back.
    D: 12 tokens, all of them given back.
    """
    return flatten(
        [table([7, 2]), table([]), table([5, 0, 3], 2), table([], 3)],
        ints(7, 0, 18, 12),
        (ints(5, 6, 15, 16, 17), ints(0, 0, 2, 2, 2)),
        (4, 6),
    )


def test_tables_in_csr_form_as_worked_by_hand(worked: GroupBatch) -> None:
    assert (worked.page_size, worked.window) == (4, 6)
    assert worked.indptr.tolist() == [0, 2, 2, 5, 5]
    assert worked.indices.tolist() == [7, 2, 5, 0, 3]
    assert worked.last_page_len.tolist() == [3, 0, 2, 0]
    assert worked.first_page.tolist() == [0, 0, 2, 3]
    # A's 5 and 6 are at 1 and 2 of page 2; C's 15 ends page 0, its 16 and 17 begin page 3.
    assert worked.slots.tolist() == [9, 10, 3, 12, 13]
    for field in ("indptr", "indices", "last_page_len", "first_page", "slots"):
        assert getattr(worked, field).dtype == np.int64


def test_a_span_is_the_positions_that_the_pages_hold(worked: GroupBatch) -> None:
    assert [worked.span(s) for s in range(4)] == [(0, 7), (0, 0), (8, 18), (12, 12)]


def test_slots_of_stored_positions(worked: GroupBatch) -> None:
    assert worked.slots_of(0, 0, 7).tolist() == [28, 29, 30, 31, 8, 9, 10]
    assert worked.slots_of(2, 8, 13).tolist() == [20, 21, 22, 23, 0]
    assert worked.slots_of(2, 17, 18).tolist() == [13]
    assert worked.slots_of(1, 0, 0).tolist() == []
    assert worked.slots_of(0, 5, 7).dtype == np.int64


def test_pages_of_one_token_are_slots() -> None:
    batch = flatten([table([4, 1, 6], 2)], ints(5), (ints(4), ints(0)), (1, 3))
    assert (batch.slots.tolist(), batch.last_page_len.tolist()) == ([6], [1])
    assert (batch.span(0), batch.slots_of(0, 2, 5).tolist()) == ((2, 5), [4, 1, 6])


def test_a_full_last_page_has_all_its_tokens() -> None:
    batch = flatten([table([3, 1])], ints(8), (ints(), ints()), (4, None))
    assert (batch.last_page_len.tolist(), batch.span(0)) == ([4], (0, 8))


def test_a_batch_of_nothing() -> None:
    batch = flatten([], ints(), (ints(), ints()), (4, None))
    assert batch.indptr.tolist() == [0]
    for field in ("indices", "last_page_len", "first_page", "slots"):
        assert getattr(batch, field).tolist() == []
        assert getattr(batch, field).dtype == np.int64


def test_a_batch_counts_sequences_and_tokens(worked: GroupBatch) -> None:
    batch = PagedBatch(ints(5, 6, 15, 16, 17), ints(0, 2, 2, 5, 5), (worked,), (0, 0))
    assert (batch.num_sequences, batch.num_tokens) == (4, 5)
    empty = PagedBatch(ints(), ints(0), (), ())
    assert (empty.num_sequences, empty.num_tokens) == (0, 0)


def test_chunks_are_those_with_several_tokens(worked: GroupBatch) -> None:
    indptr = np.array([0, 1, 1, 4, 6, 7], np.int64)
    batch = PagedBatch(np.arange(7), indptr, (worked,), (0,))
    assert batch.chunks.sequences.tolist() == [2, 3]
    assert batch.chunks.indptr.tolist() == [0, 3, 5]
    assert batch.chunks.num_tokens == 5
    assert batch.chunks is batch.chunks
    none = PagedBatch(np.arange(2), np.array([0, 1, 2]), (worked,), (0,)).chunks
    assert (none.sequences.tolist(), none.indptr.tolist(), none.num_tokens) == ([], [0], 0)


def test_selected_tokens_keep_their_sequences_and_pages(worked: GroupBatch) -> None:
    batch = PagedBatch(ints(5, 6, 15, 16, 17), ints(0, 2, 2, 5, 5), (worked,), (0, 0))
    some = batch.select(ints(1, 2, 4))
    assert some.positions.tolist() == [6, 15, 17]
    assert some.query_indptr.tolist() == [0, 1, 1, 3, 3]
    assert some.groups[0].slots.tolist() == [10, 3, 13]
    assert some.groups[0].indices.tolist() == worked.indices.tolist()
    assert some.group_of_layer == batch.group_of_layer
    none = batch.select(ints())
    assert (none.num_tokens, none.query_indptr.tolist()) == (0, [0] * 5)


def test_arrays_of_a_batch_do_not_follow_later_changes_of_a_table() -> None:
    pages = table([3, 1])
    batch = flatten([pages], ints(8), (ints(), ints()), (4, None))
    pages.pages[0] = 9
    pages.pages.append(5)
    assert batch.indices.tolist() == [3, 1]


def test_pages_leave_a_table_in_front_and_at_the_back() -> None:
    pages = table([5, 0, 3, 8], 2)
    copy = pages.copy()
    assert pages.end_page == 6
    assert pages.drop_front(2) == []
    assert pages.drop_front(3) == [5]
    assert (list(pages.pages), pages.first_page, pages.end_page) == ([0, 3, 8], 3, 6)
    assert pages.drop_back(5) == [8]
    assert (list(pages.pages), pages.first_page, pages.end_page) == ([0, 3], 3, 5)
    assert pages.drop_back(5) == []
    assert pages.drop_front(9) == [0, 3]
    assert (list(pages.pages), pages.first_page, pages.end_page) == ([], 5, 5)
    assert (list(copy.pages), copy.first_page) == ([5, 0, 3, 8], 2)
