"""Shapes in pixels that a picture is made of, and names placed so that they can be read.

A :class:`Scene` is laid out once and drawn as PNG or SVG by :mod:`quire.analysis.paint`.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "LETTER",
    "TALL",
    "TONES",
    "Bar",
    "Box",
    "Label",
    "Line",
    "Mark",
    "Scene",
    "Table",
    "meet",
    "place_names",
    "spread",
]

LETTER, TALL = 7.0, 15.0  # pixels of a letter of a label
TONES = ("blue", "orange", "green", "purple", "brown", "teal")  # of things that are told apart

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Line:
    """A polyline of a kind, which says how it is drawn (``paint.WIDTHS``, ``paint.STYLES``).

    ``tone`` is one of TONES, or "" for the colour of its kind; ``title`` is what hovering shows.
    """

    kind: str
    points: tuple[tuple[float, float], ...]
    tone: str = ""
    title: str = ""


@dataclass(frozen=True)
class Mark:
    """A point of a kind; ``title`` is what hovering shows. ``exact`` and ``diamond`` are squares
    on a corner, all others are round.
    """

    kind: str
    x: float
    y: float
    title: str
    tone: str = ""


@dataclass(frozen=True)
class Bar:
    """A filled box of a kind (``bar``, ``shade``), below all lines."""

    kind: str
    box: Box
    title: str
    tone: str = ""


@dataclass(frozen=True)
class Label:
    """Text of a kind: ``title``, ``heading``, ``note``, ``tick``, ``axis``, ``name``.

    ``anchor`` is start, middle or end; ``turned`` text reads upwards.
    """

    kind: str
    x: float
    y: float
    text: str
    anchor: str = "start"
    turned: bool = False
    tone: str = ""

    @property
    def box(self) -> Box:
        """About what text that is not turned covers."""
        wide = LETTER * len(self.text)
        left = self.x - {"start": 0.0, "middle": wide / 2, "end": wide}[self.anchor]
        return left, self.y + 4 - TALL, left + wide, self.y + 4


@dataclass(frozen=True)
class Table:
    """The same in numbers: one row a thing; on a page only."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


@dataclass(frozen=True)
class Scene:
    """All shapes, in the order in which they are drawn; ``about`` says what is seen."""

    title: str
    about: str
    size: tuple[int, int]
    lines: tuple[Line, ...]
    marks: tuple[Mark, ...]
    labels: tuple[Label, ...]
    bars: tuple[Bar, ...] = ()
    tables: tuple[Table, ...] = ()


# -- names -----------------------------------------------------------------------------------------

_CROSSING = 40.0  # pixels away from its mark that a name goes rather than across a line
_STEPS = (16, 22, 32, 44, 56, 70, 84, 100, 120)
# Right and left of the mark; then above and below it, further and further.
_PLACES = [
    (0, 1),
    (0, -1),
    *((d * way, side) for d in _STEPS for way in (-1, 1) for side in (0, 1, -1)),
]


def place_names(
    marks: Sequence[Mark],
    names: Sequence[str],
    bounds: Box,
    lines: Sequence[Line] = (),
    taken: Sequence[Box] = (),
) -> tuple[list[Label], list[Line]]:
    """A name beside each mark, where it covers no name, mark or ``taken`` box.

    It lies inside ``bounds``, and if there is room near enough, on none of ``lines``. A line leads
    to those that are not next to their mark.
    """
    covered = [(mark.x - 7, mark.y - 7, mark.x + 7, mark.y + 7) for mark in marks] + [*taken]
    crossed = [box for line in lines for box in _along(line)]
    labels, leaders = [], []
    for mark, name in sorted(zip(marks, names, strict=True), key=lambda pair: pair[0].y):
        boxes = [_beside(mark, LETTER * len(name), side, dy) for dy, side in _PLACES]
        free = [
            box
            for box in boxes
            if _inside(box, bounds) and not any(meet(box, other) for other in covered)
        ]

        def cost(box: Box, mark: Mark = mark) -> float:
            crosses = any(meet(box, other) for other in crossed)
            return abs(_middle(box) - mark.y) + (_CROSSING if crosses else 0)

        box = min(free, key=cost, default=boxes[0])
        covered.append(box)
        labels.append(Label("name", box[0], box[3] - 4, name, tone=mark.tone))
        middle = _middle(box)
        if abs(middle - mark.y) > 24:
            end = min(max(mark.x, box[0]), box[2])
            leaders.append(
                Line("leader", ((mark.x, mark.y), (end, middle - _toward(middle, mark))))
            )
    return labels, leaders


def spread(wanted: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """Places near the ``wanted`` ones, in their order and ``apart``, from ``low`` to ``high``.

    If there is no room for all, they go beyond ``high``.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    sought = [wanted[i] for i in order]
    below = [-place for place in _pushed([-place for place in reversed(sought)], apart)][::-1]
    middle = [(a + b) / 2 for a, b in zip(_pushed(sought, apart), below, strict=True)]
    fits = [min(place, high - apart * i) for i, place in enumerate(reversed(middle))][::-1]
    fits = [max(place, low + apart * i) for i, place in enumerate(fits)]
    return [fits[order.index(i)] for i in range(len(wanted))]


def _pushed(places: Sequence[float], apart: float) -> list[float]:
    """Each at least ``apart`` above the one before it, which stays."""
    found: list[float] = []
    for place in places:
        found.append(max(place, found[-1] + apart) if found else place)
    return found


def meet(a: Box, b: Box) -> bool:
    """Whether two boxes have an inner point in common."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _inside(box: Box, bounds: Box) -> bool:
    return box[0] > bounds[0] and box[1] > bounds[1] and box[2] < bounds[2] and box[3] < bounds[3]


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
