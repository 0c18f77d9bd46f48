"""Options that several commands share, and the engine they describe."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from quire.cli.progress import loading_progress
from quire.evict_choice import NO_EVICTION

if TYPE_CHECKING:
    from quire.engine import Engine, SamplingParams

__all__ = [
    "backend_options",
    "engine_options",
    "make_engine",
    "make_model",
    "sampling_options",
    "sampling_params",
]

_F = TypeVar("_F", bound=Callable[..., Any])

_BACKEND = (
    click.option(
        "-m",
        "--model",
        metavar="DIR",
        help="Hugging Face model directory, or a hub name such as org/model. "
        "[default: quill, the small model that ships with Quire]",
    ),
    click.option(
        "--backend",
        default="auto",
        show_default=True,
        help="What computes; `quire doctor` lists them.",
    ),
    click.option(
        "--threads",
        type=int,
        metavar="N",
        help="Threads of the native backend.  [default: what affinity and quota allow]",
    ),
)

_ENGINE = (
    *_BACKEND,
    click.option(
        "--kv-format",
        default="auto",
        show_default=True,
        metavar="FORMAT",
        help="How keys and values are stored: fp32, bf16, fp16, or smaller at a loss: int8, fp8, "
        "int4, int2; apart: k=int8,v=fp8; by layer: int4+int8@first,last; with keys turned "
        "first, so that they lose less: int4:rotated; auto is the checkpoint's dtype.",
    ),
    click.option(
        "--page-size",
        default="auto",
        show_default=True,
        metavar="N",
        help="Tokens a page; 'whole' makes one page as long as the context; auto is 16.",
    ),
    click.option("--num-pages", type=int, metavar="N", help="Pages of every layer group."),
    click.option(
        "--kv-memory",
        metavar="BYTES",
        help="Memory for all pages, such as 512MiB.  [default: 2GiB, or what is left if less; on a "
        "GPU, what is left]",
    ),
    click.option(
        "--prefix-cache/--no-prefix-cache",
        default=True,
        show_default=True,
        help="Keep what was computed while there is room, and share equal prefixes.",
    ),
    click.option(
        "--host-cache",
        metavar="BYTES",
        help="Host memory for pages that the pool gives up, such as 4GiB.  [default: none]",
    ),
    click.option(
        "--cache-dir",
        metavar="DIR",
        help="Keep pages in DIR, so that later processes need not compute them.  [default: none]",
    ),
    click.option(
        "--disk-cache",
        metavar="BYTES",
        help="Most bytes of the files in --cache-dir.  [default: 20GiB]",
    ),
    click.option(
        "--max-batch-tokens",
        type=int,
        default=512,
        show_default=True,
        metavar="N",
        help="Tokens a step; longer prompts are computed in chunks.",
    ),
)

_SAMPLING = (
    click.option("-n", "--max-new-tokens", type=int, default=128, show_default=True, metavar="N"),
    click.option(
        "-t",
        "--temperature",
        type=float,
        default=0.0,
        show_default=True,
        metavar="T",
        help="0 always takes the likeliest token.",
    ),
    click.option("--top-k", type=int, default=0, metavar="K", help="Keep the K likeliest tokens."),
    click.option(
        "--top-p", type=float, default=1.0, metavar="P", help="Keep the likeliest share P."
    ),
    click.option(
        "--min-p", type=float, default=0.0, metavar="P", help="Keep tokens P as likely as the best."
    ),
    click.option("--repetition-penalty", type=float, default=1.0, metavar="X"),
    click.option("--presence-penalty", type=float, default=0.0, metavar="X"),
    click.option("--frequency-penalty", type=float, default=0.0, metavar="X"),
    click.option(
        "--beam-width",
        type=int,
        default=1,
        metavar="K",
        help="Follow K continuations and take the best.",
    ),
    click.option(
        "--length-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="Of beams: above 0 favours long ones.",
    ),
    click.option(
        "--seed", type=int, metavar="S", help="Same seed, same text, whatever runs beside it."
    ),
    click.option("--stop", multiple=True, metavar="TEXT", help="End before TEXT; may be repeated."),
    click.option(
        "--evict",
        metavar="SPEC",
        default=NO_EVICTION,
        show_default=True,
        help="Drop what is above a budget of tokens, at a loss: window:budget=512,sink=4, "
        "knorm:budget=512, snapkv:budget=25% or h2o:budget=512; or keep all and read a budget of "
        "them: quest:budget=1024 or lsh:budget=1024.",
    ),
)


_TIERS = ("prefix_cache", "host_cache", "cache_dir", "disk_cache")


def _with(options: tuple[Callable[[Any], Any], ...]) -> Callable[[_F], _F]:
    return lambda command: functools.reduce(lambda f, option: option(f), options[::-1], command)


backend_options = _with(_BACKEND)
engine_options = _with(_ENGINE)
sampling_options = _with(_SAMPLING)


def make_engine(options: dict[str, Any]) -> "Engine":
    """The engine that ``engine_options`` describe; takes its options out of ``options``.

    And ``evict`` of ``sampling_options``: as the engine's own policy it is in the plan.
    Shows progress while loading, and says on standard error which model is used when none was
    named and which config keys were not understood.
    """
    from quire.config import CacheConfig

    model = options.pop("model")
    cache = CacheConfig(
        page_size=_page_size(options.pop("page_size")),
        kv_format=options.pop("kv_format"),
        evict=options.pop("evict", NO_EVICTION),
        **{name: options.pop(name) for name in _TIERS},
        **_pool_size(options.pop("num_pages"), options.pop("kv_memory")),
    )
    backend, threads = options.pop("backend"), options.pop("threads")
    most = options.pop("max_batch_tokens")
    engine = _load(model, backend=backend, threads=threads, cache=cache, max_batch_tokens=most)
    _warn_of_tiers(engine)
    click.get_current_context().call_on_close(functools.partial(_close, engine))
    return engine


def make_model(page_size: int, options: dict[str, Any]) -> "Engine":
    """The engine that ``backend_options`` describe, with a cache of one page: to make twins of.

    Takes its options out of ``options``, with ``max_batch_tokens``, and says what
    :func:`make_engine` says.
    """
    from quire.analysis.candidates import base_config

    backend, threads = options.pop("backend"), options.pop("threads")
    most = options.pop("max_batch_tokens")
    base = base_config(backend=backend, threads=threads, page_size=page_size)
    return _load(
        options.pop("model"),
        backend=backend,
        threads=threads,
        cache=base.cache,
        max_batch_tokens=most,
    )


def _load(model: str | None, **settings: Any) -> "Engine":
    from quire.engine import Engine

    if model is None:
        click.echo("quire: no --model given, using the built-in model quill", err=True)
    with loading_progress() as progress:
        engine = Engine(model, progress=progress, **settings)
    if sys.stderr.isatty():
        click.echo(f"quire: plan: {engine.plan}", err=True)
    ignored = engine.model_config.ignored_keys
    if ignored:
        click.echo(
            f"quire: warning: {Path(engine.directory) / 'config.json'} has keys that Quire does "
            f"not know and did not use: {', '.join(ignored)}",
            err=True,
        )
    return engine


def _close(engine: "Engine") -> None:
    """Let everything get to disk that is to be there, and say if it could not."""
    engine.flush()
    _warn_of_tiers(engine)
    engine.close()


def _warn_of_tiers(engine: "Engine") -> None:
    for tier in engine.status().tiers:
        if tier.off is not None:
            click.echo(f"quire: warning: the {tier.name} cache is off: {tier.off}", err=True)
        elif tier.no_writes is not None:
            click.echo(
                f"quire: warning: the {tier.name} cache stores nothing more: {tier.no_writes}",
                err=True,
            )


def sampling_params(options: dict[str, Any], **fixed: Any) -> "SamplingParams":
    """The parameters that ``sampling_options`` describe, but ``evict``; takes them out."""
    from quire.engine import SamplingParams

    names = (
        *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop"),
        *("repetition_penalty", "presence_penalty", "frequency_penalty"),
        *("beam_width", "length_penalty"),
    )
    return SamplingParams(**{name: options.pop(name) for name in names}, **fixed)


def _page_size(text: str) -> Any:
    if text in ("whole", "auto"):
        return text
    try:
        return int(text)
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is neither a number of tokens nor 'whole'", param_hint="--page-size"
        ) from None


def _pool_size(num_pages: int | None, kv_memory: str | None) -> dict[str, Any]:
    if num_pages is not None and kv_memory is not None:
        raise click.UsageError("give --num-pages or --kv-memory, not both")
    if num_pages is not None:
        return {"num_pages": num_pages}
    return {} if kv_memory is None else {"kv_memory": kv_memory}
