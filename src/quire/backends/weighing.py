"""What speaks for a key when tokens are dropped: the weight that queries give it, and its norm.

n keys of a sequence, T of its queries, H query heads, G KV heads, D head_dim.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.pages import PagePool

__all__ = ["WeighsOnHost"]

Array = npt.NDArray[Any]


class WeighsOnHost:
    """The part of a backend that scores keys for dropping tokens, where the host can read pages."""

    def weigh_keys(
        self, query: Array, pool: PagePool, pages: Sequence[int] | Array, places: Array
    ) -> Array:
        """Queries [T, H, D] at places int64 [T] -> float32 [G, n]; see ``Backend.weigh_keys``."""
        key = _keys(pool, pages, int(places[-1]) + 1)
        summed: Array = _attention_weights(query, key, places).sum(axis=1)
        return summed

    def key_norms(self, pool: PagePool, pages: Sequence[int] | Array, count: int) -> Array:
        """L2 norms float32 [G, count]; see ``Backend.key_norms``."""
        wide = _keys(pool, pages, count).astype(np.float32)
        with np.errstate(over="ignore"):
            norms: Array = np.sqrt(np.einsum("ngd,ngd->gn", wide, wide))
        return norms


def _attention_weights(query: Array, key: Array, places: Array) -> Array:
    """Softmax weights of queries [T, H, D] at ``places`` [T] over keys [n, G, D]: float32 [G, T, n]

    Summed over the query heads that share a KV head. A query sees the keys up to its own place.
    """
    (tokens, num_heads, dim), (n, heads, _) = query.shape, key.shape
    share, hidden = num_heads // heads, np.arange(n) > places[:, None]
    out = np.empty((heads, tokens, n), np.float32)
    by_head = query.astype(np.float32).reshape(tokens, heads, share, dim).transpose(1, 2, 0, 3)
    keys = key.astype(np.float32).transpose(1, 2, 0)
    for g in range(heads):
        scores = (by_head[g] @ keys[g]) * np.float32(dim**-0.5)
        scores[:, hidden] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out[g] = (weights / weights.sum(axis=-1, keepdims=True)).sum(axis=0)
    return out


def _keys(pool: PagePool, pages: Sequence[int] | Array, count: int) -> Array:
    """Keys [count, G, D] of the first tokens in ``pages``."""
    key, _ = pool.read_pages(np.asarray(pages).tolist())
    first: Array = key.reshape(-1, *key.shape[2:])[:count]
    return first
