"""Whose turn it is: the plan of the next step, made true in the queues."""

from collections.abc import Sequence

from quire.cache import KVCache
from quire.engine.loads import Loads
from quire.engine.pins import Pins
from quire.engine.policies import Policies
from quire.engine.queues import Queues
from quire.engine.request import Sample
from quire.engine.scheduler import Limits, StepPlan, plan_step
from quire.errors import QuireError

__all__ = ["Turns"]


class Turns:
    """Who runs in each step of an engine; makes room for them where there is none."""

    def __init__(
        self,
        queues: Queues,
        cache: KVCache,
        limits: Limits,
        *,
        policies: Policies,
        loads: Loads,
        pins: Pins,
    ) -> None:
        self._queues, self._cache, self._limits = queues, cache, limits
        self._policies, self._loads, self._pins = policies, loads, pins

    def next(self) -> Sequence[tuple[Sample, int]]:
        """(sample, tokens) of those that run now, all of which have been admitted.

        Empty if nobody waits, and where a step only made room or took in what was loaded. Raises
        QuireError if nobody can ever run, which must not be.
        """
        self._loads.finish()
        self._loads.start(self._queues.in_turn)
        plan = self._plan()
        if not plan.chunks and self._loads.wait():
            return ()
        while not (plan.chunks or plan.preempt) and self._queues.busy and self._pins.drop_one():
            plan = self._plan()
        self._queues.start(plan)
        if not (plan.chunks or plan.preempt) and self._queues.busy:
            raise QuireError(
                f"no sample can run: {len(self._queues.running)} running, "
                f"{len(self._queues.waiting)} waiting, {self._cache.free_pages} of "
                f"{self._cache.num_pages} pages free; "
                "this is a bug in Quire, please report it"
            )
        return plan.chunks

    def _plan(self) -> StepPlan:
        """The next step. Preemptions that free too little for anybody are applied on the way."""
        while True:
            self._policies.evictor.catch_up()
            running, waiting = self._queues.running, self._queues.in_turn
            plan = plan_step(running, waiting, self._limits, self._cache)
            if plan.chunks or not plan.preempt:
                return plan
            self._queues.start(plan)
