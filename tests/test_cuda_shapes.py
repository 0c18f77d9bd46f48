"""Attention of the cuda backend at real shapes on a GPU (``-m gpu``); the same tests at small ones.

Rows are compared with float64 over the keys and values as the pool holds them, and allowed
twice the error of float32 arithmetic whose operands are rounded as the format's are: the rule of
the conformance suite, for rows and heads that are drawn, because the naive formula takes long.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from conformance import SUBJECTS, Subject, activations, assert_as_good_as_plain, naive
from conformance.test_attention import Case, lay_out, new_pool
from quire.backends.selecting import key_bounds
from quire.batch import Candidates, PagedBatch
from recording import same_bits
from test_cuda import INTERPRETED, RUNS, STATUS

pytestmark = pytest.mark.skipif(not RUNS, reason=f"cuda: {STATUS['cuda'].detail}")

real = pytest.mark.skipif(INTERPRETED, reason="real shapes would take days")
CUDA = [subject for subject in SUBJECTS if subject.name.startswith("cuda")]
DECODE = tuple((length, 1) for length in (8191, 32767, 300, 20_000))
PREFILL = ((0, 8192), (5000, 700))
BOTH = ((16_000, 1), (0, 1500), (31, 1), (2048, 512))
SMALL = ((30, 1), (50, 1), (0, 20))
SHAPES = [  # heads, sequences, window
    pytest.param((4, 2, 32), SMALL, None, id="small"),
    pytest.param((4, 2, 32), SMALL, 25, id="small, window"),
    *(
        pytest.param(*case, marks=[pytest.mark.gpu, real])
        for case in (
            ((32, 8, 128), DECODE, None),
            ((32, 8, 128), PREFILL, None),
            ((32, 8, 128), BOTH, None),
            ((32, 8, 128), BOTH, 1000),
            ((32, 8, 64), BOTH, None),
            ((32, 32, 80), BOTH, None),
            ((24, 8, 96), BOTH, None),
            ((16, 2, 256), BOTH, None),
        )
    ),
]


@dataclass(frozen=True)
class Drawn(Case):
    """A Case whose sequences may be long."""

    def numbers(self, sequence: int) -> Any:
        query_heads, kv_heads, dim = self.heads
        stored, new = self.sequences[sequence]
        rng = np.random.default_rng([sequence, *self.heads])
        query = rng.standard_normal((new, query_heads, dim), np.float32)
        key, value = rng.standard_normal((2, stored + new, kv_heads, dim), np.float32)
        return query, key, value


@dataclass
class Filled:
    """A case's keys and values in a pool, with what is to be asked."""

    backend: Any
    pool: Any
    batch: PagedBatch
    query: np.ndarray

    def attend(self, rows: np.ndarray | None = None) -> np.ndarray:
        """All rows, or some of them in a batch of their own."""
        batch = self.batch if rows is None else self.batch.select(rows)
        taken = activations(self.backend, self.query if rows is None else self.query[rows])
        return self.backend.to_host(self.backend.attend(taken, self.pool, batch, 0))


def fill(subject: Subject, case: Drawn) -> Filled:
    laid, backend, queries = lay_out(case), subject.make(), []
    pool = new_pool(backend, case, laid.num_pages)
    fresh = np.split(laid.batch.groups[0].slots, laid.batch.query_indptr[1:-1])
    for s in range(len(case.sequences)):
        query, key, value = case.numbers(s)
        first, slots = laid.first[s], np.concatenate([laid.stored_slots[s], fresh[s]])
        pair = (activations(backend, a[first:]) for a in (key, value))
        backend.append(pool, slots, *pair)
        queries.append(query)
    return Filled(backend, pool, laid.batch, np.concatenate(queries))


@pytest.mark.parametrize("subject", CUDA, ids=lambda subject: subject.name)
@pytest.mark.parametrize("format", ["bf16", "fp16", "int8", "k=int8,v=fp8"])
@pytest.mark.parametrize(("heads", "sequences", "window"), SHAPES)
def test_attention(
    subject: Subject, heads: Any, sequences: Any, window: int | None, format: str
) -> None:
    case = Drawn(sequences, heads, 16, window, format)
    filled = fill(subject, case)
    whole = filled.attend()
    got, plain, exact = [], [], []
    for s, (stored, new) in enumerate(sequences):
        query, key, value = case.numbers(s)
        head, share = s % heads[1], heads[0] // heads[1]  # one KV head of each sequence
        some = slice(head * share, (head + 1) * share)
        key, value = case.stored(key[:, head : head + 1], value[:, head : head + 1])
        for row in np.random.default_rng(s).choice(new, min(new, 3), replace=False):
            seen = (query[row : row + 1, some], key[: stored + row + 1], value[: stored + row + 1])
            plain.append(naive.attend(*seen, window, np.float32, subject.operand(format)))
            exact.append(naive.attend(*seen, window, np.float64))
            mixed = whole[filled.batch.query_indptr[s] + row].reshape(heads[0], -1)
            got.append(mixed[some].reshape(1, -1))
    assert_as_good_as_plain(*(np.concatenate(rows) for rows in (got, plain, exact)))


@pytest.mark.parametrize("format", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize(("heads", "sequences", "window"), SHAPES)
def test_exact_rows_have_the_same_bits_alone(
    heads: Any, sequences: Any, window: int | None, format: str
) -> None:
    """A row alone is decoded; among others of its sequence it goes through the prefill kernel."""
    exact = next(subject for subject in CUDA if subject.name == "cuda-exact")
    filled = fill(exact, Drawn(sequences, heads, 16, window, format))
    whole = filled.attend()
    rows = np.random.default_rng(0).choice(len(whole), min(len(whole), 12), replace=False)
    for row in rows:
        assert same_bits(filled.attend(np.array([row]))[0], whole[row])


CHOOSING = [
    pytest.param((4, 2, 32), ((130, 1), (90, 1), (20, 1)), id="small"),
    *(
        pytest.param(heads, DECODE, marks=[pytest.mark.gpu, real])
        for heads in ((32, 8, 128), (32, 8, 64), (24, 8, 96), (16, 2, 256))
    ),
]


@pytest.mark.parametrize("format", ["bf16", "int8"])
@pytest.mark.parametrize(("heads", "sequences"), CHOOSING)
def test_pages_with_the_highest_bounds_are_chosen(heads: Any, sequences: Any, format: str) -> None:
    """But for those whose bounds differ by no more than float32 sums can tell. One head of each."""
    case = Drawn(sequences, heads, 16, None, format)
    filled = fill(next(subject for subject in CUDA if subject.name == "cuda"), case)
    backend, pool, [tables] = filled.backend, filled.pool, filled.batch.groups
    budget = max(3, max(stored for stored, _ in sequences) // 160)
    counts = np.minimum(np.diff(tables.indptr), budget)
    asked = Candidates.of(
        16,
        heads[1],
        (tables.indptr, tables.indices),
        counts=counts.tolist(),
        last_page_len=tables.last_page_len.tolist(),
        fresh=np.unique(tables.indices),
    )
    summaries, taken = backend.summaries(pool, "quest", 0), activations(backend, filled.query)
    chosen = backend.choose_pages(taken, summaries, asked)
    picked = chosen.indices.cpu().numpy()
    for s, count in enumerate(counts.tolist()):
        g, share = s % heads[1], heads[0] // heads[1]
        ids = tables.indices[tables.indptr[s] : tables.indptr[s + 1]]
        first = chosen.indptr[s * heads[1] + g]
        numbers = np.searchsorted(np.sort(ids), picked[first : first + count])
        numbers = np.argsort(ids)[numbers]
        assert (np.diff(numbers) > 0).all()
        assert (numbers[0], numbers[-1]) == (0, len(ids) - 1)
        if count == len(ids):
            continue
        keys = pool.read_pages(ids[1:-1].tolist())[0][:, :, g : g + 1]
        bounds = key_bounds(keys)[:, 0].astype(np.float64)
        query = filled.query[s].reshape(heads[1], share, -1)[g].astype(np.float64)
        terms = np.stack([np.minimum(query, 0).sum(0), np.maximum(query, 0).sum(0)]) * bounds
        scores, size = terms.sum((1, 2)), np.abs(terms).sum((1, 2)).max()
        room = 2.0**-24 * (2 * heads[2] + share) * size
        kept = np.zeros(len(scores), bool)
        kept[numbers[1:-1] - 1] = True
        assert kept.sum() == count - 2
        assert scores[kept].min() >= scores[~kept].max() - 2 * room
