"""The roofline as shapes: what a machine can do at most, and where a workload's steps lie.

After Williams, Waterman and Patterson, 2009 (doi:10.1145/1498765.1498785): operations a second
over operations for each byte that is moved, both logarithmic. Where the slope of bandwidth meets
the flat roof of arithmetic is the ridge.
"""

from dataclasses import dataclass
from typing import Literal

from quire.analysis.axes import Panel, decade_axis, si
from quire.analysis.drawing import TONES, Box, Label, Line, Mark, Table, place_names
from quire.errors import ConfigError

__all__ = ["Roof", "Roofline", "RooflinePoint", "draw_roofline"]


@dataclass(frozen=True)
class Roof:
    """A machine: ``flops`` operations a second and ``bandwidth`` bytes a second at most."""

    name: str
    flops: float
    bandwidth: float

    def __post_init__(self) -> None:
        if self.flops <= 0 or self.bandwidth <= 0:
            raise ConfigError(
                f"{self.name} cannot be drawn with {self.flops:g} FLOP/s and {self.bandwidth:g} "
                "bytes/s; both must be above 0"
            )

    @property
    def ridge(self) -> float:
        """FLOP a byte from which on arithmetic is what bounds."""
        return self.flops / self.bandwidth

    def at(self, intensity: float) -> float:
        """Operations a second at most."""
        return min(self.flops, self.bandwidth * intensity)


@dataclass(frozen=True)
class RooflinePoint:
    """A step of a workload: FLOP a byte, FLOP/s, and what bounds it."""

    name: str
    intensity: float
    flops: float
    bound: Literal["memory", "compute"]

    def __post_init__(self) -> None:
        if self.intensity <= 0 or self.flops <= 0:
            raise ConfigError(
                f"{self.name} cannot be drawn at {self.intensity:g} FLOP/byte and {self.flops:g} "
                "FLOP/s; both must be above 0"
            )


@dataclass(frozen=True)
class Roofline:
    """At least one roof, and points below or on it."""

    roofs: tuple[Roof, ...]
    points: tuple[RooflinePoint, ...]

    def __post_init__(self) -> None:
        if not self.roofs:
            raise ConfigError("a roofline needs at least one roof")


Drawn = tuple[list[Line], list[Mark], list[Label], Table]


def draw_roofline(roofline: Roofline, box: Box) -> Drawn:
    """Shapes inside ``box``, with axes around it and a heading above; and the same as a table."""
    panel = _panel(roofline, box)
    lines, labels = panel.frame()
    left, top, right, bottom = box
    labels.append(Label("heading", left, top - 18, "Roofline"))
    says = "● bound by memory   ◆ bound by arithmetic"
    labels.append(Label("note", right, top - 18, says, "end"))
    ridges, anchors, names = [], [], []
    for i, roof in enumerate(roofline.roofs):
        tone = TONES[(i + 3) % len(TONES)]  # the first three are page formats, as a rule
        ends = (panel.x.low, roof.ridge, panel.x.high)
        ridge = panel.at(roof.ridge, roof.flops)
        lines.append(Line("solid", tuple(panel.at(x, roof.at(x)) for x in ends), tone, _says(roof)))
        lines.append(Line("leader", (ridge, (ridge[0], bottom)), tone))
        ridges.append(Mark("ridge", *ridge, f"{roof.name}: ridge", tone))
        row = bottom - 8 - 17 * i
        name = f"ridge {si(roof.ridge, '')} FLOP/byte"
        first = len(roofline.roofs) > 1 and roof.ridge == min(r.ridge for r in roofline.roofs)
        side, anchor = (-7, "end") if first else (7, "start")
        labels.append(Label("name", ridge[0] + side, row, name, anchor, tone=tone))
        labels.append(Label("name", right - 6, ridge[1] - 8, _flat(roof), "end", tone=tone))
        speed = si(roof.bandwidth, "B/s")
        if speed not in names:  # one slope of several roofs
            slope = (panel.x.low * roof.ridge) ** 0.5
            anchors.append(Mark("", *panel.at(slope, roof.at(slope)), "", tone))
            names.append(speed)
    marks = [_mark(panel, point) for point in roofline.points]
    crossed = [line for line in lines if line.kind in ("solid", "leader")]
    placed, leaders = place_names(
        [*marks, *anchors],
        [*(point.name for point in roofline.points), *names],
        box,
        crossed,
        [*(label.box for label in labels if not label.turned), *map(_around, ridges)],
    )
    return [*lines, *leaders], [*ridges, *marks], [*labels, *placed], _table(roofline)


def _panel(roofline: Roofline, box: Box) -> Panel:
    roofs, points = roofline.roofs, roofline.points
    intensities = [*(roof.ridge for roof in roofs), *(point.intensity for point in points)]
    low, high = min(intensities) / 4, max(intensities) * 6
    attained = [*(roof.at(low) for roof in roofs), *(point.flops for point in points)]
    x = decade_axis("arithmetic intensity, FLOP/byte", low, high)
    most = max(roof.flops for roof in roofs)
    y = decade_axis("FLOP/s, at most and reached", min(attained) / 2, most * 3, "FLOP/s")
    return Panel(box, x, y, y_title=96)


def _mark(panel: Panel, point: RooflinePoint) -> Mark:
    kind = "diamond" if point.bound == "compute" else "point"
    title = (
        f"{point.name}: {si(point.flops, 'FLOP/s')} at {si(point.intensity, '')} FLOP/byte, "
        f"bound by {point.bound}"
    )
    return Mark(kind, *panel.at(point.intensity, point.flops), title)


def _around(mark: Mark) -> Box:
    return mark.x - 7, mark.y - 7, mark.x + 7, mark.y + 7


def _flat(roof: Roof) -> str:
    return f"{roof.name}: {si(roof.flops, 'FLOP/s')}"


def _says(roof: Roof) -> str:
    return f"{_flat(roof)}, {si(roof.bandwidth, 'B/s')}, ridge {si(roof.ridge, '')} FLOP/byte"


def _table(roofline: Roofline) -> Table:
    rows = tuple(
        (p.name, si(p.intensity, ""), si(p.flops, "FLOP/s"), p.bound) for p in roofline.points
    )
    return Table(("step", "FLOP/byte", "FLOP/s", "bound by"), rows, "Roofline")
