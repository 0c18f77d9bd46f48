"""The roofline (Williams, Waterman & Patterson, 2009) of what ``bench/gpu.py`` measured, as a PNG.

    python bench/gpu_roofline.py gpu.json roofline.png

Both axes are logarithmic: operations a byte that must move, and operations a second. The two lines
are ceilings measured in the same run, copy bandwidth and bf16 products; points are decode attention
by page format, prefill attention and linear layers. Needs matplotlib (the extra quire[bench]).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_rows import Row, read_report

__all__ = ["Point", "ceilings_of", "draw", "points_of"]

Point = tuple[float, float]  # operations a byte, operations a second

SERIES = {  # label: part, end of the case, marker, colour (Okabe & Ito's, told apart by all)
    "decode, bf16 pages": ("decode", ", bf16", "o", "#0072B2"),
    "decode, int8 pages": ("decode", ", int8", "s", "#009E73"),
    "decode, int4 pages": ("decode", ", int4", "D", "#D55E00"),
    "prefill attention": ("prefill", ", ours", "^", "#CC79A7"),
    "linear, bf16": ("linear", ", bf16", "v", "#000000"),
}
DPI = 130


def ceilings_of(rows: Sequence[Row]) -> Point:
    """Bytes a second of a copy, and operations a second of a product; SystemExit without them."""
    found: dict[str, float] = {
        row.unit: row.value for row in rows if row.part == "ceilings" and row.value is not None
    }
    missing = {"GB/s", "TF/s"} - set(found)
    if missing:
        raise SystemExit(
            f"no ceiling in {' and '.join(sorted(missing))} was measured; run bench/gpu.py with "
            "the part 'ceilings'"
        )
    return found["GB/s"] * 1e9, found["TF/s"] * 1e12


def points_of(rows: Sequence[Row]) -> dict[str, list[Point]]:
    """Points of each series, in order of intensity; series without any are left out."""
    out: dict[str, list[Point]] = {}
    for label, (part, ending, _, _) in SERIES.items():
        points = [
            (row.flops / row.bytes, row.flops / row.seconds)
            for row in rows
            if row.part == part
            and row.case.endswith(ending)
            and row.flops is not None
            and row.bytes is not None
            and row.seconds is not None
        ]
        if points:
            out[label] = sorted(points)
    return out


def draw(about: dict[str, Any], rows: Sequence[Row], path: Path) -> None:
    """The picture, over ``path``."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    (bandwidth, rate), series = ceilings_of(rows), points_of(rows)
    ridge = rate / bandwidth
    every = [point for points in series.values() for point in points]
    low = min([ridge / 64, *(x for x, _ in every)]) / 2
    high = max([ridge * 16, *(x for x, _ in every)]) * 2
    figure, axes = plt.subplots(figsize=(8, 5.2), layout="constrained")
    axes.loglog([low, ridge, high], [low * bandwidth, rate, rate], color="#666666", lw=1.5)
    label = {"fontsize": 8, "color": "#444444", "textcoords": "offset points"}
    axes.annotate(
        f"copy: {bandwidth / 1e9:,.0f} GB/s", (low * 1.6, low * 1.6 * bandwidth), xytext=(-4, 16),
        rotation=35, **label,
    )  # fmt: skip
    axes.annotate(
        f"bf16 product: {rate / 1e12:,.0f} TF/s", (high / 1.1, rate), xytext=(0, 5), ha="right",
        **label,
    )  # fmt: skip
    for name, points in series.items():
        _, _, marker, colour = SERIES[name]
        axes.plot(
            *zip(*points, strict=True), ls="", marker=marker, ms=6, mfc="none", mec=colour,
            mew=1.4, label=name,
        )  # fmt: skip
    axes.set(
        xlim=(low, high), xlabel="operations a byte", ylabel="operations a second",
        title=f"{about['card']}, torch {about['torch']}, {about['date'][:10]}",
    )  # fmt: skip
    axes.grid(which="major", color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    if series:
        axes.legend(loc="lower right", fontsize=8, frameon=False)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def main() -> None:
    """Read, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="what bench/gpu.py --json wrote")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    options = parser.parse_args()
    about, rows = read_report(options.report)
    draw(about, rows, options.picture)


if __name__ == "__main__":
    main()
