"""Engine: a model, its cache and a queue of requests. ``step`` is all that a server is built on.

Not thread-safe: one thread drives an engine.
"""

import copy
import functools
import itertools
import logging
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.backends import Logits, create_backend
from quire.batch import PagedBatch
from quire.cache import PrefixQuery
from quire.cache.session import SessionFile, write_session
from quire.config import CacheConfig, EngineConfig, refuse_unknown
from quire.engine.ahead import StepsAhead
from quire.engine.beams import BeamGroup, search_of
from quire.engine.completion import completion_of
from quire.engine.deciding import choose_for
from quire.engine.evicting import Part
from quire.engine.explain import PrefixExplanation, explain
from quire.engine.forced import ForcedText
from quire.engine.identity import describe, identity_bytes
from quire.engine.loads import Loads
from quire.engine.output import TextStream
from quire.engine.pieces import Pieces
from quire.engine.pins import Pins
from quire.engine.policies import Attend, Policies, require_usable
from quire.engine.prompts import Prompt, PromptReader, as_prompts, require_salt
from quire.engine.queues import Queues
from quire.engine.request import (
    Completion,
    FinishReason,
    Request,
    Sample,
    Status,
    StepOutput,
)
from quire.engine.scheduler import Limits, StepPlan, places, plan_step
from quire.engine.sessions import Session, load_session, no_pages, pages_of
from quire.engine.shadow import OpenedShadow, Shadow
from quire.engine.sizing import EnginePlan, Room, plan_engine
from quire.engine.status import EngineStatus, lossy_layers
from quire.engine.storage import (
    exact_config,
    layout_of,
    make_cache,
    open_tiers,
    require_formats,
)
from quire.engine.streamed import StreamedRun, StreamPlan, plan_stream
from quire.engine.tiering import PrefixTiers, compute_pace
from quire.errors import CacheFull, ConfigError, QuireError, RequestError, SessionError
from quire.evict_choice import parse_eviction
from quire.machine import this_machine
from quire.models import Checkpoint, Progress, load_model, resolve_model
from quire.pages import page_format
from quire.sampler import likeliest
from quire.sampling import Choice, SamplingParams

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
        self._policies = Policies(self.cache, self.backend, config.cache)
        self._pins = Pins(self.cache)
        self._prompts = PromptReader(self.directory, self.model_config, self.codec, self.cache)
        self._tiers = self._open_tiers()
        self._queues = Queues(self.cache)
        self._loads = Loads(self._queues, self.cache, self._tiers, config.max_sequences)
        self._shadow = self._make_shadow()
        self._streamed: StreamedRun | None = None
        self._undecided: list[Sample] = []
        self._searches: dict[Request, BeamGroup] = {}
        self._texts: dict[Sample, TextStream] = {}
        self._arrivals = 0
        self._limits = Limits(config.max_batch_tokens, config.max_sequences)
        self._ahead = StepsAhead(self.cache, self._loaded.model, self._queues, config.max_sequences)

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
        params = SamplingParams() if params is None else params
        tokens = tuple(self._prompts.tokens(prompt))
        self._prompts.require_servable(tokens, params)
        require_salt(salt)
        policy = self._policies.of(params)
        stream = None
        if policy is None:
            stream = self._plan_stream(tokens, params)
        elif policy.drops:
            kept = policy.tokens(len(tokens)) + self._layout.page_size
            self._prompts.require_kept_fit(tokens, params, kept)
        else:
            self._prompts.require_unstreamed(tokens, params, policy.policy)
        seed = secrets.randbits(64) if params.seed is None else params.seed
        request = Request(self._arrivals, tokens, params, seed, time.perf_counter(), salt=salt)
        request.stop_tokens = self._stop_tokens(params)
        self._policies.note(request, policy)
        longest = len(tokens) + params.max_new_tokens
        request.most_tokens = min(longest, self.model_config.max_position)
        limits = self.config.max_sequences, self.model_config.vocab_size
        search = search_of(request, *limits) if params.beam_width > 1 else None
        samples = max(params.n, params.beam_width)
        request.samples = tuple(Sample(request, i, list(tokens)) for i in range(samples))
        self._arrivals += 1
        for sample in request.samples:
            self._texts[sample] = TextStream(self.codec, tuple(params.stop))
        request.samples[0].stream = stream
        if search is not None:
            self._searches[request] = BeamGroup(request, search)
        for sample in request.samples if search is None else request.samples[:1]:
            self._queues.add(sample)
        return request

    def cancel(self, request: Request) -> None:
        """End a request now; its samples keep the text and tokens they have."""
        searched = self._searches.pop(request, None) is not None
        given_back = request.params.n if searched else len(request.samples)
        for sample in request.samples[:given_back]:
            if sample.status is not Status.FINISHED:
                self._finish(sample, "cancelled", None)
        self._drop(request.samples[given_back:])

    @property
    def has_work(self) -> bool:
        """True while a request is waiting or running, or a shadow is being read."""
        return self._is_serving or (self._shadow is not None and self._shadow.pending)

    @property
    def _is_serving(self) -> bool:
        return bool(self._queues.waiting or self._queues.running)

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
        self._recover()
        waiting = self._before_stream()
        if not waiting and not self._queues.running and self._is_serving:
            return self._stream_on(self._queues.waiting[0])
        if self._ahead.samples:
            return self._land()
        self._loads.finish()
        self._loads.start(waiting)
        plan = self._plan()
        if not plan.chunks and self._loads.wait():
            return []
        while not (plan.chunks or plan.preempt) and self._is_serving and self._pins.drop_one():
            plan = self._plan()
        self._start(plan)
        if plan.preempt and not plan.chunks:
            return []  # there is room now
        if not plan.chunks:
            if self._is_serving:
                raise QuireError(
                    f"no sample can run: {len(self._queues.running)} running, "
                    f"{len(self._queues.waiting)} waiting, {self.cache.free_pages} of "
                    f"{self.cache.num_pages} pages free; "
                    "this is a bug in Quire, please report it"
                )
            return []
        outputs = self._run(plan)
        if self._tiers is not None:
            self._tiers.store()
            if not self._is_serving:
                self._tiers.settle()  # there may be no later step
        return outputs

    def _land(self) -> list[StepOutput]:
        """What came of a step that ran while the host was elsewhere; the next one runs now."""
        self._undecided = list(self._ahead.samples)
        try:
            landed = self._ahead.land()
        except QuireError:  # nothing was lost
            self._undecided.clear()
            raise
        outputs = []
        for sample, choice in landed:
            outputs.append(self._decide(sample, choice))
            self._undecided.remove(sample)
        self._undecided.clear()
        if self._tiers is not None:
            self._tiers.store()
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

    def _open_tiers(self) -> PrefixTiers | None:
        tiers = open_tiers(self.config.cache, self._layout, lambda: self.identity)
        if not tiers:
            return None
        width = page_format(self._loaded.page_format).dtype.itemsize
        weights = self._loaded.bytes_read_a_step // width
        pace = compute_pace(self.backend.name, this_machine().threads, weights)
        return PrefixTiers(self.cache, tiers, pace)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- the whole of it ---------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[Prompt] | Prompt, params: SamplingParams | None = None
    ) -> list[Completion]:
        """Completions of all prompts, in their order, the ``n`` samples of each side by side.

        One prompt may be given without a list. Interrupted, it cancels what it had submitted.
        Shadows are read to their end.
        """
        requests: list[Request] = []
        try:
            requests.extend(self.submit(prompt, params) for prompt in as_prompts(prompts))
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
        if params is not None and (params.n != 1 or params.beam_width != 1):
            raise RequestError(
                f"stream() follows one sample, but n is {params.n} and beam_width "
                f"{params.beam_width}; use submit()"
            )
        request = self.submit(prompt, params)
        return Pieces(request, self._texts[request.samples[0]], self.step, self.cancel)

    def logits(self, prompt: Prompt) -> npt.NDArray[np.float32]:
        """Next-token logits at every position of a prompt, float32 [tokens, vocab].

        Raises RequestError as :meth:`submit` does, CacheFull if running requests leave too few
        pages.
        """
        self._require_pool("logits()")
        tokens = self._prompts.tokens(prompt)
        self._prompts.require_context(len(tokens), 0)
        with self.forced() as text:
            return text.score(tokens)

    def forced(self) -> ForcedText:
        """An open sequence whose tokens are told, not chosen: for scoring text.

        Raises CacheFull while a context larger than the pool is running.
        """
        self._require_pool("teacher forcing")
        shape = (self.config.max_batch_tokens, self.model_config.vocab_size)
        begin = self._policies.follow_forced
        return ForcedText(self.cache, self._forward_forced, self._affordable, shape, begin)

    def attention(self, parts: Sequence[Part], batch: PagedBatch) -> Attend:
        """How a step of (sequence, new tokens, wanted rows) attends, layer by layer."""
        return self._policies.attention(parts, batch) or self._policies.plain(batch)

    def explain_prefix(self, prompt: Prompt, *, salt: str = "") -> PrefixExplanation:
        """What of a prompt is cached now and why the rest is not; changes nothing."""
        return explain(self.cache, self.codec, self._prompts.query(prompt, salt), self._tiers)

    def pin(self, prompt: Prompt, seconds: float, *, salt: str = "") -> int:
        """Hold what is cached of a prompt for ``seconds``; returns how many tokens that is.

        Pinned pages are not evicted, unless nothing could run otherwise: then the pin that ends
        first is dropped. Raises RequestError for a time that is not positive, CacheFull while a
        context larger than the pool is running.
        """
        self._require_pool("a pin")
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
        self._require_pool("saving a session")
        tokens = request.samples[0].tokens[:-1]
        if request.samples[0].evicted_tokens:
            raise SessionError(
                f"eviction dropped {request.samples[0].evicted_tokens} tokens of this request, and "
                "a session keeps all of them; use evict='none' for what is to be saved"
            )
        if request.samples[0].stream is not None:
            self.save_notes(path, extra or {})
            return 0
        if not tokens:
            raise SessionError("a session needs at least two tokens, and this request has one")
        sequence = self.cache.create(self.cache.match(PrefixQuery(tokens, request.salt)))
        try:
            self._prefill(sequence, tokens)
            groups = pages_of(self.cache, sequence)
        finally:
            self.cache.release(sequence)
        write_session(Path(path), SessionFile(self.identity, tuple(tokens), groups, extra or {}))
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
        if self._streamed is not None:
            return Session(reason="a context larger than the pool is running; load it afterwards")
        return load_session(self.cache, Path(path), salt, self.identity, self.model_config)

    def _prefill(self, sequence: int, tokens: Sequence[int]) -> None:
        """Compute what ``sequence`` lacks of ``tokens``."""
        while (start := self.cache.length(sequence)) < len(tokens):
            size = min(self.config.max_batch_tokens, len(tokens) - start)
            chunk = tokens[start : start + self._affordable(sequence, size)]
            self._forward([(sequence, chunk, [])])

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

    def _start(self, plan: StepPlan) -> None:
        """Apply what the plan decided about the queues."""
        for preemption in plan.preempt:
            self._queues.preempt(preemption.sample, preemption.reason)
        for sample, match in zip(plan.admit, plan.matches, strict=True):
            self._queues.admit(sample, self.cache.create(match))

    def _plan(self) -> StepPlan:
        """The next step. Preemptions that free too little for anybody are applied on the way."""
        while True:
            self._policies.evictor.catch_up()
            plan = plan_step(self._queues.running, self._before_stream(), self._limits, self.cache)
            if plan.chunks or not plan.preempt:
                return plan
            self._start(plan)

    def _recover(self) -> None:
        """Samples that a step had computed when it was interrupted are computed again."""
        for sample in self._undecided:
            if sample.status is Status.RUNNING:
                self._queues.preempt(sample, "a step was interrupted before its token was chosen")
        self._undecided.clear()

    def _before_stream(self) -> list[Sample]:
        """Waiting samples before the first that must be streamed, which then has its turn alone."""
        waiting = self._queues.waiting
        return list(itertools.takewhile(lambda s: s.stream is None, waiting)) if waiting else []

    def _plan_stream(self, tokens: Sequence[int], params: SamplingParams) -> StreamPlan | None:
        """How to stream a request that does not fit the pool; RequestError if it cannot be."""
        if self._tiers is None:
            self._prompts.require_fit(tokens, params)
        if self._prompts.fits_pool(tokens, params):
            return None
        most, chunk = self._prompts.most_tokens(tokens, params), self.config.max_batch_tokens
        return plan_stream(self.cache, self.config.cache, most, params, chunk)

    def _stream_on(self, sample: Sample) -> list[StepOutput]:
        """A step of the sample that is streamed; it has the engine for itself."""
        if self._streamed is None:
            try:
                self._streamed = self._open_stream(sample)
            except (QuireError, OSError, MemoryError) as error:
                done = self._finish(sample, "error", None, f"it cannot be streamed: {error}")
                return [StepOutput(sample.request, sample.index, None, "", done)]
        logits = self._streamed.step(self._loaded.model, self.config.max_batch_tokens)
        if logits is None:
            return []
        (choice,) = choose_for([(sample, 0)], logits, self._shadow)
        return [self._decide(sample, choice)]

    def _open_stream(self, sample: Sample) -> StreamedRun:
        assert sample.stream is not None
        assert self._tiers is not None
        run = StreamedRun(sample, sample.stream, self.cache, self._tiers, self.config.cache)
        try:
            self._tiers.store()
            while self._pins.drop_one():
                pass
            run.begin(self.backend)
            self._tiers.settle()
        except BaseException:
            run.close()
            raise
        return run

    def _require_pool(self, what: str) -> None:
        """Raise CacheFull while a context larger than the pool has the memory of the pool."""
        if self._streamed is not None:
            raise CacheFull(
                f"{what} needs pages of the pool, but a context larger than the pool is running; "
                "wait until it has ended"
            )

    def _run(self, plan: StepPlan) -> list[StepOutput]:
        parts, deciding = [], []
        for sample, count in plan.chunks:
            assert sample.sequence is not None
            start = sample.computed
            ends = start + count == len(sample.tokens)
            chunk = sample.tokens[start : start + count]
            parts.append((sample.sequence, chunk, (count - 1,) if ends else ()))
            if ends:
                deciding.append(sample)
        started, samples = time.perf_counter(), [sample for sample, _ in plan.chunks]
        for sample in samples:
            self._policies.follow(sample)
        logits = self._forward(parts, samples)
        if self._tiers is not None and any(count > 1 for _, count in plan.chunks):
            logits.wait()
            tokens = sum(count for _, count in plan.chunks)
            self._tiers.compute_pace.add(time.perf_counter() - started, tokens)
        for sample, count in plan.chunks:
            sample.computed += count
        self._undecided = list(deciding)
        self._policies.count(samples)
        self._evict(parts, samples)
        if self._shadow is None and self._ahead.begin(deciding, logits):
            return self._land()
        return self._decide_all(deciding, logits)

    def _decide_all(self, deciding: Sequence[Sample], logits: Logits) -> list[StepOutput]:
        """Go on with samples whose tokens are all in; each has a row of ``logits``, in order."""
        outputs: list[StepOutput] = []
        choosing: list[tuple[Sample, int]] = []
        for row, sample in enumerate(deciding):
            if sample.request in self._searches:
                outputs += self._search_on(sample, logits.row(row))
                self._undecided.remove(sample)
                continue
            choosing.append((sample, row))
            if len(sample.request.samples) > 1:
                forks = self._fork(sample)
                choosing += [(fork, row) for fork in forks]
                self._undecided += forks
        choices = choose_for(choosing, logits, self._shadow)
        for (sample, _), choice in zip(choosing, choices, strict=True):
            outputs.append(self._decide(sample, choice))
            self._undecided.remove(sample)
        return outputs

    def _fork(self, first: Sample) -> list[Sample]:
        """Let samples of the same prompt go on from where the first one, now, is through with it.

        As many as there are free places for; the others find the prompt in the prefix index.
        """
        if first.index or first.new_tokens:
            return []
        assert first.sequence is not None
        free = self.config.max_sequences - places(self._queues.running)
        waiting = [s for s in first.request.samples[1:] if s.status is Status.WAITING]
        started = [s for s in waiting if not s.new_tokens][: max(0, free)]
        for sample in started:
            self._queues.admit(sample, self.cache.fork(first.sequence))
        return started

    def _search_on(self, sample: Sample, logits: npt.NDArray[np.float32]) -> list[StepOutput]:
        """Give a beam its logits float32 [vocab]; what the search gives back when it ends."""
        request = sample.request
        try:
            likeliest(logits, len(sample.tokens) - 1)  # raises if they are not finite
        except QuireError as error:
            return self._fail_search(request, str(error))
        found = self._searches[request].gather(sample, logits, self._queues, self.cache)
        if found is None:
            return []
        del self._searches[request]
        outputs = []
        for place, beam in zip(request.samples[: request.params.n], found, strict=False):
            self._queues.leave(place, Status.IDLE)
            place.tokens = [*request.prompt_tokens, *beam.tokens]
            place.cached_tokens, place.score = request.samples[0].cached_tokens, beam.score
            shown = beam.tokens[:-1] if beam.stopped else beam.tokens
            text = "".join(self._texts[place].push(token)[0] for token in shown)
            text += self._texts[place].flush()[0]
            reason: FinishReason = "stop" if beam.stopped else "length"
            done = self._finish(place, reason, beam.tokens[-1] if beam.stopped else None)
            outputs.append(StepOutput(request, place.index, beam.tokens[-1], text, done))
        self._drop(request.samples[len(outputs) :])
        return outputs

    def _drop(self, places: Sequence[Sample]) -> None:
        """Forget samples that a search does not give back."""
        for place in places:
            if place.status is not Status.FINISHED:
                self._loads.cancel(place)
                self._queues.leave(place, Status.FINISHED)
                del self._texts[place]

    def _fail_search(self, request: Request, error: str) -> list[StepOutput]:
        del self._searches[request]
        outputs = []
        for place in request.samples[: request.params.n]:
            done = self._finish(place, "error", None, error)
            outputs.append(StepOutput(request, place.index, None, "", done))
        self._drop(request.samples[len(outputs) :])
        return outputs

    def _forward(
        self,
        parts: Sequence[tuple[int, Sequence[int], Sequence[int]]],
        samples: Sequence[Sample] = (),
    ) -> Logits:
        """Reserve, compute, commit. ``parts``: (sequence, new tokens, which of them want logits).

        If anything raises, the cache is as it was.
        """
        reservation = self.cache.reserve([(seq, len(tokens)) for seq, tokens, _ in parts])
        try:
            for sample, grows in zip(samples, reservation.grows, strict=False):
                if grows or not sample.counted:
                    sample.count_bytes(self.cache)
            tokens: list[int] = []
            rows: list[int] = []
            for _, chunk, wanted in parts:
                rows += [len(tokens) + row for row in wanted]
                tokens += chunk
            model, batch, pools = self._loaded.model, reservation.batch, self.cache.pools
            attend = self._policies.attention(parts, batch)
            if attend is None:
                logits = model.forward(tokens, batch, pools, rows)
            else:
                logits = model.forward_with(tokens, batch, pools, rows, attend)
        except BaseException:
            self.cache.rollback(reservation)
            raise
        self.cache.commit(reservation, self._policies.exact_tokens(parts))
        return logits

    # -- inside: eviction --------------------------------------------------------------------

    def _forward_forced(self, parts: Sequence[Part]) -> npt.NDArray[np.float32]:
        logits = self._forward(parts).host()
        self._policies.settle(parts)
        self._policies.count(())
        return logits

    def _evict(self, parts: Sequence[Part], samples: Sequence[Sample]) -> None:
        """Drop what is above the budgets of ``samples``, whose ``parts`` were committed."""
        evicting = [sample for sample in samples if sample.request.eviction is not None]
        if not evicting:
            return
        try:
            self._policies.settle(parts)
        except BaseException:  # their numbers may be halfway from one place to another
            for sample in evicting:
                self._queues.preempt(sample, "a step was interrupted while tokens were dropped")
            raise
        for sample in evicting:
            assert sample.sequence is not None
            sample.evicted_tokens = self.cache.dropped(sample.sequence)

    def _affordable(self, sequence: int, tokens: int) -> int:
        """``tokens``, halved until free pages are enough for them; at least 1."""
        free = self.cache.free_pages
        while tokens > 1 and any(
            cost > have for cost, have in zip(self.cache.cost(sequence, tokens), free, strict=True)
        ):
            tokens //= 2
        return tokens

    def _decide(self, sample: Sample, choice: Choice) -> StepOutput:
        """Go on with a sample as was chosen."""
        if choice.token is None:
            piece, _ = self._texts[sample].flush()
            completion = self._finish(sample, "error", None, choice.error)
            return StepOutput(sample.request, sample.index, None, piece, completion)
        if choice.logprobs is not None:
            sample.logprobs.append(choice.logprobs)
        return self._accept(sample, choice.token)

    def _accept(self, sample: Sample, token: int) -> StepOutput:
        request, now = sample.request, time.perf_counter()
        sample.tokens.append(token)
        if sample.first_token_at is None:
            sample.first_token_at = now
        sample.last_token_at = now
        text = self._texts[sample]
        if token in request.stop_tokens:
            piece, stopped = text.flush()
            completion = self._finish(sample, "stop", stopped or token)
            return StepOutput(request, sample.index, token, piece, completion)
        piece, stopped = text.push(token)
        reason: FinishReason | None = "stop" if stopped is not None else None
        if stopped is None and len(sample.tokens) >= request.most_tokens:
            rest, stopped = text.flush()
            piece, reason = piece + rest, "length" if stopped is None else "stop"
        ended = None if reason is None else self._finish(sample, reason, stopped)
        return StepOutput(request, sample.index, token, piece, ended)

    def _stop_tokens(self, params: SamplingParams) -> frozenset[int]:
        eos = () if params.ignore_eos else self.model_config.eos_token_ids
        return frozenset((*params.stop_token_ids, *eos))

    # -- inside: the end of a sample ---------------------------------------------------------

    def _finish(
        self,
        sample: Sample,
        reason: FinishReason,
        stopped_by: str | int | None,
        error: str | None = None,
    ) -> Completion:
        if self._streamed is not None and self._streamed.sample is sample:
            self._streamed.close()
            self._streamed = None
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
