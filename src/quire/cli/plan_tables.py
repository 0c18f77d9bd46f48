"""What ``quire plan`` prints for people."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quire.analysis.plan import Plan

__all__ = ["console_of", "print_plan", "print_trace", "print_verified", "table_of"]

WIDTH = 160  # of tables in a file or a pipe


def console_of() -> Any:
    """The console of standard output; wide where it is no terminal."""
    import sys

    from rich.console import Console

    if sys.stdout.isatty():
        return Console(highlight=False, markup=False)
    return Console(highlight=False, markup=False, soft_wrap=True, width=WIDTH)


def table_of(*headings: str) -> Any:
    """A table without lines: names to the left, figures to the right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column(headings[0], no_wrap=True)
    for heading in headings[1:]:
        left = heading in ("source", "gives up", "limited by", "")
        table.add_column(heading, justify="left" if left else "right", no_wrap=not left)
    return table


def print_plan(made: "Plan") -> None:
    """All of a plan."""
    _print_model(made)
    _print_memory(made)
    _print_formats(made)
    _print_speed(made)
    _print_strategies(made)


def _print_model(made: "Plan") -> None:
    shape, load = made.asked.shape, made.asked.load
    console, size = console_of(), shape.total_numbers
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

    memory, asked, console = made.memory, made.asked, console_of()
    console.print("\nMemory")
    table = table_of("part", "bytes", "")
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
    table = table_of("stage", "layers", "weights", "keys and values")
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

    console, load = console_of(), made.asked.load
    console.print("\nKeys and values by page format")
    table = table_of(
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
    table = table_of("growth", *(f"{tokens:,}" for tokens, _ in shown[-8:]))
    table.add_row(made.rows[0].kv_format, *(format_bytes(taken) for _, taken in shown[-8:]))
    console.print(table)


def _print_speed(made: "Plan") -> None:
    from quire.config import format_bytes

    speed, asked, console = made.speed, made.asked, console_of()
    hardware = asked.hardware
    bound = "as measured here" if hardware.source.startswith("measured") else "at best"
    console.print(f"\nSpeed {bound}: {hardware.name}, {hardware.source}")
    table = table_of("step", "time", "tokens/s", "FLOP/byte", "limited by")
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

    console, load = console_of(), made.asked.load
    requests = "1 request" if load.sequences == 1 else f"{load.sequences} requests"
    console.print(f"\nWays to keep {requests} of {load.context:,} tokens")
    table = table_of("strategy", "format", "bytes", "saves", "gives up")
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


def print_trace(path: Path, done: Any, rates: Any, empty: str) -> None:
    """What came of a replay, and hit rates by size."""
    from quire.config import format_bytes

    console = console_of()
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
    table = table_of("seconds", "half within", "90 %", "99 %")
    for name, times in (
        ("until it began", done.waiting_s),
        ("until the first token", done.first_token_s),
        ("until it was done", done.completion_s),
    ):
        if times is not None:
            table.add_row(name, *(f"{each:,.2f}" for each in (times.p50, times.p90, times.p99)))
    console.print(table)
    table = table_of("hit rate by size", "hit rate", "given up", "preemptions", "refused")
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


def print_verified(rows: Any) -> None:
    """Rows of :func:`quire.analysis.verify.verify`."""
    console = console_of()
    console.print("\nPredicted against measured")
    table = table_of("term", "predicted", "measured", "difference")
    for row in rows:
        table.add_row(row.name, row.show(row.predicted), row.show(row.measured), row.difference)
    console.print(table)
