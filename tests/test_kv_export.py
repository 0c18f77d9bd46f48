"""KVCache.to_arrays: every layout against NumPy transposes of numbers that are known."""

import numpy as np
import pytest

from caches import HEADS, KEY_DIM, VALUE_DIM, Array, Windows, append, cache_over, filled, layout_of
from quire.backends.reference import ReferencePool
from quire.cache import KVCache
from quire.errors import ConfigError
from quire.pages import PAGE_FORMATS

FORMATS = ["fp32", "bf16", "fp16"]
NAMED = ["BHSD", "BSHD", "HBSD"]
SIZES = [1, 3, 16, 40]


def numbers(layer: int, length: int, format: str) -> tuple[Array, Array]:
    """Random K ``[length, HEADS, KEY_DIM]`` and V of a layer, as stored."""
    rng = np.random.default_rng(layer)
    key = rng.standard_normal((length, HEADS, KEY_DIM), np.float32)
    value = rng.standard_normal((length, HEADS, VALUE_DIM), np.float32)
    encode = PAGE_FORMATS[format].key.encode
    return encode(key)[0], encode(value)[0]


def cache_with(
    length: int, size: int, windows: Windows = (None,), format: str = "fp32"
) -> tuple[KVCache, int]:
    """A cache in which one sequence of ``length`` tokens holds :func:`numbers`."""
    cache = cache_over(layout_of(size, windows, format), 60)
    filled(cache, [1] * 5)  # so that page ids are not page numbers
    sequence = cache.create()
    for start in range(0, length, 5):
        end = min(start + 5, length)
        made = cache.reserve([(sequence, end - start)])
        for layer, pool in enumerate(cache.pools):
            assert isinstance(pool, ReferencePool)
            slots = made.batch.groups[made.batch.group_of_layer[layer]].slots
            key, value = numbers(layer, length, format)
            pool.store(slots, key[start:end], value[start:end])
        cache.commit(made)
    return cache, sequence


def arranged(tokens: Array, layout: str) -> Array:
    """``tokens`` [S, H, D] in a named layout, one element at a time."""
    length, heads, dim = tokens.shape
    axes = {"B": 1, "H": heads, "S": length, "D": dim}
    out = np.zeros([axes[axis] for axis in layout], tokens.dtype)
    for at in np.ndindex(out.shape):
        where = dict(zip(layout, at, strict=True))
        out[at] = tokens[where["S"], where["H"], where["D"]]
    return out


def assert_same_bits(found: Array, expected: Array) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("layout", NAMED)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", SIZES)
def test_a_named_layout_is_a_transpose_in_the_stored_dtype(
    layout: str, format: str, size: int
) -> None:
    cache, sequence = cache_with(19, size, (None, None), format)
    arrays = cache.to_arrays(sequence, layout)
    assert (arrays.layout, len(arrays.layers)) == (layout, 2)
    for layer, kv in enumerate(arrays.layers):
        key, value = numbers(layer, 19, format)
        assert kv.key.dtype == PAGE_FORMATS[format].dtype
        assert_same_bits(kv.key, arranged(key, layout))
        assert_same_bits(kv.value, arranged(value, layout))
        assert kv.key.flags.c_contiguous
        assert kv.value.flags.c_contiguous
        assert kv.start == 0


def test_the_layout_of_transformers_is_the_default() -> None:
    cache, sequence = cache_with(7, 4)
    (kv,) = cache.to_arrays(sequence).layers
    assert kv.key.shape == (1, HEADS, 7, KEY_DIM)
    assert_same_bits(kv.key, numbers(0, 7, "fp32")[0].transpose(1, 0, 2)[None].copy())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", SIZES)
def test_pages_come_as_stored_with_their_ids(size: int, format: str) -> None:
    cache, sequence = cache_with(19, size, format=format)
    arrays = cache.to_arrays(sequence, "pages")
    (kv,) = arrays.layers
    pages = -(-19 // size)
    assert arrays.layout == "pages"
    assert kv.key.shape == (pages, size, HEADS, KEY_DIM)
    assert kv.value.shape == (pages, size, HEADS, VALUE_DIM)
    assert (kv.start, kv.last_page_len) == (0, 19 - (pages - 1) * size)
    key, value = numbers(0, 19, format)
    assert_same_bits(kv.key.reshape(-1, HEADS, KEY_DIM)[:19], key)
    assert_same_bits(kv.value.reshape(-1, HEADS, VALUE_DIM)[:19], value)
    (pool,) = cache.pools
    assert isinstance(pool, ReferencePool)
    assert len(set(kv.page_table)) == pages
    for at, page in enumerate(kv.page_table):
        assert_same_bits(kv.key[at], pool.key[0][page])
        assert_same_bits(kv.value[at], pool.value[0][page])


@pytest.mark.parametrize("length", [1, 4, 5, 6, 18, 19, 20])
@pytest.mark.parametrize("size", SIZES)
def test_a_window_starts_where_the_next_token_looks_first(size: int, length: int) -> None:
    cache, sequence = cache_with(length, size, (None, 5))
    full, window = cache.to_arrays(sequence, "BSHD").layers
    # A query at position `length` sees itself and the four stored tokens before it.
    start = max(0, length - 4)
    assert (full.start, window.start) == (0, start)
    for layer, kv in enumerate((full, window)):
        key, value = numbers(layer, length, "fp32")
        assert_same_bits(kv.key, key[None, kv.start :].copy())
        assert_same_bits(kv.value, value[None, kv.start :].copy())
    paged = cache.to_arrays(sequence, "pages").layers[1]
    assert paged.start == start // size * size
    held = length - paged.start
    assert (len(paged.page_table) - 1) * size + paged.last_page_len == held
    assert_same_bits(
        paged.key.reshape(-1, HEADS, KEY_DIM)[:held], numbers(1, length, "fp32")[0][paged.start :]
    )


@pytest.mark.parametrize("layout", [*NAMED, "pages"])
@pytest.mark.parametrize(("windows", "length"), [((None,), 0), ((1,), 0), ((1,), 8), ((1,), 7)])
def test_a_sequence_of_which_nothing_is_seen_gives_empty_arrays(
    layout: str, windows: Windows, length: int
) -> None:
    cache, sequence = cache_with(length, 4, windows)
    (kv,) = cache.to_arrays(sequence, layout).layers
    if layout != "pages":
        assert kv.key.shape == arranged(np.zeros((0, HEADS, KEY_DIM)), layout).shape
        assert kv.start == length
    elif length % 4 == 0:
        assert kv.key.shape == (0, 4, HEADS, KEY_DIM)
        assert (kv.page_table, kv.last_page_len, kv.start) == ((), 0, length)
    else:
        assert (len(kv.page_table), kv.last_page_len, kv.start) == (1, 3, 4)


@pytest.mark.parametrize("layout", [*NAMED, "pages"])
def test_what_is_exported_is_a_copy(layout: str) -> None:
    cache, sequence = cache_with(7, 4)
    (kv,) = cache.to_arrays(sequence, layout).layers
    kv.key.fill(-1)
    kv.value.fill(-1)
    (again,) = cache.to_arrays(sequence, "BSHD").layers
    key, value = numbers(0, 7, "fp32")
    assert_same_bits(again.key, key[None])
    assert_same_bits(again.value, value[None])
    append(cache, (sequence, [5]))
    assert np.all(kv.key == -1)


@pytest.mark.parametrize(
    ("wrong", "nearest"), [("BSHX", "BSHD"), ("page", "pages"), ("bhsd", "BHSD")]
)
def test_an_unknown_layout_names_the_nearest_and_all(wrong: str, nearest: str) -> None:
    cache, sequence = cache_with(3, 4)
    with pytest.raises(ConfigError, match=f"unknown KV layout '{wrong}'; did you mean '{nearest}'"):
        cache.to_arrays(sequence, wrong)
    with pytest.raises(ConfigError, match=r"\(layouts: BHSD, BSHD, HBSD, pages\)"):
        cache.to_arrays(sequence, wrong)
