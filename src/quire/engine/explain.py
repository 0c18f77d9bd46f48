"""Why a prompt, or the rest of it, is not in the prefix cache: reasons that a person can read."""

import time
from dataclasses import dataclass

import numpy as np

from quire.cache import KVCache, PrefixQuery
from quire.engine.completion import TIERS
from quire.engine.tiering import PrefixTiers
from quire.models import TextCodec

__all__ = ["PrefixExplanation", "explain"]

NEIGHBOURS = 6  # tokens shown on either side of where two prompts part


@dataclass(frozen=True)
class PrefixExplanation:
    """What of a prompt is cached now, and why the rest is not.

    ``reasons`` are sentences; the first says why the first token after the hit missed.
    """

    prompt_tokens: int
    cached_tokens: int
    cached_tokens_by_tier: dict[str, int]
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        tiers = ", ".join(
            f"{count} in {name}" for name, count in self.cached_tokens_by_tier.items()
        )
        head = f"{self.cached_tokens} of {self.prompt_tokens} prompt tokens are cached ({tiers})"
        return "\n".join([head, *(f"- {reason}" for reason in self.reasons)])


def explain(
    cache: KVCache, codec: TextCodec | None, query: PrefixQuery, tiers: PrefixTiers | None
) -> PrefixExplanation:
    """Look ``query`` up as a request would, changing nothing."""
    limit = query.num_tokens - 1
    plan = None if tiers is None else tiers.plan(query, limit)
    if plan is None:
        hit = cache.match(query, limit).tokens
        reasons = _reasons(cache, codec, query, hit)
        by_tier = dict.fromkeys(TIERS, 0) | {"pool": hit}
        return PrefixExplanation(query.num_tokens, hit, by_tier, tuple(reasons))
    size = cache.layout.page_size
    by_tier = {name: plan.sources.count(name) * size for name in TIERS}
    by_tier["pool"] = plan.match.tokens
    hit = sum(by_tier.values())
    reasons = [plan.decision]
    if limit - hit >= size:
        reasons.append(f"the page from token {hit} on is in no tier")
    else:
        reasons.append(f"the last {query.num_tokens - hit} tokens are no whole page")
    return PrefixExplanation(query.num_tokens, hit, by_tier, tuple(reasons))


def _reasons(cache: KVCache, codec: TextCodec | None, query: PrefixQuery, hit: int) -> list[str]:
    index = cache.prefix
    if index is None:
        return ["the prefix cache is off (prefix_cache=False, --no-prefix-cache)"]
    if hit == query.num_tokens - 1:
        return ["the last token is always computed: its logits choose the next one"]
    reasons = []
    evicted = index.evicted_behind(query, hit)
    common, goes_on = index.nearest(query)
    if evicted is not None:
        ago = time.time() - evicted.at
        reasons.append(
            f"the page from token {hit} on was evicted {ago:.1f} s ago: {evicted.reason}"
        )
    inside = evicted is None and 0 < common - hit < cache.layout.page_size
    if inside and True in cache.layout.packs:
        reasons.append(
            f"{common} tokens are remembered; those from token {hit} on are in the middle of a "
            "page that is packed, and are computed again"
        )
    elif common > hit and evicted is None:
        reasons.append(
            f"{common} tokens are remembered, but pages that token {hit} would see left a sliding "
            "window and were given up"
        )
    elif common < query.num_tokens:
        reasons.append(_parting(codec, query, common, goes_on))
    other = max(
        (
            cache.match(PrefixQuery(_ids(query.data), s), query.num_tokens - 1).tokens
            for s in index.salts
            if s != query.salt
        ),
        default=0,
    )
    if other > hit:
        reasons.append(f"{other} tokens are cached under another salt, which is never shared")
    return reasons


def _parting(codec: TextCodec | None, query: PrefixQuery, at: int, goes_on: bytes) -> str:
    """Where the nearest cached prompt goes another way."""
    ours = _ids(query.data)
    here = _shown(codec, ours[at : at + NEIGHBOURS])
    if at == 0 and not goes_on:
        return "no cached prompt begins like this one"
    before = _shown(codec, ours[max(0, at - NEIGHBOURS) : at])
    if not goes_on:
        return f"the nearest cached prompt ends at token {at}, after {before}; this goes on {here}"
    there = _shown(codec, _ids(goes_on)[:NEIGHBOURS])
    return (
        f"the nearest cached prompt parts at token {at}, after {before}: this one goes on {here}, "
        f"that one {there}"
    )


def _shown(codec: TextCodec | None, tokens: list[int]) -> str:
    return repr(tokens) if codec is None else repr(codec.decode(tokens))


def _ids(data: bytes) -> list[int]:
    return [int(token) for token in np.frombuffer(data, "<u4")]
