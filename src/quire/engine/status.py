"""What an engine is doing, for people and for dashboards."""

from dataclasses import dataclass
from itertools import groupby

from quire.cache import CacheUsage
from quire.cache.tiers import TierUsage
from quire.engine.reading import SparseStatus
from quire.engine.shadow import ShadowUsage
from quire.format_choice import describe_formats
from quire.layout import CacheLayout

__all__ = ["EngineStatus", "lossy_layers"]


@dataclass(frozen=True)
class EngineStatus:
    """What an engine is doing: samples by status, KV bytes, preemptions since it started.

    pins          prefixes that are held by :meth:`Engine.pin`
    pins_dropped  those that had to be let go early, since nothing could run beside them
    tiers         what each tier below the pool holds and did
    lossy         what of the cache does not keep its numbers as they were, a line each; empty if
                  every answer is exact
    reading       what was read where policies chose pages; None if nothing was
    shadow        what re-running requests with the exact cache showed; None without ``shadow``
    """

    running: int
    waiting: int
    kv: CacheUsage
    preemptions: int
    pins: int = 0
    pins_dropped: int = 0
    tiers: tuple[TierUsage, ...] = ()
    lossy: tuple[str, ...] = ()
    reading: SparseStatus | None = None
    shadow: ShadowUsage | None = None


def lossy_layers(layout: CacheLayout) -> tuple[str, ...]:
    """Layers whose page format is lossy, neighbours together: ``"layers 2-5: int8 pages"``."""
    found = []
    for shape, layers in groupby(range(len(layout.shapes)), layout.shapes.__getitem__):
        formats = shape.key_format, shape.value_format
        if not all(format.lossless for format in formats):
            first, *rest = layers
            span = f"layers {first}-{rest[-1]}" if rest else f"layer {first}"
            found.append(f"{span}: {describe_formats([formats])} pages")
    return tuple(found)
