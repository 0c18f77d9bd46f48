"""The Pareto picture as shapes in pixels: laid out once, drawn as PNG or SVG by ``picture``.

Memory to the right on a logarithmic axis, loss upwards on one that is linear about zero and
logarithmic beyond, so that losses of 0.001 % and of 100 % are seen in one picture.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from quire.analysis.pareto import front
from quire.analysis.quality import Measurement, Report
from quire.config import format_bytes

__all__ = ["HEIGHT", "WIDTH", "Box", "Label", "Line", "Mark", "Scene", "scene_of"]

WIDTH, HEIGHT = 880, 540
LEFT, RIGHT, TOP, BOTTOM = 92, 28, 78, 64
LINEAR = 1e-4  # losses below a hundredth of a percent lie on the linear part
DECADES = (-1e-1, -1e-2, -1e-3, -1e-4, 0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
LETTER, TALL = 7.0, 15.0  # pixels of a letter of a label

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Line:
    """A polyline of a kind: ``axis``, ``grid``, ``zero``, ``front``, ``whisker``, ``leader``."""

    kind: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Mark:
    """A point of a kind: ``exact``, ``front``, ``beaten``; ``title`` is what hovering shows."""

    kind: str
    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Label:
    """Text of a kind: ``title``, ``note``, ``tick``, ``axis``, ``name``.

    ``anchor`` is start, middle or end; ``turned`` text reads upwards.
    """

    kind: str
    x: float
    y: float
    text: str
    anchor: str = "start"
    turned: bool = False


@dataclass(frozen=True)
class Scene:
    """All shapes, in the order in which they are drawn."""

    lines: tuple[Line, ...]
    marks: tuple[Mark, ...]
    labels: tuple[Label, ...]


def scene_of(report: Report, model: str) -> Scene:
    """The picture of a report; ``model`` names it."""
    own = report.exact.setting  # a candidate that is the exact cache would lie under its mark
    found = [each for _, each in report.candidates if isinstance(each, Measurement)]
    measured = [each for each in found if each.setting != own]
    axes = _Axes([report.exact, *measured])
    lines, labels = axes.frame()
    labels += [
        Label("title", LEFT, 30, f"{model}: memory against quality"),
        Label(
            "note",
            LEFT,
            52,
            f"{report.tokens:,} predicted tokens in passages of {report.context:,}; bars are 95 % "
            "intervals; lower left is better",
        ),
    ]
    best = front([report.exact, *measured])
    if len(best) > 1:
        lines.append(Line("front", tuple(axes.at(each) for each in best)))
    marks = [_mark(axes, each, best, report) for each in (*measured, report.exact)]
    for each in measured:
        low, high = each.summary.perplexity_change_interval
        x, _ = axes.at(each)
        lines.append(Line("whisker", ((x, axes.y(low)), (x, axes.y(high)))))
    names = [*(each.setting.name for each in measured), f"exact ({report.exact.setting.name})"]
    placed, leaders = _names(marks, names, lines)
    return Scene((*lines, *leaders), tuple(marks), (*labels, *placed))


def _mark(axes: "_Axes", each: Measurement, best: Sequence[Measurement], report: Report) -> Mark:
    kind = "exact" if each is report.exact else "front" if each in best else "beaten"
    low, high = each.summary.perplexity_change_interval
    title = (
        f"{each.setting.name}: {each.bytes_per_token:,.0f} bytes a token "
        f"({each.compression:.2f}x), perplexity {each.summary.perplexity_change:+.4%} "
        f"[{low:+.4%}, {high:+.4%}], KL {each.summary.kl_mean:.2e}"
    )
    return Mark(kind, *axes.at(each), title)


class _Axes:
    """From bytes a token and changes of perplexity (0.01 is one percent) to pixels."""

    def __init__(self, measured: Sequence[Measurement]) -> None:
        sizes = [each.bytes_per_token for each in measured]
        self._low, self._high = math.log2(min(sizes)) - 0.5, math.log2(max(sizes)) + 0.5
        ends = [end for each in measured for end in each.summary.perplexity_change_interval]
        self._ticks = _ticks(min(ends), max(ends))
        self._bottom, self._top = _bent(self._ticks[0]), _bent(self._ticks[-1])

    def at(self, each: Measurement) -> tuple[float, float]:
        """Where a measurement lies, in pixels from the left and from the top."""
        return self.x(each.bytes_per_token), self.y(each.summary.perplexity_change)

    def x(self, count: float) -> float:
        """Pixels from the left of ``count`` bytes a token."""
        share = (math.log2(count) - self._low) / (self._high - self._low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, loss: float) -> float:
        """Pixels from the top of a relative change of perplexity."""
        share = (_bent(loss) - self._bottom) / (self._top - self._bottom)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def frame(self) -> tuple[list[Line], list[Label]]:
        """Axes, grid, ticks with their units, and what the axes are."""
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        lines, labels = [], []
        for loss in self._ticks:
            y = self.y(loss)
            lines.append(Line("zero" if loss == 0 else "grid", ((LEFT, y), (right, y))))
            text = "0" if loss == 0 else f"{100 * loss:+.10g} %"
            labels.append(Label("tick", LEFT - 8, y + 4, text, "end"))
        for power in range(math.ceil(self._low), math.floor(self._high) + 1):
            x = self.x(2.0**power)
            lines.append(Line("grid", ((x, TOP), (x, bottom))))
            labels.append(Label("tick", x, bottom + 20, format_bytes(2.0**power), "middle"))
        lines.append(Line("axis", ((LEFT, TOP), (LEFT, bottom), (right, bottom))))
        middle = (LEFT + right) / 2, (TOP + bottom) / 2
        labels.append(
            Label("axis", middle[0], HEIGHT - 18, "bytes of keys and values a token", "middle")
        )
        labels.append(
            Label(
                "axis",
                20,
                middle[1],
                "change of perplexity against the exact cache",
                "middle",
                True,
            )
        )
        return lines, labels


def _bent(loss: float) -> float:
    """Linear up to LINEAR, one unit for each factor of ten beyond."""
    size = abs(loss) / LINEAR
    bent = size if size <= 1 else 1 + math.log10(size)
    return math.copysign(bent, loss)


def _ticks(low: float, high: float) -> tuple[float, ...]:
    """Decades from the last below ``low`` to the first above ``high``, zero among them."""
    first = max((tick for tick in DECADES if tick <= min(low, 0.0)), default=DECADES[0])
    last = min((tick for tick in DECADES if tick >= max(high, LINEAR)), default=DECADES[-1])
    return tuple(tick for tick in DECADES if first <= tick <= last)


def _names(
    marks: Sequence[Mark], names: Sequence[str], lines: Sequence[Line]
) -> tuple[list[Label], list[Line]]:
    """A name beside each mark, where it covers no name or mark, and if near enough no line.

    A line leads to those that are not next to their mark.
    """
    taken: list[Box] = [(mark.x - 7, mark.y - 7, mark.x + 7, mark.y + 7) for mark in marks]
    crossed = [box for line in lines if line.kind in _COVERED for box in _along(line)]
    labels, leaders = [], []
    for mark, name in sorted(zip(marks, names, strict=True), key=lambda pair: pair[0].y):
        boxes = [_beside(mark, LETTER * len(name), side, dy) for dy, side in _PLACES]
        inside = [b for b in boxes if b[0] > LEFT and b[2] < WIDTH - 4 and b[1] > TOP - 20]
        free = [box for box in inside if not any(_meet(box, other) for other in taken)]

        def cost(box: Box, mark: Mark = mark) -> float:
            crosses = any(_meet(box, other) for other in crossed)
            return abs(_middle(box) - mark.y) + (_CROSSING if crosses else 0)

        box = min(free, key=cost, default=boxes[0])
        taken.append(box)
        labels.append(Label("name", box[0], box[3] - 4, name))
        middle = _middle(box)
        if abs(middle - mark.y) > 24:
            end = min(max(mark.x, box[0]), box[2])
            leaders.append(
                Line("leader", ((mark.x, mark.y), (end, middle - _toward(middle, mark))))
            )
    return labels, leaders


_COVERED = ("front", "zero", "whisker")
_CROSSING = 40.0  # pixels away from its mark that a name goes rather than across a line
_STEPS = (16, 22, 32, 44, 56, 70, 84, 100, 120)
# Right and left of the mark; then above and below it, further and further.
_PLACES = [
    (0, 1),
    (0, -1),
    *((d * way, side) for d in _STEPS for way in (-1, 1) for side in (0, 1, -1)),
]


def _beside(mark: Mark, width: float, side: int, dy: float) -> Box:
    x = mark.x - width / 2 if side == 0 else mark.x + 11 if side > 0 else mark.x - 11 - width
    return x, mark.y + dy - TALL / 2, x + width, mark.y + dy + TALL / 2


def _middle(box: Box) -> float:
    return (box[1] + box[3]) / 2


def _toward(middle: float, mark: Mark) -> float:
    """From the middle of a name to its edge at the mark's side."""
    return math.copysign(TALL / 2, middle - mark.y)


def _along(line: Line) -> list[Box]:
    """Small boxes that cover a polyline."""
    found = []
    for (x0, y0), (x1, y1) in itertools.pairwise(line.points):
        steps = max(1, int(math.dist((x0, y0), (x1, y1)) // 6))
        for i in range(steps + 1):
            x, y = x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps
            found.append((x - 2, y - 2, x + 2, y + 2))
    return found


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
