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

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

__all__ = [
    "key_bounds",
    "planes",
    "score_bounds",
    "score_signatures",
    "signatures",
    "split_query",
]

Array = npt.NDArray[Any]

SEED = 0
WORD = 64


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
