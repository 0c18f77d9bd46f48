"""What ``bench/gpu.py`` reports: rows, their table, their JSON. The standard library alone."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Row", "failed", "read_report", "summary", "table_line", "write_report"]

HEADER = (
    f"{'part':12} {'case':44} {'value':>10} {'unit':9} {'±':>5}  {'ratio':>7} "
    f"{'of':27} {'asked':>8}"
)


@dataclass(frozen=True)
class Row:
    """One figure.

    value     median of ``repeats`` in ``unit``; None where there is none, and ``note`` says why
    spread    half of greatest less least, relative to the median
    ratio     of the value to that of ``of``: another contestant, or a ceiling, of the same rounds
    at_least, at_most   what is asked of the ratio
    clock     ``device`` (CUDA events) or ``wall`` (the host's, from a synchronised moment to one)
    seconds, flops, bytes   one call, its operations and the fewest bytes that it must move
    """

    part: str
    case: str
    value: float | None = None
    unit: str = ""
    spread: float | None = None
    repeats: int = 0
    clock: str = "device"
    ratio: float | None = None
    of: str = ""
    at_least: float | None = None
    at_most: float | None = None
    note: str = ""
    seconds: float | None = None
    flops: float | None = None
    bytes: float | None = None

    @property
    def holds(self) -> bool | None:
        """Whether the ratio is what was asked; None where nothing was, or nothing was measured."""
        if self.ratio is None or (self.at_least is None and self.at_most is None):
            return None
        high = self.at_least is None or self.ratio >= self.at_least
        return high and (self.at_most is None or self.ratio <= self.at_most)


def failed(part: str, case: str, reason: str) -> Row:
    """What is left of a case that raised."""
    return Row(part, case, note=f"failed: {reason}")


def summary(samples: Sequence[float]) -> tuple[float, float]:
    """The median, and half of greatest less least relative to it."""
    middle = statistics.median(samples)
    return middle, (max(samples) - min(samples)) / 2 / middle if middle else 0.0


def table_line(row: Row) -> str:
    """One line of the table."""
    value = "-" if row.value is None else f"{row.value:.4g}"
    spread = "" if row.spread is None else f"{row.spread:.0%}"
    ratio = "" if row.ratio is None else f"{row.ratio:.3g}"
    asked = ""
    if row.at_least is not None or row.at_most is not None:
        limit = f">= {row.at_least:g}" if row.at_least is not None else f"<= {row.at_most:g}"
        asked = f"{limit:>8} " + {True: "holds", False: "MISSED", None: "?"}[row.holds]
    line = (
        f"{row.part:12} {row.case:44} {value:>10} {row.unit:9} {spread:>5}  {ratio:>7} "
        f"{row.of:27} {asked:15} {row.note}"
    )
    return line.rstrip()


def write_report(path: Path, about: dict[str, Any], rows: Sequence[Row]) -> None:
    """All that is known so far, replacing what was written before."""
    report = {"about": about, "rows": [{**asdict(row), "holds": row.holds} for row in rows]}
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(report, indent=1), encoding="utf-8")
    beside.replace(path)


def read_report(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """What :func:`write_report` wrote."""
    report = json.loads(path.read_text(encoding="utf-8"))
    for row in report["rows"]:
        row.pop("holds")
    return report["about"], [Row(**row) for row in report["rows"]]
