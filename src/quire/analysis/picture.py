"""The Pareto picture in a file: PNG by matplotlib (the extra ``bench``), HTML by itself."""

from pathlib import Path

from quire.analysis.quality import Measurement, Report
from quire.analysis.rendering import require_drawable, write_scene
from quire.analysis.scene import scene_of

__all__ = ["draw", "require_drawable"]

_HEADS = (
    *("setting", "bytes a token", "compression", "perplexity", "change", "KL mean, nats"),
    *("same top-1", "recalled, asked after the prompt", "asked in the prompt"),
)


def draw(report: Report, model: str, path: Path) -> None:
    """Write the picture of a report to a ``.png`` or ``.html`` file; ``model`` names it.

    Raises QuireError for another suffix, without matplotlib, and if the file cannot be written.
    """
    require_drawable(path)
    measured = (report.exact, *(made for _, made in report.candidates))
    rows = [_cells(m, m is report.exact) for m in measured if isinstance(m, Measurement)]
    title = f"{model}: memory against quality"
    write_scene(scene_of(report, model), title, [_HEADS, *rows], path)


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
