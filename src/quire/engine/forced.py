"""Teacher forcing: a sequence whose next tokens are told, not chosen."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.cache import CacheUsage, KVCache

__all__ = ["ForcedText", "score_together"]

Parts = Sequence[tuple[int, Sequence[int], Sequence[int]]]
Forward = Callable[[Parts], npt.NDArray[np.float32]]


class ForcedText:
    """One open sequence of an engine, beside its requests; what it reads goes through its cache.

    Made by :meth:`Engine.forced`. It is in no prefix index: nothing is found and nothing is left.
    Token ids are the caller's to check. Close it to give its pages back.

    shape   the most tokens of a step, and the size of the vocabulary
    begin   called with the sequence and the number of tokens that are read first, its prompt
    """

    def __init__(
        self,
        cache: KVCache,
        forward: Forward,
        affordable: Callable[[int, int], int],
        shape: tuple[int, int],
        begin: Callable[[int, int], None],
    ) -> None:
        self.cache, self.forward, self._affordable = cache, forward, affordable
        self._most, self.vocab_size = shape
        self._begin: Callable[[int, int], None] | None = begin
        self.sequence = cache.create()

    def __enter__(self) -> "ForcedText":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Release the sequence."""
        self.cache.release(self.sequence)

    @property
    def usage(self) -> CacheUsage:
        """What the sequence takes in the cache."""
        return self.cache.usage(self.sequence)

    @property
    def tokens(self) -> int:
        """How many tokens it has read; eviction may have dropped some of them since."""
        return self.cache.length(self.sequence) + self.cache.dropped(self.sequence)

    def begin(self, tokens: int) -> None:
        """It is about to read so many tokens; shares of a prompt are of the first that it reads."""
        if self._begin is not None:
            self._begin(self.sequence, tokens)
            self._begin = None

    def read(self, tokens: Sequence[int], step: int | None = None) -> None:
        """Append ``tokens``, ``step`` at a time (the engine's ``max_batch_tokens`` if None).

        Raises CacheFull, with the steps before it done, if running requests leave too few pages.
        """
        self._steps(tokens, step, None)

    def score(self, tokens: Sequence[int], step: int | None = None) -> npt.NDArray[np.float32]:
        """Append ``tokens`` as :meth:`read` does; logits after each, float32 [tokens, vocab].

        The first row is what the model expects after the first of ``tokens``.
        """
        out = np.empty((len(tokens), self.vocab_size), np.float32)
        self._steps(tokens, step, out)
        return out

    def _steps(
        self, tokens: Sequence[int], step: int | None, out: npt.NDArray[np.float32] | None
    ) -> None:
        self.begin(len(tokens))
        start, most = 0, self._most if step is None else min(step, self._most)
        while start < len(tokens):
            size = self._affordable(self.sequence, min(most, len(tokens) - start))
            chunk = tokens[start : start + size]
            wanted = range(0) if out is None else range(len(chunk))
            logits = self.forward([(self.sequence, chunk, wanted)])
            if out is not None:
                out[start : start + len(chunk)] = logits
            start += len(chunk)


def score_together(texts: Sequence[ForcedText], tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    """Append one token to each of ``texts``, of one engine, in one step: a step that only decodes.

    Logits after each, float32 [texts, vocab]. Raises CacheFull, with nothing changed, if running
    requests leave too few pages.
    """
    for text in texts[: len(tokens)]:
        text.begin(1)
    parts = [(text.sequence, [token], [0]) for text, token in zip(texts, tokens, strict=True)]
    return texts[0].forward(parts)
