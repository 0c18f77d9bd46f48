"""The Pareto picture in a file: the scene, and on a page the table of all that was measured."""

from dataclasses import replace
from pathlib import Path

from quire.analysis.drawing import Table
from quire.analysis.paint import require_drawable, write_picture
from quire.analysis.quality import Measurement, Report
from quire.analysis.scene import scene_of

__all__ = ["draw", "require_drawable"]


def draw(report: Report, model: str, path: Path) -> None:
    """Write the picture of a report to a ``.png`` or ``.html`` file; ``model`` names it.

    Raises QuireError for another suffix, without matplotlib, and if the file cannot be written.
    """
    require_drawable(path)
    write_picture(replace(scene_of(report, model), tables=(_table(report),)), path)


def _table(report: Report) -> Table:
    heads = (
        *("setting", "bytes a token", "compression", "perplexity", "change", "KL mean, nats"),
        *("same top-1", "recalled, asked after the prompt", "asked in the prompt"),
    )
    measured = (report.exact, *(made for _, made in report.candidates))
    rows = [
        _cells(each, each is report.exact) for each in measured if isinstance(each, Measurement)
    ]
    return Table(heads, tuple(rows))


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
