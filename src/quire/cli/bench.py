"""``quire bench``: prefill latency, decode speed and memory of a model on this machine."""

import itertools
import json
import statistics
from typing import TYPE_CHECKING, Any

import click

from quire.cli.options import engine_options, make_engine

if TYPE_CHECKING:
    from quire.engine import Completion, Engine

__all__ = ["bench"]


def _lengths(ctx: click.Context, option: click.Parameter, text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        lengths = [int(word) for word in text.split(",")]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 1:
        raise click.BadParameter(f"{text!r} is not a list of positive ints such as 128,512")
    return lengths


@click.command()
@engine_options
@click.option(
    "--lengths",
    callback=_lengths,
    metavar="N,N,...",
    help="Prompt lengths and contexts in tokens.  [default: doubling from 128 to the context]",
)
@click.option("--decode-tokens", type=click.IntRange(2), default=32, show_default=True, metavar="N")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, metavar="N")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def bench(
    lengths: list[int] | None, decode_tokens: int, repeats: int, as_json: bool, **options: Any
) -> None:
    """Measure prefill, decode and memory.

    Prefill latency and peak memory at growing prompts, decode speed at growing contexts. One
    request at a time, random token ids, end of text ignored; medians of --repeats runs after one
    that is not counted, with the least and the greatest.

    On the native backend, also how near decoding comes to what memory allows: the bytes that a
    token must read (weights, keys and values), how many of them a second were read, and what share
    that is of reading a large buffer, measured in the same run. A model that fits in the
    processor's cache can exceed it.
    """
    engine = make_engine(options)
    context = engine.model_config.max_position - decode_tokens
    lengths = _default_lengths(context) if lengths is None else lengths
    if max(lengths) > context:
        raise click.BadParameter(
            f"{max(lengths)} tokens and {decode_tokens} new ones are more than the context of "
            f"{engine.model_config.max_position}",
            param_hint="--lengths",
        )
    _run(engine, min(lengths), 2)
    rows = [_measure(engine, length, decode_tokens, repeats) for length in lengths]
    setting = {**_setting(engine, repeats), "read_bytes_per_s": _read_bandwidth(engine)}
    _add_roofline(engine, rows, setting["read_bytes_per_s"], decode_tokens)
    if as_json:
        click.echo(json.dumps({**setting, "rows": rows}))
    else:
        _print(setting, rows)


_RUNS = itertools.count()


def _default_lengths(context: int) -> list[int]:
    doubling = [128 * 2**i for i in range(20) if 128 * 2**i <= context]
    return [*doubling, context] if not doubling or doubling[-1] < context else doubling


def _measure(engine: "Engine", length: int, decode_tokens: int, repeats: int) -> dict[str, Any]:
    from quire.machine import PeakMemory

    with PeakMemory() as memory:
        runs = [_run(engine, length, decode_tokens) for _ in range(repeats)]
    ttft = [run.ttft_s for run in runs if run.ttft_s is not None]
    decode = [run.decode_tokens_per_s for run in runs if run.decode_tokens_per_s is not None]
    return {
        "tokens": length,
        "ttft_s": statistics.median(ttft),
        "ttft_s_range": [min(ttft), max(ttft)],
        "prefill_tokens_per_s": length / statistics.median(ttft),
        "decode_tokens_per_s": statistics.median(decode),
        "decode_tokens_per_s_range": [min(decode), max(decode)],
        "kv_bytes_peak": runs[0].kv_bytes_peak,
        "memory_bytes_peak": memory.bytes,
    }


def _read_bandwidth(engine: "Engine") -> float | None:
    """Bytes a second that all threads together read from memory; None without the native backend.

    Median of five passes over 512 MiB, many times the last-level cache.
    """
    import time

    import numpy as np

    from quire.backends import read_memory

    buffer = np.ones(512 << 20, np.uint8)
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        if not read_memory(engine.backend, buffer):
            return None
        rates.append(buffer.nbytes / (time.perf_counter() - start))
    return statistics.median(rates)


def _add_roofline(
    engine: "Engine", rows: list[dict[str, Any]], limit: float | None, decode_tokens: int
) -> None:
    """What decoding read from memory, at the mean context of the decoded tokens."""
    for row in rows:
        context = row["tokens"] + (decode_tokens - 1) // 2
        row["decode_bytes_per_token"] = engine.decode_bytes(context)
        row["decode_bytes_per_s"] = row["decode_bytes_per_token"] * row["decode_tokens_per_s"]
        row["share_of_read_bandwidth"] = (
            None if limit is None else row["decode_bytes_per_s"] / limit
        )


def _run(engine: "Engine", length: int, new_tokens: int) -> "Completion":
    import numpy as np

    from quire.engine import SamplingParams

    ids = np.random.default_rng(length).integers(0, engine.model_config.vocab_size, length)
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    # A salt of its own, so that no run finds what another has computed.
    request = engine.submit(ids.tolist(), params, salt=f"run {next(_RUNS)}")
    while not request.finished:
        engine.step()
    return request.completions[0]


def _setting(engine: "Engine", repeats: int) -> dict[str, Any]:
    import numpy as np

    import quire
    from quire.machine import this_machine

    machine = this_machine()
    return {
        "quire": quire.__version__,
        "numpy": np.__version__,
        "cpu": machine.cpu_name,
        "threads": engine.config.threads or machine.threads,
        "model": engine.directory.name,
        "architecture": engine.model_config.architecture,
        "backend": engine.backend.name,
        "kv_format": engine.cache.layout.format_text,
        "page_size": engine.cache.layout.page_size,
        "max_batch_tokens": engine.config.max_batch_tokens,
        "repeats": repeats,
    }


def _spread(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_range"]
    return f"±{50 * (high - low) / row[name]:.0f}%"


def _print(setting: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from quire.config import format_bytes

    table = Table(
        title=f"{setting['model']} on {setting['backend']}, {setting['kv_format']} pages of "
        f"{setting['page_size']} tokens, {setting['cpu']}, {setting['threads']} threads",
        caption=f"median of {setting['repeats']}, ± half of greatest less least",
    )
    for name in ("tokens", "first token s", "prefill tok/s", "decode tok/s", "KV", "peak memory"):
        table.add_column(name, justify="right")
    for row in rows:
        memory = row["memory_bytes_peak"]
        table.add_row(
            str(row["tokens"]),
            f"{row['ttft_s']:.3f} {_spread(row, 'ttft_s')}",
            f"{row['prefill_tokens_per_s']:.0f}",
            f"{row['decode_tokens_per_s']:.1f} {_spread(row, 'decode_tokens_per_s')}",
            format_bytes(row["kv_bytes_peak"]),
            "unknown" if memory is None else format_bytes(memory),
        )
    Console().print(table)
    limit = setting["read_bytes_per_s"]
    for row in rows:
        share = row["share_of_read_bandwidth"]
        of_limit = "" if share is None else f", {share:.0%} of the {limit / 1e9:.1f} memory gives"
        click.echo(
            f"decode at {row['tokens']}: {format_bytes(row['decode_bytes_per_token'])} read a "
            f"token, {row['decode_bytes_per_s'] / 1e9:.1f} GB/s{of_limit}"
        )
