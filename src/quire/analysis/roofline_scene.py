"""The roofline picture: what a device can do, and where steps of a deployment lie below it.

Operations a byte to the right, operations a second upwards, both logarithmic (Williams, Waterman
and Patterson, CACM 52(4), 2009): on the slope memory is the limit, below a level line computing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quire.analysis.drawing import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Label,
    Line,
    Mark,
    Scene,
    place_names,
)
from quire.analysis.hardware import Hardware
from quire.analysis.rendering import write_scene
from quire.analysis.roofline import StepTime, Timer, decode_time, prefill_time
from quire.analysis.steps import Deployment
from quire.errors import ConfigError

__all__ = ["Point", "draw_roofline", "roofline_scene", "workload_points"]

BATCHES = (1, 8, 64)
_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Point:
    """A step in the picture: its ``kind`` is ``decode`` or ``prefill``."""

    name: str
    kind: str
    time: StepTime

    @property
    def rate(self) -> float:
        """Operations a second."""
        return self.time.flops / self.time.seconds


def workload_points(
    deployment: Deployment,
    timer: Timer,
    context: int,
    chunk: int | None = None,
    batches: Sequence[int] = BATCHES,
) -> tuple[Point, ...]:
    """Decoding behind ``context`` tokens with each batch, and the prefill of that many."""
    steps = [
        Point(_decode_name(many), "decode", decode_time(deployment, timer, many, context))
        for many in batches
    ]
    whole = prefill_time(deployment, timer, context, chunk)
    return (*steps, Point(f"prefill of {context:,}", "prefill", whole))


def draw_roofline(hardware: Hardware, points: Sequence[Point], model: str, path: Path) -> None:
    """Write the picture to a ``.png`` or ``.html`` file; ``model`` names it.

    Raises QuireError for another suffix, without matplotlib, and if the file cannot be written.
    """
    heads = ("step", "FLOP a byte", "FLOP/s", "bytes", "seconds", "limited by")
    rows = [
        (
            point.name,
            f"{point.time.intensity:.4g}",
            _short(point.rate),
            f"{point.time.bytes:.4g}",
            f"{point.time.seconds:.4g}",
            point.time.limit,
        )
        for point in points
    ]
    title = f"{model} on {hardware.name}"
    write_scene(roofline_scene(hardware, points, model), title, [heads, *rows], path)


def roofline_scene(hardware: Hardware, points: Sequence[Point], model: str) -> Scene:
    """The picture; raises ConfigError without points."""
    if not points:
        raise ConfigError("a roofline without steps shows nothing; give one point or more")
    axes = _Axes(hardware, points)
    lines, labels = axes.frame()
    roofs, names = _roofs(hardware, axes)
    labels += [
        Label("title", LEFT, 30, f"{model} on {hardware.name}"),
        Label(
            "note",
            LEFT,
            52,
            f"memory: {hardware.bandwidth / 1e9:,.5g} GB/s; on the slope it is the limit, at a "
            "level line the units are",
        ),
        *names,
    ]
    marks = [
        Mark(
            point.kind,
            axes.x(point.time.intensity),
            axes.y(point.rate),
            f"{point.name}: {point.time.intensity:.4g} FLOP a byte, {_short(point.rate)}, "
            f"{point.time.seconds:.4g} s, {point.time.limit}",
        )
        for point in points
    ]
    lines += roofs
    placed, leaders = place_names(marks, [point.name for point in points], lines, names)
    return Scene((*lines, *leaders), tuple(marks), (*labels, *placed))


def _roofs(hardware: Hardware, axes: "_Axes") -> tuple[list[Line], list[Label]]:
    """The slope of the memory, and a level line for each rate; dtypes of one rate share it."""
    dtypes: dict[float, list[str]] = {}
    for dtype, rate in hardware.flops.items():
        dtypes.setdefault(rate, []).append(dtype)
    right, best = WIDTH - RIGHT, max(dtypes)
    slope = (axes.x(axes.low), axes.y(axes.low * hardware.bandwidth))
    lines = [Line("roof", (slope, (axes.x(best / hardware.bandwidth), axes.y(best))))]
    labels = []
    for rate, names in dtypes.items():
        y = axes.y(rate)
        lines.append(Line("roof", ((axes.x(rate / hardware.bandwidth), y), (right, y))))
        text = f"{', '.join(names)}: {_short(rate)}"
        labels.append(Label("tick", right - 4, y - 5, text, "end"))
    return lines, labels


class _Axes:
    """From operations a byte and operations a second to pixels."""

    def __init__(self, hardware: Hardware, points: Sequence[Point]) -> None:
        rates = hardware.flops.values()
        ridges = [rate / hardware.bandwidth for rate in rates]
        across = [point.time.intensity for point in points]
        self.low = min(*across, *ridges) / 3
        self._high = 16 * max(*across, *ridges)
        self._bottom = min(*(point.rate for point in points), self.low * hardware.bandwidth) / 1.2
        self._top = 2.5 * max(*rates, *(point.rate for point in points))

    def x(self, intensity: float) -> float:
        """Pixels from the left."""
        share = math.log(intensity / self.low) / math.log(self._high / self.low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, rate: float) -> float:
        """Pixels from the top."""
        share = math.log(rate / self._bottom) / math.log(self._top / self._bottom)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def frame(self) -> tuple[list[Line], list[Label]]:
        """Axes, a grid of decades with their units, and what the axes are."""
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        lines, labels = [], []
        for power in _decades(self._bottom, self._top):
            y = self.y(10.0**power)
            lines.append(Line("grid", ((LEFT, y), (right, y))))
            labels.append(Label("tick", LEFT - 8, y + 4, _short(10.0**power, ""), "end"))
        for power in _decades(self.low, self._high):
            x = self.x(10.0**power)
            lines.append(Line("grid", ((x, TOP), (x, bottom))))
            labels.append(Label("tick", x, bottom + 20, f"{10.0**power:,.10g}", "middle"))
        lines.append(Line("axis", ((LEFT, TOP), (LEFT, bottom), (right, bottom))))
        across, up = (LEFT + right) / 2, (TOP + bottom) / 2
        labels += [
            Label("axis", across, HEIGHT - 18, "operations a byte moved (FLOP/byte)", "middle"),
            Label("axis", 20, up, "operations a second (FLOP/s)", "middle", True),
        ]
        return lines, labels


def _decades(low: float, high: float) -> range:
    return range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)


def _decode_name(sequences: int) -> str:
    return f"decode, {sequences:,} sequence{'s' if sequences > 1 else ''}"


def _short(rate: float, unit: str = "FLOP/s") -> str:
    """``989.4 TFLOP/s``."""
    for size, prefix in _PREFIXES:
        if rate >= 0.99999 * size:
            return f"{rate / size:.4g} {prefix}{unit}"
    return f"{rate:.4g} {unit}"
