"""Axes with units, and panels of two: from numbers to pixels."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

from quire.analysis.drawing import Box, Label, Line
from quire.config import format_bytes

__all__ = [
    "Axis",
    "Panel",
    "byte_axis",
    "count_axis",
    "decade_axis",
    "doubling_axis",
    "doublings",
    "si",
    "straight",
]

_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


@dataclass(frozen=True)
class Axis:
    """From ``low`` to ``high``, even in what ``bend`` makes of a number.

    ticks   values and what is written at them
    title   what is counted, with its unit
    """

    title: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    bend: Callable[[float], float]

    def share(self, value: float) -> float:
        """How far along the axis ``value`` lies: 0 at its low end, 1 at its high one."""
        low, high = self.bend(self.low), self.bend(self.high)
        return (self.bend(value) - low) / (high - low)


@dataclass(frozen=True)
class Panel:
    """Two axes around a ``box``; the title of ``y`` is written ``y_title`` pixels left of it."""

    box: Box
    x: Axis
    y: Axis
    y_title: float = 72

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels from the left and from the top."""
        return self.left_of(x), self.top_of(y)

    def left_of(self, x: float) -> float:
        """Pixels from the left."""
        left, _, right, _ = self.box
        return left + self.x.share(x) * (right - left)

    def top_of(self, y: float) -> float:
        """Pixels from the top."""
        _, top, _, bottom = self.box
        return bottom - self.y.share(y) * (bottom - top)

    def path(self, points: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
        """Of a line of ``points`` what lies below the panel's top, from its start."""
        top = self.box[1]
        found: list[tuple[float, float]] = []
        pixels = [self.at(*point) for point in points]
        for before, here in itertools.pairwise([pixels[0], *pixels]):
            if here[1] >= top:
                found.append(here)
                continue
            if before[1] > top:
                share = (before[1] - top) / (before[1] - here[1])
                found.append((before[0] + share * (here[0] - before[0]), top))
            break
        return tuple(found)

    def frame(self) -> tuple[list[Line], list[Label]]:
        """Axes, grid, ticks with their units, and what the axes are."""
        left, top, right, bottom = self.box
        lines, labels = [], []
        for value, text in self.y.ticks:
            y = self.top_of(value)
            lines.append(Line("zero" if value == 0 else "grid", ((left, y), (right, y))))
            labels.append(Label("tick", left - 8, y + 4, text, "end"))
        for value, text in self.x.ticks:
            x = self.left_of(value)
            lines.append(Line("grid", ((x, top), (x, bottom))))
            labels.append(Label("tick", x, bottom + 20, text, "middle"))
        lines.append(Line("axis", ((left, top), (left, bottom), (right, bottom))))
        across, down = (left + right) / 2, (top + bottom) / 2
        labels.append(Label("axis", across, bottom + 46, self.x.title, "middle"))
        if self.y.title:
            turned = Label("axis", left - self.y_title, down, self.y.title, "middle", True)
            labels.append(turned)
        return lines, labels


def straight(value: float) -> float:
    """The ``bend`` of a linear axis."""
    return value


def byte_axis(title: str, high: float) -> Axis:
    """Linear from 0 to ``high`` bytes, with four to eight ticks at powers of two and between."""
    step = _doubling_step(high)
    values = [step * i for i in range(int(high / step) + 1)]
    ticks = tuple((value, format_bytes(value) if value else "0") for value in values)
    return Axis(title, 0, high, ticks, straight)


def count_axis(title: str, high: float) -> Axis:
    """Linear from 0 to ``high`` things, with ticks at 1, 2 or 5 times a power of ten."""
    rough = max(high / 5, 0.2)
    scale = 10 ** math.floor(math.log10(rough))
    step = max(1, next(scale * f for f in (1, 2, 5, 10) if scale * f >= rough))
    ticks = tuple((step * i, f"{step * i:,.0f}") for i in range(int(high / step) + 1))
    return Axis(title, 0, high, ticks, straight)


def doublings(high: int, title: str) -> Axis:
    """Linear from 0 to ``high`` tokens, with ticks at a power of two."""
    step = max(1.0, _doubling_step(high))
    values = [int(step) * i for i in range(int(high / step) + 1)]
    ticks = tuple((value, _tokens(value, step)) for value in values)
    return Axis(title, 0, high, ticks, straight)


def doubling_axis(title: str, low: int, high: int) -> Axis:
    """Logarithmic from ``low`` to ``high`` tokens, with ticks at powers of two."""
    powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    return Axis(title, low, high, tuple((2.0**p, _tokens(2**p, 2**p)) for p in powers), math.log2)


def decade_axis(title: str, low: float, high: float, unit: str = "") -> Axis:
    """Logarithmic from ``low`` to ``high``, with ticks at powers of ten, in ``unit``."""
    powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    ticks = tuple((10.0**p, si(10.0**p, unit)) for p in powers)
    return Axis(title, low, high, ticks, math.log10)


def si(value: float, unit: str) -> str:
    """Three digits with a decimal prefix: ``"165 TFLOP/s"``; no prefix where there is no unit."""
    power = 0
    while unit and abs(value) >= 999.5 and power + 1 < len(_PREFIXES):
        value, power = value / 1000, power + 1
    digits = f"{value:,.0f}" if abs(value) >= 99.5 else f"{value:.3g}"
    return f"{digits} {_PREFIXES[power]}{unit}".rstrip()


def _doubling_step(high: float) -> float:
    """The power of two of which there are four to seven in ``high``."""
    return float(2.0 ** math.floor(math.log2(high / 4)))


def _tokens(count: int, step: float) -> str:
    """In units of 1,024 where all ticks are such."""
    return f"{count // 1024:,}K" if count and step % 1024 == 0 else f"{count:,}"
