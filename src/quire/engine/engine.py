"""Engine: a model, its cache and a queue of requests. ``step`` is all that a server is built on.

Not thread-safe: one thread drives an engine.
"""

import copy
import functools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.backends import create_backend
from quire.batch import PagedBatch
from quire.cache.session import SessionFile, write_session
from quire.config import CacheConfig, EngineConfig, refuse_unknown
from quire.engine.ahead import StepsAhead
from quire.engine.alone import Alone
from quire.engine.arrivals import Arrivals
from quire.engine.evicting import Part
from quire.engine.explain import PrefixExplanation, explain
from quire.engine.forced import ForcedText
from quire.engine.forward import Forward
from quire.engine.identity import describe, identity_bytes
from quire.engine.loads import Loads
from quire.engine.outcomes import Outcomes
from quire.engine.pieces import Pieces
from quire.engine.pins import Pins
from quire.engine.policies import Policies, require_usable
from quire.engine.prompts import (
    Prompt,
    PromptReader,
    as_params,
    as_prompts,
    params_of_each,
    require_salt,
)
from quire.engine.queues import Queues
from quire.engine.reading import Attend
from quire.engine.replies import Replies
from quire.engine.request import Completion, Request, Sample, Status, StepOutput
from quire.engine.scheduler import Limits
from quire.engine.searches import Searches
from quire.engine.sessions import Session, load_session, no_pages, pages_to_save
from quire.engine.shadow import OpenedShadow, Shadow
from quire.engine.sizing import EnginePlan, Room, plan_engine
from quire.engine.status import EngineStatus, lossy_layers
from quire.engine.storage import (
    exact_config,
    layout_of,
    make_cache,
    prefix_tiers,
    require_formats,
)
from quire.engine.turns import Turns
from quire.errors import ConfigError, QuireError, RequestError
from quire.evict_choice import parse_eviction
from quire.machine import this_machine
from quire.models import Checkpoint, Progress, load_model, resolve_model
from quire.sampling import SamplingParams

__all__ = ["Engine"]

logger = logging.getLogger("quire")


class Engine:
    """Loads a checkpoint and serves requests on it, continuously batched.

    model      a Hugging Face directory, a hub name such as ``org/model``, or None for quill, the
               small model that ships with Quire
    progress   called with (what, done, total) while loading
    others     see :class:`EngineConfig` and :class:`CacheConfig`; unknown ones raise ConfigError

    ``plan`` says what it takes, and was made before anything was loaded.

    Raises CheckpointError for a model that cannot be loaded, ConfigError for settings that cannot
    be used or do not fit the machine's memory, BackendError for a backend that is not there.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        backend: str = "auto",
        threads: int | None = None,
        cache: CacheConfig | None = None,
        max_batch_tokens: int = 512,
        max_sequences: int = 64,
        shadow: float = 0.0,
        progress: Progress | None = None,
        **unknown: object,
    ) -> None:
        known = ["backend", "threads", "cache", "max_batch_tokens", "max_sequences", "shadow"]
        refuse_unknown("Engine", unknown, [*known, "progress"])
        config = EngineConfig(
            backend=backend,
            threads=threads,
            cache=CacheConfig() if cache is None else cache,
            max_batch_tokens=max_batch_tokens,
            max_sequences=max_sequences,
            shadow=shadow,
        )
        self.directory = resolve_model(model)
        self.backend = create_backend(backend, threads)
        require_formats(config.cache, self.backend)  # before anything is loaded
        self.plan = self._plan_memory(config, Checkpoint(self.directory).page_format)
        self._loaded = load_model(self.directory, self.backend, progress)
        self.model_config = self._loaded.config
        self.codec = self._loaded.codec
        self._set_up(config)

    def twin(self, config: EngineConfig) -> "Engine":
        """Another engine on the same loaded weights, with settings, cache and queues of its own.

        The same thread must drive both. Raises ConfigError for settings that cannot be used, and
        for another backend or number of threads, which belong to the weights.
        """
        own = (self.config.backend, self.config.threads)
        if (config.backend, config.threads) != own:
            raise ConfigError(
                f"a twin computes with backend and threads {own}, not "
                f"{(config.backend, config.threads)}; load another Engine for that"
            )
        other = copy.copy(self)
        vars(other).pop("identity", None)  # of other settings
        other.plan = other._plan_memory(config, self._loaded.page_format, loaded=True)
        other._set_up(config)
        return other

    def _plan_memory(self, config: EngineConfig, dtype: str, *, loaded: bool = False) -> EnginePlan:
        room = Room.of(self.backend, this_machine())
        plan = plan_engine(self.directory, config, dtype, room, loaded=loaded)
        logger.info("plan: %s", plan)
        return plan

    def _set_up(self, config: EngineConfig) -> None:
        """Everything but the weights: cache, tiers, queues."""
        self.config = config
        self._layout = layout_of(self.config, self._loaded)
        require_usable(self._layout, config.cache, parse_eviction(config.cache.evict))
        keyed = self.config.cache.cache_dir is not None  # pages that outlive the process
        identity = identity_bytes(self.identity) if keyed else b""
        self.cache = make_cache(
            *(self._layout, self.plan.num_pages, self.backend),
            identity if config.cache.prefix_cache else None,
        )
        self._queues = Queues(self.cache)
        self._pins = Pins(self.cache)
        self._tiers = prefix_tiers(
            *(config.cache, self.cache, self.backend, self._loaded), lambda: self.identity
        )
        self._shadow = self._make_shadow()
        self._open_rooms(config)

    def _open_rooms(self, config: EngineConfig) -> None:
        """What carries out the parts of a step."""
        cache, queues, most = self.cache, self._queues, config.max_sequences
        model, codec = self.model_config, self.codec
        self._prompts = PromptReader(self.directory, model, codec, cache)
        self._policies = Policies(cache, self.backend, config.cache)
        self._alone = Alone(config, cache, self.backend, self._tiers, self._pins)
        self._arrivals = Arrivals(model, self._prompts, self._policies, self._alone, most)
        self._loads = Loads(queues, cache, self._tiers, most)
        limits = Limits(config.max_batch_tokens, most)
        self._turns = Turns(
            *(queues, cache, limits), policies=self._policies, loads=self._loads, pins=self._pins
        )
        self._forward = Forward(cache, self._loaded.model, self._policies, config.max_batch_tokens)
        self._replies = Replies(codec, queues, self._loads, self._alone, self._shadow)
        self._searches = Searches(cache, queues, self._replies)
        self._ahead = StepsAhead(
            cache, self._loaded.model, queues, policies=self._policies, max_sequences=most
        )
        self._outcomes = Outcomes(
            *(queues, self._replies, self._searches, self._ahead),
            shadow=self._shadow,
            max_sequences=most,
        )

    # -- requests ----------------------------------------------------------------------------

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """What decides the bits of this engine's pages. Reads all weights, to digest them.

        With a ``cache_dir`` only once: it remembers the digests of files that have not changed.
        """
        cache_dir = self.config.cache.cache_dir
        memo = None if cache_dir is None else Path(cache_dir) / "weights.json"
        return describe(self.directory, self.model_config, self._layout, self.backend, memo)

    def submit(
        self, prompt: Prompt, params: SamplingParams | None = None, *, salt: str = ""
    ) -> Request:
        """Queue a prompt (text or token ids); nothing is computed until :meth:`step`.

        Requests share the pages of equal prefixes only with requests of the same ``salt``: give
        each tenant its own, and none can tell, by time or content, what others asked.

        Raises RequestError for a prompt that is empty, longer than the context, has token ids
        outside the vocabulary or needs a tokenizer that is not there, and for a request whose
        tokens can never fit the page pool.
        """
        params = as_params(params)
        request = self._arrivals.request(prompt, params, salt)
        self._replies.begin(request)
        searches = params.beam_width > 1
        if searches:
            self._searches.begin(request)
        for sample in request.samples[:1] if searches else request.samples:
            self._queues.add(sample)
        return request

    def cancel(self, request: Request) -> None:
        """End a request now; its samples keep the text and tokens they have."""
        given_back = request.params.n if self._searches.end(request) else len(request.samples)
        for sample in request.samples[:given_back]:
            if sample.status is not Status.FINISHED:
                self._replies.finish(sample, "cancelled", None)
        self._replies.drop(request.samples[given_back:])

    @property
    def has_work(self) -> bool:
        """True while a request is waiting or running, or a shadow is being read."""
        return self._queues.busy or (self._shadow is not None and self._shadow.pending)

    def step(self) -> list[StepOutput]:
        """One forward pass over a batch of prefill chunks and decodes; what it brought.

        If it raises, the cache and the queues are as before the pass, and a later step repeats it.
        Where a device chooses tokens, a step that only decodes has launched the next one when it
        returns (``ahead.py``). With ``shadow`` it then reads one chunk of a shadow.
        """
        outputs = self._serve()
        if self._shadow is not None:
            self._shadow.step()
        return outputs

    def _serve(self) -> list[StepOutput]:
        """A step of the requests."""
        self._pins.expire()
        self._outcomes.recover()
        if self._queues.busy and not (self._queues.running or self._queues.in_turn):
            return self._stream_on(self._queues.waiting[0])
        if self._ahead.samples:
            outputs = self._outcomes.land()
            if self._tiers is not None:
                self._tiers.store()
            return outputs
        chunks = self._turns.next()
        if not chunks:
            return []
        outputs = self._run(chunks)
        if self._tiers is not None:
            self._tiers.store()
            if not self._queues.busy:
                self._tiers.settle()  # there may be no later step
        return outputs

    def flush(self) -> None:
        """Wait until every page that is to be on disk is there."""
        if self._tiers is not None:
            self._tiers.flush()

    def close(self) -> None:
        """Cancel what is queued, store what is to be stored, and let the tiers go."""
        for sample in [*self._queues.waiting, *self._queues.running]:
            if not sample.request.finished:
                self.cancel(sample.request)
        if self._shadow is not None:
            self._shadow.drop()
        if self._tiers is not None:
            self._tiers.close()
            self._tiers = None

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- the whole of it ---------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Prompt] | Prompt,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Completions of all prompts, in their order, the ``n`` samples of each side by side.

        One prompt may be given without a list; ``params`` are those of all, or a list of each
        one's. Interrupted, it cancels what it had submitted. Shadows are read to their end.
        """
        listed, requests = as_prompts(prompts), list[Request]()
        each = params_of_each(params, len(listed))
        try:
            requests.extend(map(self.submit, listed, each))
            while not all(request.finished for request in requests):
                self.step()
        except BaseException:
            for request in requests:
                self.cancel(request)
            raise
        while self._shadow is not None and self._shadow.pending:
            self._shadow.step()
        return [completion for request in requests for completion in request.completions]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """Text pieces of one completion as they come, never half a character.

        Closing the iterator early cancels the request. Raises RequestError, at once, for ``n``
        above 1 or a checkpoint without a tokenizer; QuireError if the request ends in an error.
        """
        if self.codec is None:
            raise RequestError(
                "stream() gives text, and this checkpoint has no tokenizer; use submit() and step()"
            )
        params = as_params(params)
        if params.n != 1 or params.beam_width != 1:
            raise RequestError(
                f"stream() follows one sample, but n is {params.n} and beam_width "
                f"{params.beam_width}; use submit()"
            )
        request = self.submit(prompt, params)
        return Pieces(request, self._replies.text(request.samples[0]), self.step, self.cancel)

    def logits(self, prompt: Prompt) -> npt.NDArray[np.float32]:
        """Next-token logits at every position of a prompt, float32 [tokens, vocab].

        Raises RequestError as :meth:`submit` does, CacheFull if running requests leave too few
        pages.
        """
        self._alone.require_pool("logits()")
        tokens = self._prompts.tokens(prompt)
        self._prompts.require_context(len(tokens), 0)
        with self.forced() as text:
            return text.score(tokens)

    def forced(self) -> ForcedText:
        """An open sequence whose tokens are told, not chosen: for scoring text.

        Raises CacheFull while a context larger than the pool is running.
        """
        self._alone.require_pool("teacher forcing")
        shape = (self.config.max_batch_tokens, self.model_config.vocab_size)
        forward, begin = self._forward, self._policies.follow_forced
        return ForcedText(self.cache, forward.forced, forward.affordable, shape, begin)

    def attention(self, parts: Sequence[Part], batch: PagedBatch) -> Attend:
        """How a step of (sequence, new tokens, wanted rows) attends, layer by layer."""
        return self._policies.attention(parts, batch)

    def explain_prefix(self, prompt: Prompt, *, salt: str = "") -> PrefixExplanation:
        """What of a prompt is cached now and why the rest is not; changes nothing."""
        return explain(self.cache, self.codec, self._prompts.query(prompt, salt), self._tiers)

    def pin(self, prompt: Prompt, seconds: float, *, salt: str = "") -> int:
        """Hold what is cached of a prompt for ``seconds``; returns how many tokens that is.

        Pinned pages are not evicted, unless nothing could run otherwise: then the pin that ends
        first is dropped. Raises RequestError for a time that is not positive, CacheFull while a
        context larger than the pool is running.
        """
        self._alone.require_pool("a pin")
        return self._pins.add(self._prompts.query(prompt, salt), seconds)

    def save_session(
        self, request: Request, path: str | Path, *, extra: Mapping[str, Any] | None = None
    ) -> int:
        """Write a request's first sample to a file (docs/sessions.md); returns how many tokens.

        Pages that are gone are computed again first. The last token is left out: its keys and
        values were never needed. Of a context larger than the pool no pages are saved, only
        ``extra``, which is kept beside them: anything that JSON can hold. Raises SessionError if
        the file cannot be written, CacheFull if running requests leave too few pages.
        """
        self._alone.require_pool("saving a session")
        tokens, pages = pages_to_save(self.cache, request, self._forward.prefill)
        write_session(Path(path), SessionFile(self.identity, tokens, pages, extra or {}))
        return len(tokens)

    def save_notes(self, path: str | Path, extra: Mapping[str, Any]) -> None:
        """Write a session file without pages: ``extra`` alone. Raises SessionError."""
        groups = no_pages(self.cache.layout)
        write_session(Path(path), SessionFile(self.identity, (), groups, extra))

    def load_session(self, path: str | Path, *, salt: str = "") -> Session:
        """Bring a saved conversation into the prefix cache; prompts that go on need no prefill.

        A file that is missing, damaged, of other weights or settings, or that does not fit the
        pool is a miss: ``reason`` says why, and nothing has changed.
        """
        require_salt(salt)
        if self._alone.running:
            return Session(reason="a context larger than the pool is running; load it afterwards")
        return load_session(self.cache, Path(path), salt, self.identity, self.model_config)

    def status(self) -> EngineStatus:
        """Queues and KV bytes at this moment."""
        return EngineStatus(
            running=len(self._queues.running),
            waiting=len(self._queues.waiting),
            kv=self.cache.usage(),
            preemptions=self._queues.preemptions,
            pins=self._pins.count,
            pins_dropped=self._pins.dropped,
            tiers=() if self._tiers is None else self._tiers.usage(),
            lossy=(*lossy_layers(self._layout), *self._policies.lossy),
            reading=self._policies.reader.status,
            shadow=None if self._shadow is None else self._shadow.usage,
        )

    def decode_bytes(self, context: int) -> int:
        """Bytes that a step must read to decode one token of one sequence after ``context`` tokens.

        Weights, but for tables of which a step reads single rows, and the keys and values that the
        token sees.
        """
        return self._loaded.bytes_read_a_step + self.cache.layout.seen_bytes(context)

    # -- inside: set-up and checks -----------------------------------------------------------

    def _make_shadow(self) -> Shadow | None:
        if self.config.shadow == 0:
            return None
        return Shadow(self.config.shadow, self.config.max_batch_tokens, self._open_exact)

    def _open_exact(self, tokens: int) -> OpenedShadow:
        """A sequence in an exact cache of just so many tokens; QuireError if it is too large."""
        exact = self.twin(exact_config(self.config, self._loaded, tokens, self.cache.usage()))
        return OpenedShadow(exact.forced(), exact.cache.usage().pool_bytes)

    # -- inside: a step ----------------------------------------------------------------------

    def _stream_on(self, sample: Sample) -> list[StepOutput]:
        """A step of the sample that is streamed; it has the engine for itself."""
        try:
            self._alone.open(sample)
        except (QuireError, OSError, MemoryError) as error:
            return [self._replies.fail(sample, f"it cannot be streamed: {error}")]
        logits = self._alone.step(self._loaded.model)
        return [] if logits is None else self._outcomes.decide_alone(sample, logits)

    def _run(self, chunks: Sequence[tuple[Sample, int]]) -> list[StepOutput]:
        """Compute (sample, tokens) and go on with those whose tokens are all in then."""
        parts, deciding = [], []
        for sample, count in chunks:
            assert sample.sequence is not None
            start = sample.computed
            ends = start + count == len(sample.tokens)
            chunk = sample.tokens[start : start + count]
            parts.append((sample.sequence, chunk, (count - 1,) if ends else ()))
            if ends:
                deciding.append(sample)
        started, samples = time.perf_counter(), [sample for sample, _ in chunks]
        for sample in samples:
            self._policies.follow(sample)
        logits = self._forward.run(parts, samples)
        if self._tiers is not None and any(count > 1 for _, count in chunks):
            logits.wait()
            tokens = sum(count for _, count in chunks)
            self._tiers.compute_pace.add(time.perf_counter() - started, tokens)
        for sample, count in chunks:
            sample.computed += count
        self._outcomes.expect(deciding)
        self._policies.count(samples)
        self._policies.evict(parts, samples, self._queues)
        return self._outcomes.decide(deciding, logits)
