"""A KVCache that keeps books and no numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

from quire.cache import KVCache
from quire.layout import CacheLayout, LayerGroup
from quire.pages import PageShape, page_format

PAGE = 16
LAYERS = 12  # the 160m shapes of bench/peers.py: what a page would take
SHAPE = PageShape(PAGE, 4, 64, 64, *[page_format("bf16")] * 2)
LAYOUT = CacheLayout(PAGE, (LayerGroup(tuple(range(LAYERS)), None),), (SHAPE,) * LAYERS)


@dataclass(frozen=True)
class StubPool:
    """A pool of pages that hold nothing."""

    shape: PageShape
    num_pages: int

    def copy_pages(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Nothing is there to be copied."""


def stub_cache(num_pages: int, *, shares: bool = True) -> KVCache:
    """An empty cache of ``num_pages`` pages without memory; with a prefix index if ``shares``."""
    pools = [StubPool(SHAPE, num_pages)] * LAYERS
    return KVCache(LAYOUT, [num_pages], pools, b"" if shares else None)  # type: ignore[arg-type]
