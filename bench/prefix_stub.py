"""A KVCache that keeps books and no numbers, of the shapes that the benchmarks have."""

from quire.analysis.replay import empty_cache
from quire.cache import KVCache
from quire.layout import CacheLayout, LayerGroup
from quire.pages import PageShape, page_format

PAGE = 16
LAYERS = 12  # the 160m shapes of bench/peers.py: what a page would take
SHAPE = PageShape(PAGE, 4, 64, 64, *[page_format("bf16")] * 2)
LAYOUT = CacheLayout(PAGE, (LayerGroup(tuple(range(LAYERS)), None),), (SHAPE,) * LAYERS)


def stub_cache(num_pages: int, *, shares: bool = True) -> KVCache:
    """An empty cache of ``num_pages`` pages without memory; with a prefix index if ``shares``."""
    return empty_cache(LAYOUT, [num_pages], b"" if shares else None)
