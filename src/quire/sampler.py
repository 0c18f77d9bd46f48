"""Logits to token ids: the definition, in NumPy and float64.

A pure function of the logits, the tokens so far, the parameters and the random stream. A backend
may choose where it computes (see :class:`quire.backends.base.Logits`); it must choose this.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.errors import QuireError
from quire.sampling import Ask, Choice, SamplingParams, Seen, TokenLogprob

__all__ = [
    "HostLogits",
    "adjust",
    "choose",
    "decide",
    "likeliest",
    "logprobs_of",
    "not_finite",
    "seen_by",
    "seen_of",
    "uniform",
]

Logits = npt.NDArray[np.float64]

AHEAD = 64  # positions whose numbers are drawn at a time


class HostLogits:
    """Rows of logits float32 [n, vocab] in NumPy: see :class:`quire.backends.base.Logits`."""

    def __init__(self, rows: npt.NDArray[np.float32]) -> None:
        self._rows = rows

    @property
    def shape(self) -> tuple[int, int]:
        """(n, vocab)."""
        count, vocab = self._rows.shape
        return count, vocab

    def host(self) -> npt.NDArray[np.float32]:
        """The array itself."""
        return self._rows

    def row(self, nth: int) -> npt.NDArray[np.float32]:
        """One of its rows."""
        row: npt.NDArray[np.float32] = self._rows[nth]
        return row

    def choose(self, asked: Sequence[Ask]) -> list[Choice]:
        """One by one, as :func:`decide` does."""
        return [decide(self._rows[ask.row], ask) for ask in asked]

    def ahead(self, asked: Sequence[Ask]) -> None:
        """The host computed them: there is nothing to be ahead of."""

    def wait(self) -> None:
        """They are there."""


def decide(logits: npt.NDArray[np.float32], ask: Ask) -> Choice:
    """What is asked of its row of logits float32 [vocab]."""
    params = ask.params
    try:
        token = likeliest(logits, len(ask.tokens) - 1)
        if not params.is_plain:
            token = _chosen(logits, seen_by(ask), params, ask.draw)
    except QuireError as error:
        return Choice(None, None, str(error))
    if params.logprobs is None:
        return Choice(token)
    return Choice(token, logprobs_of(token, logits, params.logprobs))


def uniform(seed: int, sample: int, position: int) -> float:
    """A number in [0, 1) from Philox 4x64 (Salmon et al., 2011), a counter-based stream.

    Keyed by (seed, sample), counted by the position of the token to choose.
    """
    return _numbers(seed, sample, position // AHEAD)[position % AHEAD]


@functools.lru_cache(maxsize=1024)  # making a generator takes as long as many of its numbers
def _numbers(seed: int, sample: int, part: int) -> tuple[float, ...]:
    """Those of AHEAD positions. The generator's next block of four words is the next position's."""
    key = np.array([seed, sample], dtype=np.uint64)  # a list with a seed of 2**63 becomes float64
    bits = np.random.Philox(key=key, counter=[part * AHEAD, 0, 0, 0])
    return tuple(np.random.Generator(bits).random(4 * AHEAD)[::4].tolist())


def choose(
    logits: npt.NDArray[np.float32],
    prompt: Sequence[int],
    reply: Sequence[int],
    params: SamplingParams,
    draw: float,
) -> int:
    """The next token after ``prompt + reply`` for logits float32 [vocab].

    ``draw`` in [0, 1) decides unless greedy; ties go to the lowest token id. Raises QuireError for
    logits that are NaN or infinite.
    """
    best = likeliest(logits, len(prompt) + len(reply) - 1)
    if params.is_plain:
        return best
    return _chosen(logits, seen_of(prompt, reply, params), params, draw)


def _chosen(
    logits: npt.NDArray[np.float32], seen: Seen | None, params: SamplingParams, draw: float
) -> int:
    adjusted = _narrow(_penalise(logits.astype(np.float64), seen, params), params)
    return int(np.argmax(adjusted)) if params.temperature == 0 else _draw(adjusted, draw)


def likeliest(logits: npt.NDArray[np.float32], position: int) -> int:
    """The token with the largest of logits float32 [vocab]; ties go to the lowest token id.

    Raises QuireError if any of the logits, which are those at ``position``, is NaN or infinite.
    """
    best = int(logits.argmax())  # of a NaN, if there is one
    if not (math.isfinite(logits[best]) and math.isfinite(logits[logits.argmin()])):
        bad = int((~np.isfinite(logits)).sum())
        raise QuireError(not_finite(f"{bad} of {logits.size}", position))
    return best


def not_finite(count: str, position: int) -> str:
    """What is said of logits that cannot be chosen from."""
    return (
        f"{count} logits at position {position} are NaN or infinite; the weights are damaged, or "
        "their dtype is too narrow for this model"
    )


def adjust(
    logits: Logits, prompt: Sequence[int], reply: Sequence[int], params: SamplingParams
) -> Logits:
    """Penalties, temperature, top-k, top-p and min-p, in that order; removed tokens are -inf.

    With temperature 0 only the penalties apply.
    """
    return _narrow(_penalise(logits, seen_of(prompt, reply, params), params), params)


def _narrow(logits: Logits, params: SamplingParams) -> Logits:
    """Temperature, top-k, top-p and min-p."""
    if params.temperature == 0:
        return logits
    # Shifting first keeps a tiny temperature from overflowing to inf - inf.
    with np.errstate(over="ignore"):
        logits = (logits - logits.max()) / params.temperature
    if 0 < params.top_k < logits.size:
        kth = np.partition(logits, -params.top_k)[-params.top_k]
        logits = np.where(logits < kth, -np.inf, logits)
    if params.top_p < 1:
        logits = _nucleus(logits, params.top_p)
    if params.min_p > 0:
        with np.errstate(divide="ignore"):
            logits = np.where(logits < logits.max() + np.log(params.min_p), -np.inf, logits)
    return logits


def seen_of(prompt: Sequence[int], reply: Sequence[int], params: SamplingParams) -> Seen | None:
    """What penalties change after ``prompt + reply``; None if there are no penalties."""
    if params.repetition_penalty != 1:
        return Seen(prompt, reply)
    if params.presence_penalty or params.frequency_penalty:
        return Seen((), reply)
    return None


def seen_by(ask: Ask) -> Seen | None:
    """What penalties change of what is asked."""
    if ask.seen is not None:
        return ask.seen
    return seen_of(ask.tokens[: ask.prompt], ask.tokens[ask.prompt :], ask.params)


def _penalise(logits: Logits, seen: Seen | None, params: SamplingParams) -> Logits:
    if seen is None:
        return logits
    at, factor, counts = logits[seen.ids], params.repetition_penalty, seen.counts
    if factor != 1:
        at = np.where(at < 0, at * factor, at / factor)
    at = at - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    logits = logits.copy()
    logits[seen.ids] = at
    return logits


def _nucleus(logits: Logits, top_p: float) -> Logits:
    weights = np.exp(logits - logits.max())
    total = weights.sum()
    most = (
        256  # a nucleus is small: sort so many of the vocabulary, more only if they are not enough
    )
    while True:
        order = _largest(logits, most)
        keep = int(np.searchsorted(np.cumsum(weights[order]) / total, top_p, side="left")) + 1
        if keep <= len(order) or len(order) == logits.size:
            break
        most *= 16
    out = np.full_like(logits, -np.inf)
    out[order[:keep]] = logits[order[:keep]]
    return out


def _largest(logits: npt.NDArray[Any], most: int) -> npt.NDArray[np.int64]:
    """Token ids of the ``most`` largest logits, the largest first, ties in order of token id."""
    ids = np.arange(logits.size)
    if most < logits.size:
        least = np.partition(logits, -most)[-most]
        above, tied = np.flatnonzero(logits > least), np.flatnonzero(logits == least)
        ids = np.sort(np.concatenate([above, tied[: most - above.size]]))
    return ids[np.argsort(-logits[ids], kind="stable")]


def _probabilities(logits: Logits) -> Logits:
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum())


def _draw(logits: Logits, draw: float) -> int:
    """Inverse of the cumulative distribution, in order of token id."""
    cumulative = np.cumsum(_probabilities(logits))
    at = int(np.searchsorted(cumulative, draw * cumulative[-1], side="right"))
    last = int(np.flatnonzero(np.isfinite(logits))[-1])
    return min(at, last)


def logprobs_of(token: int, logits: npt.NDArray[np.float32], alternatives: int) -> TokenLogprob:
    """Natural log-probabilities, in float64, of a token and of the most likely ones.

    From the model's own logits float32 [vocab]: what narrows or bends the draw does not count.
    """
    wide = logits.astype(np.float64)
    wide -= wide.max()
    logprobs = wide - np.log(np.exp(wide).sum())
    top = _largest(logits, alternatives)[:alternatives] if alternatives else ()
    pairs = tuple((int(t), float(logprobs[t])) for t in top)
    return TokenLogprob(token, float(logprobs[token]), pairs)
