"""KVCache over pages that are packed: what a step is told, and what commits and rollbacks leave.

Long random histories are in tests/test_kvcache_machine.py and tests/test_prefix_machine.py.
"""

import numpy as np
import pytest

from caches import append, assert_holds, cache_over, filled, layout_of, reserve
from quire.cache import KVCache, PrefixQuery
from quire.errors import CacheError, CacheFull, CacheInvariantError
from quire.layout import Area, fit_pages, packed_pages, with_open_pages

PACKED = "k=fp32,v=int4"


def packing(
    page_size: int = 4, packed: int = 10, opened: int = 6, identity: bytes | None = None
) -> KVCache:
    """Packed ids are 0 to ``packed - 1``, open ones follow."""
    return cache_over(layout_of(page_size, format=PACKED), [packed, opened], identity)


def test_a_step_names_open_pages_and_what_is_sealed() -> None:
    cache = packing()
    sequence = filled(cache, [1, 2, 3, 4, 5, 6])  # page 0 is open though whole, page 1 unfinished
    [(_, held)] = cache.page_tables(sequence)
    assert all(page >= 10 for page in held)
    made = reserve(cache, (sequence, [7, 8, 9, 10, 11, 12, 13]))
    group, opened = made.batch.groups[0], made.batch.groups[0].open
    [first, second, third, fourth] = group.indices.tolist()
    assert first == held[0]
    assert max(second, third) < 10 <= fourth
    assert opened.indptr.tolist() == [0, 3]
    assert opened.first.tolist() == [1]
    assert opened.indices.tolist()[0] == held[1]
    assert opened.indices.tolist()[2] == fourth
    assert opened.seal_from.tolist() == opened.indices.tolist()[:2]
    assert opened.seal_to.tolist() == [second, third]
    places = np.arange(6, 13)
    own = opened.indices[places // 4 - 1]
    assert group.slots.tolist() == (own * 4 + places % 4).tolist()
    assert group.pages_seen(0, 2).tolist() == [first, second, opened.indices[1], fourth]
    cache.commit(made)
    cache.check()
    assert_holds(cache, sequence, list(range(1, 14)))
    assert cache.free_pages == (8, 4)


def test_what_a_step_takes_is_what_it_was_said_to_cost() -> None:
    cache = packing()
    sequence = filled(cache, [1, 2, 3])
    for new, cost in ((1, (0, 0)), (2, (0, 1)), (5, (1, 1)), (6, (1, 2)), (13, (3, 3))):
        assert cache.cost(sequence, new) == cost, new
    assert cache.cost(None, 13) == (2, 4)
    assert cache.growth(sequence, 13) == (3, 1)
    assert cache.freed_by_release(sequence) == (0, 1)


@pytest.mark.parametrize("committed", range(9))
def test_a_commit_of_fewer_tokens_packs_what_is_complete(committed: int) -> None:
    cache = packing(identity=b"tests")
    sequence = cache.create(cache.match(PrefixQuery([1], "")))
    cache.commit(reserve(cache, (sequence, [1, 2, 3, 4, 5, 6])), [[1, 2, 3, 4, 5, 6]])
    tokens = list(range(7, 15))
    cache.commit(reserve(cache, (sequence, tokens)), [tokens[:committed]])
    cache.check()
    assert_holds(cache, sequence, [1, 2, 3, 4, 5, 6, *tokens[:committed]])
    assert cache.free_pages[0] == 10 - packed_pages(6 + committed, 4)
    append(cache, (sequence, [50, 51, 52]))
    assert_holds(cache, sequence, [1, 2, 3, 4, 5, 6, *tokens[:committed], 50, 51, 52])


def test_rollback_gives_both_kinds_back() -> None:
    cache = packing()
    sequence = filled(cache, [1, 2, 3, 4, 5])
    forked, before = cache.fork(sequence), cache.free_pages
    made = reserve(cache, (sequence, list(range(6, 15))), (forked, [90, 91, 92]))
    assert cache.free_pages == (before[0] - 3, before[1] - 2 - 2)
    cache.check()
    cache.rollback(made)
    cache.check()
    assert cache.free_pages == before
    for handle in (sequence, forked):
        assert_holds(cache, handle, [1, 2, 3, 4, 5])


def test_forks_share_packed_pages_and_part_in_open_ones() -> None:
    cache = packing()
    one = filled(cache, list(range(1, 11)))
    two = cache.fork(one)
    append(cache, (one, [20, 21, 22]), (two, [30, 31]))
    tables = [cache.page_tables(sequence)[0][1] for sequence in (one, two)]
    assert tables[0][:2] == tables[1][:2]
    assert tables[0][2] != tables[1][2]  # each packed its own
    assert_holds(cache, one, [*range(1, 11), 20, 21, 22])
    assert_holds(cache, two, [*range(1, 11), 30, 31])
    cache.check()


def test_truncate_ends_at_packed_pages_and_names_what_is_possible() -> None:
    cache = packing()
    sequence = filled(cache, list(range(1, 15)))
    other = cache.fork(sequence)
    for length in (5, 6, 7, 9, 11):
        low = length // 4 * 4
        with pytest.raises(CacheError, match=f"that is packed; possible are {low} and {low + 4}"):
            cache.truncate(sequence, length)
    for length in (13, 12, 8, 4, 2):
        cache.truncate(sequence, length)
        cache.check()
        assert_holds(cache, sequence, list(range(1, length + 1)))
    append(cache, (sequence, [60, 61, 62, 63, 64, 65, 66]))
    assert_holds(cache, sequence, [1, 2, 60, 61, 62, 63, 64, 65, 66])
    assert_holds(cache, other, list(range(1, 15)))


def test_either_kind_can_be_full() -> None:
    cache = packing(packed=1, opened=2)
    sequence = filled(cache, [1, 2, 3, 4])
    with pytest.raises(CacheFull, match=r"need 2 pages of 4 tokens .*, but 1 of 1 are free"):
        cache.reserve([(sequence, 8)])
    with pytest.raises(CacheFull, match=r"need 2 open pages .*, but 1 of 2 are free"):
        cache.reserve([(cache.create(), 5)])
    cache.check()
    assert cache.free_pages == (1, 1)


def test_whole_pages_that_are_filled_need_no_open_ones() -> None:
    cache = packing(packed=8, opened=3, identity=b"tests")
    tokens = list(range(1, 33))
    match = cache.match(PrefixQuery(tokens, ""))
    assert cache.cost_of_whole(match, 8) == (7, 1)
    sequence = cache.create(match)
    made = cache.reserve_whole(sequence, 8)
    [pages] = made.new_pages
    assert [page >= 8 for page in pages] == [True] + [False] * 7
    cache.commit(made, [tokens[:20]])  # three did not come
    cache.check()
    assert cache.length(sequence) == 20
    assert cache.free_pages == (4, 2)
    append(cache, (sequence, [70]))
    with pytest.raises(CacheError, match="ends inside a page"):
        cache.reserve_whole(sequence, 1)


def test_pages_of_the_wrong_kind_are_found_by_check() -> None:
    cache = packing()
    sequence = filled(cache, list(range(1, 11)))
    state = cache._sequences[sequence]
    state.tables[0].pages[1] = state.tables[0].pages[2]
    with pytest.raises(CacheInvariantError, match=r"page 1 of sequence 0 .* which is an open one"):
        cache.check()


def test_pools_must_have_just_the_pages_that_ids_tell_apart() -> None:
    layout = layout_of(4, format=PACKED)
    cache = packing()
    with pytest.raises(CacheError, match="it has 6 open pages for 7"):
        KVCache(layout, [10, 7], cache.pools)
    with pytest.raises(CacheError, match=r"a pool of 10 pages .* does not fit 9 pages"):
        KVCache(layout, [9, 6], cache.pools)
    with pytest.raises(CacheError, match="2 areas with open ones"):
        KVCache(layout, [10], cache.pools)


def test_a_layout_plans_open_pages_within_the_budget() -> None:
    layout = layout_of(32, (None, 40), format="int4")
    assert layout.areas == (Area(0), Area(0, is_open=True), Area(1), Area(1, is_open=True))
    assert with_open_pages(layout, [640, 640], 8, 64) == (640, 2 + 24 + 20, 640, 2 + 24 + 20)
    assert with_open_pages(layout, [10, 10], 8, 64) == (10, 8, 10, 13)
    for budget in (20_000, 100_000, 10**6):
        counts = fit_pages(layout, budget, 4, 64)
        cost = sum(n * size for n, size in zip(counts, layout.area_bytes, strict=True))
        assert budget - 2 * sum(layout.area_bytes) < cost <= budget


def test_a_layout_without_packed_pages_has_one_area_a_group() -> None:
    layout = layout_of(4, (None, 6))
    assert layout.packs == (False, False)
    assert layout.areas == (Area(0), Area(1))
    assert layout.held_pages(1, 21) == ([4, 5],)
    assert layout.pages_between(0, 3, 9) == (2,)
