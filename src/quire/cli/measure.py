"""``quire measure``: what lossy settings of the cache cost on a text."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quire.cli.options import backend_options, make_model
from quire.cli.progress import measuring_progress
from quire.cli.reading import decode_utf8

if TYPE_CHECKING:
    from rich.console import JustifyMethod
    from rich.table import Table

    from quire.analysis.candidates import Setting
    from quire.analysis.losses import Interval
    from quire.analysis.pareto import Recommendation
    from quire.analysis.quality import Measurement, Report

__all__ = ["measure"]

DEFAULT_TOKENS = 8192


def _budget(ctx: click.Context, option: click.Parameter, text: str | None) -> float | None:
    """Percent of perplexity."""
    if text is None:
        return None
    try:
        percent = float(text.removesuffix("%")) if text.endswith("%") else -1.0
    except ValueError:
        percent = -1.0
    if not 0 < percent < float("inf"):
        raise click.BadParameter(f"{text!r} is not a loss in percent; write it as 1% or 0.1%")
    return percent


def _tokens(ctx: click.Context, option: click.Parameter, text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise click.BadParameter(f"{text!r} is neither a number of tokens nor 'all'")
    return int(text)


@click.command()
@backend_options
@click.option(
    "--text",
    "files",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Text to measure on; may be repeated.  [default: the modules that quill never saw]",
)
@click.option(
    "--kv-format",
    "formats",
    multiple=True,
    metavar="F",
    help="A page format to measure; may be repeated.  [default: all but the checkpoint's dtype]",
)
@click.option(
    "--evict",
    "evictions",
    multiple=True,
    metavar="SPEC",
    help="A policy to measure with every format, such as window:budget=512 or quest:budget=512; "
    "may be repeated.  [default: none]",
)
@click.option(
    "--budget",
    callback=_budget,
    metavar="LOSS",
    help="Recommend the smallest setting that costs less perplexity, such as 1%.",
)
@click.option(
    "--plot",
    "pictures",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw memory against quality to a .png or .html file; may be repeated.",
)
@click.option(
    "--context",
    type=int,
    metavar="N",
    help="Tokens of a passage.  [default: the model's context, at most 2048]",
)
@click.option(
    "--tokens",
    callback=_tokens,
    default=str(DEFAULT_TOKENS),
    show_default=True,
    metavar="N",
    help="Predict at most N tokens of the text; 'all' predicts all.",
)
@click.option(
    "--recall-trials",
    type=click.IntRange(0),
    default=25,
    show_default=True,
    metavar="N",
    help="Texts with values to recall; 0 asks for none.",
)
@click.option(
    "--max-batch-tokens",
    type=int,
    default=512,
    show_default=True,
    metavar="N",
    help="Tokens a step: longer prompts are read, and tokens dropped from them, in chunks.",
)
@click.option("--page-size", type=int, default=32, show_default=True, metavar="N")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list instead of a table.")
def measure(
    *,
    files: tuple[Path, ...],
    formats: tuple[str, ...],
    evictions: tuple[str, ...],
    budget: float | None,
    pictures: tuple[Path, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Measure what page formats, eviction and sparse reading cost.

    Every --kv-format with every --evict is a candidate. The exact cache and all candidates read the
    same text, token by token after a prefilled half passage; printed are bytes a token, perplexity
    and its change with a 95 % interval, the KL divergence from the exact cache, how often the
    likeliest token is the same, recall by distance, with the question after the prompt and in it,
    and speed. Two runs print the same but for the speeds. Candidates that the engine refuses are
    shown with the reason.
    """
    from quire.analysis.pareto import recommend
    from quire.analysis.picture import draw, require_drawable
    from quire.analysis.quality import Measurement, Plan
    from quire.analysis.quality import measure as run
    from quire.errors import QuireError

    for path in pictures:
        require_drawable(path)
    texts = _texts(files)
    plan = Plan(options.pop("context"), options.pop("tokens"), options.pop("recall_trials"))
    model = make_model(options.pop("page_size"), options)
    settings = _settings(model.cache.layout.shapes[0].key_format.name, formats, evictions)
    with measuring_progress() as progress:
        report = run(model, texts, settings, plan, progress)
    measured = [each for _, each in report.candidates if isinstance(each, Measurement)]
    for setting, made in report.candidates:
        if isinstance(made, str):
            click.echo(f"quire: warning: {setting.name}: {made}", err=True)
    if not measured:
        raise QuireError("no candidate could be measured")
    advice = None if budget is None else recommend(measured, budget)
    if as_json:
        click.echo(json.dumps(_objects(report, advice)))
    else:
        _print(report, model.directory.name, model.backend.name)
    if advice is not None:
        click.echo(advice.describe(), err=as_json)
    for path in pictures:
        draw(report, model.directory.name, path)


def _texts(files: tuple[Path, ...]) -> dict[str, str]:
    from quire.analysis.text import held_out

    if not files:
        return held_out()
    found = {}
    for path in files:
        try:
            found[str(path)] = decode_utf8(path.read_bytes(), str(path))
        except OSError as error:
            raise click.UsageError(f"cannot read {path}: {error.strerror}") from error
    return found


def _settings(own: str, formats: tuple[str, ...], evictions: tuple[str, ...]) -> list["Setting"]:
    from quire.analysis.candidates import NO_EVICTION, Setting
    from quire.pages import PAGE_FORMATS

    chosen = formats or tuple(name for name in PAGE_FORMATS if name != own)
    pairs = [Setting(name, evict) for name in chosen for evict in evictions or (NO_EVICTION,)]
    return list(dict.fromkeys(pairs))


def _objects(report: "Report", advice: "Recommendation | None") -> list[dict[str, Any]]:
    from quire.analysis.quality import Measurement

    exact = _numbers(report.exact)
    made = []
    for setting, found in report.candidates:
        measured = isinstance(found, Measurement)
        numbers = _numbers(found) if isinstance(found, Measurement) else dict.fromkeys(exact)
        made.append(
            {
                "kv_format": setting.kv_format,
                "evict": setting.evict,
                **numbers,
                "error": None if measured else found,
                "recommended": None if advice is None else advice.chosen is found,
                "context": report.context,
                "tokens": report.tokens,
                "recall_missing": report.recall_missing,
                "exact": {"kv_format": report.exact.setting.kv_format, **exact},
            }
        )
    return made


def _numbers(found: "Measurement") -> dict[str, Any]:
    summary, speed = found.summary, found.speed
    return {
        "bytes_per_token": found.bytes_per_token,
        "bytes_per_token_in_pool": found.bytes_per_token_in_pool,
        "compression": found.compression,
        "perplexity": summary.perplexity,
        "perplexity_change": summary.perplexity_change,
        "perplexity_change_interval": summary.perplexity_change_interval,
        "kl_mean": summary.kl_mean,
        "kl_mean_interval": summary.kl_mean_interval,
        "kl_p99": summary.kl_p99,
        "top1_agreement": summary.top1_agreement,
        "top1_agreement_interval": summary.top1_agreement_interval,
        "recall": found.recall,
        "recall_mean": found.recall_mean,
        "recall_interval": found.recall_interval,
        "recall_in_prompt": found.recall_in_prompt,
        "recall_in_prompt_mean": found.recall_in_prompt_mean,
        "recall_in_prompt_interval": found.recall_in_prompt_interval,
        "decode_tokens_per_s": None if speed is None else speed.decode_tokens_per_s,
        "attention_bytes_per_s": None if speed is None else speed.attention_bytes_per_s,
    }


def _print(report: "Report", model: str, backend: str) -> None:
    from rich.console import Console

    from quire.analysis.quality import Measurement

    rows = [report.exact, *(m for _, m in report.candidates if isinstance(m, Measurement))]
    click.echo(
        f"{model} on {backend}: {report.tokens:,} tokens predicted in passages of "
        f"{report.context:,}, ± 95 % intervals, KL in nats a token\n"
    )
    named = [(_name(each, each is report.exact), each) for each in rows]
    heads = ["cache", "bytes/\ntoken", "smaller", "perplex-\nity", "change", "KL mean", "KL p99"]
    losses = [[_folded(name), *_losses(each, each is report.exact)] for name, each in named]
    Console().print(_table([*heads, "same\ntop-1"], losses))
    click.echo()
    if report.recall_missing is not None:
        click.echo(f"recall was not asked: {report.recall_missing}\n")
    if report.exact.recall is not None:
        heads = ["cache", "asked", *report.exact.recall, "recalled"]
        Console().print(_table(heads, [row for name, each in named for row in _recall(name, each)]))
        click.echo("values recalled by distance in tokens, asked after the prompt and in it\n")
    speed = report.exact.speed
    if speed is not None:
        heads = ["cache", "decode tok/s", "attention GB/s"]
        Console().print(_table(heads, [[name, *_speed(each)] for name, each in named], padding=1))
        click.echo(f"speeds of one sequence after {speed.context:,} tokens\n")


def _table(heads: list[str], rows: list[list[str]], padding: int = 0) -> "Table":
    """Narrow enough for 80 columns, with a rule below the heads."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, padding, 0, 0))
    for number, head in enumerate(heads):
        first = number == 0
        justify: JustifyMethod = "left" if first else "right"
        table.add_column(head, justify=justify, no_wrap=not first, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _name(each: "Measurement", exact: bool) -> str:
    """A line for the format, and one for the policy if there is one."""
    name = f"{each.setting.name} (exact)" if exact else each.setting.name
    return name.replace(" + ", " +\n ")


def _folded(name: str) -> str:
    """A name in short lines, for a table that leaves little room: broken where an option ends."""
    return name.replace(":", ":\n  ").replace(",", ",\n  ")


def _losses(each: "Measurement", exact: bool) -> list[str]:
    summary = each.summary
    low, high = summary.perplexity_change_interval
    lost = [
        f"{summary.perplexity_change:+.3%} ±{(high - low) / 2:.3%}",
        f"{summary.kl_mean:.2e}",
        f"{summary.kl_p99:.2e}",
        f"{summary.top1_agreement:.2%}",
    ]
    return [
        f"{each.bytes_per_token:,.0f}",
        f"{each.compression:.2f}x",
        f"{summary.perplexity:.3f}",
        *([""] * len(lost) if exact else lost),
    ]


def _recall(name: str, each: "Measurement") -> list[list[str]]:
    """Two rows: asked after the prompt, and in the prompt."""
    first, _, second = name.partition("\n")
    return [
        [first, "after", *_shares(each.recall, each.recall_mean, each.recall_interval)],
        [
            second,
            "in",
            *_shares(
                each.recall_in_prompt, each.recall_in_prompt_mean, each.recall_in_prompt_interval
            ),
        ],
    ]


def _shares(
    by_distance: dict[str, float] | None, mean: float | None, interval: "Interval | None"
) -> list[str]:
    if by_distance is None or mean is None or interval is None:
        return []
    whole = f"{mean:.1%} [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]"
    return [*(f"{share:.0%}" for share in by_distance.values()), whole]


def _speed(each: "Measurement") -> list[str]:
    if each.speed is None:
        return []
    return [
        f"{each.speed.decode_tokens_per_s:.0f}",
        f"{each.speed.attention_bytes_per_s / 1e9:.1f}",
    ]
