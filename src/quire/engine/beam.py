"""Beam search: which continuations of a prompt to follow, from scores alone.

The rules are those of transformers (``num_beams``, ``early_stopping=False``): of the live beams'
continuations the best are kept, twice as many as beams or more, so that enough go on when some end;
one that ends counts only among the first ``width``; the score of an ended beam is its summed
log-probability over its length to the power of ``length_penalty``. Knows nothing of pages.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Beam", "BeamSearch", "Step"]


@dataclass(frozen=True)
class Beam:
    """A continuation. ``score``: summed log-probability; of an ended one, with length penalty."""

    tokens: tuple[int, ...]
    score: float
    stopped: bool = False


@dataclass(frozen=True)
class Step:
    """A live beam goes on from the live beam ``parent`` with ``token``."""

    parent: int
    token: int


class BeamSearch:
    """The search behind one prompt.

    width           beams that are followed
    length_penalty  above 0 favours long continuations, below 0 short ones
    stop_tokens     token ids that end a beam
    most_new        tokens of the longest continuation
    """

    def __init__(
        self, width: int, length_penalty: float, stop_tokens: Set[int], most_new: int
    ) -> None:
        self.width, self.length_penalty = width, length_penalty
        self.stop_tokens, self.most_new = stop_tokens, most_new
        self.live = [Beam((), 0.0)]
        self.ended: list[Beam] = []  # the best first, at most ``width``

    def advance(self, logits: Sequence[npt.NDArray[np.float32]]) -> list[Step]:
        """Go on by a token. ``logits``: float32 [vocab] of each live beam, in order.

        Returns where each of the new live beams comes from; empty when the search is over.
        """
        scores = np.stack(
            [beam.score + _log_softmax(row) for beam, row in zip(self.live, logits, strict=True)]
        )
        keep = max(2, 1 + len(self.stop_tokens)) * self.width
        length = len(self.live[0].tokens) + 1
        order = _best(scores, keep)
        vocab = scores.shape[1]
        going: list[tuple[Step, Beam]] = []
        for rank, at in enumerate(order):
            parent, token = divmod(int(at), vocab)
            score = float(scores[parent, token])
            tokens = (*self.live[parent].tokens, token)
            stopped = token in self.stop_tokens
            if stopped or length == self.most_new:
                if rank < self.width:
                    self._end(Beam(tokens, score / length**self.length_penalty, stopped))
            elif len(going) < self.width:
                going.append((Step(parent, token), Beam(tokens, score)))
        if not going or not self._can_improve(going[0][1].score, length):
            self.live = []
            return []
        self.live = [beam for _, beam in going]
        return [step for step, _ in going]

    def _end(self, beam: Beam) -> None:
        self.ended = sorted([*self.ended, beam], key=lambda b: -b.score)[: self.width]

    def _can_improve(self, best: float, length: int) -> bool:
        """Whether the best live beam, were it to end here, would beat the worst that ended."""
        if len(self.ended) < self.width:
            return True
        return bool(best / length**self.length_penalty > self.ended[-1].score)


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max()
    return np.asarray(wide - np.log(np.exp(wide).sum()))


def _best(scores: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
    """Flat indices of the ``count`` largest scores, the largest first, ties in order of index."""
    flat = scores.ravel()
    count = min(count, flat.size)
    chosen = np.sort(np.argpartition(-flat, count - 1)[:count])
    return np.asarray(chosen[np.argsort(-flat[chosen], kind="stable")])
