"""Steps that run ahead: they begin before the host knows the tokens of the step before.

Where tokens are chosen on a device, the next step can take them from there. The host then keeps
its books, makes text and hands out results while the device computes, instead of letting it wait
(vLLM's asynchronous scheduling, SGLang's overlap scheduler). A step runs ahead where every running
sample decodes one token, none could begin, and none is certain to end. A sample that does end, by
a stop token or its text, has then computed one token more than it needed; its keys and values are
those of that token, and leave the sequence with the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from quire.backends import Ahead, Logits
from quire.cache import KVCache, Reservation
from quire.engine.deciding import ask_of
from quire.engine.policies import Policies, Step
from quire.engine.queues import Queues
from quire.engine.request import Sample, Status
from quire.engine.scheduler import places
from quire.errors import CacheFull
from quire.models import CausalLM
from quire.sampling import Choice

__all__ = ["StepsAhead"]

_UNKNOWN = (-1,)  # a token that only the device knows


@dataclass
class _Flight:
    """A step whose tokens the device chooses: ``samples`` in order of its rows, and the sequences
    that they ran on. ``grounded`` once the step behind it could not be launched.
    """

    samples: tuple[Sample, ...]
    sequences: tuple[int, ...]
    ahead: Ahead
    grounded: bool = False

    @property
    def whole(self) -> bool:
        """True while none of its samples was taken out of its run."""
        return all(map(self.has, range(len(self.samples))))

    def has(self, row: int) -> bool:
        """True while the sample of a row still runs as it did."""
        sample = self.samples[row]
        return sample.status is Status.RUNNING and sample.sequence == self.sequences[row]


class StepsAhead:
    """The step that an engine's device computes while the host is elsewhere; at most one."""

    def __init__(
        self,
        cache: KVCache,
        model: CausalLM,
        queues: Queues,
        *,
        policies: Policies,
        max_sequences: int,
    ) -> None:
        self._cache, self._model, self._queues = cache, model, queues
        self._policies, self._most = policies, max_sequences
        self._flight: _Flight | None = None

    @property
    def samples(self) -> tuple[Sample, ...]:
        """Those whose tokens the device chooses now; :meth:`land` has to be called for them."""
        return () if self._flight is None else self._flight.samples

    def begin(self, deciding: Sequence[Sample], logits: Logits) -> bool:
        """Let the device choose the tokens of ``deciding``, to each of which belongs a row.

        False, with nothing begun, where the backend or what the samples ask for needs the host, and
        where the step behind could not run ahead.
        """
        if not self._goes_on(deciding):
            return False
        ahead = logits.ahead([ask_of(sample, row) for row, sample in enumerate(deciding)])
        if ahead is None:
            return False
        self._flight = _Flight(tuple(deciding), _sequences(deciding), ahead)
        return True

    def land(self) -> list[tuple[Sample, Choice]]:
        """Launch the step behind the one that runs, if it can be; then wait for the tokens.

        They are for the samples that still run. If launching raises, the cache is as it was, the
        tokens are not lost, and the next call does not launch.
        """
        flight = self._flight
        assert flight is not None
        launched = None
        if flight.whole and not flight.grounded and self._goes_on(flight.samples):
            launched = self._launch(flight)
        self._flight = None
        try:
            choices = flight.ahead.take()
        except BaseException:
            if launched is not None:
                self._cache.rollback(launched[0])
            raise
        if launched is not None:
            reservation, following = launched
            told = [None if choice.token is None else [choice.token] for choice in choices]
            self._cache.commit(reservation, self._policies.exact(told))
            for sample in flight.samples:
                sample.computed += 1
            self._policies.count(flight.samples)
            self._flight = _Flight(flight.samples, flight.sequences, following)
        landed = zip(flight.samples, choices, strict=True)
        return [pair for row, pair in enumerate(landed) if flight.has(row)]

    def _launch(self, flight: _Flight) -> tuple[Reservation, Ahead] | None:
        """The next step of a flight's samples, whose tokens only the device knows."""
        try:
            reservation = self._cache.reserve([(each, 1) for each in flight.sequences])
        except CacheFull:
            return None
        try:
            for sample, grows in zip(flight.samples, reservation.grows, strict=True):
                if grows:
                    sample.count_bytes(self._cache)
            parts = [(sequence, _UNKNOWN, (0,)) for sequence in flight.sequences]
            rows = range(len(parts))
            step = Step(parts, flight.ahead.tokens, rows, reservation.batch)
            logits = self._policies.forward(self._model, step)
            asked = [ask_of(sample, row, known=False) for row, sample in enumerate(flight.samples)]
            following = logits.ahead(asked)
            assert following is not None  # what was asked for once can be asked for again
        except BaseException:
            flight.grounded = True
            self._cache.rollback(reservation)
            raise
        return reservation, following

    def _goes_on(self, samples: Sequence[Sample]) -> bool:
        """True if the step behind the one that decides on ``samples`` is certain to be theirs."""
        running, waiting = self._queues.running, self._queues.waiting
        if len(samples) != len(running) or (waiting and places(running) < self._most):
            return False
        return all(map(_may_run_ahead, samples))


def _may_run_ahead(sample: Sample) -> bool:
    request = sample.request
    plain = request.eviction is None and request.params.beam_width == 1
    return plain and len(sample.tokens) + 1 < request.most_tokens


def _sequences(samples: Sequence[Sample]) -> tuple[int, ...]:
    found = tuple(sample.sequence for sample in samples if sample.sequence is not None)
    assert len(found) == len(samples)
    return found
