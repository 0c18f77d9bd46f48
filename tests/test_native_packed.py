"""Packed pages of the native backend: stored bits, damage that stays where it is, arguments."""

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from quire.backends.reference import ReferenceBackend
from quire.batch import GroupBatch, OpenPages, PagedBatch
from quire.pages import PagePool, PageShape, page_format

native = pytest.importorskip("quire.backends.native")
extension = pytest.importorskip("quire.backends.native._native")

NativeBackend = native.NativeBackend
VARIANTS = NativeBackend.variants()
variants = pytest.mark.parametrize("variant", VARIANTS)

Array = npt.NDArray[Any]
LARGEST = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)


def ints(*numbers: int) -> npt.NDArray[np.int64]:
    return np.array(numbers, np.int64)


def hard_pages(size: int, dim: int) -> Array:
    """[pages, size, 2, dim], one kind of numbers a page."""
    rng = np.random.default_rng(dim)
    normal = rng.standard_normal((12, size, 2, dim)).astype(np.float32)
    normal[1] = 3.7  # constant
    normal[2] = 0
    normal[3] = np.where(normal[3] > 0, 0.0, -0.0)
    normal[4] = np.clip(normal[4], -3, 3) * np.float32(1e38)
    normal[5] = np.where(normal[5] > 0, LARGEST, -LARGEST)
    normal[6] *= 1e-38  # subnormal and almost so
    normal[7] *= 2.0**-132
    normal[8, :, :, dim // 2] += 1e3  # a channel of outliers
    normal[9, 3, 0, 0], normal[9, 5, 1, dim - 1] = np.inf, np.nan
    normal[10, :, 1] = -np.inf
    normal[11] = np.round(normal[11])  # ties
    return normal


def sealed(backend: Any, shape: PageShape, numbers: Array, values: Array | None = None) -> PagePool:
    """A pool whose packed page i holds numbers[i], sealed from open page i; values are -numbers."""
    values = -numbers if values is None else values
    count = len(numbers)
    pool = backend.pool(shape, count, count)
    flat = numbers.reshape(-1, *numbers.shape[2:])
    slots = np.arange(len(flat)) + count * shape.page_size
    with np.errstate(all="ignore"):
        backend.append(pool, slots, flat, values.reshape(flat.shape))
        pool.seal(count + np.arange(count), np.arange(count))
    return pool


@pytest.mark.parametrize("dim", [1, 16, 24, 33, 64, 80, 128])
@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize("format", ["int4", "int2"])
@variants
def test_sealed_pages_hold_the_bits_of_the_definition(
    variant: str, format: str, size: int, dim: int
) -> None:
    made = page_format(format)
    shape = PageShape(size, 2, dim, dim, made, made)
    numbers = hard_pages(size, dim)
    pool = sealed(NativeBackend(variant, threads=2), shape, numbers)
    assert pool.export_pages([0, 1]).shape == (2, shape.bytes_per_page)
    with np.errstate(all="ignore"):
        held = numbers.astype(ml_dtypes.bfloat16).astype(np.float32)
        wanted = (
            made.key.decode(made.key.encode(held), dim),
            made.value.decode(made.value.encode(-held), dim),
        )
        for found, right in zip(pool.read_pages(range(len(numbers))), wanted, strict=True):
            same = (found.view(np.uint32) == right.view(np.uint32)) | (
                np.isnan(found) & np.isnan(right)
            )
            assert same.all()


@pytest.mark.parametrize("format", ["int4", "int2"])
@variants
def test_pages_travel_between_pools_as_bytes(variant: str, format: str) -> None:
    made = page_format(format)
    shape, backend = PageShape(32, 2, 64, 64, made, made), NativeBackend(variant, threads=1)
    pool = sealed(backend, shape, hard_pages(32, 64))
    other = backend.pool(shape, 3, 1)
    other.import_pages([2, 0], pool.export_pages([8, 9]))
    other.copy_pages([2], [1])
    for found, right in zip(other.read_pages([2, 0, 1]), pool.read_pages([8, 9, 8]), strict=True):
        assert found.tobytes() == right.tobytes()
    other.discard()
    assert not other.export_pages([0, 1, 2]).any()
    assert not other.export_pages([3]).any()


def one_token(place: int, size: int, packed: int, window: int | None = None) -> PagedBatch:
    """A query at ``place``: page n has packed id n - 1, page 0 and its own the first open ones."""
    own = place // size
    group = GroupBatch(
        size,
        window,
        ints(0),
        ints(0, own + 1),
        ints(packed, *range(own - 1), packed + 1),
        ints(place % size + 1),
        ints(0),
        OpenPages(ints(0, 1), ints(packed + 1), ints(own), ints(), ints()),
    )
    return PagedBatch(ints(place), ints(0, 1), (group,), (0,))


@pytest.mark.parametrize("format", ["int4", "int2", "k=int4", "v=int4"])
@variants
def test_what_is_not_finite_reaches_only_those_that_see_it(variant: str, format: str) -> None:
    key, value = (
        page_format(format.removeprefix(f"{side}=") if not format.startswith(other) else "bf16")
        for side, other in (("k", "v"), ("v", "k"))
    )
    backend, shape = NativeBackend(variant, threads=2), PageShape(32, 2, 64, 64, key, value)
    outs = []
    for bad in (1.0, np.nan, np.inf):
        numbers = np.random.default_rng(1).standard_normal((14, 32, 2, 64)).astype(np.float32)
        values = -numbers
        (numbers if key.kind == "page" else values)[2, 7, 0, 5] = bad  # page number 3, KV head 0
        pool = sealed(backend, shape, numbers[:12], values[:12])
        rest = numbers[12:].reshape(-1, 2, 64)  # the first and the last page
        backend.append(pool, np.arange(12 * 32, 14 * 32), rest, rest)
        query = np.random.default_rng(2).standard_normal((1, 4, 64)).astype(np.float32)
        near = one_token(11 * 32 + 20, 32, 12, window=200)
        far = one_token(11 * 32 + 20, 32, 12)
        outs.append([backend.attend(query, pool, batch, 0) for batch in (near, far)])
    for near, far in outs[1:]:
        assert near.tobytes() == outs[0][0].tobytes()
        heads = far.reshape(4, 64)
        seen = np.isnan(heads[:2])
        if key.kind == "page":
            assert seen.all()
        else:
            assert seen[:, :32].all()
            assert not seen[:, 32:].any()
        assert heads[2:].tobytes() == outs[0][1].reshape(4, 64)[2:].tobytes()


@variants
def test_mixed_layers_copy_what_they_seal(variant: str) -> None:
    """In a group of packed layers, one of int8 holds both kinds of pages alike."""
    made = page_format("int8")
    backend, shape = NativeBackend(variant, threads=1), PageShape(32, 2, 16, 16, made, made)
    assert not shape.by_page
    numbers = np.random.default_rng(0).standard_normal((3, 32, 2, 16)).astype(np.float32)
    pool = sealed(backend, shape, numbers)
    assert pool.export_pages([0, 1, 2]).tobytes() == pool.export_pages([3, 4, 5]).tobytes()
    with pytest.raises(ValueError, match="slot 5 is outside the pool, or not open"):
        backend.append(pool, ints(5), numbers[0, :1], numbers[0, :1])


# -- malformed arguments raise, never crash --------------------------------------------------------


def small_pool() -> Any:
    made = page_format("int4")
    return NativeBackend(threads=1).pool(PageShape(32, 2, 32, 32, made, made), 4, 3)


@pytest.mark.parametrize(
    ("source", "target"),
    [([3], [0]), ([7], [0]), ([4], [4]), ([4], [-1]), ([-1], [0]), ([4, 5], [0]), ([2**40], [0])],
)
def test_seals_of_pages_of_the_wrong_kind_are_refused(source: list[int], target: list[int]) -> None:
    with pytest.raises(ValueError, match="seal: "):
        small_pool().seal(ints(*source), ints(*target))


@pytest.mark.parametrize("slot", [0, 4 * 32 - 1, 7 * 32, -1])
def test_tokens_go_into_open_pages_only(slot: int) -> None:
    new = np.zeros((1, 2, 32), np.float32)
    with pytest.raises(ValueError, match=f"slot {slot} is outside the pool, or not open"):
        NativeBackend(threads=1).append(small_pool(), ints(slot), new, new)


def batch_of(indices: Array, opened: OpenPages) -> PagedBatch:
    """One query at place 70 of three pages of 32 tokens."""
    group = GroupBatch(32, None, ints(160), ints(0, 3), indices, ints(7), ints(0), opened)
    return PagedBatch(ints(70), ints(0, 1), (group,), (0,))


def opened(indptr: Array, indices: Array, first: Array) -> OpenPages:
    return OpenPages(indptr, indices, first, ints(), ints())


@pytest.mark.parametrize(
    ("indices", "pages", "message"),
    [
        (ints(4, 0, 5), opened(ints(), ints(), ints()), "need the open pages"),
        (ints(0, 1, 5), opened(ints(0, 1), ints(5), ints(2)), "page 0 and those"),
        (ints(4, 5, 6), opened(ints(0, 1), ints(6), ints(2)), "page 0 and those"),
        (ints(4, 0, 5), opened(ints(0, 1), ints(1), ints(2)), "page 0 and those"),
        (ints(4, 0, 5), opened(ints(0, 1), ints(7), ints(2)), "page 0 and those"),
        (ints(4, 0, 5), opened(ints(0, 1), ints(-1), ints(2)), "page 0 and those"),
        (ints(4, 0, 7), opened(ints(0, 1), ints(5), ints(2)), "page id 7 is outside"),
        (ints(4, 0, 5), opened(ints(0, 1), ints(5), ints(1)), "in a page that is not open"),
        (ints(4, 0, 5), opened(ints(0, 1), ints(5), ints(3)), "in a page that is not open"),
        (ints(4, 0, 5), opened(ints(0, 1), ints(5), ints(-1)), "in a page that is not open"),
        (ints(4, 0, 5), opened(ints(0, 0), ints(), ints(2)), "in a page that is not open"),
        (ints(4, 0, 5), opened(ints(0, 2), ints(5), ints(2)), "must run from 0"),
        (ints(4, 0, 5), opened(ints(0), ints(), ints()), "must run from 0"),
        (ints(4, 0, 5), opened(ints(0, 1), ints(5), ints()), "disagree in length"),
    ],
)
def test_tables_that_would_read_a_page_as_the_other_kind_are_refused(
    indices: Array, pages: OpenPages, message: str
) -> None:
    backend, query = NativeBackend(threads=1), np.zeros((1, 2, 32), np.float32)
    pool = small_pool()
    good = batch_of(ints(4, 0, 5), opened(ints(0, 1), ints(5), ints(2)))
    backend.attend(query, pool, good, 0)
    with pytest.raises(ValueError, match=message):
        backend.attend(query, pool, batch_of(indices, pages), 0)


def test_pools_whose_open_pages_do_not_fit_are_refused() -> None:
    def store(size: int, code: int) -> "extension.Store":
        return extension.Store(np.zeros(size, np.uint8), None, code, 32)

    bf16, wide = store(2 * 32 * 32 * 2, 1), store(2 * 32 * 32 * 4, 0)
    int4 = store(2 * 32 * 20, 5)
    fits = extension.Pool(bf16, bf16, [1, 32, 2])
    extension.Pool(int4, int4, [1, 32, 2], fits)
    for message, key, shape, other in (
        ("packed pages need open ones", int4, [1, 32, 2], None),
        ("others have none", bf16, [1, 32, 2], fits),
        ("do not have its shape", store(2 * 32 * 20 - 1, 5), [1, 32, 2], fits),
        ("a multiple of 32 tokens", int4, [2, 16, 2], fits),
        ("hold bf16 numbers", int4, [1, 32, 2], extension.Pool(wide, wide, [1, 32, 2])),
        ("differ in shape", int4, [2, 32, 1], fits),
    ):
        with pytest.raises(ValueError, match=message):
            extension.Pool(key, key, shape, other)


def test_the_reference_reads_the_same_packed_numbers() -> None:
    """Attention of both backends over the same pages differs by arithmetic alone."""
    made = page_format("int4")
    shape = PageShape(32, 2, 64, 64, made, made)
    numbers = np.random.default_rng(3).standard_normal((12, 32, 2, 64)).astype(np.float32)
    query = np.random.default_rng(4).standard_normal((1, 4, 64)).astype(np.float32)
    batch = one_token(11 * 32 + 20, 32, 12)
    outs = []
    for backend in (ReferenceBackend(), NativeBackend(threads=1)):
        pool = sealed(backend, shape, numbers)
        outs.append(backend.attend(query, pool, batch, 0))
    assert np.abs(outs[0] - outs[1]).max() < 2**-8 * np.abs(outs[0]).max()
