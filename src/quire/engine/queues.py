"""Which samples wait, which run, and what each holds in the cache."""

from itertools import takewhile

from quire.cache import KVCache
from quire.engine.request import Sample, Status
from quire.engine.scheduler import StepPlan, places

__all__ = ["Queues"]


class Queues:
    """The samples of an engine that are not finished, both queues in order of arrival."""

    def __init__(self, cache: KVCache) -> None:
        self.waiting: list[Sample] = []
        self.running: list[Sample] = []
        self.preemptions = 0
        self._cache = cache

    @property
    def busy(self) -> bool:
        """True while a sample waits or runs."""
        return bool(self.waiting or self.running)

    @property
    def in_turn(self) -> list[Sample]:
        """Waiting samples before the first that must be streamed, which then has its turn alone."""
        return list(takewhile(lambda s: s.stream is None, self.waiting)) if self.waiting else []

    def add(self, sample: Sample) -> None:
        """Let a sample that holds nothing wait for its turn."""
        sample.status, sample.asked_tiers = Status.WAITING, False
        self.waiting.append(sample)
        self.waiting.sort(key=_arrival)

    def start(self, plan: StepPlan) -> None:
        """Apply what a plan decided about the queues."""
        for preemption in plan.preempt:
            self.preempt(preemption.sample, preemption.reason)
        for sample, match in zip(plan.admit, plan.matches, strict=True):
            self.admit(sample, self._cache.create(match))

    def fork(self, first: Sample, max_sequences: int) -> list[Sample]:
        """Let samples of the same prompt go on from where the first one, now, is through with it.

        As many as there are free places for; the others find the prompt in the prefix index.
        Returns those that run now.
        """
        if first.index or first.new_tokens:
            return []
        assert first.sequence is not None
        free = max_sequences - places(self.running)
        waiting = [s for s in first.request.samples[1:] if s.status is Status.WAITING]
        started = [s for s in waiting if not s.new_tokens][: max(0, free)]
        for sample in started:
            self.admit(sample, self._cache.fork(first.sequence))
        return started

    def admit(self, sample: Sample, sequence: int) -> None:
        """Let a waiting sample run on ``sequence``, which may hold part of its tokens already."""
        self.waiting.remove(sample)
        self.run(sample, sequence)
        if sample.cached_tokens is None:
            sample.cached_tokens = {"pool": sample.computed}

    def run(self, sample: Sample, sequence: int) -> None:
        """Let a sample that is in no queue run on ``sequence``."""
        sample.sequence, sample.computed = sequence, self._cache.length(sequence)
        sample.counted = False
        sample.status = Status.RUNNING
        self.running.append(sample)
        self.running.sort(key=_arrival)

    def preempt(self, sample: Sample, reason: str) -> None:
        """Take the pages of a running sample; it waits to be computed again."""
        self.leave(sample, Status.WAITING)
        self.add(sample)
        sample.preemptions.append(reason)
        self.preemptions += 1

    def leave(self, sample: Sample, status: Status) -> None:
        """Take a sample out of its queue, with ``status`` from now on, and free what it holds."""
        if sample.status in (Status.RUNNING, Status.WAITING):
            (self.running if sample.status is Status.RUNNING else self.waiting).remove(sample)
        if sample.sequence is not None:
            self._cache.release(sample.sequence)
        sample.sequence, sample.computed, sample.status = None, 0, status


def _arrival(sample: Sample) -> tuple[int, int]:
    return sample.request.arrival, sample.index
