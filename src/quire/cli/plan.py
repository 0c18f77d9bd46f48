"""``quire plan``: what a model takes, what fits and how fast it goes, before anything is loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from quire.analysis.hardware import Hardware
    from quire.analysis.plan import Asked, Plan
    from quire.analysis.roofline import Timer
    from quire.analysis.shape import ModelShape

__all__ = ["plan"]

THIS = "this"
FORMATS = ("auto", "int8", "int4")
DEFAULT_CONTEXT = 4096
VERIFY_CONTEXT, VERIFY_REQUESTS = 512, 4
WIDTH = 160  # of tables in a file or a pipe


@click.command()
@click.argument("model", required=False)
@click.option(
    "--context",
    type=click.IntRange(1),
    metavar="N",
    help="Tokens of each request, prompt and reply.  [default: the model's, at most 4096]",
)
@click.option(
    "--requests",
    type=click.IntRange(1),
    metavar="N",
    help="Requests at a time.  [default: 1, or 4 with --verify]",
)
@click.option(
    "--kv-format",
    "formats",
    multiple=True,
    metavar="F",
    help="Page format to plan for; more are compared.  [default: the checkpoint's dtype, int8, "
    "int4]",
)
@click.option(
    "--page-size",
    default="auto",
    show_default=True,
    metavar="N",
    help="Tokens a page; 'whole' is one page of the model's context; auto is 16, or 32 for int4.",
)
@click.option(
    "--weights",
    metavar="DTYPE",
    help="Dtype of weights: bf16, fp16, fp32, fp8, int8, int4.  [default: the checkpoint's]",
)
@click.option(
    "--max-batch-tokens",
    "chunk",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    metavar="N",
    help="Tokens a step; longer prompts are computed in chunks.",
)
@click.option(
    "--hardware",
    default=THIS,
    show_default=True,
    metavar="NAME",
    help="A card or machine of the catalogue, such as h100-sxm or rtx-4090; 'list' lists them; "
    "'this' measures this machine, in some seconds.",
)
@click.option(
    "--memory",
    metavar="BYTES",
    help="Memory for model and cache, such as 24GiB.  [default: 95 % of the hardware's]",
)
@click.option(
    "--evict-budget",
    "evict",
    type=click.IntRange(1),
    metavar="N",
    help="Tokens that evicting strategies keep.  [default: a quarter of the context]",
)
@click.option(
    "--tensor-parallel",
    "tensor",
    type=click.IntRange(1),
    default=1,
    metavar="N",
    help="Devices that share every layer.",
)
@click.option(
    "--pipeline-parallel",
    "pipeline",
    type=click.IntRange(1),
    default=1,
    metavar="N",
    help="Stages that layers are divided into.",
)
@click.option(
    "--trace",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Replay a JSONL of arrivals (timestamp, input_length, output_length, hash_ids) through "
    "the real scheduler, allocator and prefix index.",
)
@click.option(
    "--plot",
    "pictures",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw growth, capacity and roofline to a .png or .html file; may be repeated.",
)
@click.option(
    "--verify",
    is_flag=True,
    help="Load the model, run it, and print predicted against measured for every term.",
)
@click.option(
    "--threads", type=int, metavar="N", help="Threads of the native backend.  [default: all]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan(model: str | None, **options: Any) -> None:
    """Predict memory, capacity and speed of MODEL before it is loaded.

    MODEL is a directory with a config.json, a name such as llama-3-8b (an unknown one lists them
    all), a hub name, or nothing for the built-in quill. Only config.json is read, unless --verify
    is given.
    """
    if options["hardware"] == "list":
        _list_hardware()
        return
    from quire.analysis.plan import make_plan, plan_shape

    pictures, trace, as_json = (options.pop(name) for name in ("pictures", "trace", "as_json"))
    verify = options.pop("verify")
    shape = plan_shape(model)
    if verify:
        _require_verifiable(options["hardware"], model, shape)
    _require_pictures(pictures, options)
    asked, timer = _asked(shape, options, verify)
    made = make_plan(asked, timer)
    found = made.as_dict()
    parts: list[Callable[[], None]] = [lambda: _print(made)]
    if trace is not None:
        _add_trace(trace, made, timer, found, parts)
    if verify:
        _add_verified(model, made, timer, found, parts)
    for path in pictures:
        _draw(made, path)
    if as_json:
        click.echo(json.dumps(found))
        return
    for part in parts:
        part()


# -- what is asked ---------------------------------------------------------------------------------


def _asked(shape: "ModelShape", options: dict[str, Any], verify: bool) -> "tuple[Asked, Timer]":
    from quire.analysis.memory import Load, kv_layout
    from quire.analysis.plan import Asked, budget_of
    from quire.analysis.steps import deploy
    from quire.config import parse_bytes
    from quire.errors import ConfigError
    from quire.machine import this_machine

    formats = options["formats"] or FORMATS
    page_size = _page_size(options["page_size"])
    memory = None if options["memory"] is None else parse_bytes(options["memory"])
    longest = shape.max_position
    most = VERIFY_CONTEXT if verify else DEFAULT_CONTEXT
    context = options["context"] or min(most, longest)
    threads = options["threads"] or this_machine().threads
    requests = options["requests"] or (VERIFY_REQUESTS if verify else 1)
    load = Load(context, requests, options["chunk"], threads=threads)
    layout = kv_layout(shape, formats[0], page_size)
    deploy(shape, weights=options["weights"])  # refuses what it does not know before it measures
    if context > longest:
        raise ConfigError(
            f"a context of {context:,} tokens is past the {longest:,} of {shape.name}; plan for at "
            "most that"
        )
    hardware, timer = _hardware(options["hardware"], shape, layout, threads)
    asked = Asked(
        shape=shape,
        load=load,
        hardware=hardware,
        budget=budget_of(hardware.memory_bytes) if memory is None else memory,
        formats=tuple(formats),
        page_size=page_size,
        weights=options["weights"],
        evict=options["evict"],
        tensor=options["tensor"],
        pipeline=options["pipeline"],
    )
    return asked, timer


def _page_size(text: str) -> int | str:
    if text in ("auto", "whole"):
        return text
    if not text.isdecimal():
        raise click.BadParameter(
            f"{text!r} is neither a number of tokens nor 'whole'", param_hint="--page-size"
        )
    return int(text)


def _hardware(
    name: str, shape: "ModelShape", layout: Any, threads: int
) -> "tuple[Hardware, Timer]":
    """Hardware, and a timer: its roof, or what was measured here."""
    from quire.analysis.hardware import known_hardware
    from quire.analysis.roofline import Roof

    if name != THIS:
        known = known_hardware(name)
        return known, Roof(known)
    from quire.analysis.calibrate import Measured, calibrate, measured_hardware
    from quire.analysis.memory import weight_bytes
    from quire.backends import create_backend

    backend = create_backend("native", threads)
    profile = calibrate(shape, layout, backend)
    timer = Measured(profile, sum(weight_bytes(shape).values()))
    return measured_hardware(profile, backend), timer


def _list_hardware() -> None:
    from quire.analysis.hardware import DEVICES

    table = _table("name", "memory", "bandwidth", "bf16", "source")
    for device in DEVICES.values():
        each = device.hardware
        sizes = "/".join(map(str, device.sizes)) or "any"
        table.add_row(
            each.name,
            f"{sizes} GB",
            f"{each.bandwidth / 1e9:,.0f} GB/s",
            f"{each.rate('bf16') / 1e12:,.1f} TFLOP/s",
            each.source,
        )
    _console().print(table)


def _require_verifiable(hardware: str, model: str | None, shape: "ModelShape") -> None:
    from quire.architectures import model_config, read_json
    from quire.errors import ConfigError

    if hardware != THIS:
        raise click.UsageError(
            f"--verify runs the model on this machine, and the plan is for {hardware}; leave "
            "--hardware out"
        )
    path = Path(shape.source)
    if not path.is_file():
        raise ConfigError(
            f"--verify loads the model, and {model} is only known from the {shape.source}; give "
            "a directory with its weights"
        )
    model_config(read_json(path), str(path))  # refuses what Quire does not run


def _require_pictures(pictures: tuple[Path, ...], options: dict[str, Any]) -> None:
    if pictures:
        if options["tensor"] * options["pipeline"] > 1:
            raise click.UsageError("--plot draws one device; leave the parallel options out")
        from quire.analysis.plan_picture import require_drawable

        for path in pictures:
            require_drawable(path)


def _draw(made: "Plan", path: Path) -> None:
    from quire.analysis.plan_picture import draw_plan

    draw_plan(made, path)


# -- a trace ---------------------------------------------------------------------------------------


def _add_trace(
    path: Path, made: "Plan", timer: "Timer", found: dict[str, Any], parts: list[Callable[[], None]]
) -> None:
    from quire.analysis.hit_rates import hit_rates
    from quire.analysis.memory import fragmentation
    from quire.analysis.plan import timing_of, waste
    from quire.analysis.replay import replay
    from quire.analysis.trace import read_trace
    from quire.engine.scheduler import Limits

    asked, layout = made.asked, made.deployment.layout
    trace = read_trace(path)
    room = asked.budget - made.memory.weight_bytes - made.memory.workspace.total
    timing = timing_of(made, timer)
    limits = Limits(asked.load.chunk, max(64, asked.load.sequences))
    longest = asked.shape.max_position
    done = replay(trace, layout, max(1, room), timing, limits=limits, longest=longest)
    rates = hit_rates(trace, layout, None, timing, limits=limits, longest=longest)
    lengths = [min(longest, each.input_length + each.output_length) for each in trace]
    found_empty = fragmentation(lengths, longest, layout.page_size)
    empty = waste(found_empty, longest, layout.page_size)
    found["trace"] = {
        **done.as_dict(),
        "hit_rates": rates.as_dict(),
        "waste": {
            "contiguous": found_empty.contiguous_waste,
            "paged": found_empty.paged_waste,
        },
    }
    parts.append(lambda: _print_trace(path, done, rates, empty))


def _print_trace(path: Path, done: Any, rates: Any, empty: str) -> None:
    from quire.config import format_bytes

    console = _console()
    console.print(f"\nTrace {path.name} on a pool of {format_bytes(done.pool_bytes)}")
    console.print(
        f"  {done.requests:,} requests served, {done.refused:,} refused; {done.hit_rate:.1%} of "
        f"{done.prompt_tokens:,} prompt tokens were cached; {done.preemptions:,} preemptions, "
        f"{done.evicted_pages:,} pages given up"
    )
    for reason in done.refusals[:2]:
        console.print(f"  refused: {reason}")
    console.print(
        f"  memory held: at most {format_bytes(done.peak_bytes)}, {done.utilisation:.0%} of the "
        f"pool in the mean; {done.mean_waste:.1%} of it empty"
    )
    console.print(f"  empty if each were alone: {empty}")
    console.print(
        f"  {done.tokens_per_s:,.1f} tokens/s over {done.seconds:,.1f} s, busy {done.busy:.0%}"
    )
    table = _table("seconds", "half within", "90 %", "99 %")
    for name, times in (
        ("until it began", done.waiting_s),
        ("until the first token", done.first_token_s),
        ("until it was done", done.completion_s),
    ):
        if times is not None:
            table.add_row(name, *(f"{each:,.2f}" for each in (times.p50, times.p90, times.p99)))
    console.print(table)
    table = _table("hit rate by size", "hit rate", "given up", "preemptions", "refused")
    for rate in rates.rates:
        table.add_row(
            format_bytes(rate.pool_bytes),
            f"{rate.hit_rate:.1%}",
            f"{rate.evicted_pages:,}",
            f"{rate.preemptions:,}",
            f"{rate.refused:,}",
        )
    table.add_row("a cache that forgets nothing", f"{rates.bound:.1%}", "", "", "")
    console.print(table)


# -- against what happens --------------------------------------------------------------------------


def _add_verified(
    model: str | None,
    made: "Plan",
    timer: "Timer",
    found: dict[str, Any],
    parts: list[Callable[[], None]],
) -> None:
    from quire.analysis.verify import verify

    rows = verify(made, model, timer)
    found["verify"] = [row.as_dict() for row in rows]
    parts.append(lambda: _print_verified(rows))


def _print_verified(rows: Any) -> None:
    console = _console()
    console.print("\nPredicted against measured")
    table = _table("term", "predicted", "measured", "difference")
    for row in rows:
        table.add_row(row.name, row.show(row.predicted), row.show(row.measured), row.difference)
    console.print(table)


# -- what is printed -------------------------------------------------------------------------------


def _console() -> Any:
    import sys

    from rich.console import Console

    if sys.stdout.isatty():
        return Console(highlight=False, markup=False)
    return Console(highlight=False, markup=False, soft_wrap=True, width=WIDTH)


def _table(*headings: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column(headings[0], no_wrap=True)
    for heading in headings[1:]:
        left = heading in ("source", "gives up", "limited by", "")
        table.add_column(heading, justify="left" if left else "right", no_wrap=not left)
    return table


def _print(made: "Plan") -> None:
    _print_model(made)
    _print_memory(made)
    _print_formats(made)
    _print_speed(made)
    _print_strategies(made)


def _print_model(made: "Plan") -> None:
    shape, load = made.asked.shape, made.asked.load
    console, size = _console(), shape.total_numbers
    active = "" if shape.active_numbers == size else f", {_count(shape.active_numbers)} a token"
    console.print(
        f"{shape.name}: {_count(size)} parameters{active}, {len(shape.layers)} layers, context "
        f"{shape.max_position:,}, {shape.dtype} ({shape.source})"
    )
    for note in shape.notes:
        console.print(f"  {note}")
    requests = "1 request" if load.sequences == 1 else f"{load.sequences} requests"
    console.print(
        f"{requests} of {load.context:,} tokens, at most {load.chunk:,} tokens a step; pages of "
        f"{made.deployment.layout.page_size} tokens, {made.rows[0].kv_format}"
    )


def _print_memory(made: "Plan") -> None:
    from quire.config import format_bytes

    memory, asked, console = made.memory, made.asked, _console()
    console.print("\nMemory")
    table = _table("part", "bytes", "")
    for part, taken in memory.weights.items():
        if taken:
            table.add_row(f"weights: {part}", format_bytes(taken), "")
    table.add_row("keys and values", format_bytes(memory.kv), _kv_note(made))
    space = memory.workspace
    table.add_row("workspace", format_bytes(space.total - space.logits), "")
    table.add_row("logits", format_bytes(space.logits), "")
    table.add_row("total", format_bytes(memory.total), _verdict(made))
    console.print(table)
    console.print(f"budget: {format_bytes(asked.budget)}, {asked.hardware.name}")
    if made.split is not None:
        _print_split(made, console)


def _verdict(made: "Plan") -> str:
    from quire.config import format_bytes

    asked, taken = made.asked, made.device_bytes
    many = "" if made.split is None else f"{asked.tensor * asked.pipeline} devices: each "
    if made.fits:
        return f"{many}fits, with {format_bytes(asked.budget - taken)} to spare"
    return f"{many}does not fit: {format_bytes(taken - asked.budget)} too much"


def _kv_note(made: "Plan") -> str:
    from quire.analysis.memory import kv_fixed_bytes
    from quire.config import format_bytes

    fixed = kv_fixed_bytes(made.deployment.layout)
    each = f"{format_bytes(made.rows[0].kv_bytes_per_token)} a token"
    if not fixed:
        return each
    return f"{each} at first; windows hold at most {format_bytes(fixed)} a request"


def _print_split(made: "Plan", console: Any) -> None:
    from quire.analysis.memory import kv_token_bytes
    from quire.config import format_bytes

    asked, parted, together = made.asked, made.split, made.split_decode
    assert parted is not None
    assert together is not None
    console.print(f"\nEach device of {asked.tensor} x {asked.pipeline}, {asked.hardware.name}")
    table = _table("stage", "layers", "weights", "keys and values")
    every = float(kv_token_bytes(made.deployment.layout))
    for number, stage in enumerate(parted.stages):
        table.add_row(
            str(number),
            str(len(stage.share.shape.layers)),
            format_bytes(stage.weight_bytes),
            format_bytes(made.memory.kv * stage.kv_token_bytes / every),
        )
    console.print(table)
    for note in parted.notes:
        console.print(f"  {note}")
    console.print(
        f"a decode step takes {together.seconds * 1e3:,.3g} ms, of which sending "
        f"{format_bytes(sum(together.sent.values()))} takes {together.link_seconds * 1e3:,.3g} ms"
    )


def _print_formats(made: "Plan") -> None:
    from quire.config import format_bytes

    console, load = _console(), made.asked.load
    console.print("\nKeys and values by page format")
    table = _table(
        "format",
        "a token",
        f"{load.context:,} tokens",
        f"requests of {load.context:,}",
        f"longest of {load.sequences}",
    )
    for row in made.rows:
        table.add_row(
            row.kv_format,
            format_bytes(row.kv_bytes_per_token),
            format_bytes(row.kv_bytes),
            f"{row.max_requests:,}",
            f"{row.max_context:,}",
        )
    console.print(table)
    shown = [each for each in made.growth if each[0] >= 1024] or list(made.growth)
    table = _table("growth", *(f"{tokens:,}" for tokens, _ in shown[-8:]))
    table.add_row(made.rows[0].kv_format, *(format_bytes(taken) for _, taken in shown[-8:]))
    console.print(table)


def _print_speed(made: "Plan") -> None:
    from quire.config import format_bytes

    speed, asked, console = made.speed, made.asked, _console()
    hardware = asked.hardware
    bound = "as measured here" if hardware.source.startswith("measured") else "at best"
    console.print(f"\nSpeed {bound}: {hardware.name}, {hardware.source}")
    table = _table("step", "time", "tokens/s", "FLOP/byte", "limited by")
    rows = [(f"prefill of {asked.load.context:,}", asked.load.context, speed.prefill)]
    rows += [(f"decode of {n}", n, step) for n, step in speed.decode.items()]
    for name, tokens, step in rows:
        limit = f"{step.limit} ({step.shares[step.limit]:.0%})"
        table.add_row(
            name,
            _duration(step.seconds),
            f"{tokens / step.seconds:,.1f}",
            f"{step.intensity:,.1f}",
            limit,
        )
    console.print(table)
    console.print(
        f"memory reads {hardware.bandwidth / 1e9:,.0f} GB/s, so all keys and values "
        f"({format_bytes(made.memory.kv)}) once in {_duration(speed.read_cache_s)}"
    )
    if speed.compute_bound is None:
        console.print("decoding is limited by memory at any batch")
    else:
        console.print(
            f"linear layers are limited by computing from {speed.compute_bound:,} requests on; "
            "attention never is, since each brings keys and values of its own"
        )


def _print_strategies(made: "Plan") -> None:
    from quire.analysis.plan import waste
    from quire.config import format_bytes

    console, load = _console(), made.asked.load
    requests = "1 request" if load.sequences == 1 else f"{load.sequences} requests"
    console.print(f"\nWays to keep {requests} of {load.context:,} tokens")
    table = _table("strategy", "format", "bytes", "saves", "gives up")
    for each in made.strategies:
        saves = f"{each.saving:.0%}" if each.saving else ""
        table.add_row(each.name, each.kv_format, format_bytes(each.kv_bytes), saves, each.gives)
    console.print(table)
    size, longest = made.deployment.layout.page_size, made.asked.shape.max_position
    console.print(
        f"empty, if requests are of 1 to {load.context:,} tokens, each as likely: "
        f"{waste(made.fragmentation, longest, size)}"
    )
    console.print("`quire measure` says what bits and tokens cost on your own text")
    console.print("scores of a prefill, one layer: " + ", ".join(map(str, made.peaks)))


def _duration(seconds: float) -> str:
    for unit, length in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= length:
            return f"{seconds / length:.4g} {unit}"
    return f"{seconds / 1e-6:.4g} us"


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:,}"
