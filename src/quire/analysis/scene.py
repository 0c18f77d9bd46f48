"""The Pareto picture as shapes in pixels: laid out once, drawn as PNG or SVG by ``paint``.

Memory to the right on a logarithmic axis, loss upwards on one that is linear about zero and
logarithmic beyond, so that losses of 0.001 % and of 100 % are seen in one picture.
"""

import math
from collections.abc import Sequence

from quire.analysis.axes import Axis, Panel
from quire.analysis.drawing import LETTER, Box, Label, Line, Mark, Scene, place_names
from quire.analysis.pareto import front
from quire.analysis.quality import Measurement, Report
from quire.config import format_bytes

__all__ = ["HEIGHT", "LETTER", "WIDTH", "Box", "Label", "Line", "Mark", "Scene", "scene_of"]

WIDTH, HEIGHT = 880, 540
LEFT, RIGHT, TOP, BOTTOM = 92, 28, 78, 64
LINEAR = 1e-4  # losses below a hundredth of a percent lie on the linear part
DECADES = (-1e-1, -1e-2, -1e-3, -1e-4, 0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)


def scene_of(report: Report, model: str) -> Scene:
    """The picture of a report; ``model`` names it."""
    own = report.exact.setting  # a candidate that is the exact cache would lie under its mark
    found = [each for _, each in report.candidates if isinstance(each, Measurement)]
    measured = [each for each in found if each.setting != own]
    panel = _panel([report.exact, *measured])
    lines, labels = panel.frame()
    title = f"{model}: memory against quality"
    labels += [
        Label("title", LEFT, 30, title),
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
        lines.append(Line("front", tuple(_at(panel, each) for each in best)))
    marks = [_mark(panel, each, best, report) for each in (*measured, report.exact)]
    for each in measured:
        low, high = each.summary.perplexity_change_interval
        lines.append(
            Line("whisker", tuple(panel.at(each.bytes_per_token, end) for end in (low, high)))
        )
    names = [*(each.setting.name for each in measured), f"exact ({report.exact.setting.name})"]
    crossed = [line for line in lines if line.kind in ("front", "zero", "whisker")]
    placed, leaders = place_names(marks, names, (LEFT, TOP - 20, WIDTH - 4, math.inf), crossed)
    drawn = (*lines, *leaders), tuple(marks), (*labels, *placed)
    return Scene(title, "Pareto picture", (WIDTH, HEIGHT), *drawn)


def _at(panel: Panel, each: Measurement) -> tuple[float, float]:
    return panel.at(each.bytes_per_token, each.summary.perplexity_change)


def _mark(panel: Panel, each: Measurement, best: Sequence[Measurement], report: Report) -> Mark:
    kind = "exact" if each is report.exact else "front" if each in best else "beaten"
    low, high = each.summary.perplexity_change_interval
    title = (
        f"{each.setting.name}: {each.bytes_per_token:,.0f} bytes a token "
        f"({each.compression:.2f}x), perplexity {each.summary.perplexity_change:+.4%} "
        f"[{low:+.4%}, {high:+.4%}], KL {each.summary.kl_mean:.2e}"
    )
    return Mark(kind, *_at(panel, each), title)


def _panel(measured: Sequence[Measurement]) -> Panel:
    """Bytes a token to the right, changes of perplexity (0.01 is one percent) upwards."""
    sizes = [each.bytes_per_token for each in measured]
    low, high = math.log2(min(sizes)) - 0.5, math.log2(max(sizes)) + 0.5
    powers = [2.0**power for power in range(math.ceil(low), math.floor(high) + 1)]
    x = Axis(
        "bytes of keys and values a token",
        2**low,
        2**high,
        tuple((power, format_bytes(power)) for power in powers),
        math.log2,
    )
    ends = [end for each in measured for end in each.summary.perplexity_change_interval]
    ticks = _ticks(min(ends), max(ends))
    y = Axis(
        "change of perplexity against the exact cache",
        ticks[0],
        ticks[-1],
        tuple((loss, "0" if loss == 0 else f"{100 * loss:+.10g} %") for loss in ticks),
        _bent,
    )
    return Panel((LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM), x, y)


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
