"""The cache and the tiers that an engine's settings describe."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from quire.backends import Backend
from quire.cache import CacheUsage, KVCache
from quire.cache.tiers import HostTier, Tier
from quire.config import CacheConfig, EngineConfig, format_bytes
from quire.errors import ConfigError
from quire.format_choice import AUTO, parse_formats
from quire.layout import CacheLayout, cache_layout, fit_pages, pages_for, with_open_pages
from quire.models import LoadedModel
from quire.pages import page_format

__all__ = ["exact_config", "layout_of", "make_cache", "open_tiers", "require_formats"]

AUTO_MEMORY = 2 << 30  # bytes for pages, where a backend cannot say what is free


def require_formats(settings: CacheConfig, backend: Backend) -> None:
    """Raise BackendError if ``backend`` does not store the formats that are named.

    What ``auto`` stands for is known when the model is loaded, and refused when pools are made.
    """
    for pair in parse_formats(settings.kv_format).pairs:
        if AUTO not in pair:
            backend.require_formats(*map(page_format, pair))


def layout_of(config: EngineConfig, loaded: LoadedModel) -> CacheLayout:
    """Layer groups and pages of a loaded model's cache."""
    settings, model = config.cache, loaded.config
    formats = parse_formats(settings.kv_format).of_layers(model.num_layers, loaded.page_format)
    size = model.max_position if settings.page_size == "whole" else settings.page_size
    assert not isinstance(size, str)
    return cache_layout(model, size, formats)


def make_cache(
    config: EngineConfig, layout: CacheLayout, backend: Backend, identity: bytes
) -> KVCache:
    """The cache, its pools allocated. ``identity`` begins the chains of its prefix index."""
    settings = config.cache
    if settings.num_pages is not None:
        pages = (settings.num_pages,) * len(layout.groups)
        num_pages = with_open_pages(layout, pages, config.max_sequences, config.max_batch_tokens)
    else:
        budget = _budget(settings, backend)
        num_pages = fit_pages(layout, budget, config.max_sequences, config.max_batch_tokens)
    counts: list[list[int]] = [[] for _ in layout.groups]
    for area, count in zip(layout.areas, num_pages, strict=True):
        counts[area.group].append(count)
    of_layer = layout.group_of_layer
    pools = [
        backend.pool(shape, *counts[of_layer[layer]]) for layer, shape in enumerate(layout.shapes)
    ]
    return KVCache(layout, num_pages, pools, identity if settings.prefix_cache else None)


def _budget(settings: CacheConfig, backend: Backend) -> int:
    """Bytes of all pools."""
    if isinstance(settings.kv_memory, int):
        return settings.kv_memory
    free = backend.pool_budget
    return AUTO_MEMORY if free is None else free


def exact_config(
    config: EngineConfig, loaded: LoadedModel, tokens: int, usage: CacheUsage
) -> EngineConfig:
    """Settings of an exact cache for one sequence of ``tokens``, beside a pool of ``usage``.

    Exact is the checkpoint's own dtype, nothing shared. Raises ConfigError, with the numbers, for
    pages that take more than that pool: what watches must not cost more than what it watches.
    """
    cache = CacheConfig(page_size=config.cache.page_size, num_pages=1, prefix_cache=False)
    exact = dataclasses.replace(config, cache=cache, max_sequences=1, shadow=0.0)
    layout = layout_of(exact, loaded)
    pages = pages_for(tokens, layout.page_size)
    wanted = pages * sum(layout.page_bytes(group) for group in range(len(layout.groups)))
    if wanted > usage.pool_bytes:
        raise ConfigError(
            f"{tokens} tokens in an exact cache take {format_bytes(wanted)}, more than the pool of "
            f"{format_bytes(usage.pool_bytes)}"
        )
    return dataclasses.replace(exact, cache=dataclasses.replace(cache, num_pages=pages))


def open_tiers(
    settings: CacheConfig, layout: CacheLayout, identity: Callable[[], Mapping[str, str]]
) -> list[Tier]:
    """Tiers below the pool, the fastest first; ``identity`` is asked for only by those on disk.

    Raises ConfigError for a budget that is too small for this model's pages, TierError for a
    directory that cannot be used.
    """
    largest = max(layout.area_bytes)
    for name in ("host_cache", "disk_cache"):
        budget = getattr(settings, name)
        if budget is not None and budget < 4 * largest:
            raise ConfigError(
                f"{name} of {format_bytes(budget)} is too small for pages of "
                f"{format_bytes(largest)}; give at least {format_bytes(4 * largest)}"
            )
    tiers: list[Tier] = []
    if settings.host_cache is not None:
        assert isinstance(settings.host_cache, int)
        tiers.append(HostTier(settings.host_cache))
    if settings.cache_dir is not None:
        from quire.cache.disk import DiskTier  # sqlite3 and zstandard, for those who want them

        assert isinstance(settings.disk_cache, int)
        tiers.append(DiskTier(Path(settings.cache_dir), settings.disk_cache, identity()))
    return tiers
