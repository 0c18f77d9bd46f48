"""Choosing pages, slow and obvious: float64, one page and one dimension after the other.

What is made of a page or a key is remembered by its numbers: it is asked for again in every step.
"""

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from naive_eviction import Kept, NaiveLlama

Array = npt.NDArray[Any]


def outwards(number: float, up: bool) -> float:
    """The nearest bf16 that is not below (or not above) ``number``."""
    near, limit = ml_dtypes.bfloat16(number), ml_dtypes.bfloat16(np.inf if up else -np.inf)
    while float(near) < number if up else float(near) > number:
        near = np.nextafter(near, limit)
    return float(near)


@cache
def bounds_of(numbers: bytes, dim: int) -> list[tuple[float, float]]:
    """The least and the greatest float32 number of each dimension, outwards."""
    keys = np.frombuffer(numbers, np.float32).reshape(-1, dim)
    columns = [[float(key[d]) for key in keys] for d in range(dim)]
    return [(outwards(min(each), up=False), outwards(max(each), up=True)) for each in columns]


def quest_score(queries: Array, keys: Array) -> float:
    """The bound of a page's keys [page_size, D]: Tang et al., 2024, arXiv:2406.10774, section 3.3.

    Summed over the queries [share, D] that share the page's KV head.
    """
    total = 0.0
    bounds = bounds_of(keys.astype(np.float32).tobytes(), keys.shape[1])
    for query in queries.astype(np.float64):
        for q, (least, greatest) in zip(query, bounds, strict=True):
            total += max(q * least, q * greatest)
    return total


def lsh_score(planes: Array) -> Any:
    """Matching bits of the best key of a page: Charikar, 2002, and MagicPIG, arXiv:2410.16179."""

    @cache
    def side(numbers: bytes) -> list[bool]:
        x = np.frombuffer(numbers, np.float32).astype(np.float64)
        return [float(x @ plane) > 0 for plane in planes.T.astype(np.float64)]

    def score(queries: Array, keys: Array) -> float:
        sides = [side(key.astype(np.float32).tobytes()) for key in keys]
        best = []
        for query in queries:
            own = side(query.astype(np.float32).tobytes())
            best.append(max(sum(a == b for a, b in zip(own, s, strict=True)) for s in sides))
        return float(sum(best))

    return score


def choose(scores: list[float], count: int) -> list[int]:
    """``count`` page numbers: the first, the newest, and the best; of equal ones the earlier."""
    middle = sorted(range(1, len(scores) - 1), key=lambda page: (-scores[page], page))
    return sorted([0, len(scores) - 1, *middle[: count - 2]])


class SparseLlama(NaiveLlama):
    """Reads ``pages`` pages of ``size`` tokens behind ``prompt`` tokens and ``dense`` layers."""

    def __init__(self, directory: Any, score: Any, plan: dict[str, int]) -> None:
        super().__init__(directory)
        self.score, self.plan = score, plan

    def seen(self, layer: int, g: int, query: Array) -> Kept:
        """Tokens of the chosen pages."""
        tokens, plan = self.held[layer][g], self.plan
        parts = [tokens[i : i + plan["size"]] for i in range(0, len(tokens), plan["size"])]
        within = len(tokens) <= plan["prompt"] or len(parts) <= plan["pages"]
        if within or layer < plan["dense"]:
            return tokens
        keys = [np.stack([token["key"] for token in part]) for part in parts]
        scores = [self.score(query, key.astype(np.float32)) for key in keys]
        return [token for page in choose(scores, plan["pages"]) for token in parts[page]]
