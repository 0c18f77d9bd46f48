"""Which pages of a sequence a token reads when it may not read all: arithmetic on page numbers."""

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["LEAST_PAGES", "best_pages"]

LEAST_PAGES = 3  # the first, the newest, and one to choose


def best_pages(scores: npt.NDArray[Any], count: int) -> npt.NDArray[np.int64]:
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
