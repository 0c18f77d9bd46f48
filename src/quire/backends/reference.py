"""The reference backend: NumPy, float32. Short, slow, readable: the law for every other backend.

It keeps the exactness law by giving every product one fixed shape. A matrix product is done in
tiles of ``ROWS`` rows, padded with zeros, and attention walks keys in blocks of ``BLOCK`` tokens
aligned to absolute positions, so that BLAS sees the same problem for a token whatever its
company, chunk, page or page size. That BLAS computes all rows of such a tile alike is not promised
by NumPy; ``tests/test_exactness.py`` checks it on the bits.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.backends.base import Compute, Logits, SomeRows, Summaries
from quire.backends.blocks import (
    AttentionParams,
    MlpParams,
    Network,
    attention_block,
    attention_rows,
    choosing_layers,
    logits,
    mlp_block,
)
from quire.backends.reference_pool import ReferencePool
from quire.backends.selecting import (
    HostSummaries,
    choose_pages,
    score_bounds,
    score_signatures,
)
from quire.backends.weighing import WeighsOnHost
from quire.batch import Candidates, ChosenPages, GroupBatch, PagedBatch
from quire.machine import this_machine
from quire.pages import PageFormat, PagePool, PageShape
from quire.rotation import rotate
from quire.sampler import HostLogits

__all__ = ["ReferenceBackend", "ReferencePool"]

Array = npt.NDArray[Any]

ROWS = 8
BLOCK = 16


def _tiles(x: Array) -> Array:
    """x [..., rows, n] -> [..., tiles, ROWS, n], the last tile padded with zeros."""
    *outer, rows, n = x.shape
    count = -(-rows // ROWS)
    padded = np.zeros((*outer, count * ROWS, n), np.float32)
    padded[..., :rows, :] = x
    return padded.reshape(*outer, count, ROWS, n)


class ReferenceBackend(WeighsOnHost):
    """See :class:`quire.backends.base.Backend` for what each op does, with shapes and sources."""

    name = "reference"
    replays = False

    @property
    def identity(self) -> str:
        """NumPy and the processor, on which BLAS's choice of kernels depends."""
        return f"reference, numpy {np.__version__}, {this_machine().cpu_name}"

    @property
    def own_memory(self) -> int | None:
        """None: it is the machine's."""
        return None

    def weight(self, array: Array) -> Array:
        """A float32 copy, made once."""
        return np.ascontiguousarray(array, dtype=np.float32)

    def require_formats(self, key: PageFormat, value: PageFormat) -> None:
        """All formats, keys and values apart."""

    def pool(self, shape: PageShape, num_pages: int, open_pages: int = 0) -> ReferencePool:
        """Zeroed pages; untouched ones take no memory on systems that allocate lazily."""
        return ReferencePool(shape, num_pages, open_pages)

    def take_step(
        self,
        tokens: Sequence[int] | Array,
        batch: PagedBatch,
        rows: Sequence[int] | Array,
        beside: Sequence[SomeRows] = (),
    ) -> tuple[Any, Any]:
        """Both as they are."""
        return tokens, rows

    def embed(self, table: Array, ids: Sequence[int] | Array) -> Array:
        """[vocab, hidden], [T] -> [T, hidden]."""
        return np.asarray(table[np.asarray(ids, dtype=np.int64)])

    def linear(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        """[T, in], [out, in], [out] -> [T, out]."""
        product = np.matmul(_tiles(x), weight.T)
        out = product.reshape(-1, weight.shape[0])[: len(x)]
        return out if bias is None else out + bias

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """[..., n], [n] -> [..., n]."""
        mean = np.mean(x * x, axis=-1, keepdims=True)
        return x / np.sqrt(mean + np.float32(eps)) * weight

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        """[..., n], [n], [n] -> [..., n]."""
        centred = x - np.mean(x, axis=-1, keepdims=True)
        variance = np.mean(centred * centred, axis=-1, keepdims=True)
        return centred / np.sqrt(variance + np.float32(eps)) * weight + bias

    def rope(self, x: Array, positions: Array, inv_freq: Array) -> Array:
        """[T, heads, D], int64 [T], float32 [D/2] -> [T, heads, D]."""
        angles = (positions.astype(np.float32)[:, None] * inv_freq).astype(np.float64)[:, None]
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        low, high = np.split(x, 2, axis=-1)
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)

    def hadamard(self, x: Array) -> Array:
        """[T, heads, D] -> [T, heads, D]."""
        return rotate(x)

    def activate(self, x: Array, kind: str) -> Array:
        """Any shape -> the same."""
        return _ACTIVATIONS[kind](x)

    def multiply(self, x: Array, y: Array) -> Array:
        """Equal shapes -> the same."""
        return x * y

    def add(self, x: Array, y: Array) -> Array:
        """Equal shapes -> the same."""
        return x + y

    def heads(self, x: Array, num_heads: int) -> Array:
        """[T, num_heads * D] -> [T, num_heads, D]."""
        return x.reshape(len(x), num_heads, x.shape[1] // num_heads)

    def append(self, pool: PagePool, slots: Array, key: Array, value: Array) -> None:
        """Slots int64 [T], key and value [T, G, D], into the pool in its format."""
        assert isinstance(pool, ReferencePool)
        pool.store(slots, key, value)

    def attend(self, query: Array, pool: PagePool, batch: PagedBatch, group: int) -> Array:
        """[T, H, D] -> [T, H * D]; one sequence at a time, one block of keys at a time."""
        assert isinstance(pool, ReferencePool)
        tables = batch.groups[group]
        out = np.empty((*query.shape[:2], pool.shape.value_dim), np.float32)
        for s in range(batch.num_sequences):
            rows = slice(int(batch.query_indptr[s]), int(batch.query_indptr[s + 1]))
            for part in _alike(batch.places, rows, tables):
                out[part] = _attend_one(query[part], batch.places[part], pool, tables, s)
        return out.reshape(len(query), query.shape[1] * pool.shape.value_dim)

    def attend_pages(self, query: Array, pool: PagePool, chosen: ChosenPages) -> Array:
        """[S, H, D] -> [S, H * D]; one KV head of one sequence at a time."""
        assert isinstance(pool, ReferencePool)
        heads = pool.shape.num_kv_heads
        by_head = query.reshape(len(query), heads, -1, query.shape[2])
        out = np.empty((*by_head.shape[:3], pool.shape.value_dim), np.float32)
        for g in range(heads):
            alone = pool.one_head(g)
            for s in range(len(query)):
                at = s * heads + g
                pages = chosen.indices[chosen.indptr[at] : chosen.indptr[at + 1]]
                place = chosen.places[at : at + 1]
                last = int(place[0]) % chosen.page_size + 1
                tables = _one_sequence(pages, last, chosen.page_size)
                out[s, g] = _attend_one(by_head[s, g][None], place, alone, tables, 0)[0]
        return out.reshape(len(query), -1)

    def summaries(self, pool: PagePool, policy: str, bits: int) -> HostSummaries:
        """Arrays of zeros."""
        return HostSummaries(pool, policy, bits)

    def choose_pages(
        self, query: Array, summaries: Summaries, candidates: Candidates
    ) -> ChosenPages:
        """Queries [S, H, D]; one sequence at a time."""
        assert isinstance(summaries, HostSummaries)
        return choose_pages(query, summaries, candidates, _score)

    def join_rows(self, parts: Sequence[tuple[Array, Array]]) -> Array:
        """Of rows [R] and x [R, n] each -> [T, n]."""
        out = np.empty((sum(len(rows) for rows, _ in parts), parts[0][1].shape[1]), np.float32)
        for rows, x in parts:
            out[rows] = x
        return out

    def rows(self, x: Array, indices: Sequence[int] | Array) -> Array:
        """[T, n], [R] -> [R, n]."""
        return x[np.asarray(indices, dtype=np.int64)]

    def select(self, batch: PagedBatch, rows: Sequence[int] | Array) -> PagedBatch:
        """Rows [R]."""
        return batch.select(np.asarray(rows, dtype=np.int64))

    def block(self, params: AttentionParams | MlpParams) -> Any:
        """The parameters as they are."""
        return params

    def attention_block(
        self, x: Array, block: Any, batch: PagedBatch, pool: PagePool, group: int
    ) -> Array:
        """[T, hidden] -> [T, hidden], op by op."""
        result: Array = attention_block(self, x, block, batch, pool, group=group)
        return result

    def attention_rows(
        self,
        x: Array,
        block: Any,
        batch: PagedBatch,
        pool: PagePool,
        *,
        group: int,
        rows: Sequence[int] | Array,
    ) -> Array:
        """[T, hidden] -> [R, hidden], op by op."""
        return attention_rows(self, x, block, batch, pool, group=group, rows=rows)

    def mlp_block(self, x: Array, block: Any) -> Array:
        """[T, hidden] -> [T, hidden], op by op."""
        result: Array = mlp_block(self, x, block)
        return result

    def layers(
        self,
        x: Array,
        blocks: Sequence[tuple[Any, Any]],
        batch: PagedBatch,
        pools: Sequence[PagePool],
        summaries: Sequence[Summaries | None] = (),
    ) -> Array:
        """[T, hidden] -> [T, hidden], half by half."""
        if summaries:
            return choosing_layers(self, x, blocks, batch, pools, summaries=summaries)
        for (attention, mlp), pool, group in zip(blocks, pools, batch.group_of_layer, strict=False):
            x = self.mlp_block(self.attention_block(x, attention, batch, pool, group), mlp)
        return x

    def logits(
        self, tokens: Sequence[int], network: Network, batch: PagedBatch, pools: Sequence[PagePool]
    ) -> Logits:
        """[T] -> [T, vocab], op by op."""
        return logits(self, tokens, network, batch, pools)

    def whole_step(
        self,
        compute: Compute,
        head: Array,
        tokens: Sequence[int],
        batch: PagedBatch,
        pools: Sequence[PagePool],
    ) -> Logits:
        """[T] -> [T, vocab], computed anew."""
        return self.to_logits(self.linear(compute(tokens, batch, pools), head))

    def to_logits(self, x: Array) -> HostLogits:
        """The array itself."""
        return HostLogits(x)

    def to_host(self, x: Array) -> npt.NDArray[np.float32]:
        """The array itself."""
        return x


def _score(query: Array, summaries: HostSummaries, pages: Array) -> Array:
    if summaries.policy == "quest":
        return score_bounds(query, summaries.held, pages)
    return score_signatures(summaries.signatures(query), summaries.held, pages)


def _alike(places: Array, rows: slice, tables: GroupBatch) -> list[slice]:
    """The parts of ``rows``, of one sequence, whose queries see every page in the same form."""
    if rows.start == rows.stop or not tables.open.are_used:
        return [rows] if rows.start < rows.stop else []
    page = places[rows] // tables.page_size
    cuts = [*np.flatnonzero(np.diff(page)) + 1, len(page)]
    starts = [0, *cuts]
    return [slice(rows.start + a, rows.start + b) for a, b in zip(starts, cuts, strict=False)]


def _one_sequence(pages: Array, last: int, page_size: int) -> GroupBatch:
    """Page tables of a sequence of these pages."""
    of_one, none = partial(np.array, dtype=np.int64), np.empty(0, np.int64)
    held = of_one([0, len(pages)])
    return GroupBatch(page_size, None, none, held, pages, of_one([last]), of_one([0]))


def _attend_one(
    query: Array, places: Array, pool: ReferencePool, tables: GroupBatch, sequence: int
) -> Array:
    """Online softmax (Milakov & Gimelshein, 2018, arXiv:1805.02867) over blocks of keys.

    query [n, H, D] at places int64 [n], ascending -> [n, H, value_dim]. No matrix of scores
    wider than ``BLOCK`` keys is ever made. Blocks that a tile of queries cannot see are skipped,
    which changes no bit: they would add exact zeros. Where pages are packed, all queries stand in
    one page.
    """
    (n, num_heads, dim), num_kv_heads = query.shape, pool.shape.num_kv_heads
    share = num_heads // num_kv_heads
    by_kv_head = query.reshape(n, num_kv_heads, share, dim).transpose(1, 0, 2, 3)
    tiles = _tiles(by_kv_head.reshape(num_kv_heads, n * share, dim))  # [G, tiles, ROWS, D]
    at = np.full(tiles.shape[1] * ROWS, places[-1])
    at[: n * share] = np.repeat(places, share)
    at = at.reshape(-1, ROWS, 1)

    window = tables.window or int(places[-1]) + 1
    best = np.full((*tiles.shape[:3], 1), np.finfo(np.float32).min, np.float32)
    total = np.zeros_like(best)
    mixed = np.zeros((*tiles.shape[:3], pool.shape.value_dim), np.float32)
    start, end = tables.span(sequence)
    pages, size = tables.pages_seen(sequence, int(places[0]) // tables.page_size), tables.page_size
    first = max(start, int(places[0]) - window + 1) // BLOCK * BLOCK
    for block in range(first, min(end, int(places[-1]) + 1), BLOCK):
        sees = (at[:, -1, 0] >= block) & (at[:, 0, 0] - window + 1 < block + BLOCK)
        low, high = np.flatnonzero(sees)[[0, -1]]
        part = slice(low, high + 1)
        stored = max(block, start), min(block + BLOCK, end)
        page, offset = np.divmod(np.arange(*stored), size)
        slots = pages[page - start // size] * size + offset
        key, value = pool.block(slots, stored[0] - block, BLOCK)
        scores = np.matmul(tiles[:, part], key.transpose(0, 2, 1)[:, None])
        scores *= np.float32(dim**-0.5)
        keys_at = block + np.arange(BLOCK)
        seen = (keys_at <= at[part]) & (keys_at > at[part] - window)
        scores = np.where(seen, scores, np.float32(-np.inf))
        peak = np.maximum(best[:, part], scores.max(axis=-1, keepdims=True))
        shrink, weights = np.exp(best[:, part] - peak), np.exp(scores - peak)
        total[:, part] = total[:, part] * shrink + weights.sum(axis=-1, keepdims=True)
        mixed[:, part] = mixed[:, part] * shrink + _mix(weights, value, seen)
        best[:, part] = peak
    rows = (mixed / total).reshape(num_kv_heads, -1, pool.shape.value_dim)[:, : n * share]
    return rows.reshape(num_kv_heads, n, share, -1).transpose(1, 0, 2, 3).reshape(n, num_heads, -1)


def _mix(weights: Array, value: Array, seen: Array) -> Array:
    """weights [G, tiles, ROWS, BLOCK] times value [G, BLOCK, dim], summed over the tokens ``seen``.

    A token whose value is infinite or NaN (it may overflow a narrow page format) must not reach
    queries that do not see it, and 0 * inf would: such tokens are added one by one.
    """
    wild = np.asarray(~np.isfinite(value).all(axis=(0, 2)))
    if not wild.any():
        return np.matmul(weights, value[:, None])
    mixed = np.matmul(weights, np.where(wild[:, None], np.float32(0), value)[:, None])
    with np.errstate(invalid="ignore"):
        for t in np.flatnonzero(wild):
            one = slice(t, t + 1)
            term = weights[..., one] * value[:, None, one]
            mixed += np.where(seen[..., one], term, np.float32(0))
    return mixed


def _silu(x: Array) -> Array:
    with np.errstate(over="ignore"):  # exp(-x) = inf gives the right limit, 0
        return x / (1 + np.exp(-x))


def _gelu_tanh(x: Array) -> Array:
    inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)
    return np.float32(0.5) * x * (1 + np.tanh(inner))


def _gelu(x: Array) -> Array:
    return np.float32(0.5) * x * (1 + _erf(x * np.float32(np.sqrt(0.5))))


def _erf(x: Array) -> Array:
    """The error function in float32: Abramowitz & Stegun 7.1.26 in float64, error below 1.5e-7."""
    wide = np.abs(x.astype(np.float64))
    t = 1 / (1 + 0.3275911 * wide)
    poly = np.polynomial.polynomial.polyval(
        t, [0.0, 0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429]
    )
    return (np.sign(x) * (1 - poly * np.exp(-wide * wide))).astype(np.float32)


def _relu(x: Array) -> Array:
    return np.maximum(x, np.float32(0))


_ACTIVATIONS = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": _relu,
}
