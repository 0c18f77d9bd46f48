"""Blocks that prefill takes apart once for many rows give the bits of blocks read as stored."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from quire.batch import GroupBatch, PagedBatch
from quire.format_choice import parse_formats
from quire.pages import PagePool, PageShape

native = pytest.importorskip("quire.backends.native")

NativeBackend = native.NativeBackend
TOKENS, HEADS, KV_HEADS = 290, 4, 2


def attend(backend: Any, pool: PagePool, size: int, query: npt.NDArray[np.float32]) -> Any:
    """[n, HEADS, dim], queries of the last n tokens as one chunk -> [n, HEADS * dim]."""
    pages = -(-TOKENS // size)
    ends = np.array([0, pages], np.int64)
    last = np.array([TOKENS - (pages - 1) * size], np.int64)
    ids = np.arange(pages, dtype=np.int64)[::-1].copy()
    start = np.zeros(1, np.int64)
    group = GroupBatch(size, None, np.empty(0, np.int64), ends, ids, last, start)
    positions = np.arange(TOKENS - len(query), TOKENS)
    indptr = np.array([0, len(query)], np.int64)
    return backend.attend(query, pool, PagedBatch(positions, indptr, (group,), (0,)), 0)


@pytest.mark.parametrize("kv_format", ["int8", "fp8", "fp16", "k=int8,v=fp16", "k=bf16,v=fp8"])
@pytest.mark.parametrize(("size", "dim"), [(16, 64), (32, 20), (48, 33), (5, 24)])
@pytest.mark.parametrize("variant", NativeBackend.variants())
def test_many_rows_have_the_bits_of_few(variant: str, size: int, dim: int, kv_format: str) -> None:
    """A chunk of 40 tokens, whose items have several tiles, against chunks of one and of two."""
    backend = NativeBackend(variant, threads=1)
    rng = np.random.default_rng(dim)
    formats = parse_formats(kv_format).of_layers(1, "bf16")[0]
    pages = -(-TOKENS // size)
    pool = backend.pool(PageShape(size, KV_HEADS, dim, dim, *formats), pages)
    slots = np.arange(pages * size).reshape(pages, size)[::-1].reshape(-1)[:TOKENS].copy()
    key, value = rng.standard_normal((2, TOKENS, KV_HEADS, dim), np.float32)
    backend.append(pool, slots, key, value)
    query = rng.standard_normal((40, HEADS, dim), np.float32)
    many = attend(backend, pool, size, query)
    assert many[-1:].tobytes() == attend(backend, pool, size, query[-1:]).tobytes()
    assert many[-2:].tobytes() == attend(backend, pool, size, query[-2:]).tobytes()
