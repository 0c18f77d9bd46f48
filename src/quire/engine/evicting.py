"""Keeping sequences under their budgets of tokens, step by step.

After a step that was part of a prompt whatever is above the budget goes; while a reply is decoded a
page more than the budget is let stand first. Rules are in :mod:`quire.cache.eviction`; what they
need of queries is watched while the model runs, and added up when its tokens are committed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.backends import Backend
from quire.batch import PagedBatch
from quire.cache import KVCache
from quire.cache.compaction import require_compactable
from quire.cache.eviction import best_and_recent, first_and_recent, spread_votes
from quire.config import CacheConfig
from quire.errors import CacheError, CacheFull, ConfigError
from quire.evict_choice import EvictChoice
from quire.layout import CacheLayout

__all__ = ["Evictor", "Part", "Watch", "require_evictable"]

Array = npt.NDArray[Any]
Part = tuple[int, Sequence[int], Sequence[int]]  # sequence, new tokens, which of them want logits


def require_evictable(layout: CacheLayout, settings: CacheConfig) -> None:
    """Raise ConfigError, with the reason, if single tokens cannot be dropped from such a cache."""
    try:
        require_compactable(layout)
    except CacheError as error:
        raise ConfigError(str(error)) from None
    if settings.page_size == "whole":
        raise ConfigError(
            "tokens that are dropped from a page of page_size 'whole' free no memory; give a "
            "page_size in tokens"
        )


@dataclass
class _Budget:
    """One sequence, what it may keep, and what its policy remembers of it.

    queries   of each layer, the newest [at most window, H, D] (snapkv); their last is that of
              position ``seen`` - 1
    scores    of each layer, float64 [G, n]: weights that each kept token has gathered (h2o)
    voted     tokens were chosen by a vote (snapkv)
    late      it is above its budget, and pages to gather into were not free
    """

    choice: EvictChoice
    tokens: int
    queries: dict[int, Array] = field(default_factory=dict)
    scores: dict[int, Array] = field(default_factory=dict)
    seen: int = 0
    voted: bool = False
    late: bool = False

    def watches(self, length: int, count: int, prefills: bool) -> bool:
        """True if queries of ``count`` tokens behind ``length`` kept ones have to be seen."""
        if self.choice.policy == "snapkv":
            near = length + count > self.tokens - self.choice.window
            return near and (prefills or not self.voted)
        return self.choice.watches_all

    def take_queries(self, found: dict[int, Array], start: int, count: int) -> None:
        """Add queries [T, H, D] of ``count`` tokens from position ``start`` on, of every layer."""
        for layer, query in found.items():
            before = self.queries.get(layer) if self.seen == start else None
            joined = query if before is None else np.concatenate([before, query])
            self.queries[layer] = joined[-self.choice.window :]
        self.seen = start + count

    def take_scores(self, found: dict[int, Array]) -> None:
        """Add weights [G, n] that every kept token gathered in a step, of every layer."""
        for layer, weights in found.items():
            before = self.scores.get(layer)
            total = weights.astype(np.float64)
            if before is not None:
                total[:, : before.shape[1]] += before
            self.scores[layer] = total


class Watch:
    """Sees the queries of one step, layer by layer; nothing of it counts before its commit."""

    def __init__(
        self,
        cache: KVCache,
        backend: Backend,
        batch: PagedBatch,
        watched: Sequence[tuple[int, _Budget]],
    ) -> None:
        self._cache, self._backend, self._batch = cache, backend, batch
        self._watched = watched
        self._asked: dict[tuple[int, int], tuple[Array, Array]] = {}
        self._queries: dict[int, dict[int, Array]] = {at: {} for at, _ in watched}
        self._weights: dict[int, dict[int, Any]] = {at: {} for at, _ in watched}

    def __call__(self, layer: int, query: Any) -> None:
        """Queries [T, H, D] of ``layer``, the backend's own; keys are in the pool already."""
        backend, indptr = self._backend, self._batch.query_indptr
        for at, budget in self._watched:
            first, end = int(indptr[at]), int(indptr[at + 1])
            if budget.choice.policy == "snapkv":
                newest = query[max(first, end - budget.choice.window) : end]
                self._queries[at][layer] = backend.to_host(newest).copy()
                continue
            pages, places = self._keys_of(at, self._batch.group_of_layer[layer])
            pool = self._cache.pools[layer]
            self._weights[at][layer] = backend.weigh_keys(query[first:end], pool, pages, places)

    def queries(self, at: int) -> dict[int, Array]:
        """Of each layer the newest queries of sequence number ``at`` (snapkv)."""
        return self._queries.get(at, {})

    def weights(self, at: int) -> dict[int, Array]:
        """Of each layer the weights [G, n] that keys of sequence number ``at`` gathered (h2o)."""
        seen = self._weights.get(at, {})
        return {layer: self._backend.to_host(each) for layer, each in seen.items()}

    def _keys_of(self, at: int, group: int) -> tuple[Array, Array]:
        """Pages of a sequence and places of its new tokens: the same arrays for all layers."""
        if (at, group) not in self._asked:
            tables, indptr = self._batch.groups[group], self._batch.query_indptr
            pages = tables.indices[tables.indptr[at] : tables.indptr[at + 1]]
            self._asked[at, group] = pages, self._batch.places[indptr[at] : indptr[at + 1]]
        return self._asked[at, group]


class Evictor:
    """The budgets of an engine's sequences."""

    def __init__(self, cache: KVCache, backend: Backend) -> None:
        self._cache, self._backend = cache, backend
        self._budgets: dict[int, _Budget] = {}

    def follow(self, sequence: int, choice: EvictChoice, tokens: int) -> None:
        """Keep ``sequence`` under ``tokens`` from now on; nothing new if it is followed already."""
        if sequence not in self._budgets:
            alive = set(self._cache.sequences)
            self._budgets = {s: b for s, b in self._budgets.items() if s in alive}
            self._budgets[sequence] = _Budget(choice, tokens)

    def watch(self, parts: Sequence[Part], batch: PagedBatch) -> Watch | None:
        """What has to see the queries of a step; None if nobody asks for them."""
        if not self._budgets:
            return None
        watched = []
        for at, part in enumerate(parts):
            budget, count = self._budgets.get(part[0]), len(part[1])
            length = self._cache.length(part[0])
            if budget is not None and count and budget.watches(length, count, _prefills(part)):
                watched.append((at, budget))
        return Watch(self._cache, self._backend, batch, watched) if watched else None

    def settle(self, parts: Sequence[Part], watch: Watch | None) -> None:
        """``parts`` were committed: drop what is above budgets.

        A sequence that would have to write pages that others hold, with none free to take their
        place, stays above its budget until :meth:`catch_up`.
        """
        for at, part in enumerate(parts):
            budget = self._budgets.get(part[0])
            if budget is None:
                continue
            if budget.choice.policy == "snapkv":
                start = self._cache.length(part[0]) + self._cache.dropped(part[0]) - len(part[1])
                seen = {} if watch is None else watch.queries(at)
                budget.take_queries(seen, start, len(part[1]))
            elif watch is not None:
                budget.take_scores(watch.weights(at))
            self._trim(part[0], budget, _prefills(part))

    def catch_up(self) -> None:
        """Try again where pages were missing."""
        for sequence, budget in self._budgets.items():
            if budget.late and sequence in self._cache.sequences:
                self._trim(sequence, budget, prefills=True)

    # -- inside ------------------------------------------------------------------------------

    def _trim(self, sequence: int, budget: _Budget, prefills: bool) -> None:
        length = self._cache.length(sequence)
        spare = 1 if prefills else self._cache.layout.page_size
        if length < budget.tokens + spare:
            return
        keep = self._keep(sequence, budget, length, prefills)
        try:
            self._cache.evict(sequence, keep)
        except CacheFull:
            budget.late = True
            return
        budget.late = False
        budget.voted = True
        for layer, scores in budget.scores.items():
            budget.scores[layer] = np.take_along_axis(scores, keep[layer], axis=1)

    def _keep(
        self, sequence: int, budget: _Budget, length: int, prefills: bool
    ) -> list[npt.NDArray[np.int64]]:
        """For each layer, the places int64 [G, budget] that are kept."""
        choice, tokens, heads = budget.choice, budget.tokens, self._heads
        shapes = self._cache.layout.shapes
        if choice.policy == "window":
            return [first_and_recent(length, tokens, choice.sink, heads)] * len(shapes)
        at_hand = budget.seen == length + self._cache.dropped(sequence)  # queries of the newest
        if choice.policy == "snapkv" and (not at_hand or (budget.voted and not prefills)):
            # What was voted for lies in front; of the tokens since, the oldest go.
            chosen = tokens - choice.window
            return [first_and_recent(length, tokens, chosen, heads)] * len(shapes)
        recent = choice.recent_of(tokens)
        return [
            best_and_recent(self._scores(sequence, budget, layer), tokens, recent)
            for layer in range(len(shapes))
        ]

    def _scores(self, sequence: int, budget: _Budget, layer: int) -> Array:
        """What speaks for each kept token in ``layer``: [G, n]."""
        choice, length = budget.choice, self._cache.length(sequence)
        if choice.policy == "h2o":
            return budget.scores[layer]
        backend, pool = self._backend, self._cache.pools[layer]
        pages = self._cache.page_tables(sequence)[0][1]
        if choice.policy == "knorm":
            return -backend.to_host(backend.key_norms(pool, pages, length))
        query = budget.queries[layer]
        places = np.arange(length - len(query), length)
        votes = backend.to_host(backend.weigh_keys(query, pool, pages, places)).copy()
        votes[:, : length - choice.window] = spread_votes(
            votes[:, : length - choice.window], choice.kernel
        )
        return votes

    @property
    def _heads(self) -> int:
        return self._cache.layout.shapes[0].num_kv_heads


def _prefills(part: Part) -> bool:
    """True for a chunk of a prompt: more than one token, or no end of what is known."""
    return len(part[1]) > 1 or not part[2]
