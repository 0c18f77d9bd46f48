"""Running a sample whose context is larger than the pool, alone."""

import time
from collections.abc import Sequence
from pathlib import Path

from quire.backends import Backend, Logits
from quire.cache import KVCache
from quire.config import CacheConfig, format_bytes
from quire.engine.request import Sample
from quire.engine.streaming import (
    FileStore,
    LayerStream,
    MemoryStore,
    PageStore,
    stream_cache,
)
from quire.engine.tiering import PrefixTiers
from quire.errors import RequestError, TierError
from quire.layout import CacheLayout
from quire.models import CausalLM
from quire.sampling import SamplingParams

DISK_KEEPS = 8 * 2**20  # of the disk's budget, for the store itself

__all__ = ["StreamPlan", "StreamedRun", "plan_stream"]


class StreamPlan:
    """What streaming a context of ``tokens`` takes.

    num_pages     of each group, for the whole context
    layer_bytes   of one layer, or of one of each page shape: what the staging pools must hold
    total_bytes   of all layers: what the store must hold
    """

    def __init__(self, layout: CacheLayout, tokens: int, chunk: int) -> None:
        self.tokens = tokens
        self.num_pages = tuple(
            group.most_pages(tokens, chunk, layout.page_size) for group in layout.groups
        )
        shapes = dict.fromkeys(layout.shapes)
        self.layer_bytes = max(self.num_pages) * sum(shape.bytes_per_page for shape in shapes)
        self.total_bytes = sum(
            self.num_pages[group] * layout.page_bytes(group) for group in range(len(layout.groups))
        )


def plan_stream(
    cache: KVCache, settings: CacheConfig, tokens: int, params: SamplingParams, chunk: int
) -> StreamPlan:
    """How a context of ``tokens`` would be streamed; RequestError, with the numbers, if it cannot.

    ``chunk`` is the most tokens of a step.
    """
    plan = StreamPlan(cache.layout, tokens, chunk)
    pool = cache.usage().pool_bytes
    if True in cache.layout.packs:
        raise RequestError(
            f"a context of {tokens} tokens does not fit the pool of {format_bytes(pool)}, and "
            f"{cache.layout.format_text} pages, which are packed in the pool, cannot be streamed "
            "from below it; raise kv_memory, or choose a format that stores each token on its own, "
            "such as int8"
        )
    what = f"a context of {tokens} tokens takes {format_bytes(plan.total_bytes)} of pages"
    if params.n > 1 or params.beam_width > 1:
        raise RequestError(
            f"{what}, more than the pool of {format_bytes(pool)}; only one sample at a time can be "
            f"streamed from below, not n = {params.n} and beam_width = {params.beam_width}; raise "
            "kv_memory"
        )
    if plan.layer_bytes > pool:
        layer = (
            "one layer of it" if len(set(cache.layout.shapes)) == 1 else "one layer of each shape"
        )
        raise RequestError(
            f"{what}, and {layer} {format_bytes(plan.layer_bytes)}, more than the pool of "
            f"{format_bytes(pool)}; raise kv_memory to at least {format_bytes(plan.layer_bytes)}"
        )
    assert not isinstance(settings.host_cache, str)
    assert not isinstance(settings.disk_cache, str)
    lent = max(settings.host_cache or 0, (settings.disk_cache or 0) - DISK_KEEPS)
    if plan.total_bytes > lent:
        raise RequestError(
            f"{what}, more than the pool of {format_bytes(pool)} and than any tier below it; "
            "lower max_new_tokens, shorten the prompt, raise kv_memory, or give a host_cache of at "
            f"least {format_bytes(plan.total_bytes)} or a disk_cache of at least "
            f"{format_bytes(plan.total_bytes + DISK_KEEPS)} to stream it from"
        )
    return plan


class StreamedRun:
    """The one streamed sample of an engine. The pool's memory is given back while it runs."""

    def __init__(
        self,
        sample: Sample,
        plan: StreamPlan,
        cache: KVCache,
        tiers: PrefixTiers,
        settings: CacheConfig,
    ) -> None:
        self.sample, self._plan, self._cache = sample, plan, cache
        self._stream: LayerStream | None = None
        self._store: PageStore | None = None
        self._logits: Logits | None = None
        self._lender = tiers.lender(plan.total_bytes)
        if self._lender is None:
            raise TierError(
                f"no tier has {format_bytes(plan.total_bytes)} to lend for the pages now; raise "
                "host_cache or disk_cache"
            )
        self.tier = "host memory" if self._lender.name == "host" else "disk"
        try:
            self._store = self._open_store(settings)
        except BaseException:
            self.close()
            raise

    def begin(self, backend: Backend) -> None:
        """Give the pool's memory back and make the staging pools. The cache must hold nothing."""
        cache, plan, sample = self._cache, self._plan, self.sample
        assert self._store is not None
        cache.clear()
        self._books = stream_cache(cache.layout, plan.num_pages)
        self._sequence = self._books.create()
        self._stream = LayerStream(cache.layout, backend, self._store)
        pool = cache.usage().pool_bytes
        buffers = 2 if 2 * plan.layer_bytes <= pool else 1
        self._stream.allocate(max(plan.num_pages), buffers)
        self._seconds = 0.0
        sample.kv_bytes_peak = buffers * plan.layer_bytes
        sample.cached_tokens = {}

    def step(self, model: CausalLM, most: int) -> Logits | None:
        """Compute up to ``most`` tokens; logits [1, vocab] if those were all there are."""
        assert self._stream is not None
        sample, started = self.sample, time.perf_counter()
        if sample.uncomputed == 0:
            return self._logits  # the step before was interrupted before it chose a token
        chunk = sample.tokens[sample.computed : sample.computed + most]
        ends = len(chunk) == sample.uncomputed
        logits = self._forward(model, chunk, [len(chunk) - 1] if ends else [])
        logits.wait()  # it is timed
        self._logits = logits if ends else None
        sample.computed += len(chunk)
        self._seconds += time.perf_counter() - started
        sample.streamed = (
            f"{format_bytes(self._stream.bytes_read)} of pages read from {self.tier} and "
            f"{format_bytes(self._stream.bytes_written)} written in {self._seconds:.2f} s of steps "
            f"({format_bytes(self._stream.bytes_read / self._seconds)}/s)"
        )
        return self._logits

    def close(self) -> None:
        """Let the staging pools and the store go."""
        if self._stream is not None:
            self._stream.close()
        if self._store is not None:
            self._store.close()
        if self._lender is not None:
            self._lender.take_back(self._plan.total_bytes)
            self._lender = None

    def _open_store(self, settings: CacheConfig) -> PageStore:
        plan, layout = self._plan, self._cache.layout
        counts = [plan.num_pages[layout.group_of_layer[n]] for n in range(len(layout.shapes))]
        if self.tier == "host memory":
            return MemoryStore(layout.shapes, counts)
        assert settings.cache_dir is not None
        return FileStore(Path(settings.cache_dir), layout.shapes, counts)

    def _forward(self, model: CausalLM, chunk: Sequence[int], rows: Sequence[int]) -> Logits:
        assert self._stream is not None
        reservation = self._books.reserve([(self._sequence, len(chunk))])
        try:
            self._stream.begin(reservation.batch)
            try:
                logits = model.forward(chunk, reservation.batch, self._stream, rows)
            finally:
                self._stream.end()
        except BaseException:
            self._books.rollback(reservation)
            raise
        self._books.commit(reservation)
        return logits
