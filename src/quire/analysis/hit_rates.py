"""How much of a trace's prompts is found in a cache, by the size of the cache."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from quire.analysis.replay import LIMITS, replay
from quire.analysis.replayed import Timing
from quire.analysis.trace import Arrival, common_prefixes, unbounded_hits
from quire.engine.scheduler import Limits
from quire.errors import ConfigError
from quire.layout import CacheLayout, fit_pages, pages_for

__all__ = ["SHARES", "HitRate", "HitRates", "hit_rates", "unlimited_bytes"]

SHARES = (1 / 64, 1 / 16, 1 / 4, 1.0)  # of what a pool without limit comes to hold


@dataclass(frozen=True)
class HitRate:
    """Of one size: what was asked for, what pages came to, and what of the trace it held.

    hit_tokens   prompt tokens that were cached when their request began
    hit_rate     their share of *all* prompt tokens; those of refused requests count as missed
    """

    size: int
    pool_bytes: int
    hit_tokens: int
    hit_rate: float
    refused: int
    preemptions: int
    evicted_pages: int


@dataclass(frozen=True)
class HitRates:
    """Hit rates by size, in order of size.

    prompt_tokens    of the trace
    bound            hit rate of a cache that forgets nothing, one request after the other
    unlimited_bytes  what that cache holds at the end
    """

    prompt_tokens: int
    bound: float
    unlimited_bytes: int
    rates: tuple[HitRate, ...]

    def as_dict(self) -> dict[str, Any]:
        """All of it, of dicts, lists and numbers: for JSON."""
        return asdict(self) | {"rates": [asdict(rate) for rate in self.rates]}


def hit_rates(
    trace: Sequence[Arrival],
    layout: CacheLayout,
    sizes: Sequence[int] | None,
    timing: Timing,
    *,
    limits: Limits = LIMITS,
    longest: int | None = None,
) -> HitRates:
    """Replays of a trace on pools of several ``sizes`` in bytes.

    None are :data:`SHARES` of :func:`unlimited_bytes`, but for those that hold not even a page.
    The bound knows no last page that is packed, and no window: where pages are packed, a match ends
    with a whole one, and where a window gave pages up, a shorter prefix is what is left.
    Each size is a replay; the largest of the shares holds all: 2.8 million pages, 3.6 GiB of books
    and 151 s for the trace of 20,000 requests that :mod:`quire.analysis.replay` tells of.
    Raises ConfigError for a size that does not hold a page of each layer group.
    """
    asked = sum(arrival.input_length for arrival in trace)
    unlimited = unlimited_bytes(trace, layout)
    if sizes is None:
        shares = [int(unlimited * share) for share in SHARES]
        sizes = [size for size in shares if _holds_a_page(layout, size, limits)] or [unlimited]
    rates = []
    for size in sorted(sizes):
        done = replay(trace, layout, size, timing, limits=limits, longest=longest)
        rates.append(
            HitRate(
                size=size,
                pool_bytes=done.pool_bytes,
                hit_tokens=done.hit_tokens,
                hit_rate=done.hit_tokens / max(1, asked),
                refused=done.refused,
                preemptions=done.preemptions,
                evicted_pages=done.evicted_pages,
            )
        )
    return HitRates(asked, unbounded_hits(trace) / max(1, asked), unlimited, tuple(rates))


def unlimited_bytes(trace: Sequence[Arrival], layout: CacheLayout) -> int:
    """Bytes of all pages that a cache which forgets nothing holds after the trace, replies too.

    Of each request the pages behind what an earlier one has; its first and its unfinished one are
    open where pages are packed. A window makes no difference: pages behind it stay, cached.
    """
    size, plain, opened = layout.page_size, 0, 0
    for arrival, common in zip(trace, common_prefixes(trace), strict=True):
        tokens = arrival.input_length + max(1, arrival.output_length) - 1
        new = pages_for(tokens, size) - common // size
        still_open = min(new, (common < size) + (tokens % size > 0))
        plain, opened = plain + new - still_open, opened + still_open
    return sum(
        plain * layout.page_bytes(group) + opened * layout.open_page_bytes(group)
        for group in range(len(layout.groups))
    )


def _holds_a_page(layout: CacheLayout, size: int, limits: Limits) -> bool:
    try:
        fit_pages(layout, size, limits.max_sequences, limits.max_batch_tokens)
    except ConfigError:
        return False
    return True
