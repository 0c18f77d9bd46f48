"""What is known of a page's keys without reading them, and what it says of a query.

*Bounds* (Quest, Tang et al., 2024, arXiv:2406.10774): the least and the greatest number of each
dimension over the keys of a page. No key's product with a query is above the sum over dimensions of
``max(q * least, q * greatest)``. They are kept as bf16, rounded outwards, so that they stay bounds;
of bf16 keys they are exact.

*Signatures* (SimHash, Charikar, 2002, doi:10.1145/509907.509965): on which side of some random
planes through the origin a key lies. The share of planes that two vectors lie on different sides of
is, in expectation, the angle between them over pi.

n pages, P in a pool, G KV heads, H query heads, D head_dim, W words of 64 bits.
"""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from quire.batch import Candidates, ChosenPages
from quire.pages import PagePool, PageShape

__all__ = [
    "HostSummaries",
    "best_pages",
    "choose_pages",
    "key_bounds",
    "planes",
    "score_bounds",
    "score_signatures",
    "signatures",
    "split_query",
    "summary_bytes",
]

Array = npt.NDArray[Any]

SEED = 0
WORD = 64
PAGES_AT_ONCE = 256  # that are decoded at a time


def summary_bytes(policy: str, bits: int, shape: PageShape) -> int:
    """Bytes of what ``policy`` ("quest", or "lsh" with its bits) remembers of one page."""
    if policy == "quest":
        return 2 * 2 * shape.key_dim * shape.num_kv_heads
    return bits // 8 * shape.page_size * shape.num_kv_heads


def key_bounds(key: Array) -> Array:
    """Keys [n, page_size, G, D] -> bf16 [n, G, 2, D], least and greatest; NaN if one is NaN."""
    wide = key.astype(np.float32)
    return np.stack([_away(wide.min(axis=1), -1), _away(wide.max(axis=1), 1)], axis=2)


def _away(x: Array, sign: int) -> Array:
    """Float32 to bf16, up where ``sign`` is 1, down where it is -1."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    cut = (bits & 0xFFFF != 0) & ~np.isnan(x)  # cutting is towards zero
    grows = cut & (np.signbit(x) == (sign < 0))
    high = ((bits >> 16) + grows).astype(np.uint16)
    high[np.isnan(x)] = 0x7FC0
    return high.view(ml_dtypes.bfloat16)


def split_query(query: Array, num_kv_heads: int) -> Array:
    """Queries [H, D] -> float32 [G, 2, D]: their negative and their positive parts.

    Each summed over the query heads that share a KV head: a sum of bounds is the bound of the sum.
    """
    shared = query.astype(np.float32).reshape(num_kv_heads, -1, query.shape[1])
    parts = np.minimum(shared, 0).sum(axis=1), np.maximum(shared, 0).sum(axis=1)
    return np.stack(parts, axis=1)


def score_bounds(query: Array, bounds: Array, pages: Array) -> Array:
    """Upper bounds of the scores of keys in pages, float32 [G, n].

    query    [H, D]; those that share a KV head are summed
    bounds   bf16 [P, G, 2, D], least and greatest
    pages    int64 [n]

    A page of which nothing can be said, since it has infinite or NaN keys, has the bound infinity.
    """
    parts = split_query(query, bounds.shape[1])
    with np.errstate(invalid="ignore", over="ignore"):
        found: Array = np.einsum("gpd,ngpd->gn", parts, bounds[pages].astype(np.float32))
    found[np.isnan(found)] = np.inf
    return found


def planes(bits: int, dim: int) -> Array:
    """Normals of random planes, float32 [dim, bits]: always the same ones."""
    return np.random.default_rng(SEED).standard_normal((dim, bits)).astype(np.float32)


def signatures(x: Array, normals: Array) -> Array:
    """Vectors [..., D] -> uint64 [..., W]: a bit for each plane that they lie above."""
    above = np.matmul(x.astype(np.float32), normals) > 0
    return np.packbits(above, axis=-1).view(np.uint64)


def score_signatures(query: Array, signs: Array, pages: Array) -> Array:
    """Bits that the best matching key of a page has in common with queries, float32 [G, n].

    query   uint64 [H, W]: signatures; the best matches of those that share a KV head are summed
    signs   uint64 [P, G, page_size, W]
    pages   int64 [n]
    """
    heads, words = signs.shape[1], signs.shape[3]
    share = len(query) // heads
    found = np.zeros((heads, len(pages)), np.float32)
    for g in range(heads):
        keys = signs[pages, g]  # [n, page_size, W]
        for each in query[g * share : (g + 1) * share]:
            apart = np.bitwise_count(keys ^ each).sum(axis=-1, dtype=np.int64)
            found[g] += WORD * words - apart.min(axis=-1)
    return found


def best_pages(scores: Array, count: int) -> npt.NDArray[np.int64]:
    """The ``count`` pages that are read of ``n``: int64 [G, count], ascending in each row.

    scores   [G, n - 2] of all pages but the first, which holds the attention sinks, and the newest:
             those two are always read. Of equal scores the earlier page is chosen
    """
    heads, scored = scores.shape
    wanted = count - 2
    least = np.partition(scores, scored - wanted, axis=1)[:, scored - wanted, None]
    chosen = scores >= least
    if np.count_nonzero(chosen) > heads * wanted:  # some are equal to the last that is chosen
        above, equal = scores > least, scores == least
        room = wanted - above.sum(axis=1, keepdims=True)
        chosen = above | (equal & (np.cumsum(equal, axis=1) <= room))
    out = np.empty((heads, count), np.int64)
    out[:, 0], out[:, -1] = 0, scored + 1
    out[:, 1:-1] = np.nonzero(chosen)[1].reshape(heads, wanted) + 1
    return out


class HostSummaries:
    """What is known of the keys of one layer's pages, in this process's memory.

    See :class:`quire.backends.base.Summaries`. Memory that no page used is not touched.

    held   bounds bf16 [P, G, 2, D], or signatures uint64 [P, G, page_size, W]
    """

    def __init__(self, pool: PagePool, policy: str, bits: int) -> None:
        self.pool, self.policy, self._bits = pool, policy, bits
        shape, heads = pool.shape, pool.shape.num_kv_heads
        self.bytes_per_page = summary_bytes(policy, bits, shape)
        if policy == "quest":
            self.held: Array = np.zeros(
                (pool.num_pages, heads, 2, shape.key_dim), ml_dtypes.bfloat16
            )
            return
        self._normals = planes(bits, shape.key_dim)
        self.held = np.zeros((pool.num_pages, heads, shape.page_size, bits // WORD), np.uint64)

    def make(self, pages: Array) -> None:
        """Of complete ``pages``, int64 [n], as they are stored."""
        for start in range(0, len(pages), PAGES_AT_ONCE):
            some = pages[start : start + PAGES_AT_ONCE]
            key, _ = self.pool.read_pages(some.tolist())
            if self.policy == "quest":
                self.held[some] = key_bounds(key)
            else:
                self.held[some] = signatures(key, self._normals).transpose(0, 2, 1, 3)

    def signatures(self, query: Array) -> Array:
        """Of queries [H, D], uint64 [H, W]."""
        return signatures(query, self._normals)


def choose_pages(
    query: Array, summaries: HostSummaries, candidates: Candidates, score: Callable[..., Array]
) -> ChosenPages:
    """See :meth:`quire.backends.base.Backend.choose_pages`; makes summaries of fresh pages first.

    score   (query [H, D], summaries, pages int64 [n]) -> float32 [G, n]
    """
    summaries.make(candidates.fresh)
    lists = []
    for s, count in enumerate(candidates.counts.tolist()):
        pages = candidates.indices[candidates.indptr[s] : candidates.indptr[s + 1]]
        if count == len(pages):
            lists += [pages] * summaries.pool.shape.num_kv_heads
            continue
        lists += list(pages[best_pages(score(query[s], summaries, pages[1:-1]), count)])
    return candidates.choose(np.concatenate(lists))
