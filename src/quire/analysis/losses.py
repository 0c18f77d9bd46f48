"""What a candidate loses, token by token, and how sure that is.

Intervals are percentiles of a paired block bootstrap (Künsch, 1989; Efron, 1979): both caches see
the same tokens, so differences are resampled, in blocks of consecutive tokens, since neighbours in
a text are alike. The random stream has a fixed seed: the same losses give the same interval.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quire.analysis.divergence import kl_divergence, log_softmax

__all__ = ["Interval", "Losses", "Summary", "bootstrap", "wilson"]

BLOCK = 64  # tokens
LEAST_BLOCKS = 20  # of a short text, whose blocks are then shorter
RESAMPLES = 2000
SEED = 0
CONFIDENCE = 0.95
Z = 1.959963984540054  # the normal quantile of 0.975

Float64 = npt.NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Summary:
    """What one candidate lost, over all targets; intervals are of 95 %.

    perplexity         exp of the mean loss (nats a token), of the candidate
    perplexity_change  against the exact cache: 0.01 is one percent worse
    kl_mean, kl_p99    of KL(exact || candidate), nats a token
    top1_agreement     share of positions at which both hold the same token likeliest
    """

    tokens: int
    perplexity: float
    exact_perplexity: float
    perplexity_change: float
    perplexity_change_interval: Interval
    kl_mean: float
    kl_mean_interval: Interval
    kl_p99: float
    top1_agreement: float
    top1_agreement_interval: Interval


class Losses:
    """Losses of one candidate beside the exact cache, for every target of every passage.

    ``lengths`` are the targets of each passage. Memory: four numbers a target.
    """

    def __init__(self, lengths: list[int]) -> None:
        self._starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        total = int(self._starts[-1])
        self._exact, self._other, self._kl = (np.zeros(total) for _ in range(3))
        self._agree = np.zeros(total, np.bool_)

    def add(
        self,
        where: tuple[tuple[int, ...], int],
        exact: Float64,
        logits: npt.NDArray[np.float32],
        targets: list[int],
    ) -> None:
        """One step: ``where`` is (passages, target), ``exact`` log-probabilities [passages, vocab].

        ``logits`` are the candidate's, float32 of the same shape; ``targets`` one token id each.
        """
        other, rows = log_softmax(logits), np.arange(len(targets))
        at = self._starts[list(where[0])] + where[1]
        self._exact[at], self._other[at] = -exact[rows, targets], -other[rows, targets]
        self._kl[at] = kl_divergence(exact, other)
        self._agree[at] = exact.argmax(axis=-1) == other.argmax(axis=-1)

    def summary(self) -> Summary:
        """All of it, once every target was added."""
        change = self._other - self._exact
        low, high = bootstrap(change, self._starts)
        return Summary(
            tokens=len(change),
            perplexity=math.exp(self._other.mean()),
            exact_perplexity=math.exp(self._exact.mean()),
            perplexity_change=math.expm1(change.mean()),
            perplexity_change_interval=(math.expm1(low), math.expm1(high)),
            kl_mean=float(self._kl.mean()),
            kl_mean_interval=bootstrap(self._kl, self._starts),
            kl_p99=float(np.quantile(self._kl, 0.99)),
            top1_agreement=float(self._agree.mean()),
            top1_agreement_interval=bootstrap(self._agree.astype(np.float64), self._starts),
        )


def bootstrap(values: Float64, starts: npt.NDArray[np.int64]) -> Interval:
    """An interval for the mean of ``values`` [n] that lie in passages ``starts[i]:starts[i + 1]``.

    Blocks never span two passages.
    """
    size = max(1, min(BLOCK, len(values) // LEAST_BLOCKS))
    cuts = np.unique(np.concatenate([np.arange(a, b, size) for a, b in _spans(starts)]))
    sums = np.add.reduceat(values, cuts)
    counts = np.diff(np.append(cuts, len(values)))
    random = np.random.default_rng(SEED)
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        drawn = random.integers(0, len(cuts), len(cuts))
        means[i] = sums[drawn].sum() / counts[drawn].sum()
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _spans(starts: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    return [(int(a), int(b)) for a, b in itertools.pairwise(starts) if b > a]


def wilson(right: int, trials: int) -> Interval:
    """An interval for a share of ``right`` in ``trials`` (Wilson, 1927)."""
    share, z2 = right / trials, Z * Z
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    spread = Z * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials))
    spread /= 1 + z2 / trials
    low = 0.0 if right == 0 else centre - spread  # as it is but for rounding
    return low, 1.0 if right == trials else centre + spread
