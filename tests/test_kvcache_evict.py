"""Dropping tokens of a live sequence: what is moved, what others still find, what is computed."""

import numpy as np
import pytest

from caches import HEADS, append, cache_of, cache_over, layout_of, stored
from quire.backends import AttentionParams, Backend, Projection, create_backend
from quire.backends.blocks import attention_block, attention_rows
from quire.backends.rope import inverse_frequencies
from quire.batch import GroupBatch, PagedBatch
from quire.cache import KVCache, PrefixQuery
from quire.config import RopeConfig
from quire.errors import CacheError, CacheFull
from quire.pages import PAGE_FORMATS, PageShape

FORMATS = ("fp32", "bf16", "fp16", "int8", "fp8")
POOLS = [
    *(("reference", name, 4) for name in FORMATS),
    *(("native", name, size) for name in FORMATS for size in (4, 16)),
]


def backend_of(name: str) -> Backend:
    return create_backend(name)


@pytest.mark.parametrize(("backend", "format", "size"), POOLS)
def test_tokens_are_moved_as_they_are_stored(backend: str, format: str, size: int) -> None:
    random = np.random.default_rng(0)
    heads, dim, pages = 3, 16, 5
    shape = PageShape(size, heads, dim, dim, *[PAGE_FORMATS[format]] * 2)
    kernels = backend_of(backend)
    pool = kernels.pool(shape, pages)
    new = random.standard_normal((2, pages * size, heads, dim)).astype(np.float32)
    kernels.append(pool, np.arange(pages * size), *new)
    before = [a.reshape(-1, heads, dim).copy() for a in pool.read_pages(range(pages))]
    source = np.stack([random.permutation(pages * size)[: 2 * size + 1] for _ in range(heads)])
    target = random.permutation(pages * size)[: 2 * size + 1]  # some are sources, too
    pool.gather_tokens(source, target)
    for old, now in zip(before, pool.read_pages(range(pages)), strict=True):
        for head in range(heads):
            old[target, head] = old[source[head], head].copy()
        np.testing.assert_array_equal(now.reshape(-1, heads, dim), old)


def places(*rows: list[int]) -> list[np.ndarray]:
    return [np.array(rows, np.int64)]


def held_heads(cache: KVCache, sequence: int) -> list[list[int]]:
    """For each KV head of the first layer, the tokens that a sequence keeps."""
    key = cache.to_arrays(sequence, "BSHD").layers[0].key[0]
    return [[int(k) // 64 for k in key[:, head, 0]] for head in range(HEADS)]


@pytest.mark.parametrize("num_pages", [20, 3])  # with room for new pages, and without
def test_what_the_index_found_is_never_changed(num_pages: int) -> None:
    cache = cache_over(layout_of(4), num_pages, b"model")
    tokens = list(range(1, 11))
    sequence = cache.create(cache.match(PrefixQuery(tokens)))
    made = cache.reserve([(sequence, 10)])
    for layer, pool in enumerate(cache.pools):
        pool.store(made.batch.groups[0].slots, *stored(layer, tokens))
    cache.commit(made, [tokens])
    assert cache.match(PrefixQuery(tokens)).tokens == 8  # the last page is not whole
    cache.evict(sequence, places([0, 2, 7, 8, 9], [1, 2, 3, 4, 9]))
    cache.check()
    assert held_heads(cache, sequence) == [[1, 3, 8, 9, 10], [2, 3, 4, 5, 10]]
    assert (cache.length(sequence), cache.dropped(sequence)) == (5, 5)
    match = cache.match(PrefixQuery(tokens))
    assert match.tokens == (8 if num_pages == 20 else 0)
    made = cache.reserve([(sequence, 3)])
    assert made.batch.positions.tolist() == [10, 11, 12]
    assert made.batch.places.tolist() == [5, 6, 7]
    cache.commit(made, [[20, 21, 22]])
    if match.tokens:
        other = cache.create(match)
        assert held_heads(cache, other) == [tokens[:8]] * HEADS
        cache.release(other)
    cache.release(sequence)  # leaves nothing that could be found
    cache.check()
    assert cache.match(PrefixQuery([1, 3, 8, 9, 10, 20, 21, 22])).tokens <= 1
    assert cache.match(PrefixQuery([*tokens, 20, 21, 22])).tokens == match.tokens


def test_pages_of_a_fork_are_left_alone_and_need_room() -> None:
    cache = cache_of(2, 4)
    one = cache.create()
    append(cache, (one, [1, 2, 3, 4, 5, 6]))
    other = cache.fork(one)
    keep = places([0, 3, 5], [2, 4, 5])
    with pytest.raises(CacheFull, match="2 pages that other sequences hold, too, but 1 of 4"):
        cache.evict(one, keep)
    assert held_heads(cache, one) == [[1, 2, 3, 4, 5, 6]] * HEADS
    cache.release(other)
    cache.evict(one, keep)
    assert held_heads(cache, one) == [[1, 4, 6], [3, 5, 6]]
    assert cache.free_pages == (2,)
    with pytest.raises(CacheError, match="heads keep different ones"):
        cache.truncate(one, 2)


def test_a_page_that_stays_as_it_is_stays_shared() -> None:
    cache = cache_of(2, 6)
    one = cache.create()
    append(cache, (one, [1, 2, 3, 4, 5, 6]))
    other = cache.fork(one)
    cache.evict(one, places([0, 1, 4], [0, 1, 5]))
    assert cache.page_tables(one)[0][1][0] == cache.page_tables(other)[0][1][0]
    assert held_heads(cache, one) == [[1, 2, 5], [1, 2, 6]]
    assert held_heads(cache, other) == [[1, 2, 3, 4, 5, 6]] * HEADS
    cache.check()


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (places([0, 1], [0, 3]), "must ascend and lie in the 3 tokens"),
        (places([1, 0], [0, 1]), "must ascend"),
        (places([0, 0], [0, 1]), "must ascend"),
        (places([0, 1]), r"int64 \[2, 2\], one row a KV head"),
        (places([], []), "at least one place"),
        (places([0, 1], [0, 1]) * 2, "2 layers, not 1"),
        ([np.zeros((2, 1), np.int32)], "int32"),
    ],
)
def test_places_that_are_not_the_sequences_are_refused(
    keep: list[np.ndarray], message: str
) -> None:
    cache = cache_of(4, 2)
    one = cache.create()
    append(cache, (one, [1, 2, 3]))
    with pytest.raises(CacheError, match=message):
        cache.evict(one, keep)
    assert held_heads(cache, one) == [[1, 2, 3]] * HEADS


def test_a_layer_group_with_a_window_is_refused() -> None:
    cache = cache_of(4, 4, (None, 5))
    one = cache.create()
    append(cache, (one, [1, 2, 3]))
    with pytest.raises(CacheError, match="layers keep a sliding window 5"):
        cache.evict(one, places([0], [0]) * 2)


def block_of(backend: Backend) -> AttentionParams:
    random = np.random.default_rng(1)

    def weight(out: int, width: int) -> Projection:
        return Projection(backend.weight(random.standard_normal((out, width)).astype(np.float32)))

    return AttentionParams(
        norm=np.ones(32, np.float32),
        norm_eps=1e-5,
        q=weight(64, 32),
        k=weight(32, 32),
        v=weight(32, 32),
        o=weight(32, 64),
        q_norm=None,
        k_norm=None,
        num_heads=4,
        num_kv_heads=2,
        inv_freq=inverse_frequencies(RopeConfig(), 16),
    )


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_token_sees_by_its_place_and_is_rotated_by_its_position(backend: str) -> None:
    """Half a layer in one call and op by op; shifting all positions changes no attention."""
    kernels = backend_of(backend)
    params, out = block_of(kernels), {}
    shape = PageShape(16, 2, 16, 16, *[PAGE_FORMATS["fp32"]] * 2)
    x = np.random.default_rng(2).standard_normal((9, 32)).astype(np.float32)
    slots = np.array([*range(16, 21), *range(0, 4)])
    ints = lambda *values: np.array(values, np.int64)  # noqa: E731
    group = GroupBatch(16, None, slots, ints(0, 1, 2), ints(1, 0), ints(5, 4), ints(0, 0))
    at = ints(*range(5), *range(4))
    for dropped in (0, 700):
        batch = PagedBatch(at + dropped, ints(0, 5, 9), (group,), (0,), at)
        block = kernels.block(params)
        pools = [kernels.pool(shape, 2) for _ in range(3)]
        whole = kernels.attention_block(x, block, batch, pools[0], 0)
        by_op = attention_block(kernels, x, params, batch, pools[1], group=0)
        rows = [0, 4, 6]
        some = attention_rows(kernels, x, params, batch, pools[2], group=0, rows=rows)
        np.testing.assert_array_equal(whole, by_op)
        np.testing.assert_array_equal(whole[rows], some)
        out[dropped] = whole
    np.testing.assert_allclose(out[0], out[700], rtol=0, atol=2e-3)
