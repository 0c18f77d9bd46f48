"""Prompts that arrive: each becomes a request, or is refused at once if it can never be served."""

import secrets
import time
from collections.abc import Sequence

from quire.config import ModelConfig
from quire.engine.alone import Alone
from quire.engine.beams import require_searchable
from quire.engine.policies import Policies
from quire.engine.prompts import Prompt, PromptReader, require_salt
from quire.engine.request import Request, Sample
from quire.engine.streamed import StreamPlan
from quire.evict_choice import EvictChoice
from quire.sampling import SamplingParams

__all__ = ["Arrivals"]


class Arrivals:
    """Makes the requests of an engine, and counts them. ``max_sequences`` run at a time."""

    def __init__(
        self,
        model: ModelConfig,
        prompts: PromptReader,
        policies: Policies,
        alone: Alone,
        max_sequences: int,
    ) -> None:
        self._model, self._prompts, self._policies = model, prompts, policies
        self._alone, self._max_sequences = alone, max_sequences
        self._count = 0

    def request(self, prompt: Prompt, params: SamplingParams, salt: str) -> Request:
        """A request with its samples, none of which is queued yet.

        Raises RequestError, with the numbers, for one that this engine can never serve.
        """
        tokens = tuple(self._prompts.tokens(prompt))
        self._prompts.require_servable(tokens, params)
        require_salt(salt)
        policy = self._policies.of(params)
        stream = self._require_room(tokens, params, policy)
        require_searchable(params, self._max_sequences, self._model.vocab_size)
        self._policies.remember(policy)
        seed = secrets.randbits(64) if params.seed is None else params.seed
        request = Request(self._count, tokens, params, seed, time.perf_counter(), salt=salt)
        self._count += 1
        request.stop_tokens = self._stop_tokens(params)
        request.most_tokens = min(len(tokens) + params.max_new_tokens, self._model.max_position)
        self._policies.note(request, policy)
        samples = range(max(params.n, params.beam_width))
        request.samples = tuple(Sample(request, i, list(tokens)) for i in samples)
        request.samples[0].stream = stream
        return request

    def _require_room(
        self, tokens: Sequence[int], params: SamplingParams, policy: EvictChoice | None
    ) -> StreamPlan | None:
        """How it is to be streamed; None if what it keeps fits the pool. RequestError if neither.

        What follows a policy cannot be streamed.
        """
        if policy is None:
            return self._alone.plan(self._prompts, tokens, params)
        if policy.drops:
            self._prompts.require_kept_fit(tokens, params, policy.tokens(len(tokens)))
        else:
            self._prompts.require_unstreamed(tokens, params, policy.policy)
        return None

    def _stop_tokens(self, params: SamplingParams) -> frozenset[int]:
        eos = () if params.ignore_eos else self._model.eos_token_ids
        return frozenset((*params.stop_token_ids, *eos))
