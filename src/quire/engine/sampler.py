"""Logits to token ids. A pure function of the logits, the tokens so far, the parameters and the
random stream; knows nothing of batches."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from quire.engine.request import SamplingParams, TokenLogprob
from quire.errors import QuireError

__all__ = ["adjust", "choose", "uniform"]

Logits = npt.NDArray[np.float64]


def uniform(seed: int, sample: int, position: int) -> float:
    """A number in [0, 1) from Philox 4x64 (Salmon et al., 2011), a counter-based stream.

    Keyed by (seed, sample), counted by the position of the token to choose.
    """
    key = np.array([seed, sample], dtype=np.uint64)  # a list with a seed of 2**63 becomes float64
    bits = np.random.Philox(key=key, counter=[position, 0, 0, 0])
    return float(np.random.Generator(bits).random())


def choose(
    logits: npt.NDArray[np.float32],
    prompt: Sequence[int],
    reply: Sequence[int],
    params: SamplingParams,
    draw: float,
) -> TokenLogprob:
    """The next token after ``prompt + reply`` for logits float32 [vocab].

    ``draw`` in [0, 1) decides unless greedy; ties go to the lowest token id. Raises QuireError for
    logits that are NaN or infinite.
    """
    if not np.isfinite(logits).all():
        bad = int((~np.isfinite(logits)).sum())
        raise QuireError(
            f"{bad} of {logits.size} logits at position {len(prompt) + len(reply) - 1} are NaN or "
            "infinite; the weights are damaged, or their dtype is too narrow for this model"
        )
    adjusted = adjust(logits.astype(np.float64), prompt, reply, params)
    token = _greedy(adjusted) if params.temperature == 0 else _draw(adjusted, draw)
    return _with_logprobs(token, logits, params.logprobs)


def adjust(
    logits: Logits, prompt: Sequence[int], reply: Sequence[int], params: SamplingParams
) -> Logits:
    """Penalties, temperature, top-k, top-p and min-p, in that order; removed tokens are -inf.

    With temperature 0 only the penalties apply.
    """
    logits = _penalise(logits, prompt, reply, params)
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


def _penalise(
    logits: Logits, prompt: Sequence[int], reply: Sequence[int], params: SamplingParams
) -> Logits:
    if params.repetition_penalty != 1:
        seen = np.unique(np.asarray([*prompt, *reply], dtype=np.int64))
        at, factor = logits[seen], params.repetition_penalty
        logits = logits.copy()
        logits[seen] = np.where(at < 0, at * factor, at / factor)
    if reply and (params.presence_penalty or params.frequency_penalty):
        counts = np.bincount(np.asarray(reply, dtype=np.int64), minlength=logits.size)
        logits = logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    return logits


def _nucleus(logits: Logits, top_p: float) -> Logits:
    order = np.argsort(-logits, kind="stable")
    cumulative = np.cumsum(_probabilities(logits[order]))
    keep = int(np.searchsorted(cumulative, top_p, side="left")) + 1
    out = np.full_like(logits, -np.inf)
    out[order[:keep]] = logits[order[:keep]]
    return out


def _probabilities(logits: Logits) -> Logits:
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum())


def _greedy(logits: Logits) -> int:
    return int(np.argmax(logits))


def _draw(logits: Logits, draw: float) -> int:
    """Inverse of the cumulative distribution, in order of token id."""
    cumulative = np.cumsum(_probabilities(logits))
    at = int(np.searchsorted(cumulative, draw * cumulative[-1], side="right"))
    last = int(np.flatnonzero(np.isfinite(logits))[-1])
    return min(at, last)


def _with_logprobs(
    token: int, logits: npt.NDArray[np.float32], alternatives: int | None
) -> TokenLogprob:
    wide = logits.astype(np.float64)
    wide -= wide.max()
    logprobs = wide - np.log(np.exp(wide).sum())
    if not alternatives:
        return TokenLogprob(token, float(logprobs[token]))
    top = np.argsort(-logprobs, kind="stable")[:alternatives]
    pairs = tuple((int(t), float(logprobs[t])) for t in top)
    return TokenLogprob(token, float(logprobs[token]), pairs)
