"""What a request does when it outgrows a budget: drop tokens, or leave pages unread."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quire.backends import Backend, Logits
from quire.batch import PagedBatch
from quire.cache import KVCache
from quire.config import CacheConfig, format_bytes
from quire.engine.evicting import Evictor, Part, Watch, require_evictable
from quire.engine.queues import Queues
from quire.engine.reading import (
    Attend,
    Reader,
    SparseStep,
    read_layers,
    remembered_bytes,
    require_readable,
)
from quire.engine.request import Request, Sample
from quire.engine.sizing import Room
from quire.errors import BackendError, ConfigError, RequestError
from quire.evict_choice import EvictChoice, parse_eviction
from quire.layout import CacheLayout
from quire.machine import this_machine
from quire.models import CausalLM
from quire.sampling import SamplingParams

__all__ = ["Policies", "Step", "require_usable"]


def require_usable(layout: CacheLayout, settings: CacheConfig, choice: EvictChoice | None) -> None:
    """Raise ConfigError, with the reason, for a policy that does not work with such a cache."""
    if choice is None:
        return
    if choice.drops:
        require_evictable(layout, settings)
    else:
        require_readable(layout, settings, choice)


@dataclass(frozen=True)
class Step:
    """New tokens of sequences: ``parts``, all ``tokens`` one behind the other, ``rows`` of those
    that want logits, and where they go. ``tokens`` may be on a device that has chosen them.
    """

    parts: Sequence[Part]
    tokens: Any
    rows: Sequence[int]
    batch: PagedBatch

    @classmethod
    def of(cls, parts: Sequence[Part], batch: PagedBatch) -> "Step":
        """Of ``parts`` that ``batch`` was made for."""
        tokens: list[int] = []
        rows: list[int] = []
        for _, chunk, wanted in parts:
            rows += [len(tokens) + row for row in wanted]
            tokens += chunk
        return cls(parts, tokens, rows, batch)


class Policies:
    """The policies of an engine's sequences, step by step: its own, and those of requests."""

    def __init__(self, cache: KVCache, backend: Backend, settings: CacheConfig) -> None:
        self._cache, self._backend, self._settings = cache, backend, settings
        self._own = parse_eviction(settings.evict)
        self.evictor, self.reader = Evictor(cache, backend), Reader(cache, backend)
        self._watch: Watch | None = None
        self._sparse: SparseStep | None = None
        if self._own is not None and not self._own.drops:
            self.reader.remember(self._own)  # as the plan has it

    # -- what is asked for -------------------------------------------------------------------

    @property
    def lossy(self) -> tuple[str, ...]:
        """What the engine's own policy loses, for people."""
        if self._own is None:
            return ()
        if self._own.drops:
            return (f"all layers: evict {self._own}",)
        layers = read_layers(self._cache.layout, self._own)
        span = f"layers {layers[0]}-{layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"
        return (f"{span}: read {self._own}",)

    def of(self, params: SamplingParams) -> EvictChoice | None:
        """The policy of a request; RequestError if it cannot be used with what else it asks."""
        choice = self._own if params.evict is None else parse_eviction(params.evict)
        if choice is None:
            return None
        try:
            require_usable(self._cache.layout, self._settings, choice)
        except ConfigError as error:
            raise RequestError(str(error)) from None
        if choice.drops and (params.n > 1 or params.beam_width > 1):
            raise RequestError(
                f"eviction {str(choice)!r} follows one sample, but n is {params.n} and "
                f"beam_width {params.beam_width}; submit samples one by one, or use evict='none'"
            )
        return choice

    def remember(self, choice: EvictChoice | None) -> None:
        """Set aside what a request's policy remembers of every page, the first time.

        The plan has only what the engine's own policy remembers, so raises RequestError, with the
        numbers, if there is no room for more.
        """
        if choice is None or choice.drops or self.reader.remembers(choice):
            return
        layout, free = self._cache.layout, Room.of(self._backend, this_machine()).free
        each, first = remembered_bytes(layout, choice), read_layers(layout, choice)[0]
        pages = self._cache.pools[first].num_pages
        if free is not None and each * pages > free:
            raise RequestError(
                f"eviction {str(choice)!r} remembers {format_bytes(each * pages)} beside the pool, "
                f"{each} bytes of each of {pages} pages, and {format_bytes(free)} can be had; "
                "start the engine with it, whose plan then leaves room, lower kv_memory, or use "
                "evict='none'"
            )
        try:
            self.reader.remember(choice)
        except BackendError as error:
            raise RequestError(str(error)) from error

    def follow(self, sample: Sample) -> None:
        """Apply the policy of a sample's request to the sequence it runs on."""
        request, sequence = sample.request, sample.sequence
        assert sequence is not None
        if request.eviction is not None and request.budget is not None:
            self.evictor.follow(sequence, request.eviction, request.budget)
        elif request.reading is not None:
            self.reader.follow(sequence, request.reading, len(request.prompt_tokens))

    def follow_forced(self, sequence: int, tokens: int) -> None:
        """Apply the engine's own policy to a sequence whose first ``tokens`` are its prompt."""
        if self._own is None:
            return
        if self._own.drops:
            self.evictor.follow(sequence, self._own, self._own.tokens(tokens))
        else:
            self.reader.follow(sequence, self._own, tokens)

    def note(self, request: Request, choice: EvictChoice | None) -> None:
        """Write into ``request`` what its policy means for a prompt of its length."""
        if choice is None:
            return
        if not choice.drops:
            request.reading = choice
            return
        request.eviction, request.budget = choice, choice.tokens(len(request.prompt_tokens))
        request.most_kept = request.budget + self._cache.layout.page_size

    # -- a step ------------------------------------------------------------------------------

    def attention(self, parts: Sequence[Part], batch: PagedBatch) -> Attend:
        """How a step attends, layer by layer."""
        self._watch = self.evictor.watch(parts, batch)
        self._sparse = self.reader.step(parts, batch)
        watch = self._watch
        inner = self._plain(batch) if self._sparse is None else self._sparse.attend

        def attend(layer: int, query: Any) -> Any:
            if watch is not None:
                watch(layer, query)
            return inner(layer, query)

        return attend

    def forward(self, model: CausalLM, step: Step) -> Logits:
        """Logits of a step's wanted rows."""
        attend = self.attention(step.parts, step.batch)
        pools, sparse, watch = self._cache.pools, self._sparse, self._watch
        if sparse is None and watch is None:
            return model.forward(step.tokens, step.batch, pools, step.rows)
        all_wanted = len(step.rows) == len(step.tokens)
        if sparse is not None and sparse.whole and watch is None and all_wanted:
            return sparse.forward(model, step.tokens)
        beside = [] if sparse is None else sparse.beside
        return model.forward_with(
            step.tokens, step.batch, pools, step.rows, attend=attend, beside=beside
        )

    def _plain(self, batch: PagedBatch) -> Attend:
        """Attention over all pages."""
        pools, groups = self._cache.pools, batch.group_of_layer
        return lambda layer, query: self._backend.attend(query, pools[layer], batch, groups[layer])

    def exact(self, tokens: Sequence[Sequence[int] | None]) -> list[Sequence[int] | None]:
        """For the prefix index, the new tokens of each sequence of the step that was computed last.

        None where keys are not the exact ones.
        """
        sparse = {} if self._sparse is None else self._sparse.usage
        return [None if at in sparse else chunk for at, chunk in enumerate(tokens)]

    def settle(self, parts: Sequence[Part]) -> None:
        """``parts`` were committed: drop what is above budgets."""
        self.evictor.settle(parts, self._watch)

    def evict(self, parts: Sequence[Part], samples: Sequence[Sample], queues: Queues) -> None:
        """Drop what is above the budgets of ``samples``, whose ``parts`` were committed.

        If it raises, those with a budget wait to be computed again.
        """
        evicting = [sample for sample in samples if sample.request.eviction is not None]
        if not evicting:
            return
        try:
            self.settle(parts)
        except BaseException:  # their numbers may be halfway from one place to another
            for sample in evicting:
                queues.preempt(sample, "a step was interrupted while tokens were dropped")
            raise
        for sample in evicting:
            assert sample.sequence is not None
            sample.evicted_tokens = self._cache.dropped(sample.sequence)

    def count(self, samples: Sequence[Sample]) -> None:
        """A step of ``samples`` was committed: add what they read."""
        if self._sparse is not None:
            for at, usage in self._sparse.usage.items():
                if at < len(samples):
                    before = samples[at].reading
                    samples[at].reading = usage if before is None else before + usage
            self.reader.settle(self._sparse)
