"""The samples of a request that searches: one for each live beam, all a token further at a time."""

import time

import numpy as np
import numpy.typing as npt

from quire.cache import KVCache
from quire.engine.beam import Beam, BeamSearch, Step
from quire.engine.queues import Queues
from quire.engine.request import Request, Sample, Status
from quire.errors import RequestError
from quire.sampling import SamplingParams

__all__ = ["BeamGroup", "require_searchable", "search_of"]


def require_searchable(params: SamplingParams, max_sequences: int, vocab: int) -> None:
    """Raise RequestError, with the numbers, for a search that cannot be."""
    if params.beam_width == 1:
        return
    if params.beam_width > max_sequences:
        raise RequestError(
            f"{params.beam_width} beams do not fit {max_sequences} sequences at a time; raise "
            "max_sequences or lower beam_width"
        )
    if params.beam_width > vocab:
        raise RequestError(
            f"{params.beam_width} beams cannot begin with different tokens of a vocabulary of "
            f"{vocab}; lower beam_width"
        )


def search_of(request: Request) -> BeamSearch:
    """The search that a request asks for."""
    params, most = request.params, request.most_tokens - len(request.prompt_tokens)
    return BeamSearch(params.beam_width, params.length_penalty, request.stop_tokens, most)


class BeamGroup:
    """Live beams of one request and the logits that have come for them.

    A beam whose logits are there waits until those of all others are; then each new beam goes on
    from a fork of the one it continues, and beams that nothing continues give their pages back.
    """

    def __init__(self, request: Request, search: BeamSearch) -> None:
        self.request, self.search = request, search
        self._live = [request.samples[0]]
        self._rows: dict[Sample, npt.NDArray[np.float32]] = {}

    def gather(
        self, sample: Sample, logits: npt.NDArray[np.float32], queues: Queues, cache: KVCache
    ) -> list[Beam] | None:
        """Take the logits float32 [vocab] of a live beam; the result, best first, at the end."""
        self._rows[sample] = logits.copy()
        sample.parked = True
        if len(self._rows) < len(self._live):
            return None
        rows = [self._rows[live] for live in self._live]
        self._rows.clear()
        for live in self._live:
            live.parked = False
        now = time.perf_counter()
        for each in self.request.samples:
            each.first_token_at = each.first_token_at or now
            each.last_token_at = now
        steps = self.search.advance(rows)
        if not steps:
            return self.search.ended
        self._follow(steps, queues, cache)
        return None

    def _follow(self, steps: list[Step], queues: Queues, cache: KVCache) -> None:
        parents = [self._live[step.parent] for step in steps]
        for beam in self._live:
            if beam not in parents:
                queues.leave(beam, Status.IDLE)
        idle = [s for s in self.request.samples if s.status is Status.IDLE]
        first_child: set[Sample] = set()
        live = []
        for parent in parents:
            child = parent
            if parent in first_child:
                child = idle.pop()
                child.tokens = list(parent.tokens)
                if parent.sequence is None:
                    queues.add(child)
                else:
                    queues.run(child, cache.fork(parent.sequence))
            first_child.add(parent)
            live.append(child)
        for beam, step in zip(live, steps, strict=True):
            beam.tokens.append(step.token)
        self._live = live
