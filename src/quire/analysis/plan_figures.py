"""The numbers in the pictures of a plan: growth over context, and capacity by page format.

Both ask :mod:`quire.analysis.memory`, so that a picture says what the plan in words does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from quire.analysis.memory import (
    Load,
    kv_layout,
    most_context,
    most_requests,
    plan_memory,
    weight_bytes,
)
from quire.analysis.shape import ModelShape
from quire.errors import ConfigError
from quire.layout import CacheLayout

__all__ = [
    "Capacity",
    "CapacityBar",
    "Case",
    "Growth",
    "GrowthLine",
    "Limit",
    "context_capacity",
    "growth_over_context",
    "request_capacity",
]

SAMPLES = 96  # contexts at which a line of growth is computed


@dataclass(frozen=True)
class Limit:
    """Memory that all must fit into; ``name`` is of the card or machine."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Case:
    """What is planned: a model, page formats of its cache, a load, and what it must fit into.

    formats     as in ``kv_format``; each is a line and a bar
    load        context and sequences of it are those of ``request_capacity`` and
                ``context_capacity``; growth over context leaves its context aside
    weights     their dtype; None as the checkpoint has them
    page_size   as in ``kv_layout``
    """

    shape: ModelShape
    formats: tuple[str, ...]
    load: Load
    limit: Limit | None = None
    weights: str | None = None
    page_size: int | str = "auto"

    def layout(self, name: str) -> CacheLayout:
        """Of the page format ``name``."""
        return kv_layout(self.shape, name, self.page_size)


# -- growth ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GrowthLine:
    """Bytes at a context, for a page format and a number of sequences.

    points   (tokens, bytes of weights, pages and workspace), tokens ascending
    most     the longest context that fits; 0 if none does, None where no limit is given
    """

    name: str
    sequences: int
    points: tuple[tuple[int, int], ...]
    most: int | None = None


@dataclass(frozen=True)
class Growth:
    """How a model's memory grows with its context, up to ``longest``.

    unwindowed   the first line, if layers with a sliding window kept all tokens; None without such
    windows      of those layers, ascending
    """

    model: str
    longest: int
    weights: int
    lines: tuple[GrowthLine, ...]
    limit: Limit | None = None
    unwindowed: GrowthLine | None = None
    windows: tuple[int, ...] = ()


def growth_over_context(case: Case, sequences: Sequence[int]) -> Growth:
    """A line for each page format and each number of ``sequences``."""
    shape = case.shape
    lines = tuple(
        _line(case, name, count) for count in dict.fromkeys(sequences) for name in case.formats
    )
    return Growth(
        model=shape.name,
        longest=shape.max_position,
        weights=sum(weight_bytes(shape, case.weights).values()),
        lines=lines,
        limit=case.limit,
        unwindowed=_unwindowed(case, sequences[0]),
        windows=tuple(sorted({window for window in shape.windows if window is not None})),
    )


def _line(case: Case, name: str, count: int) -> GrowthLine:
    shape, layout = case.shape, case.layout(name)
    load = replace(case.load, sequences=count)
    most = None
    if case.limit is not None:
        most = most_context(shape, layout, load, case.limit.bytes, case.weights)
    contexts = _contexts(shape, most)
    points = tuple(
        (tokens, plan_memory(shape, layout, replace(load, context=tokens), case.weights).total)
        for tokens in contexts
    )
    return GrowthLine(name, count, points, most)


def _contexts(shape: ModelShape, most: int | None) -> list[int]:
    """Half of them even, half of them by the same factor; windows and ``most`` among them."""
    longest, half = shape.max_position, SAMPLES // 2
    even = [math.ceil(longest * i / half) for i in range(1, half + 1)]
    factor = [math.ceil(longest ** (i / half)) for i in range(half + 1)]
    bends = [tokens for tokens in (*shape.windows, most) if tokens]
    return sorted({min(tokens, longest) for tokens in (*even, *factor, *bends)})


def _unwindowed(case: Case, count: int) -> GrowthLine | None:
    if not any(case.shape.windows):
        return None
    layers = tuple(replace(layer, window=None) for layer in case.shape.layers)
    return _line(replace(case, shape=replace(case.shape, layers=layers)), case.formats[0], count)


# -- capacity --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CapacityBar:
    """How many ``unit``s of a :class:`Capacity` fit with a page format."""

    name: str
    most: int


@dataclass(frozen=True)
class Capacity:
    """What fits by page format; ``ceiling`` is more than which no bar can have, if there is one."""

    heading: str
    unit: str
    bars: tuple[CapacityBar, ...]
    ceiling: int | None = None


def request_capacity(case: Case) -> Capacity:
    """The most sequences of ``case.load.context`` tokens at a time; ConfigError without a limit."""
    budget = _budget(case)
    bars = tuple(
        CapacityBar(
            name, most_requests(case.shape, case.layout(name), case.load, budget, case.weights)
        )
        for name in case.formats
    )
    return Capacity(f"Requests of {case.load.context:,} tokens at a time", "requests", bars)


def context_capacity(case: Case) -> Capacity:
    """The longest context of ``case.load.sequences`` sequences, up to the model's.

    Raises ConfigError without a limit.
    """
    budget = _budget(case)
    bars = tuple(
        CapacityBar(
            name, most_context(case.shape, case.layout(name), case.load, budget, case.weights)
        )
        for name in case.formats
    )
    count = case.load.sequences
    of = "one request" if count == 1 else f"each of {count:,} requests"
    return Capacity(f"Longest context of {of}", "tokens", bars, case.shape.max_position)


def _budget(case: Case) -> int:
    if case.limit is None:
        raise ConfigError(
            f"how much of {case.shape.name} fits is asked, but not into what; give a limit in bytes"
        )
    return case.limit.bytes
