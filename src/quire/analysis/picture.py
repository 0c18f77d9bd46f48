"""The Pareto picture in a file: PNG by matplotlib (the extra ``bench``), HTML by itself."""

import html
from pathlib import Path
from string import Template
from typing import Any

from quire.analysis.quality import Measurement, Report
from quire.analysis.scene import HEIGHT, WIDTH, Label, Line, Mark, Scene, scene_of
from quire.errors import QuireError

__all__ = ["draw", "require_drawable"]

COLOURS = {
    "exact": "#8a5a00",
    "front": "#0b62c4",
    "beaten": "#8a8f98",
    "whisker": "#8a8f98",
    "leader": "#8a8f98",
    "grid": "#e3e5e8",
    "zero": "#8a8f98",
    "axis": "#3c4148",
}
SIZES = {"title": 17, "note": 12.5, "tick": 12, "axis": 13, "name": 12.5}
STYLES = {"zero": "--", "leader": ":"}
WIDTHS = {"front": 2.0, "whisker": 1.4, "zero": 1.2, "axis": 1.2}

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1d2025; --page: #ffffff; --soft: #5c626b;
  --grid: #e3e5e8; --grey: #8a8f98; --front: #0b62c4; --exact: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --page: #16181c; --soft: #a4abb5;
  --grid: #2b2f36; --grey: #7d848f; --front: #6cb0ff; --exact: #f0b649; } }
body { margin: 2rem auto; max-width: 58rem; padding: 0 1rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
svg { width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif; fill: var(--ink); }
text.title { font-weight: 600; } text.note, text.tick { fill: var(--soft); }
polyline { fill: none; stroke: var(--grey); } polyline.grid { stroke: var(--grid); }
polyline.axis { stroke: var(--soft); } polyline.front { stroke: var(--front); }
polyline.zero { stroke-dasharray: 5 4; } polyline.leader { stroke-dasharray: 1 3; }
text.name { paint-order: stroke; stroke: var(--page); stroke-width: 3; stroke-linejoin: round; }
circle, rect { stroke: var(--page); stroke-width: 1.5; }
.beaten { fill: var(--grey); } circle.front { fill: var(--front); } .exact { fill: var(--exact); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--grid); }
th:first-child, td:first-child { text-align: left; }
</style>
</head>
<body>
$svg
$table
</body>
</html>
""")


def require_drawable(path: Path) -> None:
    """Raise QuireError for a file that could not be drawn, before anything is measured for it."""
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


def draw(report: Report, model: str, path: Path) -> None:
    """Write the picture of a report to a ``.png`` or ``.html`` file; ``model`` names it.

    Raises QuireError for another suffix, without matplotlib, and if the file cannot be written.
    """
    require_drawable(path)
    scene = scene_of(report, model)
    try:
        if path.suffix.lower() == ".png":
            _png(scene, path)
        else:
            page = _PAGE.substitute(
                title=html.escape(f"{model}: memory against quality"),
                svg=_svg(scene),
                table=_table(report),
            )
            path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise QuireError(f"{path} cannot be written: {error.strerror}") from error


def _svg(scene: Scene) -> str:
    shapes = [
        *map(_svg_line, scene.lines),
        *map(_svg_mark, scene.marks),
        *map(_svg_label, scene.labels),
    ]
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Pareto picture">'
    return "\n".join([head, *shapes, "</svg>"])


def _svg_line(line: Line) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in line.points)
    width = WIDTHS.get(line.kind, 1)
    return f'<polyline class="{line.kind}" stroke-width="{width}" points="{points}"/>'


def _svg_mark(mark: Mark) -> str:
    title = f"<title>{html.escape(mark.title)}</title>"
    if mark.kind == "exact":
        at = f'x="{mark.x - 6:.1f}" y="{mark.y - 6:.1f}" width="12" height="12"'
        turned = f'transform="rotate(45 {mark.x:.1f} {mark.y:.1f})"'
        return f'<rect class="exact" {at} {turned}>{title}</rect>'
    return f'<circle class="{mark.kind}" cx="{mark.x:.1f}" cy="{mark.y:.1f}" r="6">{title}</circle>'


def _svg_label(label: Label) -> str:
    turn = f' transform="rotate(-90 {label.x:.1f} {label.y:.1f})"' if label.turned else ""
    return (
        f'<text class="{label.kind}" x="{label.x:.1f}" y="{label.y:.1f}" '
        f'text-anchor="{label.anchor}" font-size="{SIZES[label.kind]}"{turn}>'
        f"{html.escape(label.text)}</text>"
    )


def _table(report: Report) -> str:
    heads = (
        *("setting", "bytes a token", "compression", "perplexity", "change", "KL mean, nats"),
        *("same top-1", "recalled, asked after the prompt", "asked in the prompt"),
    )
    rows = [f"<tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>"]
    for each in (report.exact, *(made for _, made in report.candidates)):
        if isinstance(each, Measurement):
            cells = _cells(each, each is report.exact)
            rows.append(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>")
    return "<table>\n" + "\n".join(rows) + "\n</table>"


def _cells(each: Measurement, exact: bool) -> tuple[str, ...]:
    summary = each.summary
    return (
        f"exact ({each.setting.name})" if exact else each.setting.name,
        f"{each.bytes_per_token:,.0f}",
        f"{each.compression:.2f}x",
        f"{summary.perplexity:.4f}",
        f"{summary.perplexity_change:+.4%}",
        f"{summary.kl_mean:.2e}",
        f"{summary.top1_agreement:.2%}",
        *("" if m is None else f"{m:.1%}" for m in (each.recall_mean, each.recall_in_prompt_mean)),
    )


def _png(scene: Scene, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(HEIGHT, 0)
    axes.axis("off")
    for line in scene.lines:
        x, y = zip(*line.points, strict=True)
        style, width = STYLES.get(line.kind, "-"), WIDTHS.get(line.kind, 1)
        axes.plot(x, y, style, color=COLOURS[line.kind], linewidth=width)
    for mark in scene.marks:
        shape = "D" if mark.kind == "exact" else "o"
        axes.plot(mark.x, mark.y, shape, color=COLOURS[mark.kind], markersize=8, zorder=3)
    for label in scene.labels:
        axes.text(
            label.x,
            label.y,
            label.text,
            fontsize=0.72 * SIZES[label.kind],  # points of 1/72 inch, at 100 pixels an inch
            color="#5c626b" if label.kind in ("tick", "note") else "#1d2025",
            ha={"start": "left", "middle": "center", "end": "right"}[label.anchor],
            va="center" if label.turned else "baseline",
            rotation=90 if label.turned else 0,
            weight="bold" if label.kind == "title" else "normal",
            path_effects=[withStroke(linewidth=2, foreground="white")],
            zorder=4,
        )
    figure.savefig(path, dpi=160, metadata={"Software": None})
