"""The picture of a plan: memory over context, capacity by page format, and the roofline.

Numbers come from :mod:`quire.analysis.plan_figures`, and those of the roofline from whoever has
them; here they are laid out. :func:`quire.analysis.paint.write_picture` makes a file of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from quire.analysis.axes import (
    Axis,
    Panel,
    byte_axis,
    count_axis,
    doubling_axis,
    doublings,
    straight,
)
from quire.analysis.drawing import (
    LETTER,
    TONES,
    Bar,
    Box,
    Label,
    Line,
    Mark,
    Scene,
    Table,
    place_names,
    spread,
)
from quire.analysis.plan_figures import Capacity, Growth, GrowthLine
from quire.analysis.roofline_scene import Roofline, draw_roofline
from quire.config import format_bytes

__all__ = ["plan_picture"]

WIDTH, LEFT, MARGIN = 1120, 92, 212  # MARGIN: right of the growth panel, for names of lines
TOP, TALL, BETWEEN = 116, 340, 122  # of the growth panel; from its bottom to the panels below
BAR, GAP = 26, 16
COUNTS = ("solid", "dashed", "dotted")  # lines of the first, second and third number of requests
OFF = 4.0  # times above all lines from which on a limit is not drawn to scale
HEADROOM = 1.3  # times the limit up to which lines are drawn


def plan_picture(
    growth: Growth, capacity: Capacity | None = None, roofline: Roofline | None = None
) -> Scene:
    """Lay out the panels that there is something for, and their numbers as tables."""
    tones = _tones(growth, capacity)
    parts = _Parts()
    _draw_growth(parts, growth, tones)
    top = TOP + TALL + BETWEEN
    bottoms: list[float] = [TOP + TALL]
    if capacity is not None:
        right = WIDTH - MARGIN if roofline is None else WIDTH * 0.44
        bottoms.append(_draw_capacity(parts, capacity, tones, (LEFT + 16, top, right, 0)))
    if roofline is not None:
        left = LEFT if capacity is None else WIDTH * 0.56
        box = (left, top, WIDTH - 28, max(bottoms[-1], top + 290))
        lines, marks, labels, table = draw_roofline(roofline, box)
        parts.add(lines, marks, labels)
        parts.tables.append(table)
        bottoms.append(box[3])
    about = f"Plan of {growth.model}: memory over context, capacity, roofline"
    return parts.scene(_title(growth), about, int(max(bottoms)) + 64)


@dataclass
class _Parts:
    """What has been laid out up to now."""

    lines: list[Line] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)

    def add(self, lines: list[Line], marks: list[Mark], labels: list[Label]) -> None:
        self.lines += lines
        self.marks += marks
        self.labels += labels

    def scene(self, title: str, about: str, height: int) -> Scene:
        drawn = tuple(self.lines), tuple(self.marks), tuple(self.labels), tuple(self.bars)
        return Scene(title, about, (WIDTH, height), *drawn, tuple(self.tables))


def _tones(growth: Growth, capacity: Capacity | None) -> dict[str, str]:
    """A colour for each page format, the same in all panels."""
    names = [line.name for line in growth.lines]
    names += [bar.name for bar in capacity.bars] if capacity else []
    return {name: TONES[i % len(TONES)] for i, name in enumerate(dict.fromkeys(names))}


def _title(growth: Growth) -> str:
    into = f": what fits into {growth.limit.name}" if growth.limit else ": memory over context"
    return growth.model + into


# -- growth ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Curve:
    """A line of growth with what it is called and how it looks."""

    line: GrowthLine
    name: str
    kind: str
    tone: str


def _draw_growth(parts: _Parts, growth: Growth, tones: dict[str, str]) -> None:
    curves = _curves(growth, tones)
    panel, off = _growth_panel(growth, [curve.line for curve in curves])
    lines, labels = panel.frame()
    labels += [Label("title", LEFT, 30, _title(growth)), Label("note", LEFT, 52, _note(growth))]
    labels.append(Label("heading", LEFT, TOP - 28, _growth_heading(growth)))
    labels.append(_shade(parts, panel, growth))
    if growth.limit is not None:
        line, label = _limit(panel, growth, off)
        lines.append(line)
        labels.append(label)
    taken = [label.box for label in labels if not label.turned]
    taken += [_flat_box(line) for line in lines if line.tone]  # the limit
    drawn = [_draw_curve(panel, curve) for curve in curves]
    lines += drawn
    marks = [mark for curve in curves if (mark := _crossing(panel, growth, curve))]
    lines += [Line("leader", ((m.x, m.y + 6), (m.x, panel.box[3])), m.tone) for m in marks]
    ends = list(zip(curves, drawn, strict=True))
    inside = [end for end in ends if end[1].points[-1][0] > panel.box[2] - 1]
    named, leaders = _right_names(panel, inside)
    named += _top_names(panel, [end for end in ends if end not in inside])
    bounds = (panel.box[0], panel.box[1] - 2, panel.box[2] + 20, panel.box[3])
    crossed = [line for line in lines if line.kind not in ("grid", "axis", "leader")]
    taken += [label.box for label in named]
    numbers = [f"{_tokens(curve):,}" for curve in curves if _crossing(panel, growth, curve)]
    placed, more = place_names(marks, numbers, bounds, crossed, taken)
    parts.add([*lines, *leaders, *more], marks, [*labels, *named, *placed])
    parts.tables.append(_growth_table(growth))


def _curves(growth: Growth, tones: dict[str, str]) -> list[_Curve]:
    """Lines to draw; those that lie on one another are one, with all of their names."""
    counts = list(dict.fromkeys(line.sequences for line in growth.lines))
    together: dict[tuple[int, tuple[tuple[int, int], ...]], list[GrowthLine]] = {}
    for line in growth.lines:
        together.setdefault((line.sequences, line.points), []).append(line)
    curves = []
    if growth.unwindowed is not None:
        ghost = replace(growth.unwindowed, most=None)
        curves.append(_Curve(ghost, "no windows", "ghost", ""))
    for (count, _), same in together.items():
        name = _named(", ".join(line.name for line in same), count, counts)
        kind = _kind(counts.index(count))
        curves.append(_Curve(same[0], name, kind, tones[same[0].name]))
    return curves


def _named(name: str, count: int, counts: Sequence[int]) -> str:
    return name if len(counts) == 1 else f"{count:,} × {name}"


def _kind(i: int) -> str:
    """How lines of the ``i``-th number of requests are drawn."""
    return COUNTS[i % len(COUNTS)]


def _growth_panel(growth: Growth, lines: Sequence[GrowthLine]) -> tuple[Panel, bool]:
    """The panel, and whether the limit is too far above it to be drawn to scale."""
    highest = max(line.points[-1][1] for line in lines)
    off = False
    if growth.limit is None:
        high = 1.06 * highest
    elif highest <= growth.limit.bytes:
        off = growth.limit.bytes > OFF * highest
        high = 1.3 * highest if off else 1.12 * growth.limit.bytes
    else:
        least = max(growth.limit.bytes, min(line.points[0][1] for line in lines))
        high = min(1.06 * highest, HEADROOM * least)
    y = byte_axis("memory: weights, KV, workspace", high)
    return Panel((LEFT, TOP, WIDTH - MARGIN, TOP + TALL), _context_axis(growth), y), off


def _context_axis(growth: Growth) -> Axis:
    """Linear, on which growth is straight; logarithmic where a crossing is far to the left."""
    crossings = [line.most for line in growth.lines if line.most and line.most < growth.longest]
    if not crossings or min(crossings) > growth.longest / 12:
        return doublings(growth.longest, "context of each request, tokens")
    low = max(1, min([growth.longest >> 8, *(most // 4 for most in crossings)]))
    title = "context of each request, tokens (logarithmic)"
    return doubling_axis(title, low, growth.longest)


def _draw_curve(panel: Panel, curve: _Curve) -> Line:
    start = panel.x.low
    points: list[tuple[float, float]] = [p for p in curve.line.points if p[0] >= start]
    before = [p for p in curve.line.points if p[0] < start]
    if before:  # where the axis begins
        (x0, y0), (x1, y1) = before[-1], points[0]
        points.insert(0, (start, y0 + (y1 - y0) * (start - x0) / (x1 - x0)))
    path = panel.path(points) or (panel.at(points[0][0], panel.y.high),)
    return Line(curve.kind, path, curve.tone, _curve_title(curve))


def _curve_title(curve: _Curve) -> str:
    tokens, count = curve.line.points[-1]
    return f"{curve.name}: {format_bytes(count)} at {tokens:,} tokens"


def _crossing(panel: Panel, growth: Growth, curve: _Curve) -> Mark | None:
    """Where a line meets the limit, if it does."""
    most = curve.line.most
    if not most or most >= growth.longest or growth.limit is None:
        return None
    x, y = panel.at(most, growth.limit.bytes)
    return Mark("crossing", x, y, f"{curve.name}: fits up to {most:,} tokens", curve.tone)


def _tokens(curve: _Curve) -> int:
    """The longest context of a line that has one."""
    return curve.line.most or 0


def _flat_box(line: Line) -> Box:
    (left, y), (right, _) = line.points
    return left, y - 3, right, y + 3


def _right_names(
    panel: Panel, ends: Sequence[tuple[_Curve, Line]]
) -> tuple[list[Label], list[Line]]:
    """Names right of the panel, at the ends of lines; a short line leads to each."""
    _, top, right, bottom = panel.box
    places = spread([line.points[-1][1] for _, line in ends], 17, top, bottom)
    labels, leaders = [], []
    for (curve, line), y in zip(ends, places, strict=True):
        end = line.points[-1]
        full = f"{curve.name}: {format_bytes(curve.line.points[-1][1])}"
        text = full if LETTER * len(full) < MARGIN - 26 else curve.name
        labels.append(Label("name", right + 24, y + 4, text, tone=curve.tone))
        leaders.append(Line("leader", (end, (right + 20, y)), curve.tone))
    return labels, leaders


def _top_names(panel: Panel, ends: Sequence[tuple[_Curve, Line]]) -> list[Label]:
    """Names above the panel, where lines leave it."""
    if not ends:
        return []
    left, top, right, _ = panel.box
    half = max(LETTER * len(curve.name) for curve, _ in ends) / 2 + 4
    wanted = [line.points[-1][0] for _, line in ends]
    places = spread(wanted, 2 * half, left + half, right + half)
    return [
        Label("name", x, top - 7, curve.name, "middle", tone=curve.tone)
        for (curve, _), x in zip(ends, places, strict=True)
    ]


def _shade(parts: _Parts, panel: Panel, growth: Growth) -> Label:
    """The weights: a box that all lines stand on."""
    left, top, right, bottom = panel.box
    y = max(top, panel.top_of(growth.weights))
    text = f"weights {format_bytes(growth.weights)}"
    parts.bars.append(Bar("shade", (left, y, right, bottom), text))
    inside = bottom - y > 24
    return Label("name", left + 12, y + 18 if inside else y - 8, text)


def _limit(panel: Panel, growth: Growth, off: bool) -> tuple[Line, Label]:
    """The line that lines must stay below, and its name."""
    assert growth.limit is not None
    left, top, right, _ = panel.box
    name = f"{growth.limit.name}: {format_bytes(growth.limit.bytes)}"
    y = top if off else panel.top_of(growth.limit.bytes)
    if off:
        times = growth.limit.bytes / panel.y.high
        says = f"↑ {name}, {times:,.0f} × the height of this panel"
        label = Label("name", left + 12, y + 18, says, tone="limit")
    else:
        label = Label("name", left + 12, y - 7, name, tone="limit")
    return Line("dashed" if off else "limit", ((left, y), (right, y)), "limit", name), label


def _growth_heading(growth: Growth) -> str:
    counts = list(dict.fromkeys(line.sequences for line in growth.lines))
    if len(counts) > 1:
        each = [f"{count:,} ({_kind(i)})" for i, count in enumerate(counts)]
        of = f"{', '.join(each[:-1])} and {each[-1]} requests"
    else:
        of = "one request" if counts == [1] else f"{counts[0]:,} requests"
    return f"Memory of {of} by page format"


def _note(growth: Growth) -> str:
    most = [line.most for line in growth.lines]
    if growth.limit is None:
        says = ["memory is that of weights, keys and values, and workspace"]
    elif all(tokens == 0 for tokens in most):
        says = ["no context fits"]
    elif all(tokens == growth.longest for tokens in most):
        says = ["all contexts fit"]
    else:
        says = ["a mark is the longest context that fits"]
    if growth.windows and growth.unwindowed is not None:
        kept = " or ".join(f"{window:,}" for window in growth.windows)
        line = growth.unwindowed
        says.append(
            f"layers with a sliding window keep {kept} tokens; no windows: "
            f"{line.sequences:,} × {line.name} if they kept all"
        )
    return "; ".join(says)


def _growth_table(growth: Growth) -> Table:
    heads = ("page format", "requests", "longest context that fits", "bytes at the longest")
    rows = []
    for line in growth.lines:
        most = "" if line.most is None else f"{line.most:,}"
        tokens, count = line.points[-1]
        rows.append((line.name, f"{line.sequences:,}", most, f"{format_bytes(count)} ({tokens:,})"))
    return Table(heads, tuple(rows), _growth_heading(growth))


# -- capacity --------------------------------------------------------------------------------------


def _draw_capacity(parts: _Parts, capacity: Capacity, tones: dict[str, str], room: Box) -> float:
    """Bars from the top of ``room`` down; returns where they end."""
    left, top, right, _ = room
    left = max(left, 20 + LETTER * max(len(bar.name) for bar in capacity.bars))
    bottom = top + GAP + len(capacity.bars) * (BAR + GAP)
    texts = _bar_texts(capacity)
    widest = max(len(text) for text in texts) * LETTER + 16
    largest = max(1, capacity.ceiling or 0, *(bar.most for bar in capacity.bars))
    high = largest * (right - left) / max(right - left - widest, 80)
    if capacity.unit == "tokens":
        x = doublings(int(high), "tokens")
    else:
        x = count_axis(capacity.unit, high)
    last = capacity.ceiling or high
    x = replace(x, ticks=tuple(tick for tick in x.ticks if tick[0] <= last))
    panel = Panel((left, top, right, bottom), x, Axis("", 0, 1, (), straight))
    lines, labels = panel.frame()
    labels.append(Label("heading", left, top - 18, capacity.heading))
    for i, (bar, text) in enumerate(zip(capacity.bars, texts, strict=True)):
        y = top + GAP + i * (BAR + GAP)
        end = panel.left_of(bar.most)
        box = (left, y, end, y + BAR)
        parts.bars.append(Bar("bar", box, f"{bar.name}: {text}", tones[bar.name]))
        labels.append(Label("name", left - 8, y + BAR / 2 + 4, bar.name, "end"))
        labels.append(Label("name", end + 8, y + BAR / 2 + 4, text))
    parts.add(lines, [], labels)
    rows = tuple((bar.name, f"{bar.most:,}") for bar in capacity.bars)
    parts.tables.append(Table(("page format", capacity.unit), rows, capacity.heading))
    return bottom


def _bar_texts(capacity: Capacity) -> list[str]:
    """What is written at each bar: how much, and how many times the first."""
    first, texts = capacity.bars[0], []
    for bar in capacity.bars:
        if not bar.most:
            texts.append("none fits")
        elif bar.most == capacity.ceiling:
            texts.append(f"{bar.most:,}, all the model has")
        elif bar is first or not first.most:
            texts.append(f"{bar.most:,}")
        else:
            texts.append(f"{bar.most:,} ({bar.most / first.most:.3g} × {first.name})")
    return texts
