"""How far apart two predictions of the next token are. Pure functions of logits.

Everything is computed in float64 from float32 logits, row by row, after the greatest logit of a row
was subtracted, so that nothing overflows and small divergences are not lost in rounding.
"""

import numpy as np
import numpy.typing as npt

from quire.errors import QuireError

__all__ = ["kl_divergence", "log_softmax", "require_finite"]

Logits = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


def log_softmax(logits: Logits) -> Float64:
    """Natural log-probabilities, float64 [tokens, vocab], of logits float32 [tokens, vocab]."""
    out = logits.astype(np.float64)
    out -= out.max(axis=-1, keepdims=True)
    out -= np.log(np.exp(out).sum(axis=-1, keepdims=True))
    return out


def kl_divergence(exact: Float64, other: Float64) -> Float64:
    """KL(exact || other) in nats for each row: float64 [tokens], never below 0.

    Both are log-probabilities, float64 [tokens, vocab]; a token that ``exact`` rules out counts
    nothing (Kullback & Leibler, 1951). What rounding leaves below zero is 0.
    """
    weights = np.exp(exact)
    with np.errstate(invalid="ignore"):
        terms = np.where(weights > 0, weights * (exact - other), 0.0)
    return np.asarray(np.maximum(terms.sum(axis=-1), 0.0))


def require_finite(logits: Logits, what: str) -> None:
    """Raise QuireError, naming ``what``, if any of logits [tokens, vocab] is NaN or infinite."""
    if not np.isfinite(logits).all():
        row = int(np.flatnonzero(~np.isfinite(logits).all(axis=-1))[0])
        bad = int((~np.isfinite(logits[row])).sum())
        raise QuireError(
            f"{what}: {bad} of {logits.shape[-1]} logits after token {row} of a chunk are NaN or "
            "infinite, so there is nothing to compare"
        )
