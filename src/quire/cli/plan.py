"""``quire plan``: what a model takes, what fits and how fast it goes, before anything is loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quire.cli.plan_tables import (
    console_of,
    print_plan,
    print_trace,
    print_verified,
    table_of,
)

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
    parts: list[Callable[[], None]] = [lambda: print_plan(made)]
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
    from dataclasses import replace

    from quire.analysis.load import Card, Load
    from quire.analysis.memory import kv_layout
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
    if hardware.kind == "gpu":
        load = replace(load, card=Card())
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
    from quire.analysis.calibrate import measure_machine

    return measure_machine(shape, layout, threads)


def _list_hardware() -> None:
    from quire.analysis.hardware import DEVICES

    table = table_of("name", "memory", "bandwidth", "bf16", "source")
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
    console_of().print(table)


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
    parts.append(lambda: print_trace(path, done, rates, empty))


# -- against what happens --------------------------------------------------------------------------


def _add_verified(
    model: str | None,
    made: "Plan",
    timer: "Timer",
    found: dict[str, Any],
    parts: list[Callable[[], None]],
) -> None:
    from quire.analysis.calibrate import measure_machine
    from quire.analysis.verify import verify

    asked, layout = made.asked, made.deployment.layout
    rows = verify(
        made, model, timer, lambda: measure_machine(asked.shape, layout, asked.load.threads)[1]
    )
    found["verify"] = [row.as_dict() for row in rows]
    parts.append(lambda: print_verified(rows))
