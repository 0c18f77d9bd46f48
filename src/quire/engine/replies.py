"""The replies of samples: from the tokens that were chosen to text, reasons to end, completions."""

import time
from collections.abc import Iterable

from quire.engine.alone import Alone
from quire.engine.completion import completion_of
from quire.engine.loads import Loads
from quire.engine.output import TextStream
from quire.engine.queues import Queues
from quire.engine.request import Completion, FinishReason, Request, Sample, Status, StepOutput
from quire.engine.shadow import Shadow
from quire.models import TextCodec
from quire.sampling import Choice

__all__ = ["Replies"]


class Replies:
    """The replies of an engine's samples as they grow. One that ends lets go of all it holds.

    codec    None where the checkpoint has no tokenizer, and replies have no text
    shadow   is told of samples that end, if there is one
    """

    def __init__(
        self,
        codec: TextCodec | None,
        queues: Queues,
        loads: Loads,
        alone: Alone,
        shadow: Shadow | None,
    ) -> None:
        self._codec, self._queues, self._loads = codec, queues, loads
        self._alone, self._shadow = alone, shadow
        self._texts: dict[Sample, TextStream] = {}

    def __len__(self) -> int:
        """How many have not ended."""
        return len(self._texts)

    def begin(self, request: Request) -> None:
        """The replies to a request begin, one for each sample."""
        for sample in request.samples:
            self._texts[sample] = TextStream(self._codec, tuple(request.params.stop))

    def text(self, sample: Sample) -> TextStream:
        """The text of a reply that has not ended."""
        return self._texts[sample]

    def decide(self, sample: Sample, choice: Choice) -> StepOutput:
        """Go on with a sample as was chosen."""
        if choice.token is None:
            piece, _ = self._texts[sample].flush()
            completion = self.finish(sample, "error", None, choice.error)
            return StepOutput(sample.request, sample.index, None, piece, completion)
        if choice.logprobs is not None:
            sample.logprobs.append(choice.logprobs)
        return self._accept(sample, choice.token)

    def fail(self, sample: Sample, error: str) -> StepOutput:
        """End a sample that cannot go on; it keeps the text and tokens it has."""
        completion = self.finish(sample, "error", None, error)
        return StepOutput(sample.request, sample.index, None, "", completion)

    def finish(
        self,
        sample: Sample,
        reason: FinishReason,
        stopped_by: str | int | None,
        error: str | None = None,
    ) -> Completion:
        """End a sample and give back what it holds; its completion."""
        self._alone.end(sample)
        self._loads.cancel(sample)
        self._queues.leave(sample, Status.FINISHED)
        text = self._texts.pop(sample)
        if reason == "cancelled":
            text.flush()
        completion = completion_of(sample, text.text, reason, stopped_by, error)
        sample.completion = completion
        if self._shadow is not None:
            self._shadow.finished(sample, whole=reason in ("stop", "length"))
        return completion

    def drop(self, places: Iterable[Sample]) -> None:
        """Forget samples that a search does not give back."""
        for place in places:
            if place.status is not Status.FINISHED:
                self._loads.cancel(place)
                self._queues.leave(place, Status.FINISHED)
                del self._texts[place]

    def _accept(self, sample: Sample, token: int) -> StepOutput:
        request, now = sample.request, time.perf_counter()
        sample.tokens.append(token)
        if sample.first_token_at is None:
            sample.first_token_at = now
        sample.last_token_at = now
        text = self._texts[sample]
        if token in request.stop_tokens:
            piece, stopped = text.flush()
            completion = self.finish(sample, "stop", stopped or token)
            return StepOutput(request, sample.index, token, piece, completion)
        piece, stopped = text.push(token)
        reason: FinishReason | None = "stop" if stopped is not None else None
        if stopped is None and len(sample.tokens) >= request.most_tokens:
            rest, stopped = text.flush()
            piece, reason = piece + rest, "length" if stopped is None else "stop"
        ended = None if reason is None else self.finish(sample, reason, stopped)
        return StepOutput(request, sample.index, token, piece, ended)
