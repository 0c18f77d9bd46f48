"""Pools of quantised pages: bytes, scales that go where their payload goes, and what is refused."""

import numpy as np
import pytest

from quire.backends.reference import ReferencePool
from quire.errors import BackendError
from quire.formats import page_format
from quire.pages import PageShape

POOLED = [("int8", "int8"), ("fp8", "fp8"), ("int8", "fp8"), ("bf16", "int8"), ("fp8", "fp32")]
pooled = pytest.mark.parametrize(("key", "value"), POOLED)


def filled_pool(key: str, value: str) -> ReferencePool:
    """Six pages of five tokens, all written but for the last page."""
    shape = PageShape(5, 2, 6, 4, page_format(key), page_format(value))
    pool = ReferencePool(shape, 6)
    rng = np.random.default_rng(0)
    numbers = [rng.standard_normal((25, 2, dim)).astype(np.float32) for dim in (6, 4)]
    numbers[1][7, 1, 2] = np.nan
    pool.store(np.arange(25), *numbers)
    return pool


@pooled
def test_a_pool_takes_exactly_the_bytes_that_are_accounted(key: str, value: str) -> None:
    pool = filled_pool(key, value)
    arrays = (*pool.key, *pool.value)
    assert sum(array.nbytes for array in arrays) == 6 * pool.shape.bytes_per_page
    assert pool.export_pages([0, 3]).shape == (2, pool.shape.bytes_per_page)


@pooled
def test_scales_go_where_their_payload_goes(key: str, value: str) -> None:
    pool = filled_pool(key, value)
    before = pool.read_pages(range(6))
    pool.copy_pages([1, 2], [5, 4])
    copied = pool.read_pages([5, 4])
    for one, other in zip(copied, pool.read_pages([1, 2]), strict=True):
        assert one.tobytes() == other.tobytes()
    data = filled_pool(key, value).export_pages([3, 1])
    other_pool = ReferencePool(pool.shape, 3)
    other_pool.import_pages([2, 0], data)
    for one, other in zip(other_pool.read_pages([2, 0]), before, strict=True):
        assert one.tobytes() == other[[3, 1]].tobytes()
    assert np.array_equal(other_pool.export_pages([2, 0]), data)


@pooled
@pytest.mark.parametrize("first", [0, 2, 4, 5])
def test_blanked_slots_have_neither_payload_nor_scale(key: str, value: str, first: int) -> None:
    pool = filled_pool(key, value)
    data = pool.export_pages([1])
    pool.blank_slots(data, first)
    fresh = ReferencePool(pool.shape, 2)
    fresh.import_pages([1], data)
    again = ReferencePool(pool.shape, 2)
    kept = np.arange(5, 5 + first)
    for held, source in ((again.key, pool.key), (again.value, pool.value)):
        for mine, theirs in zip(held, source, strict=True):
            mine.reshape(-1, *mine.shape[2:])[kept] = theirs.reshape(-1, *theirs.shape[2:])[kept]
    assert again.export_pages([1]).tobytes() == data.tobytes()


@pooled
def test_a_discarded_pool_is_as_new(key: str, value: str) -> None:
    pool = filled_pool(key, value)
    pool.discard()
    assert not pool.export_pages(range(6)).any()


@pytest.mark.parametrize(("key", "value"), [("int4", "int4"), ("bf16", "int2"), ("int4", "int8")])
def test_native_pools_refuse_packed_pages_without_open_ones(key: str, value: str) -> None:
    native = pytest.importorskip("quire.backends.native")
    shape = PageShape(32, 1, 4, 4, page_format(key), page_format(value))
    with pytest.raises(BackendError, match="packed from open ones, and the pool is to have none"):
        native.NativeBackend().pool(shape, 1)


@pooled
@pytest.mark.parametrize(("page_size", "dim"), [(5, 6), (16, 6), (16, 16)])
def test_native_pools_move_and_blank_scales_with_their_numbers(
    key: str, value: str, page_size: int, dim: int
) -> None:
    backend = pytest.importorskip("quire.backends.native").NativeBackend(threads=1)
    shape = PageShape(page_size, 2, dim, dim, page_format(key), page_format(value))
    numbers = np.random.default_rng(0).standard_normal((3 * page_size, 2, dim)).astype(np.float32)
    numbers[1, 1, 2] = np.nan
    pool, other = backend.pool(shape, 5), backend.pool(shape, 5)
    backend.append(pool, np.arange(3 * page_size), numbers, -numbers)
    before = pool.read_pages([0, 1])
    pool.copy_pages([0, 1], [4, 3])
    data = pool.export_pages([4, 3])
    assert data.shape == (2, shape.bytes_per_page)
    other.import_pages([2, 0], data)
    for one, two in zip(other.read_pages([2, 0]), before, strict=True):
        assert one.tobytes() == two.tobytes()
    pool.blank_slots(data, 3)
    fresh = backend.pool(shape, 5)
    backend.append(fresh, np.arange(3), numbers[:3], -numbers[:3])
    backend.append(
        fresh,
        page_size + np.arange(3),
        numbers[page_size : page_size + 3],
        -numbers[page_size : page_size + 3],
    )
    blank = fresh.export_pages([0, 1])
    filled = backend.pool(shape, 2)
    filled.import_pages([0, 1], blank)
    filled.import_pages([0, 1], data)
    for one, two in zip(filled.read_pages([0, 1]), fresh.read_pages([0, 1]), strict=True):
        assert one[:, :3].tobytes() == two[:, :3].tobytes()
    backend.pool(shape, 1).blank_slots(data, 0)
    assert not data.any()
