"""The cache and the tiers that an engine's settings describe."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from quire.backends import Backend
from quire.cache import CacheUsage, KVCache
from quire.cache.tiers import HostTier, Tier
from quire.config import CacheConfig, EngineConfig, format_bytes
from quire.engine.tiering import PrefixTiers, compute_pace
from quire.errors import ConfigError
from quire.format_choice import AUTO, parse_formats
from quire.layout import CacheLayout, cache_layout, pages_for
from quire.machine import this_machine
from quire.models import LoadedModel
from quire.pages import page_format

__all__ = ["exact_config", "layout_of", "make_cache", "prefix_tiers", "require_formats"]


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
    layout: CacheLayout, num_pages: tuple[int, ...], backend: Backend, identity: bytes | None
) -> KVCache:
    """The cache, its pools of ``num_pages`` in each area allocated.

    ``identity`` begins the chains of its prefix index; None has no index.
    """
    counts: list[list[int]] = [[] for _ in layout.groups]
    for area, count in zip(layout.areas, num_pages, strict=True):
        counts[area.group].append(count)
    of_layer = layout.group_of_layer
    pools = [
        backend.pool(shape, *counts[of_layer[layer]]) for layer, shape in enumerate(layout.shapes)
    ]
    return KVCache(layout, num_pages, pools, identity)


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


def prefix_tiers(
    settings: CacheConfig,
    cache: KVCache,
    backend: Backend,
    loaded: LoadedModel,
    identity: Callable[[], Mapping[str, str]],
) -> PrefixTiers | None:
    """The tiers below a cache's pool; None if there are none. ``identity`` is of its pages, and
    asked for only by tiers on disk.

    Raises ConfigError for a budget that is too small for this model's pages, TierError for a
    directory that cannot be used.
    """
    tiers = _open_tiers(settings, cache.layout, identity)
    if not tiers:
        return None
    width = page_format(loaded.page_format).dtype.itemsize
    weights = loaded.bytes_read_a_step // width
    pace = compute_pace(backend.name, this_machine().threads, weights)
    return PrefixTiers(cache, tiers, pace)


def _open_tiers(
    settings: CacheConfig, layout: CacheLayout, identity: Callable[[], Mapping[str, str]]
) -> list[Tier]:
    """The fastest first."""
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
