"""The forward pass of a step: pages set aside, numbers computed, tokens committed, or nothing."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from quire.backends import Logits
from quire.cache import KVCache
from quire.engine.evicting import Part
from quire.engine.policies import Policies, Step
from quire.engine.request import Sample
from quire.models import CausalLM

__all__ = ["Forward"]


class Forward:
    """The forward passes of one engine. ``most``: tokens of a step."""

    def __init__(self, cache: KVCache, model: CausalLM, policies: Policies, most: int) -> None:
        self._cache, self._model, self._policies = cache, model, policies
        self._most = most

    def run(self, parts: Sequence[Part], samples: Sequence[Sample] = ()) -> Logits:
        """Reserve, compute, commit; logits [rows that are wanted, vocab].

        ``samples``, if there are any, are those to which the first of ``parts`` belong. If anything
        raises, the cache is as it was.
        """
        reservation = self._cache.reserve([(seq, len(tokens)) for seq, tokens, _ in parts])
        try:
            for sample, grows in zip(samples, reservation.grows, strict=False):
                if grows or not sample.counted:
                    sample.count_bytes(self._cache)
            step = Step.of(parts, reservation.batch)
            logits = self._policies.forward(self._model, step)
        except BaseException:
            self._cache.rollback(reservation)
            raise
        self._cache.commit(reservation, self._policies.exact([chunk for _, chunk, _ in parts]))
        return logits

    def forced(self, parts: Sequence[Part]) -> npt.NDArray[np.float32]:
        """A pass of sequences that no sample runs on, under the engine's own policy.

        Logits float32 [rows that are wanted, vocab].
        """
        logits = self.run(parts).host()
        self._policies.settle(parts)
        self._policies.count(())
        return logits

    def prefill(self, sequence: int, tokens: Sequence[int]) -> None:
        """Compute what ``sequence`` lacks of ``tokens``; CacheFull if there are too few pages."""
        while (start := self._cache.length(sequence)) < len(tokens):
            size = min(self._most, len(tokens) - start)
            chunk = tokens[start : start + self.affordable(sequence, size)]
            self.run([(sequence, chunk, [])])

    def affordable(self, sequence: int, tokens: int) -> int:
        """``tokens``, halved until free pages are enough for them; at least 1."""
        free = self._cache.free_pages
        while tokens > 1 and any(
            cost > have for cost, have in zip(self._cache.cost(sequence, tokens), free, strict=True)
        ):
            tokens //= 2
        return tokens
