"""KVCache by example: steps, forks, windows, refusals, books and bytes.

Long random histories are in ``test_kvcache_machine.py``.
"""

import re
from collections.abc import Callable, Sequence
from itertools import accumulate, product
from typing import Any

import numpy as np
import pytest

from caches import (
    Windows,
    append,
    assert_holds,
    cache_of,
    cache_over,
    ceil_div,
    filled,
    layout_of,
    reserve,
    snapshot,
    write,
)
from quire.backends.reference import ReferencePool
from quire.cache import CacheUsage, KVCache
from quire.errors import CacheError, CacheFull, CacheInvariantError

CONTEXT = 40  # the longest sequence of these tests; pages of 40 make a contiguous cache
PAGE_SIZES = [1, 3, 16, CONTEXT]
WINDOWS: list[Windows] = [(None,), (5, 5), (None, 5), (2, None, 7)]

every_page_size = pytest.mark.parametrize("size", PAGE_SIZES)
every_model = pytest.mark.parametrize("windows", WINDOWS, ids=str)


def roomy(size: int, windows: Windows = (None,), sequences: int = 4) -> KVCache:
    return cache_of(size, sequences * ceil_div(CONTEXT, size), windows)


def tokens(number: int, start: int = 1) -> list[int]:
    return list(range(start, start + number))


def kept_pages(window: int | None, length: int, size: int) -> list[int]:
    """Page numbers with tokens where a next token, at position ``length``, sees or is written."""
    first = 0 if window is None else max(0, length - window + 1)
    return [page for page in range(ceil_div(length, size)) if (page + 1) * size > first]


# -- a step ----------------------------------------------------------------------------------


@every_model
@every_page_size
@pytest.mark.parametrize("chunk", [1, 2, 7, CONTEXT])
def test_a_sequence_holds_its_tokens_whatever_the_chunks(
    size: int, windows: Windows, chunk: int
) -> None:
    cache = roomy(size, windows)
    sequence, told = cache.create(), tokens(CONTEXT)
    for end in range(chunk, CONTEXT + chunk, chunk):
        append(cache, (sequence, told[end - chunk : end]))
        assert_holds(cache, sequence, told[:end])
        cache.check()


@every_page_size
def test_a_sequence_takes_the_pages_that_its_tokens_fill(size: int) -> None:
    cache = roomy(size)
    sequence, all_pages = cache.create(), cache.num_pages[0]
    assert cache.free_pages == (all_pages,)
    for length in range(1, CONTEXT + 1):
        assert cache.cost(sequence, 1) == ((length - 1) % size == 0,)
        append(cache, (sequence, [length]))
        assert cache.free_pages == (all_pages - ceil_div(length, size),)
    assert cache.cost(None, CONTEXT) == (ceil_div(CONTEXT, size),)


@every_page_size
def test_reserved_tokens_count_only_after_the_commit(size: int) -> None:
    cache = roomy(size)
    sequence = filled(cache, tokens(5))
    before = cache.usage(sequence)
    made = reserve(cache, (sequence, tokens(9, 6)))
    assert_holds(cache, sequence, tokens(5))
    assert cache.usage(sequence).tokens == before.tokens == 5
    cache.check()
    cache.commit(made)
    assert_holds(cache, sequence, tokens(14))


@every_model
@every_page_size
def test_rollback_leaves_everything_as_it_was(size: int, windows: Windows) -> None:
    cache = roomy(size, windows, sequences=6)
    first = filled(cache, tokens(10))
    forked = cache.fork(first)
    other, empty = filled(cache, tokens(7, 100)), cache.create()
    before = snapshot(cache)
    chunks = [(first, tokens(9, 200)), (forked, tokens(1, 300)), (other, []), (empty, tokens(4))]
    cache.rollback(reserve(cache, *chunks))
    assert snapshot(cache) == before
    append(cache, *chunks)
    assert_holds(cache, first, tokens(10) + tokens(9, 200))
    assert_holds(cache, forked, [*tokens(10), 300])
    assert_holds(cache, empty, tokens(4))


@every_page_size
def test_one_reservation_may_be_open_beside_another(size: int) -> None:
    cache = roomy(size)
    first = filled(cache, tokens(5))
    second = cache.fork(first)
    one, two = reserve(cache, (first, [70])), reserve(cache, (second, [80, 81]))
    cache.check()
    cache.commit(two)
    cache.check()
    cache.rollback(one)
    assert_holds(cache, first, tokens(5))
    assert_holds(cache, second, [*tokens(5), 80, 81])
    cache.release(first)
    cache.release(second)
    assert cache.free_pages == cache.num_pages


def test_a_step_of_no_sequences_or_no_tokens_changes_nothing() -> None:
    cache = roomy(3)
    sequence = filled(cache, tokens(4))
    before = snapshot(cache)
    append(cache)
    append(cache, (sequence, []))
    assert snapshot(cache) == before


# -- running out -----------------------------------------------------------------------------


def test_cache_full_says_what_is_needed_and_what_is_free() -> None:
    cache = cache_of(3, 5)
    held = filled(cache, [1])
    first, second = cache.create(), cache.create()
    before = snapshot(cache)
    expected = "13 tokens of 2 sequences need 5 pages of 3 tokens .*, but 4 of 5 are free"
    with pytest.raises(CacheFull, match=expected):
        cache.reserve([(first, 7), (second, 6)])
    assert snapshot(cache) == before
    append(cache, (first, tokens(7)), (second, tokens(3, 20)))
    assert cache.free_pages == (0,)
    assert_holds(cache, held, [1])


def test_cache_full_names_the_group_that_lacks_pages_and_takes_none_of_the_other() -> None:
    cache = cache_over(layout_of(2, (None, 4)), [9, 3])
    sequence = cache.create()
    before = snapshot(cache)
    with pytest.raises(CacheFull, match=r"need 4 pages of 2 tokens \(sliding window 4\).* 3 of 3"):
        cache.reserve([(sequence, 7)])
    assert snapshot(cache) == before
    cache = cache_over(layout_of(2, (None, 4)), [3, 9])
    with pytest.raises(CacheFull, match=r"need 4 pages of 2 tokens \(full attention\).* 3 of 3"):
        cache.reserve([(cache.create(), 7)])


@every_page_size
def test_a_full_cache_serves_again_after_a_release(size: int) -> None:
    cache = roomy(size, sequences=1)
    sequence = filled(cache, tokens(CONTEXT))
    late = cache.create()
    with pytest.raises(CacheFull):
        cache.reserve([(late, 1)])
    with pytest.raises(CacheFull):
        cache.reserve([(cache.fork(sequence), cache.num_pages[0] * size - CONTEXT + 1)])
    for handle in cache.sequences[:]:
        if handle != late:
            cache.release(handle)
    append(cache, (late, tokens(CONTEXT, 50)))
    assert_holds(cache, late, tokens(CONTEXT, 50))


def test_the_copy_of_a_shared_page_counts_in_what_is_needed() -> None:
    cache = cache_of(4, 2)
    source = filled(cache, tokens(6))
    forked = cache.fork(source)
    assert cache.cost(forked, 1) == (1,)
    before = snapshot(cache)
    with pytest.raises(CacheFull, match=r"1 tokens of 1 sequences need 1 pages .* 0 of 2"):
        cache.reserve([(forked, 1)])
    assert snapshot(cache) == before
    cache.release(source)
    assert cache.cost(forked, 2) == (0,)
    append(cache, (forked, [60, 61]))
    assert_holds(cache, forked, [*tokens(6), 60, 61])


def test_a_pool_that_fails_to_copy_leaves_the_cache_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = roomy(4)
    source = filled(cache, tokens(6))
    forked = cache.fork(source)
    before = snapshot(cache)

    def fail(source: Sequence[int], target: Sequence[int]) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(cache.pools[0], "copy_pages", fail)
        with pytest.raises(MemoryError):
            cache.reserve([(forked, 9)])
    assert snapshot(cache) == before
    append(cache, (forked, [60]))
    assert_holds(cache, forked, [*tokens(6), 60])


# -- forks -----------------------------------------------------------------------------------


@every_model
@every_page_size
@pytest.mark.parametrize("length", [0, 1, 5, 16, 17])
def test_a_fork_takes_no_pages_and_the_first_write_copies(
    size: int, windows: Windows, length: int
) -> None:
    cache = roomy(size, windows)
    source = filled(cache, tokens(length))
    free = cache.free_pages
    forked = cache.fork(source)
    assert forked != source
    assert cache.free_pages == free
    assert_holds(cache, forked, tokens(length))
    # Either an unfinished page is copied, or a new one is begun: one page, never more.
    append(cache, (forked, [77]))
    assert cache.free_pages == tuple(pages - 1 for pages in free)
    append(cache, (source, [88]))
    cache.check()
    for turn in range(3):
        assert_holds(cache, forked, [*tokens(length), 77, *tokens(turn, 500)])
        assert_holds(cache, source, [*tokens(length), 88, *tokens(turn, 900)])
        append(cache, (forked, [500 + turn]), (source, [900 + turn]))


def test_the_last_holder_of_a_page_writes_in_place() -> None:
    cache = cache_of(4, 3)
    source = filled(cache, tokens(6))
    forked = cache.fork(source)
    append(cache, (source, [70]))
    assert (cache.free_pages, cache.cost(forked, 1)) == ((0,), (0,))
    append(cache, (forked, [80]))
    assert cache.free_pages == (0,)
    assert_holds(cache, source, [*tokens(6), 70])
    assert_holds(cache, forked, [*tokens(6), 80])


@every_page_size
def test_a_family_of_forks_in_one_batch_keeps_its_own_contents(size: int) -> None:
    cache = roomy(size, sequences=5)
    root = filled(cache, tokens(10))
    child = cache.fork(root)
    family = [root, child, cache.fork(child), cache.fork(root)]
    append(cache, *((handle, [100 * (i + 1), 7]) for i, handle in enumerate(family)))
    cache.check()
    for i, handle in enumerate(family):
        assert_holds(cache, handle, [*tokens(10), 100 * (i + 1), 7])
    for handle in family:
        cache.release(handle)
    assert cache.free_pages == cache.num_pages


@every_page_size
def test_a_copy_that_is_rolled_back_leaves_the_page_shared(size: int) -> None:
    cache = roomy(size)
    source = filled(cache, tokens(5))
    forked = cache.fork(source)
    before = snapshot(cache)
    cache.rollback(reserve(cache, (forked, tokens(3, 60))))
    assert snapshot(cache) == before
    append(cache, (source, [70]))
    assert_holds(cache, forked, tokens(5))
    assert_holds(cache, source, [*tokens(5), 70])


@every_model
@every_page_size
def test_release_frees_the_pages_that_nobody_else_holds(size: int, windows: Windows) -> None:
    cache = roomy(size, windows)
    source = filled(cache, tokens(10))
    forked = cache.fork(source)
    append(cache, (forked, tokens(9, 60)))
    for handle, rest in ((source, forked), (forked, None)):
        alone, free = cache.freed_by_release(handle), cache.free_pages
        cache.release(handle)
        assert cache.free_pages == tuple(f + a for f, a in zip(free, alone, strict=True))
        cache.check()
        if rest is not None:
            assert_holds(cache, rest, tokens(10) + tokens(9, 60))
    assert cache.free_pages == cache.num_pages
    assert cache.sequences == ()


# -- truncate --------------------------------------------------------------------------------


@every_page_size
@pytest.mark.parametrize("length", [0, 1, 3, 15, 16, 17, 20])
def test_truncate_forgets_the_tail_and_frees_its_pages(size: int, length: int) -> None:
    cache = roomy(size)
    sequence = filled(cache, tokens(20))
    cache.truncate(sequence, length)
    cache.check()
    assert_holds(cache, sequence, tokens(length))
    assert cache.free_pages == (cache.num_pages[0] - ceil_div(length, size),)
    append(cache, (sequence, tokens(9, 300)))
    assert_holds(cache, sequence, tokens(length) + tokens(9, 300))


@every_page_size
@pytest.mark.parametrize("length", [0, 2, 9, 17])
def test_truncate_across_a_shared_page_spares_the_other_holder(size: int, length: int) -> None:
    cache = roomy(size)
    source = filled(cache, tokens(18))
    forked = cache.fork(source)
    free = cache.free_pages
    cache.truncate(forked, length)
    assert cache.free_pages == free
    append(cache, (forked, tokens(5, 400)))
    append(cache, (source, [900]))
    cache.check()
    assert_holds(cache, forked, tokens(length) + tokens(5, 400))
    assert_holds(cache, source, [*tokens(18), 900])


def test_truncate_beyond_the_end_or_below_zero_is_refused() -> None:
    cache = roomy(3)
    sequence = filled(cache, tokens(4))
    before = snapshot(cache)
    for length in (5, -1):
        with pytest.raises(CacheError, match=f"cannot truncate .* to {length} tokens: it has 4"):
            cache.truncate(sequence, length)
    assert snapshot(cache) == before


@pytest.mark.parametrize(
    "windows", [(1,), (2,), (5,), (None, 5), (2, 7), (7, 2), (4, 5, 6)], ids=str
)
@pytest.mark.parametrize("size", [1, 3, 4, CONTEXT])
def test_truncate_names_the_shortest_length_whose_window_is_still_there(
    size: int, windows: Windows
) -> None:
    for length in range(1, 20):
        cache = roomy(size, windows)
        sequence = filled(cache, tokens(length))
        worked, named = set[int](), set[int]()
        for target in range(length + 1):
            trial, refusal = cache.fork(sequence), ""
            try:
                cache.truncate(trial, target)
            except CacheError as error:
                refusal = str(error)
            if refusal:
                assert_holds(cache, trial, tokens(length))
                found = re.search(r"the shortest possible length is (\d+);", refusal)
                assert found, refusal
                named.add(int(found[1]))
            else:
                worked.add(target)
                append(cache, (trial, [600]))
                assert_holds(cache, trial, [*tokens(target), 600])
            cache.release(trial)
        gone = [
            set(range(ceil_div(length, size))) - set(kept_pages(window, length, size))
            for window in windows
        ]
        possible = {
            target
            for target in range(length + 1)
            if all(
                (0 if w is None else max(0, target - w + 1)) // size not in dropped
                for w, dropped in zip(windows, gone, strict=True)
            )
        }
        assert worked == possible
        assert named <= {min(possible)}


# -- sliding windows -------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 5, 8])
@pytest.mark.parametrize("window", [1, 2, 4, 7])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_long_sequence_in_a_window_stops_growing(size: int, window: int, chunk: int) -> None:
    cache = cache_of(size, 100 // size + 1, (window,))
    group, sequence, told = cache.layout.groups[0], cache.create(), tokens(100)
    bound = group.most_pages(100, chunk, size) * cache.layout.page_bytes(0)
    peak = 0
    for start in range(0, 100, chunk):
        new = told[start : start + chunk]
        made = reserve(cache, (sequence, new))
        peak = max(peak, cache.allocated_bytes(sequence))
        cache.commit(made)
        end = start + len(new)
        assert_holds(cache, sequence, told[:end])
        assert cache.num_pages[0] - cache.free_pages[0] == len(kept_pages(window, end, size))
    assert peak <= bound < ceil_div(100, size) * cache.layout.page_bytes(0)


def test_in_a_mixed_model_only_the_window_gives_pages_back() -> None:
    cache = cache_over(layout_of(4, (None, 6, None)), [10, 4])
    sequence = cache.create()
    for start in range(1, 41, 4):
        append(cache, (sequence, tokens(4, start)))
        assert_holds(cache, sequence, tokens(start + 3))
    # Length 40: a next token sees positions 35 to 40, so pages 8 (32 to 35) and 9 stay.
    assert cache.free_pages == (0, 2)
    table = cache.to_arrays(sequence, "pages").layers
    assert [(kv.start, len(kv.page_table)) for kv in table] == [(0, 10), (32, 2), (0, 10)]


def test_pages_behind_the_window_serve_other_sequences() -> None:
    cache = cache_of(2, 4, (4,))
    first = cache.create()
    for token in tokens(11):
        append(cache, (first, [token]))
    second = filled(cache, tokens(4, 50))
    assert cache.free_pages == (0,)
    assert_holds(cache, first, tokens(11))
    assert_holds(cache, second, tokens(4, 50))


def test_a_fork_keeps_pages_that_left_the_others_window() -> None:
    cache = cache_of(2, 12, (4,))
    source = filled(cache, tokens(6))
    forked = cache.fork(source)
    append(cache, (source, tokens(10, 7)))
    assert_holds(cache, forked, tokens(6))
    append(cache, (forked, [99]))
    assert_holds(cache, forked, [*tokens(6), 99])
    assert_holds(cache, source, tokens(16))


# -- growth: what the scheduler keeps in reserve ----------------------------------------------


def pages_taken(cache: KVCache, sequence: int, number: int) -> tuple[int, ...]:
    """The most pages that leave the free list while ``sequence`` grows token by token."""
    before, least = cache.free_pages, cache.free_pages
    for token in tokens(number, 1000):
        made = reserve(cache, (sequence, [token]))
        least = tuple(min(pair) for pair in zip(least, cache.free_pages, strict=True))
        cache.commit(made)
    return tuple(b - now for b, now in zip(before, least, strict=True))


@pytest.mark.parametrize("forked", [False, True])
@every_model
@pytest.mark.parametrize("size", [1, 3, 4])
def test_growth_is_enough_to_grow_token_by_token(size: int, windows: Windows, forked: bool) -> None:
    for length, number in product([0, 1, 4, 5, 9, 12], [0, 1, 2, 6, 25]):
        cache = roomy(size, windows)
        sequence = filled(cache, tokens(length))
        if forked:
            cache.fork(sequence)
        said, whole = cache.growth(sequence, number), cache.cost(sequence, number)
        taken = pages_taken(cache, sequence, number)
        for least, most, all_at_once in zip(taken, said, whole, strict=True):
            assert least <= most <= all_at_once, f"{number} tokens after {length}"


@every_model
def test_growth_of_a_new_sequence_is_bounded_by_its_window(windows: Windows) -> None:
    for size, number in product([1, 3, 4], [1, 5, 12, 37]):
        cache = roomy(size, windows)
        said = cache.growth(None, number)
        taken = pages_taken(cache, cache.create(), number)
        for group, most, real in zip(cache.layout.groups, said, taken, strict=True):
            assert most == group.most_pages(number, 1, size)
            assert real <= most <= real + 1  # alignment may spare a page


# -- misuse ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda cache, bad: cache.fork(bad),
        lambda cache, bad: cache.truncate(bad, 0),
        lambda cache, bad: cache.release(bad),
        lambda cache, bad: cache.length(bad),
        lambda cache, bad: cache.cost(bad, 1),
        lambda cache, bad: cache.growth(bad, 1),
        lambda cache, bad: cache.usage(bad),
        lambda cache, bad: cache.allocated_bytes(bad),
        lambda cache, bad: cache.freed_by_release(bad),
        lambda cache, bad: cache.to_arrays(bad),
        lambda cache, bad: cache.reserve([(0, 2), (bad, 2)]),
    ],
)
@pytest.mark.parametrize("bad", [1, 2, -1])
def test_an_unknown_or_released_handle_is_refused(
    call: Callable[[KVCache, int], Any], bad: int
) -> None:
    cache = roomy(3)
    assert filled(cache, tokens(4)) == 0
    cache.release(filled(cache, tokens(4)))
    before = snapshot(cache)
    with pytest.raises(CacheError, match=f"sequence {bad} is unknown"):
        call(cache, bad)
    assert snapshot(cache) == before


def test_a_handle_is_never_given_out_twice() -> None:
    cache = roomy(3)
    handles = []
    for _ in range(3):
        handles += [cache.create()]
        handles += [cache.fork(handles[-1])]
        cache.release(handles[-1])
        cache.release(handles[-2])
    assert len(set(handles)) == 6


def test_a_sequence_twice_in_a_reservation_or_a_negative_count_is_refused() -> None:
    cache = roomy(3)
    first, second = filled(cache, tokens(4)), cache.create()
    before = snapshot(cache)
    with pytest.raises(CacheError, match=f"sequence {first} stands twice"):
        cache.reserve([(first, 1), (second, 1), (first, 1)])
    with pytest.raises(CacheError, match=f"sequence {second}: cannot reserve -1 tokens"):
        cache.reserve([(first, 4), (second, -1)])
    assert snapshot(cache) == before
    append(cache, (first, [70]), (second, [80]))


@pytest.mark.parametrize("count", [0, 1, 9])
def test_a_sequence_with_an_open_reservation_is_left_alone(count: int) -> None:
    cache = roomy(3)
    sequence, other = filled(cache, tokens(4)), filled(cache, tokens(4, 50))
    made = cache.reserve([(sequence, count)])
    free = cache.free_pages
    for call in (
        lambda: cache.fork(sequence),
        lambda: cache.truncate(sequence, 2),
        lambda: cache.release(sequence),
        lambda: cache.reserve([(other, 1), (sequence, 1)]),
    ):
        with pytest.raises(CacheError, match=f"sequence {sequence} has an open reservation"):
            call()
    assert cache.free_pages == free
    append(cache, (other, [60]))
    cache.rollback(made)
    cache.release(sequence)
    assert_holds(cache, other, [*tokens(4, 50), 60])


@pytest.mark.parametrize("first", ["commit", "rollback"])
@pytest.mark.parametrize("second", ["commit", "rollback"])
def test_a_reservation_is_settled_once(first: str, second: str) -> None:
    cache = roomy(3)
    made = reserve(cache, (filled(cache, tokens(4)), [70, 71]))
    getattr(cache, first)(made)
    before = snapshot(cache)
    with pytest.raises(CacheError, match="already committed or rolled back"):
        getattr(cache, second)(made)
    assert snapshot(cache) == before


def test_the_reservation_of_another_cache_is_refused() -> None:
    mine, other = roomy(3), roomy(3)
    sequence = filled(mine, tokens(4))
    made = reserve(mine, (sequence, [70]))
    filled(other, tokens(4))
    before = snapshot(other)
    for settle in (other.commit, other.rollback):
        with pytest.raises(CacheError):
            settle(made)
    assert snapshot(other) == before
    mine.commit(made)
    assert_holds(mine, sequence, [*tokens(4), 70])


def test_pools_that_do_not_fit_the_layout_are_refused() -> None:
    layout = layout_of(4, (None, 6))
    right = [ReferencePool(layout.shapes[0], 5) for _ in range(2)]
    other_shape = ReferencePool(layout_of(3).shapes[0], 5)
    KVCache(layout, [5, 4], right)
    with pytest.raises(CacheError, match="1 page counts and 2 pools for 2 groups and 2 layers"):
        KVCache(layout, [5], right)
    with pytest.raises(CacheError, match="2 page counts and 1 pools for 2 groups and 2 layers"):
        KVCache(layout, [5, 5], right[:1])
    with pytest.raises(CacheError, match=r"layer 1: a pool of 5 pages .* does not fit 6 pages"):
        KVCache(layout, [5, 6], right)
    with pytest.raises(CacheError, match="layer 0: a pool of 5 pages"):
        KVCache(layout, [5, 5], [other_shape, right[1]])


# -- check finds doctored books --------------------------------------------------------------


def _lose_a_page(cache: KVCache) -> None:
    cache._sequences[0].tables[0].pages.pop()


def _give_all_pages_back(cache: KVCache) -> None:
    cache._allocators[0].release(cache._sequences[0].tables[0].drop_back(0))


def _hold_a_page_twice(cache: KVCache) -> None:
    pages = cache._sequences[0].tables[0].pages
    pages[1] = pages[0]


def _hold_a_free_page(cache: KVCache) -> None:
    cache._sequences[0].tables[0].pages[0] = cache._allocators[0].areas[0].free[0]


def _hold_a_page_that_does_not_exist(cache: KVCache) -> None:
    cache._sequences[0].tables[0].pages[0] += cache.num_pages[0]


def _leak_a_page(cache: KVCache) -> None:
    cache._allocators[1].allocate(1)


def _forget_a_reservation(cache: KVCache) -> None:
    cache.reserve([(0, 9)])
    cache._reservations.clear()


def _forget_a_sequence(cache: KVCache) -> None:
    del cache._sequences[0]


def _count_too_many_tokens(cache: KVCache) -> None:
    cache._sequences[0].length += 3


def _count_too_few_tokens(cache: KVCache) -> None:
    cache._sequences[0].length -= 3


def _give_back_too_early(cache: KVCache) -> None:
    table = cache._sequences[0].tables[1]
    cache._allocators[1].release(table.drop_front(table.first_page + 1))


def _give_back_too_late(cache: KVCache) -> None:
    table = cache._sequences[0].tables[1]
    table.pages.insert(0, cache._allocators[1].allocate(1)[0])
    table.first_page -= 1


@pytest.mark.parametrize(
    "doctor",
    [
        _lose_a_page,
        _give_all_pages_back,
        _hold_a_page_twice,
        _hold_a_free_page,
        _hold_a_page_that_does_not_exist,
        _leak_a_page,
        _forget_a_reservation,
        _forget_a_sequence,
        _count_too_many_tokens,
        _count_too_few_tokens,
        _give_back_too_early,
        _give_back_too_late,
    ],
)
def test_check_finds_doctored_books(doctor: Callable[[KVCache], None]) -> None:
    cache = roomy(3, (None, 5))
    assert filled(cache, tokens(14)) == 0
    filled(cache, tokens(4))
    cache.check()
    doctor(cache)
    with pytest.raises(CacheInvariantError):
        cache.check()


# -- bytes -----------------------------------------------------------------------------------


def test_usage_in_bytes_is_what_the_shapes_say() -> None:
    # A token in a layer: 2 heads of 3 key and 2 value numbers of 4 bytes = 40 bytes. Two layers in
    # the full group, one in the window: 80 and 40 bytes a token, 320 and 160 bytes a page of 4.
    cache = cache_over(layout_of(4, (None, 6, None)), [10, 5])
    pool_bytes = 10 * 320 + 5 * 160
    assert cache.usage() == CacheUsage(pool_bytes, 0, 0, 0, 120)
    first = filled(cache, tokens(5))
    assert cache.usage(first) == CacheUsage(pool_bytes, 2 * 480, 5 * 120, 5, 120)
    assert cache.usage(first).waste_bytes == 3 * 120
    # 9 more tokens: the full group has 4 pages; the window sees 9 to 14, which are pages 2 and 3.
    append(cache, (first, tokens(9, 6)))
    grown = CacheUsage(pool_bytes, 4 * 320 + 2 * 160, 14 * 80 + 6 * 40, 14, 120)
    assert cache.usage(first) == cache.usage() == grown
    assert cache.allocated_bytes(first) == grown.allocated_bytes
    second = filled(cache, tokens(4))
    assert cache.usage(second) == CacheUsage(pool_bytes, 480, 4 * 120, 4, 120)
    assert cache.usage(second).waste_bytes == 0
    both = cache.usage()
    assert both.allocated_bytes == grown.allocated_bytes + 480
    assert (both.used_bytes, both.tokens) == (grown.used_bytes + 480, 18)


@pytest.mark.parametrize(("format", "width"), [("fp32", 4), ("bf16", 2), ("fp16", 2)])
def test_usage_counts_the_width_of_the_format(format: str, width: int) -> None:
    cache = cache_over(layout_of(4, format=format), 3)
    cache.commit(cache.reserve([(cache.create(), 5)]))
    usage = cache.usage()
    assert usage.bytes_per_token == 2 * (3 + 2) * width
    assert usage.pool_bytes == 12 * usage.bytes_per_token
    assert usage.allocated_bytes == 8 * usage.bytes_per_token
    assert usage.used_bytes == 5 * usage.bytes_per_token
    pool = cache.pools[0]
    assert isinstance(pool, ReferencePool)
    assert usage.pool_bytes == pool.key[0].nbytes + pool.value[0].nbytes


def test_a_shared_page_counts_once_in_the_total_and_in_full_for_each_sequence() -> None:
    cache = cache_of(4, 10)
    token = 40
    source = filled(cache, tokens(6))
    forked = cache.fork(source)
    assert cache.usage(source) == cache.usage(forked)
    assert cache.usage().allocated_bytes == 8 * token
    assert (cache.usage().used_bytes, cache.usage().tokens) == (6 * token, 12)
    # The fork forgets the sixth token; the page still holds it for the other.
    cache.truncate(forked, 5)
    assert cache.usage(forked).used_bytes == 5 * token
    assert (cache.usage().used_bytes, cache.usage().tokens) == (6 * token, 11)
    # One page of two is now the fork's own.
    append(cache, (forked, [99]))
    assert cache.usage(forked).allocated_bytes == cache.allocated_bytes(forked) == 8 * token
    assert cache.usage().allocated_bytes == 12 * token
    assert (cache.usage().used_bytes, cache.usage().tokens) == (8 * token, 12)


def test_allocated_bytes_of_a_sequence_include_reserved_pages_and_copies() -> None:
    cache = cache_of(4, 10)
    page = 160
    sequence = filled(cache, tokens(6))
    cache.fork(sequence)
    assert cache.allocated_bytes(sequence) == 2 * page
    made = cache.reserve([(sequence, 8)])  # a copy of the second page, and two new ones
    assert cache.free_pages == (5,)
    assert cache.allocated_bytes(sequence) == 5 * page
    cache.rollback(made)
    assert cache.allocated_bytes(sequence) == 2 * page
    cache.commit(cache.reserve([(sequence, 8)]))
    assert cache.allocated_bytes(sequence) == cache.usage(sequence).allocated_bytes == 4 * page


@every_model
@every_page_size
def test_a_sequence_wastes_less_than_a_page_in_each_group(size: int, windows: Windows) -> None:
    cache = roomy(size, windows)
    first, second = cache.create(), cache.create()
    groups = range(len(cache.layout.groups))
    page_bytes = sum(cache.layout.page_bytes(g) for g in groups)
    for chunk in [1, 2, 3, 5, 1, 8, 1, 7, 4]:
        append(cache, (first, tokens(chunk)), (second, [1]))
        for handle in (first, second):
            usage = cache.usage(handle)
            assert 0 <= usage.waste_bytes < page_bytes
            assert usage.waste_bytes == -cache.length(handle) % size * usage.bytes_per_token
        total = cache.usage()
        assert total.allocated_bytes == sum(
            (cache.num_pages[g] - cache.free_pages[g]) * cache.layout.page_bytes(g) for g in groups
        )
        assert total.waste_bytes == sum(cache.usage(h).waste_bytes for h in (first, second))


# -- the batch of a step ---------------------------------------------------------------------


def test_the_batch_of_a_ragged_step_says_where_every_new_token_goes() -> None:
    cache = cache_over(layout_of(4, (None, 5, None)), 20)
    long, empty, short = filled(cache, tokens(10)), cache.create(), filled(cache, tokens(3))
    counts = [3, 0, 2]
    made = cache.reserve(list(zip((long, empty, short), counts, strict=True)))
    batch = made.batch
    assert (batch.num_sequences, batch.num_tokens) == (3, 5)
    assert batch.positions.tolist() == [10, 11, 12, 3, 4]
    assert batch.query_indptr.tolist() == [0, *accumulate(counts)]
    assert batch.group_of_layer == (0, 1, 0)
    full, window = batch.groups
    assert (full.window, window.window) == (None, 5)
    assert [full.span(s) for s in range(3)] == [(0, 13), (0, 0), (0, 5)]
    assert [window.span(s) for s in range(3)] == [(4, 13), (0, 0), (0, 5)]
    assert full.last_page_len.tolist() == window.last_page_len.tolist() == [1, 0, 1]
    assert np.diff(full.indptr).tolist() == [4, 0, 2]
    assert np.diff(window.indptr).tolist() == [3, 0, 2]
    assert window.first_page.tolist() == [1, 0, 0]
    for group in batch.groups:
        new = [*group.slots_of(0, 10, 13).tolist(), *group.slots_of(2, 3, 5).tolist()]
        assert group.slots.tolist() == new
        assert len(set(group.indices.tolist())) == len(group.indices)
    for array in (batch.positions, batch.query_indptr, full.slots, full.indices, full.first_page):
        assert array.dtype == np.int64
    write(cache, batch, [11, 12, 13, 4, 5])
    cache.commit(made)
    assert_holds(cache, long, tokens(13))
    assert_holds(cache, short, tokens(5))
    tables = [cache.to_arrays(s, "pages").layers[0].page_table for s in (long, empty, short)]
    assert full.indices.tolist() == [page for table in tables for page in table]
