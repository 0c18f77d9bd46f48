"""A scene in a file: PNG by matplotlib (the extra ``bench``), HTML by itself."""

import html
from pathlib import Path
from string import Template
from typing import Any

from quire.analysis.drawing import Bar, Label, Line, Mark, Scene, Table
from quire.errors import QuireError

__all__ = ["require_drawable", "write_picture"]

COLOURS = {
    "exact": "#8a5a00",
    "front": "#0b62c4",
    "grid": "#e3e5e8",
    "axis": "#3c4148",
    "shade": "#e9ebee",
    "limit": "#c21f2e",
    "point": "#1d2025",
    "diamond": "#1d2025",
    "blue": "#0b62c4",
    "orange": "#c2570c",
    "green": "#1b7f3b",
    "purple": "#7a3fb5",
    "brown": "#7d5a3c",
    "teal": "#0f7a80",
}
GREY, INK, SOFT = "#8a8f98", "#1d2025", "#5c626b"
DARK = {
    "exact": "#f0b649",
    "front": "#6cb0ff",
    "grid": "#2b2f36",
    "shade": "#23272e",
    "limit": "#ff7a80",
    "point": "#e8eaed",
    "diamond": "#e8eaed",
    "blue": "#6cb0ff",
    "orange": "#ff9d57",
    "green": "#63d083",
    "purple": "#c39bf5",
    "brown": "#d3ab86",
    "teal": "#56cfd4",
}
SIZES = {"title": 17, "heading": 14, "note": 12.5, "tick": 12, "axis": 13, "name": 12.5}
STYLES = {"zero": "--", "leader": ":", "dashed": "--", "dotted": ":", "ghost": "-."}
DASHES = {"--": "5 4", ":": "1 3", "-.": "7 3 1 3"}
WIDTHS = {
    **{"front": 2.0, "whisker": 1.4, "zero": 1.2, "axis": 1.2, "limit": 1.8, "ghost": 1.2},
    **{"solid": 2.0, "dashed": 2.0, "dotted": 2.0},
}
TONES = ("limit", "blue", "orange", "green", "purple", "brown", "teal")

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1d2025; --page: #ffffff; --soft: #5c626b;
  --grey: #8a8f98; $light }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --page: #16181c; --soft: #a4abb5;
  --grey: #7d848f; $dark } }
body { margin: 2rem auto; max-width: ${width}px; padding: 0 1rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
svg { width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif; fill: var(--ink); }
text.title, text.heading { font-weight: 600; } text.note, text.tick { fill: var(--soft); }
polyline { fill: none; stroke: var(--grey); } polyline.grid { stroke: var(--grid); }
polyline.axis { stroke: var(--soft); } polyline.front { stroke: var(--front); }
$dashes
text.name { paint-order: stroke; stroke: var(--page); stroke-width: 3; stroke-linejoin: round; }
circle, rect { stroke: var(--page); stroke-width: 1.5; fill: var(--grey); }
circle.front { fill: var(--front); } .exact { fill: var(--exact); } .shade { fill: var(--shade); }
.point, .diamond { fill: var(--ink); }
$tones
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 1rem 0 .25rem; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--grid); }
th:first-child, td:first-child { text-align: left; }
</style>
</head>
<body>
$svg
$tables
</body>
</html>
""")


def require_drawable(path: Path) -> None:
    """Raise QuireError for a file that could not be drawn, before work is done for it."""
    if path.suffix.lower() not in (".png", ".html"):
        raise QuireError(f"{path} is neither a .png nor a .html file; a picture is one of them")
    if not path.parent.is_dir():
        raise QuireError(f"{path} cannot be written: {path.parent} is not a directory")
    if path.suffix.lower() == ".png":
        try:
            import matplotlib  # noqa: F401  (an extra, and slow to import)
        except ImportError as error:
            raise QuireError(
                f"{path} needs matplotlib, which is not installed; pip install 'quire[bench]', or "
                "draw an .html file, which needs nothing"
            ) from error


def write_picture(scene: Scene, path: Path) -> None:
    """Write a scene to a ``.png`` or ``.html`` file; its tables are in the latter only.

    Raises QuireError for another suffix, without matplotlib, and if the file cannot be written.
    """
    require_drawable(path)
    try:
        if path.suffix.lower() == ".png":
            _png(scene, path)
        else:
            path.write_text(_page(scene), encoding="utf-8")
    except OSError as error:
        raise QuireError(f"{path} cannot be written: {error.strerror}") from error


# -- HTML ------------------------------------------------------------------------------------------


def _page(scene: Scene) -> str:
    return _PAGE.substitute(
        title=html.escape(scene.title),
        width=scene.size[0] + 48,
        light=" ".join(f"--{name}: {colour};" for name, colour in COLOURS.items()),
        dark=" ".join(f"--{name}: {colour};" for name, colour in DARK.items()),
        dashes="\n".join(
            f"polyline.{kind} {{ stroke-dasharray: {DASHES[style]}; }}"
            for kind, style in STYLES.items()
        ),
        tones="\n".join(
            f"polyline.{tone} {{ stroke: var(--{tone}); }} "
            f"circle.{tone}, rect.{tone}, text.{tone} {{ fill: var(--{tone}); }}"
            for tone in TONES
        ),
        svg=_svg(scene),
        tables="\n".join(map(_html_table, scene.tables)),
    )


def _svg(scene: Scene) -> str:
    shapes = [
        *map(_svg_bar, scene.bars),
        *map(_svg_line, scene.lines),
        *map(_svg_mark, scene.marks),
        *map(_svg_label, scene.labels),
    ]
    wide, tall = scene.size
    about = html.escape(scene.about)
    head = f'<svg viewBox="0 0 {wide} {tall}" role="img" aria-label="{about}">'
    return "\n".join([head, *shapes, "</svg>"])


def _class(each: Line | Mark | Bar | Label) -> str:
    return f"{each.kind} {each.tone}".rstrip()


def _title(text: str) -> str:
    return f"<title>{html.escape(text)}</title>"


def _svg_line(line: Line) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in line.points)
    width = WIDTHS.get(line.kind, 1)
    start = f'<polyline class="{_class(line)}" stroke-width="{width}" points="{points}"'
    return f"{start}>{_title(line.title)}</polyline>" if line.title else f"{start}/>"


def _svg_mark(mark: Mark) -> str:
    title = _title(mark.title)
    if mark.kind in ("exact", "diamond"):
        at = f'x="{mark.x - 6:.1f}" y="{mark.y - 6:.1f}" width="12" height="12"'
        turned = f'transform="rotate(45 {mark.x:.1f} {mark.y:.1f})"'
        return f'<rect class="{_class(mark)}" {at} {turned}>{title}</rect>'
    at = f'cx="{mark.x:.1f}" cy="{mark.y:.1f}"'
    return f'<circle class="{_class(mark)}" {at} r="6">{title}</circle>'


def _svg_bar(bar: Bar) -> str:
    left, top, right, bottom = bar.box
    at = f'x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}"'
    return f'<rect class="{_class(bar)}" {at}>{_title(bar.title)}</rect>'


def _svg_label(label: Label) -> str:
    turn = f' transform="rotate(-90 {label.x:.1f} {label.y:.1f})"' if label.turned else ""
    return (
        f'<text class="{_class(label)}" x="{label.x:.1f}" y="{label.y:.1f}" '
        f'text-anchor="{label.anchor}" font-size="{SIZES[label.kind]}"{turn}>'
        f"{html.escape(label.text)}</text>"
    )


def _html_table(table: Table) -> str:
    caption = [f"<caption>{html.escape(table.caption)}</caption>"] if table.caption else []
    rows = [_row("th", table.heads), *(_row("td", row) for row in table.rows)]
    return "\n".join(["<table>", *caption, *rows, "</table>"])


def _row(tag: str, cells: tuple[str, ...]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"


# -- PNG -------------------------------------------------------------------------------------------


def _colour(each: Line | Mark | Bar) -> str:
    return COLOURS.get(each.tone or each.kind, GREY)


def _png(scene: Scene, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    wide, tall = scene.size
    figure = Figure(figsize=(wide / 100, tall / 100), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, wide)
    axes.set_ylim(tall, 0)
    axes.axis("off")
    for bar in scene.bars:
        left, top, right, bottom = bar.box
        axes.bar(left, top - bottom, right - left, bottom, align="edge", color=_colour(bar))
    for line in scene.lines:
        x, y = zip(*line.points, strict=True)
        style, width = STYLES.get(line.kind, "-"), WIDTHS.get(line.kind, 1)
        axes.plot(x, y, style, color=_colour(line), linewidth=width)
    for mark in scene.marks:
        shape = "D" if mark.kind in ("exact", "diamond") else "o"
        axes.plot(mark.x, mark.y, shape, color=_colour(mark), markersize=8, zorder=3)
    for label in scene.labels:
        _write(axes, label)
    figure.savefig(path, dpi=160, metadata={"Software": None})


def _write(axes: Any, label: Label) -> None:
    from matplotlib.patheffects import withStroke

    plain = SOFT if label.kind in ("tick", "note") else INK
    axes.text(
        label.x,
        label.y,
        label.text,
        fontsize=0.72 * SIZES[label.kind],  # points of 1/72 inch, at 100 pixels an inch
        color=COLOURS.get(label.tone, plain),
        ha={"start": "left", "middle": "center", "end": "right"}[label.anchor],
        va="center" if label.turned else "baseline",
        rotation=90 if label.turned else 0,
        weight="bold" if label.kind in ("title", "heading") else "normal",
        path_effects=[withStroke(linewidth=2, foreground="white")],
        zorder=4,
    )
