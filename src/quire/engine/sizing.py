"""The plan of an engine, made from ``config.json`` before weights are loaded and pools made.

The bytes are those of :mod:`quire.analysis.memory`, with which ``quire plan`` predicts.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from quire.analysis.families import read_shape
from quire.analysis.load import Card, Load
from quire.analysis.memory import SPARE, MemoryPlan, kv_layout, weight_bytes, workspace
from quire.analysis.shape import ModelShape
from quire.backends import Backend
from quire.config import CacheConfig, EngineConfig, format_bytes
from quire.engine.reading import read_layers, remembered_bytes
from quire.errors import ConfigError
from quire.evict_choice import parse_eviction
from quire.layout import CacheLayout, fit_pages, with_open_pages
from quire.machine import Machine

__all__ = ["EnginePlan", "Room", "plan_engine"]

MOST_AUTO = 2 << 30  # bytes of pages, unless it is said how many


@dataclass(frozen=True)
class Room:
    """The memory that an engine finds.

    available   bytes that could be had now; None where that is unknown
    is_own      True if it is a card's, which nobody else needs
    """

    threads: int
    available: int | None
    is_own: bool = False

    @classmethod
    def of(cls, backend: Backend, machine: Machine) -> "Room":
        """What ``backend`` computes in."""
        own = backend.own_memory
        if own is None:
            return cls(machine.threads, machine.available_bytes)
        return cls(machine.threads, own, is_own=True)

    @property
    def free(self) -> int | None:
        """What may be used of it."""
        return None if self.available is None else int(self.available * (1 - SPARE))


@dataclass(frozen=True)
class EnginePlan:
    """What an engine takes.

    memory      bytes of weights, pages, summaries that the engine's own policy keeps, workspace
    num_pages   of each area of the cache
    tokens      that the pages hold, of one long sequence
    available   bytes that could be had when the plan was made; None where it is unknown
    kv_format   of all layers
    """

    memory: MemoryPlan
    num_pages: tuple[int, ...]
    tokens: int
    available: int | None
    kv_format: str

    def __str__(self) -> str:
        """One line for a person."""
        free = "" if self.available is None else f" of {format_bytes(self.available)} available"
        return f"{self.memory}{free}; {self.tokens:,} tokens of {self.kv_format} keys and values"


def plan_engine(
    directory: Path,
    config: EngineConfig,
    dtype: str,
    room: Room,
    *,
    loaded: bool = False,
) -> EnginePlan:
    """What an engine of these settings takes in ``room``.

    dtype    of the checkpoint's numbers, which its config.json need not say
    loaded   True if its weights are there already, for another engine

    ``kv_memory`` of ``"auto"`` becomes 2 GiB, or what is left of the available memory if that is
    less; all that is left of a memory that is the backend's own. Raises ConfigError, with these
    numbers, for what does not fit.
    """
    shape = replace(read_shape(directory), dtype=dtype)
    settings = config.cache
    layout = kv_layout(shape, settings.kv_format, settings.page_size)
    threads = room.threads if config.threads is None else config.threads
    load = Load(
        shape.max_position,
        config.max_sequences,
        config.max_batch_tokens,
        threads=threads,
        card=_card(config),
    )
    memory = MemoryPlan(
        {} if loaded else weight_bytes(shape, "fp32" if config.backend == "reference" else None),
        0,
        workspace(shape, layout, load),
    )
    free = room.free
    _require_fit(memory, room)
    area, each = _summaries(settings, layout)
    left = None if free is None else free - memory.total
    if left is not None and each:
        left = left * layout.area_bytes[area] // (layout.area_bytes[area] + each)
    pages = _pages(config, layout, room, left)
    kept = sum(count * size for count, size in zip(pages, layout.area_bytes, strict=True))
    memory = replace(memory, kv=kept, summaries=pages[area] * each)
    _require_fit(memory, room)
    tokens = _tokens(shape, layout, pages)
    return EnginePlan(memory, pages, tokens, room.available, layout.format_text)


def _card(config: EngineConfig) -> Card | None:
    """What the backend computes on, if it is a card."""
    if config.backend not in ("cuda", "cuda-exact"):
        return None
    moves = config.cache.host_cache is not None or config.cache.cache_dir is not None
    return Card(exact=config.backend == "cuda-exact", moves=moves)


def _summaries(settings: CacheConfig, layout: CacheLayout) -> tuple[int, int]:
    """The area of pages by whose summaries the engine's own policy chooses; bytes of one's."""
    choice = parse_eviction(settings.evict)
    if choice is None or choice.drops:
        return 0, 0
    layers = read_layers(layout, choice)
    if not layers:  # which is refused
        return 0, 0
    group = layout.group_of_layer[layers[0]]
    areas = [(area.group, area.is_open) for area in layout.areas]
    return areas.index((group, False)), remembered_bytes(layout, choice)


def _require_fit(memory: MemoryPlan, room: Room) -> None:
    """Raise ConfigError, with the plan's numbers, for more than there is."""
    if room.free is not None and memory.total > room.free:
        raise ConfigError(
            f"the model does not fit: {memory}, and {format_bytes(room.free)} can be had "
            f"({format_bytes(room.available or 0)} are available, of which {SPARE:.0%} are left "
            f"to others); {_advice(memory, room.free)}"
        )


def _advice(memory: MemoryPlan, free: int) -> str:
    left = free - memory.total + memory.kv + memory.summaries
    if memory.summaries:  # it shrinks with the pages
        left = left * memory.kv // (memory.kv + memory.summaries)
    if left <= 0:
        return "choose a smaller model, or free memory"
    return f"lower kv_memory to at most {left} bytes, choose a smaller kv_format, or free memory"


def _pages(
    config: EngineConfig, layout: CacheLayout, room: Room, left: int | None
) -> tuple[int, ...]:
    """Pages of each area: as many as are asked for, or fit."""
    settings, most = config.cache, config.max_batch_tokens
    if settings.num_pages is not None:
        pages = (settings.num_pages,) * len(layout.groups)
        return with_open_pages(layout, pages, config.max_sequences, most)
    budget = settings.kv_memory
    if isinstance(budget, str):
        budget = (
            MOST_AUTO if left is None else max(1, left if room.is_own else min(MOST_AUTO, left))
        )
    return fit_pages(layout, budget, config.max_sequences, most)


def _tokens(shape: ModelShape, layout: CacheLayout, pages: tuple[int, ...]) -> int:
    """Tokens of one sequence that fill the groups which keep everything; or all, if none does."""
    whole = [
        count
        for area, count in zip(layout.areas, pages, strict=True)
        if not area.is_open and layout.groups[area.group].window is None
    ]
    opened = any(area.is_open for area in layout.areas)
    most = min(whole, default=math.inf)
    if math.isinf(most):
        return shape.max_position
    return (int(most) + opened) * layout.page_size  # its first page is an open one
