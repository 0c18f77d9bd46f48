"""Rules by which tokens of a sequence are kept: arithmetic on places and scores, nothing else.

n tokens are stored, ``budget`` of them are kept. Every rule gives int64 ``[G, budget]``: the places
that each of G KV heads keeps, ascending. Of equal scores the earlier place is kept.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["best_and_recent", "first_and_recent", "spread_votes"]

Array = npt.NDArray[Any]
Places = npt.NDArray[np.int64]


def first_and_recent(n: int, budget: int, first: int, num_kv_heads: int) -> Places:
    """The first ``first`` places and the newest: StreamingLLM (Xiao et al., arXiv:2309.17453)."""
    kept = np.r_[np.arange(first), np.arange(n - (budget - first), n)]
    return np.tile(kept.astype(np.int64), (num_kv_heads, 1))


def best_and_recent(scores: Array, budget: int, recent: int) -> Places:
    """The newest ``recent`` places, and of those before them the ones of the highest scores.

    scores   [G, n], or any number of leading places of it that reaches to the recent ones. A NaN is
             below every number.
    """
    heads, n = scores.shape
    older = scores[:, : n - recent]
    best = np.argsort(-older, axis=1, kind="stable")[:, : budget - recent]
    newest = np.tile(np.arange(n - recent, n), (heads, 1))
    return np.concatenate([np.sort(best, axis=1), newest], axis=1).astype(np.int64)


def spread_votes(votes: Array, kernel: int) -> Array:
    """The most of each vote and its (kernel - 1) / 2 neighbours on either side, [G, n] -> [G, n].

    Max pooling, as SnapKV has it (Li et al., arXiv:2404.14469), so that what stands beside a token
    that was looked at is kept, too.
    """
    padded = np.pad(votes, ((0, 0), (kernel // 2, kernel // 2)), constant_values=-np.inf)
    most: Array = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=1).max(axis=-1)
    return most
