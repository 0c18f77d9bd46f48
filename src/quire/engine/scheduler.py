"""Which samples run in the next step, with how many tokens each, and who must give way.

A pure function of the queues, the limits and a view of the cache; it changes none of them.

Policy: first come, first served. Samples are served in order of arrival; those that decode get
their one token before prefills share what is left of the budget. A sample that finds no free pages
takes those of the youngest sample behind it, which is computed again later; if none is behind it,
it waits in place. If then nobody can run, the youngest gives way to an older
one that waits. So the oldest always makes progress. A waiting sample is admitted when there is
budget left, so that every running one got all it asked for, and when all its tokens (with eviction,
all that it keeps) fit beside one spare page for each running sample. It starts behind the part of
its tokens that is cached; while a running sample computes more of that part, it waits, so that
nothing is computed twice.
"""

import operator
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from quire.cache import PrefixMatch, PrefixQuery
from quire.cache.prefix_tree import common_tokens
from quire.engine.request import Sample, Status

__all__ = ["CacheView", "Limits", "Preemption", "StepPlan", "awaits", "places", "plan_step"]

Pages = tuple[int, ...]


class CacheView(Protocol):
    """What the scheduler reads of the cache: pages of each of its areas, which are layer groups,
    and the open pages of those that pack whole ones.
    """

    @property
    def free_pages(self) -> Pages:
        """Pages that nobody holds."""

    def match(self, query: PrefixQuery, limit: int) -> PrefixMatch | None:
        """The cached part of a prompt, of at most ``limit`` tokens."""

    def shareable(self, tokens: int) -> int:
        """How many of ``tokens`` leading tokens others can use while a sequence is running."""

    def cost(self, sequence: int | PrefixMatch | None, new_tokens: int) -> Pages:
        """Pages that ``new_tokens`` more tokens in one step would take.

        A match, or None, is a sequence that is yet to be created.
        """

    def growth(self, sequence: int | PrefixMatch | None, new_tokens: int) -> Pages:
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
    """``chunks`` run, (sample, tokens); ``admit`` are those of them that start now, ``matches``
    what of each is cached.
    """

    chunks: tuple[tuple[Sample, int], ...]
    admit: tuple[Sample, ...]
    matches: tuple[PrefixMatch | None, ...]
    preempt: tuple[Preemption, ...]


def _add(a: Pages, b: Pages) -> Pages:
    return tuple(map(operator.add, a, b))


def _subtract(a: Pages, b: Pages) -> Pages:
    return tuple(map(operator.sub, a, b))


def _within(need: Pages, free: Pages) -> bool:
    return all(map(operator.le, need, free))


def plan_step(
    running: Sequence[Sample], waiting: Sequence[Sample], limits: Limits, cache: CacheView
) -> StepPlan:
    """The next step. ``running`` and ``waiting`` are in order of arrival."""
    planner = _Planner(limits.max_batch_tokens, cache)
    active = list(running)
    at = 0
    while at < len(active):
        want = active[at].pending
        if want > 1:  # those behind it that decode get theirs before the rest of a prefill
            kept = sum(1 for sample in active[at + 1 :] if sample.pending == 1)
            want = min(want, max(planner.budget - kept, 1 if at == 0 else 0))
        planner.serve(active, at, min(want, planner.budget))
        at += 1
    admitted = planner.admit(active, waiting, limits.max_sequences)
    planner.give_way(active, waiting)
    samples, matches = tuple([s for s, _ in admitted]), tuple([m for _, m in admitted])
    return StepPlan(tuple(planner.chunks), samples, matches, tuple(planner.preempted))


class _Planner:
    """The step while it is being planned."""

    def __init__(self, budget: int, cache: CacheView) -> None:
        self.budget, self.cache = budget, cache
        self.free = cache.free_pages
        self.chunks: list[tuple[Sample, int]] = []
        self.preempted: list[Preemption] = []

    def serve(self, active: list[Sample], at: int, want: int) -> None:
        """Plan tokens for ``active[at]``, taking pages from the youngest behind it if need be."""
        sample = active[at]
        if want <= 0:
            return
        while not (fitting := self._fitting(sample.sequence, want))[0]:
            victims = [i for i in range(at + 1, len(active)) if active[i].load is None]
            if not victims:
                break
            self._preempt(active.pop(victims[-1]), sample)
        if fitting[0]:
            self._take(sample, *fitting)

    def admit(
        self, active: Sequence[Sample], waiting: Sequence[Sample], max_sequences: int
    ) -> list[tuple[Sample, PrefixMatch | None]]:
        """Start waiting samples while budget, sequence slots and pages last."""
        admitted: list[tuple[Sample, PrefixMatch | None]] = []
        if not waiting:
            return admitted
        computing = [(s, s.computed) for s in active if s.uncomputed > 1]
        for sample in waiting:
            running = [*active, *(s for s, _ in admitted)]
            if self.preempted or self.budget == 0 or places([*running, sample]) > max_sequences:
                break
            if sample.parked:
                continue
            match = self.cache.match(sample.prefix_query, sample.match_limit)
            if awaits(sample, _cached(match), computing, self.cache):
                continue
            choices: tuple[PrefixMatch | None, ...] = (None,) if match is None else match.choices()
            fitting = [m for m in choices if self._has_room(sample, m, len(running))]
            if not fitting:
                break
            match = fitting[0]
            cached = _cached(match)
            most = min(len(sample.tokens) - cached, self.budget)
            self._take(sample, *self._fitting(match, most))
            admitted.append((sample, match))
            computing.append((sample, cached))
            if match is not None and match.takes:
                break  # another match may have counted on the page that it takes
        return admitted

    def give_way(self, active: Sequence[Sample], waiting: Sequence[Sample]) -> None:
        """If nothing can run, the youngest makes room for an older one that waits.

        A search waits for a beam of its own that was preempted: its other beams hold pages, and
        none of those behind them may find any.
        """
        older = next((sample for sample in waiting if not sample.parked), None)
        if self.chunks or self.preempted or older is None:
            return
        age = older.request.arrival, older.index
        for sample in reversed(active):
            if sample.load is None and (sample.request.arrival, sample.index) > age:
                self._preempt(sample, older)
                break

    def _has_room(self, sample: Sample, match: PrefixMatch | None, running: int) -> bool:
        """True if all that a sample keeps fits beside a spare page for each running sample."""
        growth = self.cache.growth(match, sample.most_kept - _cached(match))
        spare = tuple(running for _ in self.free)
        return _within(_add(growth, spare), self.free) and self._fitting(match, 1)[0] == 1

    def _fitting(self, sequence: int | PrefixMatch | None, want: int) -> tuple[int, Pages]:
        """The most tokens, up to ``want``, whose pages are free, and what they cost."""
        cost = self.cache.cost(sequence, want)
        if not any(cost) or _within(cost, self.free):
            return want, cost
        sizes = range(1, want + 1)
        most = bisect_right(
            sizes, False, key=lambda n: not _within(self.cache.cost(sequence, n), self.free)
        )
        return most, self.cache.cost(sequence, most)

    def _take(self, sample: Sample, tokens: int, cost: Pages) -> None:
        self.chunks.append((sample, tokens))
        self.budget -= tokens
        if any(cost):
            self.free = _subtract(self.free, cost)

    def _preempt(self, victim: Sample, older: Sample) -> None:
        assert victim.sequence is not None
        reason = (
            f"{len(victim.tokens)} tokens gave way at {victim.computed} computed: request "
            f"{older.request.arrival}, which is older, needed pages and {self.free} were free"
        )
        self.preempted.append(Preemption(victim, reason))
        self.free = _add(self.free, self.cache.freed_by_release(victim.sequence))


def _cached(match: PrefixMatch | None) -> int:
    return 0 if match is None else match.tokens


def places(samples: Sequence[Sample]) -> int:
    """How many sequences ``samples`` may come to at a time: a search counts with all its beams."""
    width: dict[int, int] = {}
    for sample in samples:
        request = sample.request
        beams = request.params.beam_width
        width[request.arrival] = beams if beams > 1 else width.get(request.arrival, 0) + 1
    return sum(width.values())


def awaits(
    sample: Sample, cached: int, computing: Sequence[tuple[Sample, int]], cache: CacheView
) -> bool:
    """True if a running sample will bring more of ``sample`` into the cache than is there.

    computing   (sample, how many of its tokens are there) of those that run and are not through
                with their prompt
    """
    if _follows(sample):
        return True
    for other, computed in computing:
        if other.request.salt == sample.request.salt:
            common = common_tokens(other.prefix_query.data, sample.prefix_query.data)
            if other.request.eviction is not None:  # what it changes is not shared
                common = min(common, other.match_limit)
            if cache.shareable(min(common, sample.match_limit)) > max(cached, computed):
                return True
    return False


def _follows(sample: Sample) -> bool:
    """True if the first sample of the same prompt is about to share what it computes."""
    first = sample.request.samples[0] if sample.request.samples else sample
    return (
        first is not sample
        and not sample.new_tokens
        and first.status is not Status.FINISHED
        and first.computed < len(sample.request.prompt_tokens)
    )
