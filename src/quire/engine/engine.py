"""Engine: a model, its cache and a queue of requests. ``step`` is all that a server is built on.

Not thread-safe: one thread drives an engine.
"""

import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from quire.backends import create_backend
from quire.cache import CacheUsage, KVCache
from quire.config import CacheConfig, EngineConfig, refuse_unknown
from quire.engine.output import TextStream
from quire.engine.request import (
    Completion,
    FinishReason,
    Request,
    Sample,
    SamplingParams,
    Status,
    StepOutput,
)
from quire.engine.sampler import choose, logprobs_of, uniform
from quire.engine.scheduler import Limits, StepPlan, plan_step
from quire.errors import QuireError, RequestError
from quire.layout import cache_layout, fit_pages
from quire.models import Progress, load_model, resolve_model
from quire.pages import page_format

__all__ = ["Engine", "EngineStatus"]

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class EngineStatus:
    """What an engine is doing: samples by status, KV bytes, preemptions since it started."""

    running: int
    waiting: int
    kv: CacheUsage
    preemptions: int


class Engine:
    """Loads a checkpoint and serves requests on it, continuously batched.

    model      a Hugging Face directory, a hub name such as ``org/model``, or None for quill, the
               small model that ships with Quire
    progress   called with (what, done, total) while loading
    others     see :class:`EngineConfig` and :class:`CacheConfig`; unknown ones raise ConfigError

    Raises CheckpointError for a model that cannot be loaded, ConfigError for settings that cannot
    be used, BackendError for a backend that is not there.
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
        progress: Progress | None = None,
        **unknown: object,
    ) -> None:
        known = ["backend", "threads", "cache", "max_batch_tokens", "max_sequences", "progress"]
        refuse_unknown("Engine", unknown, known)
        self.config = EngineConfig(
            backend=backend,
            threads=threads,
            cache=CacheConfig() if cache is None else cache,
            max_batch_tokens=max_batch_tokens,
            max_sequences=max_sequences,
        )
        if self.config.cache.kv_format != "auto":
            page_format(self.config.cache.kv_format)  # a wrong name is an error before loading
        self.directory = resolve_model(model)
        self.backend = create_backend(backend, threads)
        self._loaded = load_model(self.directory, self.backend, progress)
        self.model_config = self._loaded.config
        self.codec = self._loaded.codec
        self.cache = self._make_cache()
        self._waiting: list[Sample] = []
        self._running: list[Sample] = []
        self._texts: dict[Sample, TextStream] = {}
        self._arrivals = 0
        self._preemptions = 0

    # -- requests ----------------------------------------------------------------------------

    def submit(self, prompt: Prompt, params: SamplingParams | None = None) -> Request:
        """Queue a prompt (text or token ids); nothing is computed until :meth:`step`.

        Raises RequestError for a prompt that is empty, longer than the context, has token ids
        outside the vocabulary or needs a tokenizer that is not there, and for a request whose
        tokens can never fit the page pool.
        """
        params = SamplingParams() if params is None else params
        tokens = tuple(self._tokens(prompt))
        self._require_servable(tokens, params)
        seed = secrets.randbits(64) if params.seed is None else params.seed
        request = Request(self._arrivals, tokens, params, seed, time.perf_counter())
        request.samples = tuple(Sample(request, i, list(tokens)) for i in range(params.n))
        self._arrivals += 1
        for sample in request.samples:
            self._texts[sample] = TextStream(self.codec, tuple(params.stop))
        self._waiting.extend(request.samples)
        return request

    def cancel(self, request: Request) -> None:
        """End a request now; its samples keep the text and tokens they have."""
        for sample in request.samples:
            if sample.status is not Status.FINISHED:
                self._finish(sample, "cancelled", None)

    @property
    def has_work(self) -> bool:
        """True while a request is waiting or running."""
        return bool(self._waiting or self._running)

    def step(self) -> list[StepOutput]:
        """One forward pass over a batch of prefill chunks and decodes; what it brought.

        If it raises, the cache and the queues are as before the pass, and a later step repeats it.
        """
        plan = plan_step(self._running, self._waiting, self._limits, self.cache)
        self._start(plan)
        if not plan.chunks:
            if self.has_work:
                raise QuireError(
                    f"no sample can run: {len(self._running)} running, {len(self._waiting)} "
                    f"waiting, {self.cache.free_pages} of {self.cache.num_pages} pages free; "
                    "this is a bug in Quire, please report it"
                )
            return []
        return self._run(plan)

    # -- the whole of it ---------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[Prompt] | Prompt, params: SamplingParams | None = None
    ) -> list[Completion]:
        """Completions of all prompts, in their order, the ``n`` samples of each side by side.

        One prompt may be given without a list. Interrupted, it cancels what it had submitted.
        """
        requests: list[Request] = []
        try:
            requests.extend(self.submit(prompt, params) for prompt in _as_list(prompts))
            while not all(request.finished for request in requests):
                self.step()
        except BaseException:
            for request in requests:
                self.cancel(request)
            raise
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
        if params is not None and params.n != 1:
            raise RequestError(f"stream() follows one sample, but n is {params.n}; use submit()")
        return _Pieces(self, self.submit(prompt, params))

    def logits(self, prompt: Prompt) -> npt.NDArray[np.float32]:
        """Next-token logits at every position of a prompt, float32 [tokens, vocab].

        Raises RequestError as :meth:`submit` does, CacheFull if running requests leave too few
        pages.
        """
        tokens = self._tokens(prompt)
        self._require_context(len(tokens), 0)
        out = np.empty((len(tokens), self.model_config.vocab_size), np.float32)
        sequence = self.cache.create()
        try:
            start = 0
            while start < len(tokens):
                size = min(self.config.max_batch_tokens, len(tokens) - start)
                chunk = tokens[start : start + self._affordable(sequence, size)]
                end = start + len(chunk)
                out[start:end] = self._forward([(sequence, chunk, range(len(chunk)))])
                start = end
        finally:
            self.cache.release(sequence)
        return out

    def status(self) -> EngineStatus:
        """Queues and KV bytes at this moment."""
        return EngineStatus(
            len(self._running), len(self._waiting), self.cache.usage(), self._preemptions
        )

    def decode_bytes(self, context: int) -> int:
        """Bytes that a step must read to decode one token of one sequence after ``context`` tokens.

        Weights, but for tables of which a step reads single rows, and the keys and values that the
        token sees.
        """
        layout = self.cache.layout
        seen = (
            min(context + 1, group.window or context + 1) * layout.token_bytes(index)
            for index, group in enumerate(layout.groups)
        )
        return self._loaded.bytes_read_a_step + sum(seen)

    # -- inside: set-up and checks -----------------------------------------------------------

    @property
    def _limits(self) -> Limits:
        return Limits(self.config.max_batch_tokens, self.config.max_sequences)

    def _make_cache(self) -> KVCache:
        settings, model = self.config.cache, self.model_config
        name = self._loaded.page_format if settings.kv_format == "auto" else settings.kv_format
        size = model.max_position if settings.page_size == "whole" else settings.page_size
        layout = cache_layout(model, size, page_format(name))
        if settings.num_pages is not None:
            num_pages = (settings.num_pages,) * len(layout.groups)
        else:
            assert isinstance(settings.kv_memory, int)
            num_pages = fit_pages(
                layout, settings.kv_memory, self.config.max_sequences, self.config.max_batch_tokens
            )
        of_layer = layout.group_of_layer
        pools = [
            self.backend.pool(shape, num_pages[of_layer[layer]])
            for layer, shape in enumerate(layout.shapes)
        ]
        return KVCache(layout, num_pages, pools)

    def _tokens(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.codec is None:
                raise RequestError(
                    f"{self.directory} has no tokenizer, so prompts must be lists of token ids"
                )
            tokens = self.codec.encode(prompt)
            if not tokens and self.model_config.bos_token_id is not None:
                tokens = [self.model_config.bos_token_id]
        else:
            if isinstance(prompt, bytes) or not isinstance(prompt, Iterable):
                raise RequestError(f"a prompt must be text or a list of token ids, not {prompt!r}")
            tokens = list(prompt)
        if not tokens:
            raise RequestError("the prompt is empty; give at least one token")
        vocab = self.model_config.vocab_size
        for at, token in enumerate(tokens):
            integer = isinstance(token, int | np.integer) and not isinstance(token, bool)
            if not integer or not 0 <= token < vocab:
                raise RequestError(
                    f"token {at} of the prompt is {token!r}; ids of this model are 0 to {vocab - 1}"
                )
        return [int(token) for token in tokens]

    def _require_context(self, prompt: int, new: int) -> None:
        limit = self.model_config.max_position
        if prompt + new > limit:
            raise RequestError(
                f"the prompt has {prompt} tokens; with room for {new} new ones that is more than "
                f"the model's context of {limit}; shorten it by {prompt + new - limit}"
            )

    def _require_servable(self, tokens: Sequence[int], params: SamplingParams) -> None:
        self._require_context(len(tokens), 1)
        if params.stop and self.codec is None:
            raise RequestError(
                "stop strings need a tokenizer, which this checkpoint does not have; use "
                "stop_token_ids"
            )
        for token in params.stop_token_ids:
            if token >= self.model_config.vocab_size:
                raise RequestError(
                    f"stop token id {token} is outside the vocabulary of "
                    f"{self.model_config.vocab_size}"
                )
        # The last new token is never fed back, so it needs no slot.
        most = min(len(tokens) + params.max_new_tokens, self.model_config.max_position) - 1
        layout = self.cache.layout
        for group, pages in zip(layout.groups, self.cache.num_pages, strict=True):
            need = group.most_pages(most, 1, layout.page_size)
            if need > pages:
                raise RequestError(
                    f"{len(tokens)} prompt tokens and up to {params.max_new_tokens} new ones need "
                    f"{need} pages of {layout.page_size} tokens ({group.name()}), but the pool has "
                    f"{pages}; lower max_new_tokens, shorten the prompt or raise kv_memory"
                )

    # -- inside: a step ----------------------------------------------------------------------

    def _start(self, plan: StepPlan) -> None:
        """Apply what the plan decided about the queues."""
        for preemption in plan.preempt:
            sample = preemption.sample
            self._leave_cache(sample)
            sample.preemptions.append(preemption.reason)
            sample.status = Status.WAITING
            self._preemptions += 1
            self._running.remove(sample)
            self._waiting.append(sample)
        for sample in plan.admit:
            sample.sequence = self.cache.create()
            sample.status = Status.RUNNING
            self._waiting.remove(sample)
            self._running.append(sample)
        for queue in (self._waiting, self._running):
            queue.sort(key=lambda sample: (sample.request.arrival, sample.index))

    def _run(self, plan: StepPlan) -> list[StepOutput]:
        parts, deciding = [], []
        for sample, count in plan.chunks:
            assert sample.sequence is not None
            ends = count == sample.pending
            chunk = sample.tokens[sample.computed : sample.computed + count]
            parts.append((sample.sequence, chunk, [count - 1] if ends else []))
            if ends:
                deciding.append(sample)
        logits = self._forward(parts, [sample for sample, _ in plan.chunks])
        for sample, count in plan.chunks:
            sample.computed += count
        return [self._decide(s, row) for s, row in zip(deciding, logits, strict=True)]

    def _forward(
        self,
        parts: Sequence[tuple[int, Sequence[int], Sequence[int]]],
        samples: Sequence[Sample] = (),
    ) -> npt.NDArray[np.float32]:
        """Reserve, compute, commit. ``parts``: (sequence, new tokens, which of them want logits).

        If anything raises, the cache is as it was.
        """
        reservation = self.cache.reserve([(seq, len(tokens)) for seq, tokens, _ in parts])
        try:
            for sample in samples:
                assert sample.sequence is not None
                held = self.cache.allocated_bytes(sample.sequence)
                sample.kv_bytes_peak = max(sample.kv_bytes_peak, held)
            tokens = [token for _, chunk, _ in parts for token in chunk]
            starts = reservation.batch.query_indptr.tolist()
            rows = [starts[i] + row for i, (_, _, wanted) in enumerate(parts) for row in wanted]
            logits = self._loaded.model.forward(tokens, reservation.batch, self.cache.pools, rows)
        except BaseException:
            self.cache.rollback(reservation)
            raise
        self.cache.commit(reservation)
        return logits

    def _affordable(self, sequence: int, tokens: int) -> int:
        """``tokens``, halved until free pages are enough for them; at least 1."""
        free = self.cache.free_pages
        while tokens > 1 and any(
            cost > have for cost, have in zip(self.cache.cost(sequence, tokens), free, strict=True)
        ):
            tokens //= 2
        return tokens

    def _decide(self, sample: Sample, logits: npt.NDArray[np.float32]) -> StepOutput:
        """Choose the next token of a sample from its logits float32 [vocab]."""
        request = sample.request
        params, reply = request.params, sample.new_tokens
        greedy = params.temperature == 0
        draw = 0.0 if greedy else uniform(request.seed, sample.index, len(sample.tokens))
        try:
            token = choose(logits, request.prompt_tokens, reply, params, draw)
        except QuireError as error:
            piece, _ = self._texts[sample].flush()
            completion = self._finish(sample, "error", None, str(error))
            return StepOutput(request, sample.index, None, piece, completion)
        if params.logprobs is not None:
            sample.logprobs.append(logprobs_of(token, logits, params.logprobs))
        return self._accept(sample, token)

    def _accept(self, sample: Sample, token: int) -> StepOutput:
        request, now = sample.request, time.perf_counter()
        sample.tokens.append(token)
        sample.first_token_at = sample.first_token_at or now
        sample.last_token_at = now
        text = self._texts[sample]
        if token in self._stop_tokens(request.params):
            piece, stopped = text.flush()
            completion = self._finish(sample, "stop", stopped or token)
            return StepOutput(request, sample.index, token, piece, completion)
        piece, stopped = text.push(token)
        reason: FinishReason | None = "stop" if stopped is not None else None
        if stopped is None and self._is_full(sample):
            rest, stopped = text.flush()
            piece, reason = piece + rest, "length" if stopped is None else "stop"
        ended = None if reason is None else self._finish(sample, reason, stopped)
        return StepOutput(request, sample.index, token, piece, ended)

    def _stop_tokens(self, params: SamplingParams) -> set[int]:
        eos = () if params.ignore_eos else self.model_config.eos_token_ids
        return {*params.stop_token_ids, *eos}

    def _is_full(self, sample: Sample) -> bool:
        new = len(sample.tokens) - len(sample.request.prompt_tokens)
        full = len(sample.tokens) >= self.model_config.max_position
        return full or new >= sample.request.params.max_new_tokens

    # -- inside: the end of a sample ---------------------------------------------------------

    def _leave_cache(self, sample: Sample) -> None:
        if sample.sequence is not None:
            self.cache.release(sample.sequence)
        sample.sequence, sample.computed = None, 0

    def _finish(
        self,
        sample: Sample,
        reason: FinishReason,
        stopped_by: str | int | None,
        error: str | None = None,
    ) -> Completion:
        (self._running if sample.status is Status.RUNNING else self._waiting).remove(sample)
        self._leave_cache(sample)
        sample.status = Status.FINISHED
        text = self._texts.pop(sample)
        if reason == "cancelled":
            text.flush()
        completion = _completion(sample, text.text, reason, stopped_by, error)
        sample.completion = completion
        return completion


class _Pieces(Iterator[str]):
    """What :meth:`Engine.stream` returns: a cursor into the text of one sample.

    Others may step the engine between two pieces; nothing is lost.
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine, self._request, self._text = engine, request, engine._texts[request.samples[0]]
        self._given = 0

    def __next__(self) -> str:
        while not (piece := self._text.text[self._given :]):
            if self._request.finished:
                error = self._request.completions[0].error
                if error is not None:
                    raise QuireError(error)
                raise StopIteration
            try:
                self._engine.step()
            except BaseException:
                self.close()
                raise
        self._given += len(piece)
        return piece

    def close(self) -> None:
        """Cancel the request."""
        self._engine.cancel(self._request)
        self._given = len(self._text.text)

    def __del__(self) -> None:
        self.close()


def _as_list(prompts: Sequence[Prompt] | Prompt) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, bytes) or not isinstance(prompts, Iterable):
        raise RequestError(f"prompts must be text or a list, not {prompts!r}")
    listed = list(prompts)
    if listed and all(isinstance(item, int | np.integer) for item in listed):
        return [listed]  # type: ignore[list-item]
    return listed  # type: ignore[return-value]


def _completion(
    sample: Sample,
    text: str,
    reason: FinishReason,
    stopped_by: str | int | None,
    error: str | None,
) -> Completion:
    request, new = sample.request, sample.new_tokens
    first, last = sample.first_token_at, sample.last_token_at
    decode_s = last - first if first is not None and last is not None else 0.0
    return Completion(
        text=text,
        token_ids=tuple(new),
        finish_reason=reason,
        stop_reason=stopped_by,
        prompt_tokens=len(request.prompt_tokens),
        cached_tokens=0,
        new_tokens=len(new),
        ttft_s=None if first is None else first - request.submitted_at,
        decode_tokens_per_s=(len(new) - 1) / decode_s if decode_s > 0 else None,
        kv_bytes_peak=sample.kv_bytes_peak,
        seed=request.seed,
        index=sample.index,
        logprobs=None if request.params.logprobs is None else tuple(sample.logprobs),
        preemptions=tuple(sample.preemptions),
        error=error,
    )
