"""The requests that search: from the logits of their beams to what each search gives back."""

import numpy as np
import numpy.typing as npt

from quire.cache import KVCache
from quire.engine.beam import Beam
from quire.engine.beams import BeamGroup, search_of
from quire.engine.queues import Queues
from quire.engine.replies import Replies
from quire.engine.request import FinishReason, Request, Sample, Status, StepOutput
from quire.errors import QuireError
from quire.sampler import likeliest

__all__ = ["Searches"]


class Searches:
    """The beam searches of an engine that have not ended."""

    def __init__(self, cache: KVCache, queues: Queues, replies: Replies) -> None:
        self._cache, self._queues, self._replies = cache, queues, replies
        self._groups: dict[Request, BeamGroup] = {}

    def __len__(self) -> int:
        """How many have not ended."""
        return len(self._groups)

    def begin(self, request: Request) -> None:
        """The search of a request begins, with its first sample as the only beam."""
        self._groups[request] = BeamGroup(request, search_of(request))

    def end(self, request: Request) -> bool:
        """Forget the search of a request; False if there is none."""
        return self._groups.pop(request, None) is not None

    def advance(self, sample: Sample, logits: npt.NDArray[np.float32]) -> list[StepOutput]:
        """Give a beam its logits float32 [vocab]; what the search gives back when it ends.

        Nothing of a search that failed in this step, by the logits of another beam.
        """
        request = sample.request
        if request not in self._groups:
            return []
        try:
            likeliest(logits, len(sample.tokens) - 1)  # raises if they are not finite
        except QuireError as error:
            return self._fail(request, str(error))
        found = self._groups[request].gather(sample, logits, self._queues, self._cache)
        if found is None:
            return []
        del self._groups[request]
        places = zip(request.samples[: request.params.n], found, strict=False)
        outputs = [self._give_back(place, beam) for place, beam in places]
        self._replies.drop(request.samples[len(outputs) :])
        return outputs

    def _give_back(self, place: Sample, beam: Beam) -> StepOutput:
        """Let a sample of the request end as ``beam`` did."""
        request, text = place.request, self._replies.text(place)
        self._queues.leave(place, Status.IDLE)
        place.tokens = [*request.prompt_tokens, *beam.tokens]
        place.cached_tokens, place.score = request.samples[0].cached_tokens, beam.score
        shown = beam.tokens[:-1] if beam.stopped else beam.tokens
        piece = "".join(text.push(token)[0] for token in shown) + text.flush()[0]
        reason: FinishReason = "stop" if beam.stopped else "length"
        last = beam.tokens[-1]
        done = self._replies.finish(place, reason, last if beam.stopped else None)
        return StepOutput(request, place.index, last, piece, done)

    def _fail(self, request: Request, error: str) -> list[StepOutput]:
        del self._groups[request]
        places = request.samples[: request.params.n]
        outputs = [self._replies.fail(place, error) for place in places]
        self._replies.drop(request.samples[len(outputs) :])
        return outputs
