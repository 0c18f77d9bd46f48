"""Shapes in pixels that a picture is made of, and names placed so that they can be read."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["HEIGHT", "LETTER", "WIDTH", "Box", "Label", "Line", "Mark", "Scene", "place_names"]

WIDTH, HEIGHT = 880, 540
LEFT, RIGHT, TOP, BOTTOM = 92, 28, 78, 64
LETTER, TALL = 7.0, 15.0  # pixels of a letter of a label

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Line:
    """A polyline of a kind.

    ``axis``, ``grid``, ``leader``; of losses ``zero``, ``front``, ``whisker``; of a roofline
    ``roof``.
    """

    kind: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Mark:
    """A point of a kind; ``title`` is what hovering shows.

    Of losses: ``exact``, ``front``, ``beaten``; of a roofline: ``decode``, ``prefill``.
    """

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


def place_names(
    marks: Sequence[Mark],
    names: Sequence[str],
    lines: Sequence[Line],
    labels_there: Sequence[Label] = (),
) -> tuple[list[Label], list[Line]]:
    """A name beside each mark, where it covers no name or mark, and if near enough no line.

    ``labels_there`` are not covered either. A line leads to names that are not next to their mark.
    """
    taken: list[Box] = [(mark.x - 7, mark.y - 7, mark.x + 7, mark.y + 7) for mark in marks]
    taken += map(_covered, labels_there)
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


_COVERED = ("front", "zero", "whisker", "roof")
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


def _covered(label: Label) -> Box:
    """The box of a label that is not turned."""
    width = LETTER * len(label.text)
    left = label.x - {"start": 0.0, "middle": width / 2, "end": width}[label.anchor]
    return left, label.y - TALL + 4, left + width, label.y + 4


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
