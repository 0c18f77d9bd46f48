"""Reading only pages that can matter: which sequences do, which pages they read, what they read.

A policy that reads sparsely drops nothing. Tokens of a prompt are computed with all pages, so what
a prompt leaves in the cache is exact; from the first token of the reply on, each layer but the
first ``dense`` ones reads, for each KV head, the first page, the newest page and the most promising
of the others, as many as the budget allows. A sequence within its budget is read whole.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from quire.backends import Backend, Logits, SomeRows, attend_chosen, summary_bytes
from quire.batch import Candidates, PagedBatch
from quire.cache import KVCache
from quire.config import CacheConfig
from quire.engine.evicting import Part
from quire.engine.summaries import KnownPages
from quire.errors import ConfigError
from quire.evict_choice import EvictChoice
from quire.layout import CacheLayout
from quire.models import CausalLM

__all__ = [
    "ReadUsage",
    "Reader",
    "SparseStatus",
    "SparseStep",
    "read_layers",
    "remembered_bytes",
    "require_readable",
]

Array = npt.NDArray[np.int64]
Attend: TypeAlias = Callable[[int, Any], Any]

LEAST_PAGES = 3  # the first, the newest, and one to choose


@dataclass(frozen=True)
class ReadUsage:
    """What steps that chose pages read, of how much; each number summed over the steps.

    steps          tokens that were decoded with chosen pages
    tokens_read    by each KV head of the layers that choose
    tokens_held    that a step without a policy would have read there
    bytes_read     of keys, values and what is known of pages, in all layers, dense ones included
    bytes_held     of keys and values that a step without a policy would have read
    """

    steps: int = 0
    tokens_read: int = 0
    tokens_held: int = 0
    bytes_read: int = 0
    bytes_held: int = 0

    def __add__(self, other: "ReadUsage") -> "ReadUsage":
        return ReadUsage(
            self.steps + other.steps,
            self.tokens_read + other.tokens_read,
            self.tokens_held + other.tokens_held,
            self.bytes_read + other.bytes_read,
            self.bytes_held + other.bytes_held,
        )

    def __str__(self) -> str:
        if not self.steps:
            return "read all tokens"
        read, held = (round(n / self.steps) for n in (self.tokens_read, self.tokens_held))
        share = self.bytes_read / self.bytes_held
        return f"read {read:,} of {held:,} tokens a step, {share:.0%} of the bytes"


@dataclass(frozen=True)
class SparseStatus:
    """What policies that choose pages did since an engine started, and what they remember.

    usage            what was read, of how much
    bytes_per_page   of what is known of one page, in all layers that choose; of the policy that
                     takes most
    bytes            of all that is known of pages now, beside the pool
    bytes_most       of all pages of the pool: what it can grow to; on a card, what is set aside
    """

    usage: ReadUsage
    bytes_per_page: int
    bytes: int
    bytes_most: int


def read_layers(layout: CacheLayout, choice: EvictChoice) -> tuple[int, ...]:
    """Layers in which ``choice`` chooses pages: all but the first and those with a window."""
    windows = [layout.groups[group].window for group in layout.group_of_layer]
    return tuple(i for i, window in enumerate(windows) if i >= choice.dense and window is None)


def remembered_bytes(layout: CacheLayout, choice: EvictChoice) -> int:
    """Bytes of what ``choice`` remembers of one page, in all layers that choose."""
    shapes = [layout.shapes[layer] for layer in read_layers(layout, choice)]
    return sum(summary_bytes(choice.policy, choice.bits, shape) for shape in shapes)


def require_readable(layout: CacheLayout, settings: CacheConfig, choice: EvictChoice) -> None:
    """Raise ConfigError, with the reason, if pages of such a cache cannot be chosen."""
    if settings.page_size == "whole":
        raise ConfigError(
            f"{choice.policy} chooses pages to read, and page_size 'whole' has one page a "
            "sequence; give a page_size in tokens"
        )
    if not read_layers(layout, choice):
        raise ConfigError(
            f"eviction {str(choice)!r} chooses pages in layers from {choice.dense} on that see the "
            f"whole context, and none of the {len(layout.shapes)} layers is one; lower dense, or "
            "use evict='none' for a model whose layers all have a sliding window"
        )
    size = layout.page_size
    if isinstance(choice.budget, int) and choice.budget < LEAST_PAGES * size:
        raise ConfigError(
            f"eviction {str(choice)!r}: the first page, the newest and one to choose are "
            f"{LEAST_PAGES} pages of {size} tokens; give a budget of at least "
            f"{LEAST_PAGES * size} tokens or a smaller page_size"
        )


@dataclass(frozen=True)
class _Followed:
    """A sequence that reads at most ``pages`` once its ``prompt`` tokens are there."""

    choice: EvictChoice
    prompt: int
    pages: int


@dataclass(frozen=True)
class _Token:
    """The one new token of a sequence, whose prompt is there.

    at, row   its sequence's number and its own in the batch
    pages     int64 [n]: of its sequence, in order, as it sees them; the last holds the token
    last      tokens in the last page, itself included
    reads     how many pages each head reads
    """

    at: int
    row: int
    pages: Array
    last: int
    reads: int

    @classmethod
    def of(cls, batch: PagedBatch, group: int, at: int, most: int | None = None) -> "_Token":
        """Of a sequence that reads at most so many pages of a layer group, or all of them."""
        tables = batch.groups[group]
        row, last = int(batch.query_indptr[at]), int(tables.last_page_len[at])
        pages = tables.pages_seen(at, int(batch.places[row]) // tables.page_size)
        return cls(at, row, pages, last, len(pages) if most is None else min(most, len(pages)))

    @property
    def chooses(self) -> bool:
        """False if it reads all."""
        return self.reads < len(self.pages)


class SparseStep:
    """A step in which some tokens read chosen pages.

    whole    True if all are computed alike: each sequence has one new token, and those that choose
             do it by the same. The others, policy or not, choose all their pages then, if the
             backend replays steps; if it does not, there must be no others
    beside   the batches of some tokens that :meth:`attend` attends with, and which these are
    """

    def __init__(
        self,
        cache: KVCache,
        backend: Backend,
        batch: PagedBatch,
        choosing: Mapping[KnownPages, Sequence[_Token]],
    ) -> None:
        self._cache, self._backend, self._batch = cache, backend, batch
        self._tokens = choosing
        self.whole = (
            len(choosing) == 1
            and bool((np.diff(batch.query_indptr) == 1).all())
            and (backend.replays or self._choosers == batch.num_sequences)
        )
        self._unknown: dict[KnownPages, tuple[Array, Array]] = {}
        self._choosing = {known: self._part(known, some) for known, some in choosing.items()}
        self._rest = {} if self.whole else self._rests()

    @property
    def beside(self) -> list[SomeRows]:
        """See the class."""
        return [*self._choosing.values(), *self._rest.values()]

    def forward(self, model: CausalLM, tokens: Sequence[int]) -> Logits:
        """Logits of all tokens of a step that is ``whole``."""
        [(known, (_, batch))] = self._choosing.items()
        logits = model.forward_choosing(tokens, batch, self._cache.pools, known.summaries)
        known.note(*self._unknown[known])
        return logits

    def attend(self, layer: int, query: Any) -> Any:
        """Queries [T, H, D] of ``layer`` -> [T, H * D], both the backend's own."""
        backend, pool = self._backend, self._cache.pools[layer]
        group = self._batch.group_of_layer[layer]
        parts: list[tuple[Array, Any]] = []
        for known, (rows, batch) in self._choosing.items():
            summaries = known.summaries[layer]
            if summaries is not None:
                own = backend.rows(query, rows)
                parts.append((rows, attend_chosen(backend, own, pool, batch, summaries)))
                if layer == known.layers[-1]:  # all of them know the pages now
                    known.note(*self._unknown[known])
        if not parts:
            return backend.attend(query, pool, self._batch, group)
        others = self._rest.get(self._choose_in(layer))
        if others is not None:
            rows, batch = others
            own = backend.rows(query, rows)
            parts.append((rows, backend.attend(own, pool, batch, group)))
        return backend.join_rows(parts)

    @cached_property
    def usage(self) -> dict[int, ReadUsage]:
        """What each sequence that reads sparsely reads, by its number in the batch."""
        return {
            token.at: self._usage_of(known, token)
            for known, tokens in self._tokens.items()
            for token in tokens
        }

    # -- inside ------------------------------------------------------------------------------

    @property
    def _choosers(self) -> int:
        return sum(map(len, self._tokens.values()))

    def _part(self, known: KnownPages, tokens: Sequence[_Token]) -> SomeRows:
        """The batch of tokens that choose by the same, with the pages that they choose from."""
        self._unknown[known] = fresh, _ = known.unknown(*self._tables(known.group, tokens))
        if self.whole and len(tokens) < self._batch.num_sequences:
            tokens = self._with_others(known.group, tokens)
        candidates = Candidates.of(
            self._cache.layout.page_size,
            self._cache.layout.shapes[known.layers[0]].num_kv_heads,
            self._tables(known.group, tokens),
            counts=[token.reads for token in tokens],
            last_page_len=[token.last for token in tokens],
            fresh=fresh,
        )
        rows = np.array([token.row for token in tokens])
        batch = self._batch if self.whole else self._batch.select(rows)
        return rows, replace(batch, candidates=candidates)

    def _with_others(self, group: int, tokens: Sequence[_Token]) -> list[_Token]:
        """Of every sequence; those that are not among ``tokens`` read all."""
        own, batch = {token.at: token for token in tokens}, self._batch
        every = range(batch.num_sequences)
        return [own[at] if at in own else _Token.of(batch, group, at) for at in every]

    def _tables(self, group: int, tokens: Sequence[_Token]) -> tuple[Array, Array]:
        """Where the pages of each token begin, and all of them: the batch's own if that is so."""
        tables = self._batch.groups[group]
        if len(tokens) == self._batch.num_sequences and not tables.open.are_used:
            return tables.indptr, tables.indices
        starts = np.cumsum([0, *(len(token.pages) for token in tokens)])
        return starts, np.concatenate([token.pages for token in tokens])

    def _choose_in(self, layer: int) -> frozenset[KnownPages]:
        """By what tokens choose in a layer."""
        return frozenset(known for known in self._choosing if layer in known.layers)

    def _rests(self) -> dict[frozenset[KnownPages], SomeRows]:
        """Of each set of tokens that choose in some layer, those that do not; if there are any."""
        rests = {}
        for choosing in map(self._choose_in, range(len(self._cache.layout.shapes))):
            if choosing and choosing not in rests:
                chosen = np.concatenate([self._choosing[known][0] for known in choosing])
                others = np.setdiff1d(np.arange(self._batch.num_tokens), chosen)
                if len(others):
                    rests[choosing] = others, self._batch.select(others)
        return rests

    def _usage_of(self, known: KnownPages, token: _Token) -> ReadUsage:
        size = self._cache.layout.page_size
        held = (len(token.pages) - 1) * size + token.last
        read = (token.reads - 1) * size + token.last
        bytes_read, bytes_held = float((len(token.pages) - 2) * known.bytes_per_page), 0.0
        for (chooses, window), each in known.bytes_of_layers.items():
            seen = held if window is None else min(held, window)
            bytes_held += seen * each
            bytes_read += (read if chooses else seen) * each
        return ReadUsage(1, read, held, round(bytes_read), round(bytes_held))


class Reader:
    """The sequences of an engine that read sparsely, and what is known of their pages."""

    def __init__(self, cache: KVCache, backend: Backend) -> None:
        self._cache, self._backend = cache, backend
        self._followed: dict[int, _Followed] = {}
        self._known: dict[tuple[str, int, tuple[int, ...]], KnownPages] = {}
        self.usage = ReadUsage()

    @property
    def status(self) -> SparseStatus | None:
        """What was read, and what is remembered; None if nobody asked for such a policy."""
        if not self._known:
            return None
        known = self._known.values()
        return SparseStatus(
            self.usage,
            max(each.bytes_per_page for each in known),
            sum(each.bytes for each in known),
            sum(each.bytes_per_page * each.num_pages for each in known),
        )

    def remembers(self, choice: EvictChoice) -> bool:
        """True if room is set aside for what ``choice`` remembers."""
        return self._key(choice) in self._known

    def remember(self, choice: EvictChoice) -> None:
        """Set aside room for what ``choice`` remembers of every page, once.

        Raises BackendError if the backend has no memory for it.
        """
        if not self.remembers(choice):
            key = self._key(choice)
            self._known[key] = KnownPages(self._cache, self._backend, choice, key[2])

    def follow(self, sequence: int, choice: EvictChoice, prompt: int) -> None:
        """Let ``sequence`` read sparsely behind ``prompt`` tokens; nothing new if it does."""
        if sequence not in self._followed:
            alive = set(self._cache.sequences)
            self._followed = {s: f for s, f in self._followed.items() if s in alive}
            pages = choice.tokens(prompt) // self._cache.layout.page_size
            self._followed[sequence] = _Followed(choice, prompt, max(LEAST_PAGES, pages))

    def step(self, parts: Sequence[Part], batch: PagedBatch) -> SparseStep | None:
        """How a step attends; None if all of it reads all pages."""
        if not self._followed:
            return None
        choosing = defaultdict[KnownPages, list[_Token]](list)
        for at, (sequence, new, _) in enumerate(parts):
            followed = self._followed.get(sequence)
            if followed is None or len(new) != 1:
                continue
            if self._cache.length(sequence) >= followed.prompt:
                known = self._known[self._key(followed.choice)]
                token = _Token.of(batch, known.group, at, followed.pages)
                if token.chooses:
                    choosing[known].append(token)
        return SparseStep(self._cache, self._backend, batch, choosing) if choosing else None

    def settle(self, step: SparseStep) -> None:
        """``step`` was committed."""
        self.usage = sum(step.usage.values(), self.usage)

    def _key(self, choice: EvictChoice) -> tuple[str, int, tuple[int, ...]]:
        """Policies of one key remember the same, whatever their budgets."""
        return choice.policy, choice.bits, read_layers(self._cache.layout, choice)
