"""What comes of a step: from its logits to a choice for each sample, and what the choice brings.

Samples that were computed and not yet decided on are remembered: those of a step that was
interrupted in between are computed again.
"""

from collections.abc import Sequence

from quire.backends import Logits
from quire.engine.ahead import StepsAhead
from quire.engine.deciding import choose_for
from quire.engine.queues import Queues
from quire.engine.replies import Replies
from quire.engine.request import Sample, Status, StepOutput
from quire.engine.searches import Searches
from quire.engine.shadow import Shadow
from quire.errors import QuireError

__all__ = ["Outcomes"]


class Outcomes:
    """What comes of an engine's steps. ``max_sequences`` run at a time, forks included."""

    def __init__(
        self,
        queues: Queues,
        replies: Replies,
        searches: Searches,
        ahead: StepsAhead,
        *,
        shadow: Shadow | None,
        max_sequences: int,
    ) -> None:
        self._queues, self._replies, self._searches = queues, replies, searches
        self._ahead, self._shadow, self._max_sequences = ahead, shadow, max_sequences
        self._undecided: list[Sample] = []

    def expect(self, samples: Sequence[Sample]) -> None:
        """The tokens of ``samples`` are all in; :meth:`decide` follows, or :meth:`recover`."""
        self._undecided = list(samples)

    def recover(self) -> None:
        """Samples that a step had computed when it was interrupted are computed again."""
        for sample in self._undecided:
            if sample.status is Status.RUNNING:
                self._queues.preempt(sample, "a step was interrupted before its token was chosen")
        self._undecided.clear()

    def decide(self, deciding: Sequence[Sample], logits: Logits) -> list[StepOutput]:
        """Go on with samples that were expected; each has a row of ``logits``, in order.

        Where the device chooses, after the next step was launched.
        """
        if self._shadow is None and self._ahead.begin(deciding, logits):
            return self.land()
        outputs: list[StepOutput] = []
        choosing: list[tuple[Sample, int]] = []
        for row, sample in enumerate(deciding):
            if sample.request.params.beam_width > 1:
                outputs += self._searches.advance(sample, logits.row(row))
                self._undecided.remove(sample)
                continue
            choosing.append((sample, row))
            if len(sample.request.samples) > 1:
                forks = self._queues.fork(sample, self._max_sequences)
                choosing += [(fork, row) for fork in forks]
                self._undecided += forks
        choices = choose_for(choosing, logits, self._shadow)
        for (sample, _), choice in zip(choosing, choices, strict=True):
            outputs.append(self._replies.decide(sample, choice))
            self._undecided.remove(sample)
        return outputs

    def decide_alone(self, sample: Sample, logits: Logits) -> list[StepOutput]:
        """Go on with the sample that is streamed: of logits [1, vocab], which are not lost."""
        (choice,) = choose_for([(sample, 0)], logits, self._shadow)
        return [self._replies.decide(sample, choice)]

    def land(self) -> list[StepOutput]:
        """What came of a step that ran while the host was elsewhere; the next one runs now."""
        self._undecided = list(self._ahead.samples)
        try:
            landed = self._ahead.land()
        except QuireError:  # nothing was lost
            self._undecided.clear()
            raise
        outputs = []
        for sample, choice in landed:
            outputs.append(self._replies.decide(sample, choice))
            self._undecided.remove(sample)
        self._undecided.clear()
        return outputs
