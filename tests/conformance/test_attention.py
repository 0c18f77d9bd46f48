"""``append`` and ``attend`` of every backend: what is stored, what is seen, how precisely."""

import struct
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import pairwise
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
    combinations,
    naive,
)
from quire.backends import Backend, reference
from quire.batch import GroupBatch, PagedBatch
from quire.errors import BackendError
from quire.format_choice import Formats, parse_formats
from quire.pages import PagePool, PageShape, page_format

pytestmark = ALL_SUBJECTS

Array = npt.NDArray[Any]

FORMATS = ("fp32", "bf16", "fp16")
QUANTISED = ("int8", "fp8", "k=int8,v=fp8", "k=fp8,v=bf16", "k=fp16,v=int8")
DTYPES: dict[str, Any] = {"fp32": np.float32, "bf16": ml_dtypes.bfloat16, "fp16": np.float16}


@dataclass(frozen=True)
class Case:
    """A batch: ``sequences`` holds (stored tokens, new tokens) of each.

    drop  True if pages behind the window were given back, as the cache does
    """

    sequences: tuple[tuple[int, int], ...]
    heads: tuple[int, int, int] = (4, 2, 32)  # query heads, KV heads, head_dim
    page_size: int = 16
    window: int | None = None
    format: str = "fp32"
    drop: bool = True

    @property
    def formats(self) -> Formats:
        """Of keys and of values."""
        return parse_formats(self.format).of_layers(1, "fp32")[0]

    def stored(self, key: Array, value: Array) -> tuple[Array, Array]:
        """Keys and values [..., G, D] as the formats keep them, float32."""
        dim = self.heads[2]
        keys, values = self.formats
        return (
            keys.key.decode(keys.key.encode(key), dim),
            values.value.decode(values.value.encode(value), dim),
        )

    def numbers(self, sequence: int) -> tuple[Array, Array, Array]:
        """Query [new, H, D], key and value [stored + new, G, D]: a function of the position."""
        stored, new = self.sequences[sequence]
        query, key, value = (a[: stored + new] for a in drawn(sequence, self.heads))
        return query[stored:], key, value


@cache  # subjects, page sizes and formats meet the same numbers, and drawing them takes longest
def drawn(seed: int, heads: tuple[int, int, int]) -> tuple[Array, Array, Array]:
    """Query [512, H, D], key and value [512, G, D]; not to be written to."""
    query_heads, kv_heads, dim = heads
    rng = np.random.default_rng([seed, *heads])
    tokens = rng.standard_normal((512, query_heads + 2 * kv_heads, dim)).astype(np.float32)
    tokens.setflags(write=False)
    query, key, value = np.split(tokens, [query_heads, query_heads + kv_heads], axis=1)
    return query, key, value


@dataclass
class Laid:
    """A case in a pool: the batch to attend with, and the slots of the stored tokens."""

    batch: PagedBatch
    num_pages: int
    stored_slots: list[Array]
    first: list[int]  # the first position that each sequence still holds


def lay_out(case: Case, seed: int = 0) -> Laid:
    """Scatter the pages of ``case`` over a pool with some pages to spare."""
    size = case.page_size
    tables, firsts = [], []
    for stored, new in case.sequences:
        behind = 0 if case.window is None else max(0, stored - case.window + 1) // size
        first = behind if case.drop else 0
        firsts.append(first)
        tables.append(max(0, -(-(stored + new) // size) - first))
    num_pages = sum(tables) + 3
    ids = np.random.default_rng(seed).permutation(num_pages)
    indptr = np.concatenate([[0], np.cumsum(tables)]).astype(np.int64)
    indices = ids[: indptr[-1]].astype(np.int64)
    slots, old, last, positions = [], [], [], []
    for s, (stored, new) in enumerate(case.sequences):
        pages = indices[indptr[s] : indptr[s + 1]]
        place = [
            pages[p // size - firsts[s]] * size + p % size
            for p in range(firsts[s] * size, stored + new)
        ]
        kept = len(place) - new
        old.append(np.array(place[:kept], np.int64))
        slots += place[kept:]
        positions += range(stored, stored + new)
        last.append(stored + new - (firsts[s] + len(pages) - 1) * size if len(pages) else 0)
    group = GroupBatch(
        size,
        case.window,
        np.array(slots, np.int64),
        indptr,
        indices,
        np.array(last, np.int64),
        np.array(firsts, np.int64),
    )
    query_indptr = np.concatenate([[0], np.cumsum([n for _, n in case.sequences])])
    batch = PagedBatch(np.array(positions, np.int64), query_indptr.astype(np.int64), (group,), (0,))
    return Laid(batch, num_pages, old, [first * size for first in firsts])


def new_pool(backend: Backend, case: Case, num_pages: int) -> PagePool:
    _, kv_heads, dim = case.heads
    try:
        backend.require_formats(*case.formats)
    except BackendError as error:
        pytest.skip(str(error))
    return backend.pool(PageShape(case.page_size, kv_heads, dim, dim, *case.formats), num_pages)


def fill(backend: Backend, case: Case, pool: PagePool, number: float) -> None:
    """Write ``number`` into every slot of a pool: into a page, which is copied to the others."""
    slots = np.arange(case.page_size, dtype=np.int64)
    junk = np.full((len(slots), *case.heads[1:]), number, np.float32)
    backend.append(pool, slots, activations(backend, junk), activations(backend, junk))
    others = range(1, pool.num_pages)
    pool.copy_pages([0] * len(others), others)


def run(
    backend: Backend, case: Case, *, garbage: float | None = None, seed: int = 0
) -> list[Array]:
    """Store the case's tokens, attend, and split the result by sequence."""
    laid = lay_out(case, seed)
    pool = new_pool(backend, case, laid.num_pages)
    if garbage is not None:
        fill(backend, case, pool, garbage)
    numbers = [case.numbers(s) for s in range(len(case.sequences))]
    for s, (stored, _) in enumerate(case.sequences):
        if len(laid.stored_slots[s]):
            key, value = (activations(backend, a[laid.first[s] : stored]) for a in numbers[s][1:])
            backend.append(pool, laid.stored_slots[s], key, value)
    fresh = [
        (query, key[stored:], value[stored:])
        for (stored, _), (query, key, value) in zip(case.sequences, numbers, strict=True)
    ]
    query, key, value = (activations(backend, np.concatenate(a)) for a in zip(*fresh, strict=True))
    backend.append(pool, laid.batch.groups[0].slots, key, value)
    out = backend.to_host(backend.attend(query, pool, laid.batch, 0))
    return np.split(out, laid.batch.query_indptr[1:-1])


@lru_cache(maxsize=2000)  # subjects share most of it
def expected(case: Case, sequence: int, dtype: Any, operand: Any = None) -> Array:
    """The naive result over keys and values as the page formats keep them."""
    query, key, value = case.numbers(sequence)
    return naive.attend(query, *case.stored(key, value), case.window, dtype, operand)


def check(subject: Subject, case: Case) -> None:
    """The error rule for every sequence of a case; where operands are rounded, for all together.

    Rounded operands make errors of chance, and a sequence with one query has too few numbers for
    their maxima to be compared.
    """
    got = run(backend_of(subject), case, garbage=np.nan)
    operand = subject.operand(case.format)
    plain, exact = (
        [expected(case, s, dtype, rounded_to) for s in range(len(case.sequences))]
        for dtype, rounded_to in ((subject.arithmetic, operand), (np.float64, None))
    )
    assert [len(a) for a in got] == [new for _, new in case.sequences]
    if operand is not subject.arithmetic:
        got, plain, exact = ([np.concatenate(a)] for a in (got, plain, exact))
    for three in zip(got, plain, exact, strict=True):
        assert_as_good_as_plain(*three)


# One token; a whole first page; a last page with one token; prefill, chunk and decode side by
# side; sequences with no new tokens, one of them with none at all.
RAGGED = ((0, 1), (0, 16), (16, 1), (0, 33), (20, 17), (40, 0), (63, 2), (0, 0), (48, 1))


@pytest.mark.parametrize(
    "heads",
    [
        (1, 1, 32),
        (4, 4, 32),
        (4, 2, 32),
        (8, 1, 32),
        (6, 3, 33),
        (5, 1, 47),
        (3, 3, 1),
        (2, 1, 64),
        (4, 2, 80),
        (7, 7, 96),
        (14, 2, 128),
        (2, 2, 256),
    ],
    ids=lambda heads: "x".join(map(str, heads)),
)
def test_attention_for_every_head_count_and_size(
    subject: Subject, heads: tuple[int, int, int]
) -> None:
    check(subject, Case(RAGGED, heads))


@pytest.mark.parametrize("page_size", [1, 3, 16, 64, 100])
@pytest.mark.parametrize("format", [*FORMATS, *QUANTISED])
def test_attention_for_every_page_size_and_format(
    subject: Subject, page_size: int, format: str
) -> None:
    check(subject, Case(RAGGED, page_size=page_size, format=format))


@pytest.mark.parametrize(
    ("window", "page_size", "drop"),
    combinations([1, 2, 7, 16, 17, 30, 64, 1000], [1, 3, 16, 100], [True, False]),
)
def test_attention_in_a_sliding_window(
    subject: Subject, window: int, page_size: int, drop: bool
) -> None:
    check(subject, Case(RAGGED, page_size=page_size, window=window, drop=drop))


@pytest.mark.parametrize("format", ["int8", "k=int8,v=fp8"])
@pytest.mark.parametrize("heads", [(1, 1, 1), (6, 3, 33), (2, 1, 64), (14, 2, 128)])
def test_attention_over_scales_for_every_head_size(
    subject: Subject, heads: tuple[int, int, int], format: str
) -> None:
    check(subject, Case(RAGGED, heads, format=format))
    check(subject, Case(RAGGED, heads, window=17, format=format))


@pytest.mark.parametrize("sequences", [((0, 1),), ((0, 2),), ((0, 0), (0, 1)), ((99, 1),)])
def test_attention_of_the_smallest_batches(
    subject: Subject, sequences: tuple[tuple[int, int], ...]
) -> None:
    check(subject, Case(sequences))


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("format", ["fp32", "k=int8,v=fp8"])
def test_attention_of_short_chunks_behind_long_prefixes(
    subject: Subject, window: int | None, format: str
) -> None:
    check(subject, Case(((480, 16),), window=window, format=format))
    sequences = ((301, 5), (40, 1), (505, 2), (0, 3))
    check(subject, Case(sequences, (6, 1, 16), window=window, format=format))


def test_attention_of_a_batch_without_new_tokens_is_empty(subject: Subject) -> None:
    backend = backend_of(subject)
    case = Case(((0, 0), (5, 0)))
    laid = lay_out(case)
    pool = new_pool(backend, case, laid.num_pages)
    none = backend.heads(backend.rows(activations(backend, np.zeros((1, 128), np.float32)), []), 4)
    assert backend.to_host(backend.attend(none, pool, laid.batch, 0)).shape == (0, 128)


def test_a_lone_token_gets_its_own_value(subject: Subject) -> None:
    case = Case(((0, 1),), heads=(6, 3, 32))
    value = case.numbers(0)[2]
    got = run(backend_of(subject), case)[0].reshape(6, 32)
    assert np.array_equal(got, np.repeat(value[0], 2, axis=0))


def test_query_heads_share_kv_heads_in_order(subject: Subject) -> None:
    """Query head h reads KV head h // (H / G): with equal keys it gets that head's mean value."""
    backend = backend_of(subject)
    case = Case(((0, 4),), heads=(6, 3, 32))
    laid = lay_out(case)
    pool = new_pool(backend, case, laid.num_pages)
    value = np.broadcast_to(np.arange(1, 4, dtype=np.float32)[:, None], (4, 3, 32)).copy()
    key = activations(backend, np.ones((4, 3, 32), np.float32))
    backend.append(pool, laid.batch.groups[0].slots, key, activations(backend, value))
    query = activations(backend, np.ones((4, 6, 32), np.float32))
    got = backend.to_host(backend.attend(query, pool, laid.batch, 0)).reshape(4, 6, 32)
    assert np.array_equal(got[-1, :, 0], np.array([1, 1, 2, 2, 3, 3], np.float32))


def test_large_scores_do_not_overflow(subject: Subject) -> None:
    """exp of an unshifted score of 1e4 would be infinite; the best key takes all the weight."""
    backend = backend_of(subject)
    case = Case(((0, 40),), heads=(1, 1, 32))
    laid = lay_out(case)
    pool = new_pool(backend, case, laid.num_pages)
    key = np.zeros((40, 1, 32), np.float32)
    key[:, 0, 0] = np.where(np.arange(40) == 25, 100, -100)
    value = case.numbers(0)[2]
    pair = activations(backend, key), activations(backend, value)
    backend.append(pool, laid.batch.groups[0].slots, *pair)
    query = np.zeros((40, 1, 32), np.float32)
    query[:, 0, 0] = 600
    got = backend.to_host(backend.attend(activations(backend, query), pool, laid.batch, 0))
    assert np.array_equal(got[25:], np.broadcast_to(value[25], (15, 32)))
    assert np.isfinite(got).all()


# -- storing -------------------------------------------------------------------------------------


def hard_numbers() -> Array:
    """Ties, subnormals, the edges of each format, infinities and NaN, float32 [n, 1, 2]."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 2000, dtype=np.uint64).astype(np.uint32)
    bits[np.isnan(bits.view(np.float32))] |= 0x0040_0000  # no signalling NaN comes out of a model
    ties = np.arange(0x3F80_8000, 0x3F88_8000, 0x8000, dtype=np.uint32)  # halfway in bf16
    half_ties = np.arange(0x3F80_1000, 0x3F82_1000, 0x1000, dtype=np.uint32)  # halfway in fp16
    edges = [65504, 65519.99, 65520, 1e5, 6e-8, 3e-8, 2.98e-8, 3.39e38, 3.4e38]
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, *edges], np.float32)
    found = np.concatenate([a.view(np.float32) for a in (bits, ties, half_ties, special)])
    return found[: len(found) // 2 * 2].reshape(-1, 1, 2)


def rounded(x: float, format: str) -> float:
    """Round to nearest, ties to even, by means that are not NumPy's."""
    if format == "fp32" or not np.isfinite(x):
        return x
    if format == "fp16":
        try:
            return float(struct.unpack("<e", struct.pack("<e", x))[0])
        except OverflowError:
            return float(np.copysign(np.inf, x))
    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF_0000
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


@pytest.mark.parametrize("format", FORMATS)
def test_append_rounds_as_the_page_format_does(subject: Subject, format: str) -> None:
    backend = backend_of(subject)
    numbers = hard_numbers()
    case = Case(((0, len(numbers)),), (1, 1, 2), format=format)
    laid = lay_out(case)
    pool = new_pool(backend, case, laid.num_pages)
    taken = activations(backend, numbers)
    backend.append(pool, laid.batch.groups[0].slots, taken, taken)
    key, value = pool.read_pages(laid.batch.groups[0].indices.tolist())
    (stored,) = page_format(format).key.encode(numbers)
    assert key.dtype == value.dtype == stored.dtype == np.dtype(DTYPES[format])
    for held in (key, value):
        tokens = held.reshape(-1, 1, 2)[: len(numbers)]
        nan = np.isnan(numbers)  # stays one, with any payload
        assert np.array_equal(np.isnan(tokens), nan)
        assert tokens[~nan].tobytes() == stored[~nan].tobytes()
    wanted = [rounded(float(x), format) for x in numbers.ravel()]
    assert np.array_equal(stored.astype(np.float64).ravel(), wanted, equal_nan=True)


def hard_vectors() -> Array:
    """Vectors of many sizes and spreads, with infinities and NaN in some, float32 [n, 2, 8]."""
    rng = np.random.default_rng(1)
    numbers = hard_numbers().ravel()
    mixed = numbers[: len(numbers) // 16 * 16].reshape(-1, 2, 8)
    sizes = np.float32(10.0) ** rng.integers(-44, 38, (600, 2, 1)).astype(np.float32)
    spread = rng.standard_normal((600, 2, 8)).astype(np.float32) * sizes
    spread[::7, 0, 3] *= 100  # an outlier
    return np.concatenate([mixed, np.clip(spread, -3e38, 3e38)])


@pytest.mark.parametrize("format", QUANTISED)
def test_append_stores_what_the_definition_encodes(subject: Subject, format: str) -> None:
    backend = backend_of(subject)
    numbers = hard_vectors()
    case = Case(((0, len(numbers)),), (2, 2, 8), format=format)
    laid = lay_out(case)
    pool = new_pool(backend, case, laid.num_pages)
    taken = activations(backend, numbers)
    backend.append(pool, laid.batch.groups[0].slots, taken, taken)
    read = pool.read_pages(laid.batch.groups[0].indices.tolist())
    for held, wanted in zip(read, case.stored(numbers, numbers), strict=True):
        tokens = held.reshape(-1, 2, 8)[: len(numbers)].astype(np.float32)
        assert np.array_equal(np.isnan(tokens), np.isnan(wanted))
        there = ~np.isnan(wanted)
        assert tokens[there].tobytes() == wanted[there].tobytes()


@pytest.mark.parametrize("format", QUANTISED)
def test_appending_in_any_chunks_stores_the_same_bytes(subject: Subject, format: str) -> None:
    backend = backend_of(subject)
    case = Case(((0, 32),), (2, 2, 6), page_size=8, format=format)
    key, value = hard_vectors()[:64, :, :6].reshape(2, 32, 2, 6)
    stored = []
    for cuts in ([0, 32], range(33), [0, 5, 8, 9, 23, 32]):
        pool = new_pool(backend, case, 4)
        for start, end in pairwise(cuts):
            pair = (activations(backend, a[start:end]) for a in (key, value))
            backend.append(pool, np.arange(start, end, dtype=np.int64), *pair)
        stored.append(pool.export_pages(range(4)).tobytes())
    assert stored[0] == stored[1] == stored[2]
    assert len(stored[0]) == 4 * pool.shape.bytes_per_page


def test_append_writes_its_slots_and_no_other(subject: Subject) -> None:
    backend = backend_of(subject)
    case = Case(((0, 5),), (2, 2, 4), page_size=3)
    pool = new_pool(backend, case, 4)
    fill(backend, case, pool, 7.0)
    slots = np.array([10, 0, 5, 4], np.int64)  # scattered, in no order
    new = np.random.default_rng(0).standard_normal((4, 2, 4)).astype(np.float32)
    backend.append(pool, slots, activations(backend, new), activations(backend, -new))
    key, value = (a.reshape(12, 2, 4) for a in pool.read_pages(range(4)))
    assert np.array_equal(key[slots], new)
    assert np.array_equal(value[slots], -new)
    rest = np.setdiff1d(np.arange(12), slots)
    assert (key[rest] == 7).all()
    assert (value[rest] == 7).all()


def test_copied_pages_hold_the_same_bits(subject: Subject) -> None:
    backend = backend_of(subject)
    case = Case(((0, 12),), (2, 2, 4), page_size=3, format="bf16")
    pool = new_pool(backend, case, 6)
    new = np.random.default_rng(0).standard_normal((12, 2, 4)).astype(np.float32)
    taken = activations(backend, new)
    backend.append(pool, np.arange(12, dtype=np.int64), taken, taken)
    pool.copy_pages([0, 3], [5, 4])
    for held in pool.read_pages(range(6)):
        wanted = new.reshape(4, 3, 2, 4)[[0, 1, 2, 3, 3, 0]].astype(ml_dtypes.bfloat16)
        assert held.tobytes() == wanted.tobytes()


# -- what is not seen ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("garbage", "page_size", "window", "format"),
    combinations([np.nan, np.inf, -np.inf], [3, 16, 64], [None, 7], ["fp32", "k=int8,v=fp8"]),
)
def test_garbage_in_other_slots_never_leaks(
    subject: Subject, garbage: float, page_size: int, window: int | None, format: str
) -> None:
    """Free pages, slots beyond the length, and pages that left the window hold NaN or infinity."""
    case = Case(RAGGED, page_size=page_size, window=window, format=format)
    clean = run(backend_of(subject), case, garbage=0.0)
    dirty = run(backend_of(subject), case, garbage=garbage)
    assert all(np.array_equal(a, b) for a, b in zip(clean, dirty, strict=True))


@pytest.mark.parametrize(
    ("poison", "where", "seen", "format"),
    combinations(
        [np.nan, np.inf],
        ["key", "value"],
        [(None, 21), (7, 21), (7, 3), (20, 0)],
        ["fp32", "int8", "fp8"],
    ),
)
def test_a_poisoned_token_reaches_only_the_queries_that_see_it(
    subject: Subject, poison: float, where: str, seen: tuple[int | None, int], format: str
) -> None:
    """A value that overflowed its page format must not spoil the tokens before it, nor those
    whose window is past it: what a token gets depends on what it sees, on nothing else."""
    (window, at), backend = seen, backend_of(subject)
    case = Case(((0, 40),), window=window, format=format)
    laid = lay_out(case)
    query, key, value = case.numbers(0)

    def attend(key: Array, value: Array) -> Array:
        pool = new_pool(backend, case, laid.num_pages)
        pair = activations(backend, key), activations(backend, value)
        backend.append(pool, laid.batch.groups[0].slots, *pair)
        taken = activations(backend, query)
        with np.errstate(invalid="ignore"):  # the poisoned rows themselves
            return backend.to_host(backend.attend(taken, pool, laid.batch, 0))

    clean = attend(key, value)
    bad = (key if where == "key" else value).copy()
    bad[at] = poison
    dirty = attend(bad, value) if where == "key" else attend(key, bad)
    sees = np.arange(40) >= at
    if window is not None:
        sees &= np.arange(40) < at + window
    assert np.array_equal(dirty[~sees], clean[~sees])
    assert not np.isfinite(dirty[sees]).all(axis=1).any()


# -- the exactness law ---------------------------------------------------------------------------


@pytest.mark.parametrize("format", [*FORMATS, "int8", "k=int8,v=fp8"])
@pytest.mark.parametrize("window", [None, 7, 24])
def test_bits_do_not_depend_on_pages_chunks_or_company(
    subject: Subject, window: int | None, format: str
) -> None:
    if not subject.exact:
        pytest.skip(f"{subject.name} does not claim the exactness law")
    backend = backend_of(subject)
    whole = Case(((0, 75),), (6, 2, 40), 100, window, format)
    law = run(backend, whole)[0]
    for page_size in (1, 3, 16, 64):
        for seed, cuts in enumerate(((0, 75), (0, 40, 75), (0, 1, 17, 50, 74, 75))):
            for start, end in pairwise(cuts):
                company = ((start, end - start), (30, 1), (0, 0), (0, 21))
                case = replace(whole, sequences=company, page_size=page_size)
                assert np.array_equal(run(backend, case, seed=seed)[0], law[start:end])


# -- memory --------------------------------------------------------------------------------------


def test_no_matrix_of_scores_is_wider_than_a_block(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    if subject.name != "reference":
        pytest.skip("looks inside the reference backend")
    widths: dict[str, set[int]] = {"exp": set(), "matmul": set()}
    for name, seen in widths.items():
        op = getattr(np, name)

        def recorded(*given: Any, op: Any = op, seen: set[int] = seen, **named: Any) -> Any:
            out = op(*given, **named)
            seen.update(a.shape[-1] for a in (*given, out))
            return out

        monkeypatch.setattr(reference.np, name, recorded)
    # A head_dim below BLOCK: any wider array has keys along its last axis.
    run(backend_of(subject), Case(((0, 130), (90, 3)), (2, 1, 8), page_size=100))
    assert widths == {"exp": {1, reference.BLOCK}, "matmul": {8, reference.BLOCK}}
