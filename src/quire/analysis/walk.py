"""Walking passages with several engines side by side.

Every engine reads the prompt of a passage as it would a request's, in chunks, and is then told the
rest one token at a time, in steps that only decode: so page formats that treat unfinished pages
otherwise, and policies that drop tokens while decoding, lose what they would lose in use. Some
passages go at once, one token each a step, for speed alone; by the exactness law company does not
change what an engine answers. Memory: the caches of so many passages, and the logits of one step.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quire.analysis.candidates import Track
from quire.analysis.divergence import require_finite
from quire.analysis.text import Passage
from quire.engine.forced import ForcedText, score_together
from quire.errors import QuireError

__all__ = ["Told", "walk"]


@dataclass(frozen=True)
class Told:
    """What one step brought.

    at        which token of each passage was told
    passages  numbers of the passages that are in it
    logits    of the exact track, then of every other: float32 [passages, vocab], or None for one
              that was stopped
    """

    at: int
    passages: tuple[int, ...]
    logits: tuple[npt.NDArray[np.float32] | None, ...]


def walk(
    exact: Track,
    tracks: Sequence[Track],
    passages: Sequence[Passage],
    lanes: int,
    ended: Callable[[Track, ForcedText], None] | None = None,
) -> Iterator[Told]:
    """All steps of all passages, ``lanes`` passages at a time.

    ended   called at the end of each passage with every track that was not stopped and its sequence

    An error of Quire's stops the track that it came from; of the exact one it is raised.
    """
    # Equal lengths together, so that lanes stay full.
    order = sorted(range(len(passages)), key=lambda i: (-len(passages[i].told), i))
    for start in range(0, len(order), lanes):
        batch = order[start : start + lanes]
        with ExitStack() as stack:
            runs = [_Run(track, stack) for track in (exact, *tracks)]
            for run in runs:
                run.read([passages[i].prompt for i in batch])
            for at in range(len(passages[batch[0]].told)):
                active = tuple(i for i in batch if at < len(passages[i].told))
                tokens = [passages[i].told[at] for i in active]
                logits = tuple(run.tell(tokens) for run in runs)
                if exact.error is not None:
                    raise QuireError(f"the exact cache: {exact.error}")
                yield Told(at, active, logits)
            if ended is not None:
                for run in runs:
                    run.end(ended)


class _Run:
    """One track's texts of one batch of passages."""

    def __init__(self, track: Track, stack: ExitStack) -> None:
        self.track, self._stack = track, stack
        self._texts: list[ForcedText] = []

    def read(self, prompts: Sequence[Sequence[int]]) -> None:
        """Open a sequence for each of ``prompts``, token ids, and prefill it in chunks.

        Nothing if the track was stopped; an error of Quire's stops it.
        """
        if self.track.error is not None:
            return
        try:
            for prompt in prompts:
                text = self._stack.enter_context(self.track.engine.forced())
                self._texts.append(text)
                text.read(prompt)
        except QuireError as error:
            self.track.stop(error)

    def tell(self, tokens: Sequence[int]) -> npt.NDArray[np.float32] | None:
        """Logits of the first so many texts: passages of a batch end the last one first."""
        if self.track.error is not None:
            return None
        try:
            logits = score_together(self._texts[: len(tokens)], tokens)
            require_finite(logits, self.track.setting.name)
        except QuireError as error:
            self.track.stop(error)
            return None
        return logits

    def end(self, ended: Callable[[Track, ForcedText], None]) -> None:
        """Call ``ended`` with each sequence, unless the track was stopped."""
        if self.track.error is None:
            for text in self._texts:
                ended(self.track, text)
