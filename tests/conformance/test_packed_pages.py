"""Formats that store whole pages at once: what is sealed, and which form of a page a query sees."""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, pairwise
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from conformance import (
    ALL_SUBJECTS,
    Subject,
    activations,
    assert_as_good_as_plain,
    backend_of,
    naive,
)
from conformance.test_attention import drawn
from quire.backends import Backend, keep
from quire.batch import GroupBatch, OpenPages, PagedBatch
from quire.errors import BackendError
from quire.format_choice import Formats, parse_formats
from quire.pages import PagePool, PageShape

pytestmark = ALL_SUBJECTS

Array = npt.NDArray[Any]

FORMATS = ("int4", "int2", "k=int8,v=int4", "k=int4,v=fp8", "k=int2,v=int4", "k=bf16,v=int2")


@dataclass(frozen=True)
class Case:
    """One sequence of ``total`` tokens that are computed in the chunks between ``cuts``."""

    total: int
    cuts: tuple[int, ...] = ()
    heads: tuple[int, int, int] = (4, 2, 32)  # query heads, KV heads, head_dim
    page_size: int = 32
    window: int | None = None
    format: str = "int4"

    @property
    def formats(self) -> Formats:
        """Of keys and of values."""
        return parse_formats(self.format).of_layers(1, "fp32")[0]

    @property
    def shape(self) -> PageShape:
        """Of a page."""
        _, heads, dim = self.heads
        return PageShape(self.page_size, heads, dim, dim, *self.formats)

    def numbers(self, seed: int = 0) -> tuple[Array, Array, Array]:
        """Query [total, H, D], key and value [total, G, D], each a function of the place."""
        query, key, value = drawn(seed, self.heads)
        key = key.copy()
        key[:, 0, 3] += 20  # a channel of outliers
        return query[: self.total], key[: self.total], value[: self.total]

    def kept(self, key: Array, value: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        """Keys and values [total, G, D] float32, each as (open, packed) pages have them.

        Numbers of an unfinished page are NaN where pages are packed.
        """
        whole = len(key) // self.page_size * self.page_size
        out = []
        for numbers, format, side in zip((key, value), self.formats, ("key", "value"), strict=True):
            coding, dim = getattr(format, side), self.heads[2]
            if format.kind != "page":
                same = coding.decode(coding.encode(numbers), dim)
                out.append((same, same))
                continue
            held = numbers.astype(ml_dtypes.bfloat16).astype(np.float32)
            packed = np.full_like(held, np.nan)
            pages = held[:whole].reshape(-1, self.page_size, *held.shape[1:])
            packed[:whole] = coding.decode(coding.encode(pages), dim).reshape(-1, *held.shape[1:])
            out.append((held, packed))
        return out[0], out[1]


@lru_cache(maxsize=200)  # subjects share most of it
def expected(case: Case, dtype: Any, operand: Any = None) -> Array:
    """The law, query by query: its own page and page 0 open, the others packed."""
    query, key, value = case.numbers()
    (open_key, packed_key), (open_value, packed_value) = case.kept(key, value)
    rows = []
    for place in range(case.total):
        page = np.arange(place + 1) // case.page_size
        is_open = ((page == 0) | (page == place // case.page_size))[:, None, None]
        keys = np.where(is_open, open_key[: place + 1], packed_key[: place + 1])
        values = np.where(is_open, open_value[: place + 1], packed_value[: place + 1])
        rows.append(
            naive.attend(query[place : place + 1], keys, values, case.window, dtype, operand)
        )
    return np.concatenate(rows)


class Book:
    """The pages of a few sequences, scattered over a pool, grown by hand as a cache would."""

    def __init__(self, backend: Backend, case: Case, sequences: int = 1, seed: int = 0) -> None:
        self.case, self.backend = case, backend
        try:
            backend.require_formats(*case.formats)
        except BackendError as error:
            pytest.skip(str(error))
        most = sequences * (-(-case.total // case.page_size) + 2)
        rng = np.random.default_rng(seed)
        self.pool: PagePool = backend.pool(case.shape, most, most + 2)
        self._packed = rng.permutation(most).tolist()
        self._open = (most + rng.permutation(most + 2)).tolist()
        self.open_ids: list[list[int]] = [[] for _ in range(sequences)]
        self.ids: list[list[int]] = [[] for _ in range(sequences)]  # in their final form
        self.length = [0] * sequences
        first, *others = self._open
        junk = np.full((case.page_size, *case.heads[1:]), np.nan, np.float32)
        slots = np.arange(first * case.page_size, (first + 1) * case.page_size, dtype=np.int64)
        taken = activations(backend, junk)
        backend.append(self.pool, slots, taken, taken)
        self.pool.copy_pages([first] * len(others), others)

    def batch(self, counts: list[int]) -> PagedBatch:
        """Grow sequences by ``counts`` tokens; open pages that are sealed stay taken."""
        case, size = self.case, self.case.page_size
        slots: list[int] = []
        places: list[int] = []
        seals: list[tuple[int, int]] = []
        touched: list[list[int]] = []
        firsts, dropped = [], []
        for s, count in enumerate(counts):
            start, end = self.length[s], self.length[s] + count
            while len(self.ids[s]) * size < end:
                self.open_ids[s].append(self._open.pop())
                self.ids[s].append(self.open_ids[s][-1])
            numbers = range(start // size, -(-end // size)) if count else range(0)
            for n in numbers:
                if n and (n + 1) * size <= end:
                    self.ids[s][n] = self._packed.pop()
                    seals.append((self.open_ids[s][n], self.ids[s][n]))
            slots += [self.open_ids[s][p // size] * size + p % size for p in range(start, end)]
            places += range(start, end)
            touched.append([self.open_ids[s][n] for n in numbers])
            firsts.append(numbers.start)
            dropped.append(0 if case.window is None else max(0, start - case.window + 1) // size)
            self.length[s] = end
        held = [ids[first:] for ids, first in zip(self.ids, dropped, strict=True)]
        last = [
            length - (len(ids) - 1) * size if ids else 0
            for length, ids in zip(self.length, self.ids, strict=True)
        ]
        group = GroupBatch(
            size,
            case.window,
            ints(slots),
            ints(np.cumsum([0, *map(len, held)])),
            ints(list(chain(*held))),
            ints(last),
            ints(dropped),
            OpenPages(
                ints(np.cumsum([0, *map(len, touched)])),
                ints(list(chain(*touched))),
                ints(firsts),
                ints([a for a, _ in seals]),
                ints([b for _, b in seals]),
            ),
        )
        return PagedBatch(ints(places), ints(np.cumsum([0, *counts])), (group,), (0,))

    def step(self, counts: list[int]) -> list[Array]:
        """Store and attend; what each sequence got."""
        before = self.length[:]
        batch = self.batch(counts)
        fresh = [
            [a[start : start + count] for a in self.case.numbers(s)]
            for s, (start, count) in enumerate(zip(before, counts, strict=True))
        ]
        query, key, value = (
            activations(self.backend, np.concatenate(a)) for a in zip(*fresh, strict=True)
        )
        keep(self.backend, self.pool, batch.groups[0], key, value)
        out = self.backend.to_host(self.backend.attend(query, self.pool, batch, 0))
        return np.split(out, batch.query_indptr[1:-1])


def ints(numbers: Any) -> npt.NDArray[np.int64]:
    return np.array(numbers, np.int64)


def run(backend: Backend, case: Case, seed: int = 0) -> Array:
    """What all queries of a case's one sequence get."""
    book, cuts = Book(backend, case, seed=seed), [0, *case.cuts, case.total]
    return np.concatenate([book.step([b - a])[0] for a, b in pairwise(cuts)])


def check(subject: Subject, case: Case) -> None:
    got = run(backend_of(subject), case)
    operand = subject.operand(case.format)
    plain, exact = (
        expected(case, dtype, rounded)
        for dtype, rounded in ((subject.arithmetic, operand), (np.float64, None))
    )
    assert_as_good_as_plain(got, plain, exact)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("window", [None, 40])
def test_a_query_sees_its_own_page_and_the_first_open_and_others_packed(
    subject: Subject, format: str, window: int | None
) -> None:
    check(subject, Case(150, (7, 64, 65, 128), format=format, window=window))


@pytest.mark.parametrize("heads", [(4, 2, 16), (1, 1, 32), (6, 3, 33), (2, 1, 64), (14, 2, 128)])
@pytest.mark.parametrize("format", ["int4", "int2"])
def test_every_head_size(subject: Subject, heads: tuple[int, int, int], format: str) -> None:
    check(subject, Case(80, (33,), heads, format=format))


@pytest.mark.parametrize("page_size", [3, 16, 32, 64])
def test_values_alone_are_packed_in_pages_of_any_size(subject: Subject, page_size: int) -> None:
    check(subject, Case(100, (17, 50), page_size=page_size, format="k=int8,v=int4"))


def test_the_two_forms_of_a_page_are_told_apart(subject: Subject) -> None:
    """The error of int2 is far above that of arithmetic: a query that saw the wrong form shows."""
    case = Case(96, format="int2")
    _, key, value = case.numbers()
    (open_key, packed_key), (open_value, packed_value) = case.kept(key, value)
    assert np.abs(open_key[32:64] - packed_key[32:64]).max() > 0.5
    assert np.abs(open_value[32:64] - packed_value[32:64]).max() > 0.5


@pytest.mark.parametrize("format", ["int4", "int2", "k=int8,v=int4"])
@pytest.mark.parametrize("window", [None, 40])
def test_bits_do_not_depend_on_chunks_pages_or_company(
    subject: Subject, format: str, window: int | None
) -> None:
    if not subject.exact:
        pytest.skip(f"{subject.name} does not claim the exactness law")
    backend, case = backend_of(subject), Case(130, format=format, window=window)
    law = run(backend, case)
    for seed, cuts in enumerate(((32, 64, 96), (1, 31, 33, 63, 65, 100), tuple(range(1, 130)))):
        assert np.array_equal(run(backend, replace(case, cuts=cuts), seed), law)
    book = Book(backend, case, 3, 5)
    parts = [book.step([n, m, 1])[0] for n, m in ((20, 40), (45, 0), (1, 24), (64, 33))]
    assert np.array_equal(np.concatenate(parts), law)


@pytest.mark.parametrize("format", FORMATS)
def test_sealing_stores_what_the_definition_encodes(subject: Subject, format: str) -> None:
    backend, case = backend_of(subject), Case(96, (40, 64, 95), format=format)
    book, cuts = Book(backend, case), [0, *case.cuts, 96]
    for a, b in pairwise(cuts):
        book.step([b - a])
    _, key, value = case.numbers()
    kept = case.kept(key, value)
    packed = book.pool.read_pages(book.ids[0][1:])
    for held, (_, wanted) in zip(packed, kept, strict=True):
        found = held.reshape(64, *case.heads[1:]).astype(np.float32)
        assert np.array_equal(found, wanted[32:])
    opened = book.pool.read_pages(book.open_ids[0])  # the sealed ones, too, are as they were
    for held, (wanted, _) in zip(opened, kept, strict=True):
        assert np.array_equal(held.reshape(96, *case.heads[1:]).astype(np.float32), wanted)
    both = book.pool.read_pages(book.ids[0])
    for held, (first, rest) in zip(both, kept, strict=True):
        found = held.reshape(96, *case.heads[1:]).astype(np.float32)
        assert np.array_equal(found[:32], first[:32])
        assert np.array_equal(found[32:], rest[32:])


@pytest.mark.parametrize("format", FORMATS)
def test_pages_of_either_kind_travel_as_bytes(subject: Subject, format: str) -> None:
    backend, case = backend_of(subject), Case(64, format=format)
    book = Book(backend, case)
    book.step([64])
    pool, shape, (first, second) = book.pool, case.shape, book.ids[0]
    spare_open, spare = book._open.pop(), book._packed.pop()
    for page, other, size in (
        (first, spare_open, shape.open_shape.bytes_per_page),
        (second, spare, shape.bytes_per_page),
    ):
        data = pool.export_pages([page])
        assert data.dtype == np.uint8
        assert data.shape == (1, size)
        pool.import_pages([other], data)
        pool.copy_pages([page], [book._open.pop() if page == first else book._packed.pop()])
        for a, b in zip(pool.read_pages([page]), pool.read_pages([other]), strict=True):
            assert a.tobytes() == b.tobytes()


def test_empty_slots_of_an_open_page_are_blanked(subject: Subject) -> None:
    backend, case = backend_of(subject), Case(10, format="k=int8,v=int4", page_size=32)
    book = Book(backend, case)
    book.step([10])
    data = book.pool.export_pages(book.ids[0])
    before = book.pool.read_pages(book.ids[0])
    book.pool.blank_slots(data, 10)
    book.pool.import_pages(book.ids[0], data)
    for was, held in zip(before, book.pool.read_pages(book.ids[0]), strict=True):
        assert np.array_equal(held[0, :10], was[0, :10])
        assert not held[0, 10:].any()


def test_single_tokens_of_packed_pages_are_not_moved(subject: Subject) -> None:
    book = Book(backend_of(subject), Case(64))
    with pytest.raises(BackendError):
        book.pool.gather_tokens(np.zeros((2, 1), np.int64), np.ones(1, np.int64))
