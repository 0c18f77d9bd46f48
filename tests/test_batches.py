"""Batches that are made of the one before are those that would be made of the tables."""

import contextlib
import random

import numpy as np
import pytest

from caches import Windows, cache_over, layout_of
from quire.batch import PagedBatch
from quire.cache import KVCache
from quire.cache.batches import BatchBuilder
from quire.errors import CacheError


def assert_same(one: PagedBatch, other: PagedBatch) -> None:
    assert one.group_of_layer == other.group_of_layer
    pairs = [(one.positions, other.positions), (one.query_indptr, other.query_indptr)]
    for a, b in zip(one.groups, other.groups, strict=True):
        assert (a.page_size, a.window) == (b.page_size, b.window)
        names = ("slots", "indptr", "indices", "last_page_len", "first_page")
        pairs += [(getattr(a, name), getattr(b, name)) for name in names]
    for left, right in pairs:
        assert left.dtype == right.dtype == np.int64
        assert left.tolist() == right.tolist()


def step(cache: KVCache, handles: list[int], draw: random.Random) -> bool:
    """Reserve, compare, end; True if the batch shares arrays with the one before."""
    before = cache._batches._last
    counts = [1] * len(handles)
    if draw.random() < 0.1:
        counts[draw.randrange(len(counts))] = draw.choice([0, 2, 5])
    made = cache.reserve(list(zip(handles, counts, strict=True)))
    anew = BatchBuilder(cache.layout).build(made.chunks, made._states, made._growth)
    assert_same(made.batch, anew)
    ending = draw.random()
    if ending < 0.1:
        cache.rollback(made)
    else:
        known = [[draw.randrange(3) for _ in range(count)] for count in counts]
        if ending < 0.2:
            known[0] = known[0][:-1]
        cache.commit(made, None if ending > 0.98 else known)
    assert_same(made.batch, anew)  # also after its tokens are committed
    cache.check()
    return before is not None and made.batch.query_indptr is before.batch.query_indptr


@pytest.mark.parametrize("identity", [None, b"model"])
@pytest.mark.parametrize("windows", [(None,), (5,), (None, 3, None)], ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_a_batch_is_that_of_the_tables_whatever_came_before(
    seed: int, windows: Windows, identity: bytes | None
) -> None:
    draw = random.Random(seed)
    cache = cache_over(layout_of(draw.choice([4, 16]), windows), 400, identity)
    handles = [cache.create() for _ in range(draw.choice([1, 3]))]
    shared = 0
    for _ in range(150):
        shared += step(cache, handles, draw)
        act, which = draw.random(), draw.randrange(len(handles))
        if act < 0.03:
            length = max(0, cache.length(handles[which]) - draw.randint(0, 1))
            with contextlib.suppress(CacheError):  # a window may have given back too much
                cache.truncate(handles[which], length)
        elif act < 0.06:
            fork = cache.fork(handles[which])
            if draw.random() < 0.5:
                handles[which], fork = fork, handles[which]
            cache.release(fork)
        elif act < 0.08:
            cache.release(handles[which])
            handles[which] = cache.create()
        elif act < 0.1 and len(handles) < 5:
            handles.append(cache.fork(handles[which]))
    assert shared


def test_one_token_more_moves_what_moves_and_shares_the_rest() -> None:
    cache = cache_over(layout_of(4, (None, 6)), 20)
    handles = [cache.create(), cache.create()]
    cache.commit(cache.reserve([(handles[0], 5), (handles[1], 9)]))
    batches = []
    for _ in range(4):
        made = cache.reserve([(handle, 1) for handle in handles])
        batches.append(made.batch)
        cache.commit(made)
    first, second, third, fourth = batches
    assert [batch.positions.tolist() for batch in batches] == [[5, 9], [6, 10], [7, 11], [8, 12]]
    assert second.groups[0].indices is third.groups[0].indices is first.groups[0].indices
    assert third.groups[0].last_page_len.tolist() == [4, 4]
    assert fourth.groups[0].indices is not third.groups[0].indices  # both began a page
    assert [len(batch.groups[0].indices) for batch in batches] == [5, 5, 5, 7]


def test_what_one_sequence_is_given_back_by_a_window_is_seen_in_the_next_batch() -> None:
    cache = cache_over(layout_of(4, (3,)), 20)
    handle = cache.create()
    firsts = []
    cache.commit(cache.reserve([(handle, 4)]))
    for _ in range(8):
        made = cache.reserve([(handle, 1)])
        firsts.append(made.batch.groups[0].first_page.tolist()[0])
        cache.commit(made)
    assert firsts == [max(0, position - 2) // 4 for position in range(4, 12)]
