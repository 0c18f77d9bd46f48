"""Samples whose pages are on their way up from a tier."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

from quire.cache import KVCache
from quire.engine.queues import Queues
from quire.engine.request import Sample
from quire.engine.scheduler import awaits, places
from quire.engine.tiering import LoadPlan, PrefixTiers

__all__ = ["Loads"]


class Loads:
    """Starts loads for waiting samples, and takes in what they bring."""

    def __init__(
        self, queues: Queues, cache: KVCache, tiers: PrefixTiers | None, max_sequences: int
    ) -> None:
        self._queues, self._cache, self._tiers = queues, cache, tiers
        self._max_sequences = max_sequences

    def start(self, waiting: Sequence[Sample]) -> None:
        """Let samples whose next pages are in a tier start, if loading them pays.

        In order of arrival: one that does not find room keeps those behind it from starting.
        """
        if self._tiers is None:
            return
        for sample in waiting:
            if places([*self._queues.running, sample]) > self._max_sequences:
                return
            skip = sample.asked_tiers or sample.parked
            plan = None if skip else self._plan(sample, self._tiers)
            if plan is None:
                continue
            if not self._has_room(sample, plan):
                return
            plan = self._fitting(plan)
            if not plan.sources:
                sample.asked_tiers = True
                continue  # a window's pages are few: computing brings them step by step
            load = self._tiers.start(plan, sample.prefix_query)
            self._queues.admit(sample, load.sequence)
            sample.load = load

    def finish(self) -> None:
        """Take in the loads that are done."""
        if self._tiers is None:
            return
        for sample in self._queues.running:
            if sample.load is not None and sample.load.finished.is_set():
                self._settle(sample)

    def wait(self) -> bool:
        """Wait for a load and take it in; False if there is none."""
        loading = [sample for sample in self._queues.running if sample.load is not None]
        if loading:
            self._settle(loading[0])
        return bool(loading)

    def cancel(self, sample: Sample) -> None:
        """Stop the load of a sample, if there is one."""
        if sample.load is not None:
            sample.load.cancelled = True
            self._settle(sample)

    def _plan(self, sample: Sample, tiers: PrefixTiers) -> LoadPlan | None:
        """What to load for ``sample`` now; None if nothing, or if others bring it anyway."""
        query, limit = sample.prefix_query, sample.match_limit
        if limit == 0:
            sample.asked_tiers = True
            return None
        computing = [(s, s.computed) for s in self._queues.running if s.uncomputed > 1]
        if awaits(sample, self._cache.match(query, limit).tokens, computing, self._cache):
            return None
        plan = tiers.plan(query, limit)
        if plan is not None:
            sample.tier_decision = sample.tier_decision or plan.decision
        if plan is None or not plan.worthwhile:
            sample.asked_tiers = True
            return None
        return plan

    def _has_room(self, sample: Sample, plan: LoadPlan) -> bool:
        """As the scheduler admits: all tokens, and a spare page for each that is running."""
        growth = self._cache.growth(plan.match, sample.most_kept - plan.match.tokens)
        running = len(self._queues.running)
        room = zip(growth, self._cache.free_pages, strict=True)
        return all(need + running <= free for need, free in room)

    def _fitting(self, plan: LoadPlan) -> LoadPlan:
        """As many of the plan's pages, from the first on, as can be reserved in one go."""
        free = self._cache.free_pages

        def too_many(count: int) -> bool:
            cost = self._cache.cost_of_whole(plan.match, count)
            return any(need > have for need, have in zip(cost, free, strict=True))

        counts = range(1, len(plan.sources) + 1)
        return replace(plan, sources=plan.sources[: bisect_left(counts, True, key=too_many)])

    def _settle(self, sample: Sample) -> None:
        """Take in what a load has brought; waits for it."""
        assert self._tiers is not None
        assert sample.load is not None
        assert sample.sequence is not None
        assert sample.cached_tokens is not None
        came = self._tiers.finish(sample.load)
        sample.load = None
        sample.computed = self._cache.length(sample.sequence)
        if not sample.preemptions:
            sample.cached_tokens |= came
