"""Which samples run in the next step, with how many tokens each, and who must give way.

A pure function of the queues, the limits and a view of the cache; it changes none of them.

Policy: first come, first served. Samples are served in order of arrival; those that decode get
their one token before prefills share what is left of the budget. A sample that finds no free pages
takes those of the youngest sample behind it, which is computed again later; if none is behind it,
it waits in place. So the oldest always makes progress. A waiting sample is admitted when there is
budget left, so that every running one got all it asked for, and when all its tokens fit beside one
spare page for each running sample.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from quire.engine.request import Sample

__all__ = ["CacheView", "Limits", "Preemption", "StepPlan", "plan_step"]

Pages = tuple[int, ...]


class CacheView(Protocol):
    """What the scheduler reads of the cache: pages of each layer group."""

    @property
    def free_pages(self) -> Pages:
        """Pages that nobody holds."""

    def cost(self, sequence: int | None, new_tokens: int) -> Pages:
        """Pages that ``new_tokens`` more tokens in one step would take; None is a new sequence."""

    def growth(self, sequence: int | None, new_tokens: int) -> Pages:
        """Pages more than now that a sequence holds at the most while it grows one by one."""

    def freed_by_release(self, sequence: int) -> Pages:
        """Pages that only this sequence holds."""


@dataclass(frozen=True)
class Limits:
    """Tokens a step and sequences at a time."""

    max_batch_tokens: int
    max_sequences: int


@dataclass(frozen=True)
class Preemption:
    """A running sample that must give its pages back, and why."""

    sample: Sample
    reason: str


@dataclass(frozen=True)
class StepPlan:
    """``chunks`` run, (sample, tokens); ``admit`` are those of them that start now."""

    chunks: tuple[tuple[Sample, int], ...]
    admit: tuple[Sample, ...]
    preempt: tuple[Preemption, ...]


def _add(a: Pages, b: Pages) -> Pages:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _subtract(a: Pages, b: Pages) -> Pages:
    return tuple(x - y for x, y in zip(a, b, strict=True))


def _within(need: Pages, free: Pages) -> bool:
    return all(n <= f for n, f in zip(need, free, strict=True))


def plan_step(
    running: Sequence[Sample], waiting: Sequence[Sample], limits: Limits, cache: CacheView
) -> StepPlan:
    """The next step. ``running`` and ``waiting`` are in order of arrival."""
    planner = _Planner(limits.max_batch_tokens, cache)
    active = list(running)
    at = 0
    while at < len(active):
        decodes = sum(1 for sample in active[at + 1 :] if sample.pending == 1)
        kept = 0 if active[at].pending == 1 else decodes
        planner.serve(active, at, max(planner.budget - kept, 1 if at == 0 else 0))
        at += 1
    admitted = planner.admit(active, waiting, limits.max_sequences)
    return StepPlan(tuple(planner.chunks), admitted, tuple(planner.preempted))


class _Planner:
    """The step while it is being planned."""

    def __init__(self, budget: int, cache: CacheView) -> None:
        self.budget, self.cache = budget, cache
        self.free = cache.free_pages
        self.chunks: list[tuple[Sample, int]] = []
        self.preempted: list[Preemption] = []

    def serve(self, active: list[Sample], at: int, budget: int) -> None:
        """Plan tokens for ``active[at]``, taking pages from the youngest behind it if need be."""
        sample = active[at]
        want = min(sample.pending, budget)
        if want <= 0:
            return
        while (tokens := self._fitting(sample.sequence, want)) == 0 and at + 1 < len(active):
            self._preempt(active.pop(), sample)
        if tokens:
            self._take(sample, tokens)

    def admit(
        self, active: Sequence[Sample], waiting: Sequence[Sample], max_sequences: int
    ) -> tuple[Sample, ...]:
        """Start waiting samples while budget, sequence slots and pages last."""
        admitted: list[Sample] = []
        for sample in waiting:
            running = len(active) + len(admitted)
            if self.preempted or self.budget == 0 or running >= max_sequences:
                break
            spare = tuple(running for _ in self.free)
            if not _within(_add(self.cache.growth(None, sample.pending), spare), self.free):
                break
            tokens = self._fitting(None, min(sample.pending, self.budget))
            if tokens == 0:
                break
            self._take(sample, tokens)
            admitted.append(sample)
        return tuple(admitted)

    def _fitting(self, sequence: int | None, want: int) -> int:
        """The most tokens, up to ``want``, whose pages are free."""
        sizes = range(1, want + 1)
        if _within(self.cache.cost(sequence, want), self.free):
            return want
        return bisect_right(
            sizes, False, key=lambda n: not _within(self.cache.cost(sequence, n), self.free)
        )

    def _take(self, sample: Sample, tokens: int) -> None:
        self.chunks.append((sample, tokens))
        self.budget -= tokens
        self.free = _subtract(self.free, self.cache.cost(sample.sequence, tokens))

    def _preempt(self, victim: Sample, older: Sample) -> None:
        assert victim.sequence is not None
        reason = (
            f"{len(victim.tokens)} tokens gave way at {victim.computed} computed: request "
            f"{older.request.arrival}, which is older, needed pages and {self.free} were free"
        )
        self.preempted.append(Preemption(victim, reason))
        self.free = _add(self.free, self.cache.freed_by_release(victim.sequence))
