"""Reading only pages that can matter: which sequences do, which pages they read, what they read.

A policy that reads sparsely drops nothing. Tokens of a prompt are computed with all pages, so what
a prompt leaves in the cache is exact; from the first token of the reply on, each layer but the
first ``dense`` ones reads, for each KV head, the first page, the newest page and the most promising
of the others, as many as the budget allows. A sequence within its budget is read whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.backends import Backend
from quire.batch import ChosenPages, PagedBatch
from quire.cache import KVCache
from quire.cache.selection import LEAST_PAGES, best_pages
from quire.config import CacheConfig
from quire.engine.summaries import Summaries, summary_bytes
from quire.errors import ConfigError
from quire.evict_choice import EvictChoice
from quire.layout import CacheLayout

__all__ = [
    "ReadUsage",
    "Reader",
    "SparseStatus",
    "SparseStep",
    "read_layers",
    "require_readable",
]

Array = npt.NDArray[np.int64]
Part = tuple[int, Sequence[int], Sequence[int]]


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
    bytes_most       of all pages of the pool: what it can grow to
    """

    usage: ReadUsage
    bytes_per_page: int
    bytes: int
    bytes_most: int


def read_layers(layout: CacheLayout, choice: EvictChoice) -> tuple[int, ...]:
    """Layers in which ``choice`` chooses pages: all but the first and those with a window."""
    windows = [layout.groups[group].window for group in layout.group_of_layer]
    return tuple(i for i, window in enumerate(windows) if i >= choice.dense and window is None)


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
    """The one new token of a sequence that reads sparsely in this step.

    at, row   its sequence's number and its own in the batch
    pages     int64 [n]: of its sequence, in order; the last holds the token
    last      tokens in the last page, itself included
    """

    at: int
    row: int
    followed: _Followed
    summaries: Summaries
    pages: Array
    last: int


class SparseStep:
    """Attention of a step in which some tokens read chosen pages."""

    def __init__(
        self, cache: KVCache, backend: Backend, batch: PagedBatch, tokens: Sequence[_Token]
    ) -> None:
        self._cache, self._backend, self._batch = cache, backend, batch
        self._tokens = tokens
        self._choosing = {  # by layer; equal lists are one object
            layer: [token for token in tokens if layer in token.summaries.layers]
            for layer in sorted({layer for token in tokens for layer in token.summaries.layers})
        }
        self._others: dict[tuple[int, ...], tuple[list[int], PagedBatch]] = {}
        for token in tokens:
            token.summaries.bring(token.pages[1:-1])

    def attend(self, layer: int, query: Any) -> Any:
        """Queries [T, H, D] of ``layer`` -> [T, H * D], both the backend's own."""
        backend, pool = self._backend, self._cache.pools[layer]
        group, tokens = self._batch.group_of_layer[layer], self._choosing.get(layer)
        if not tokens:
            return backend.attend(query, pool, self._batch, group)
        rows = tuple(token.row for token in tokens)
        chosen = self._choose(layer, query, tokens)
        sparse = backend.attend_pages(backend.rows(query, rows), pool, chosen)
        parts: list[tuple[Sequence[int], Any]] = [(rows, sparse)]
        others, batch = self._rest(rows)
        if others:
            parts.append((others, backend.attend(backend.rows(query, others), pool, batch, group)))
        return backend.join_rows(parts)

    @cached_property
    def usage(self) -> dict[int, ReadUsage]:
        """What each sequence that reads sparsely reads, by its number in the batch."""
        return {token.at: self._usage_of(token) for token in self._tokens}

    # -- inside ------------------------------------------------------------------------------

    def _choose(self, layer: int, query: Any, tokens: Sequence[_Token]) -> ChosenPages:
        lists = []
        for token in tokens:
            own = self._backend.rows(query, [token.row])
            scores = token.summaries.scores(layer, own, token.pages[1:-1])
            lists.append(token.pages[best_pages(scores, token.followed.pages)])
        counts = [each.shape[1] for each in lists for _ in each]
        return ChosenPages(
            self._cache.layout.page_size,
            np.concatenate([[0], np.cumsum(counts)]),
            np.concatenate([each.ravel() for each in lists]),
            np.array([token.last for token in tokens]),
        )

    def _rest(self, rows: tuple[int, ...]) -> tuple[list[int], PagedBatch]:
        """Tokens of the batch that are not among ``rows``, and the batch of them alone."""
        if rows not in self._others:
            others = np.setdiff1d(np.arange(self._batch.num_tokens), rows)
            self._others[rows] = others.tolist(), self._batch.select(others)
        return self._others[rows]

    def _usage_of(self, token: _Token) -> ReadUsage:
        layout, size = self._cache.layout, self._cache.layout.page_size
        held = (len(token.pages) - 1) * size + token.last
        read = (token.followed.pages - 1) * size + token.last
        known = len(token.pages) - 2
        choosing = token.summaries.layers
        bytes_read = bytes_held = 0.0
        for layer, shape in enumerate(layout.shapes):
            window = layout.groups[layout.group_of_layer[layer]].window
            seen = held if window is None else min(held, window)
            bytes_held += seen * shape.bytes_per_token
            bytes_read += (read if layer in choosing else seen) * shape.bytes_per_token
            if layer in choosing:
                bytes_read += known * summary_bytes(token.followed.choice, shape)
        return ReadUsage(1, read, held, round(bytes_read), round(bytes_held))


class Reader:
    """The sequences of an engine that read sparsely, and what is known of their pages."""

    def __init__(self, cache: KVCache, backend: Backend) -> None:
        self._cache, self._backend = cache, backend
        self._followed: dict[int, _Followed] = {}
        self._summaries: dict[tuple[str, int, tuple[int, ...]], Summaries] = {}
        self.usage = ReadUsage()

    @property
    def status(self) -> SparseStatus | None:
        """What was read, and what is remembered; None if no step chose pages."""
        if not self._summaries:
            return None
        known = self._summaries.values()
        return SparseStatus(
            self.usage,
            max(each.bytes_per_page for each in known),
            sum(each.bytes for each in known),
            sum(each.bytes_per_page * each.num_pages for each in known),
        )

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
        tokens = []
        for at, (sequence, new, _) in enumerate(parts):
            followed = self._followed.get(sequence)
            if followed is None or len(new) != 1:
                continue
            if self._cache.length(sequence) >= followed.prompt:
                token = self._token(at, followed, batch)
                if len(token.pages) > followed.pages:
                    tokens.append(token)
        return SparseStep(self._cache, self._backend, batch, tokens) if tokens else None

    def settle(self, step: SparseStep) -> None:
        """``step`` was committed."""
        self.usage = sum(step.usage.values(), self.usage)

    def _token(self, at: int, followed: _Followed, batch: PagedBatch) -> _Token:
        summaries = self._summaries_of(followed.choice)
        tables = batch.groups[batch.group_of_layer[summaries.layers[0]]]
        row, last = int(batch.query_indptr[at]), int(tables.last_page_len[at])
        pages = tables.pages_seen(at, int(batch.places[row]) // tables.page_size)
        return _Token(at, row, followed, summaries, pages, last)

    def _summaries_of(self, choice: EvictChoice) -> Summaries:
        layers = read_layers(self._cache.layout, choice)
        key = choice.policy, choice.bits, layers
        if key not in self._summaries:
            self._summaries[key] = Summaries(self._cache, self._backend, choice, layers)
        return self._summaries[key]
