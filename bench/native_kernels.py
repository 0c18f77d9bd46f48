"""Native kernels against this machine's own limits and against PyTorch, in one run.

    python bench/native_kernels.py [--seconds 0.5] [--json FILE] [--loaded]

Prints, for each case, the median and the spread of several rounds in which the contestants and the
machine's limit take turns: bytes moved or operations done per second, and the share of the limit:
reading memory (256 MiB, many times the last cache), or multiply-adds in registers. Virtual machines
share their bus with others, so a limit holds for its own case only.
PyTorch is optional (any CPU build); it gets the same number of threads.

--kv-format FORMAT (repeated) measures attention over pages of such a format instead, in turns with
the same over bf16 pages: decode of 8 sequences after 1k, 4k and 16k tokens, and prefill.

--loaded measures a few cases again while another process keeps one core busy: what share of the
quiet rate is left, for Quire and for PyTorch.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from quire.backends.native import NativeBackend
from quire.batch import GroupBatch, OpenPages, PagedBatch
from quire.format_choice import parse_formats
from quire.machine import this_machine
from quire.pages import PageShape

try:
    import torch
except ImportError:
    torch = None  # type: ignore[assignment]

Call = Callable[[], Any]


@dataclass
class Row:
    """One case: ``rate`` in units a second, ``spread`` half of greatest less least, relative."""

    case: str
    unit: str
    rate: float
    spread: float
    share_of_limit: float
    times_torch: float | None


class Bench:
    """Rounds of contestants in turn, on one backend."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.native = NativeBackend()
        self.rows: list[Row] = []
        self._buffer = np.ones(1 << 28, np.uint8)
        if torch is not None:
            torch.set_num_threads(self.native.threads)

    def read_limit(self) -> float:
        """Bytes a second from memory, now."""
        return self._buffer.nbytes / _time(lambda: self.native.probe_read(self._buffer))

    def multiply_limit(self) -> float:
        """Operations a second of bf16 multiply-adds in registers, now."""
        done: list[float] = []
        seconds = _time(lambda: done.append(self.native.probe_multiply(1 << 20)))
        return done[0] / seconds

    def run(self, case: str, work: float, unit: str, ours: Call, theirs: Call | None) -> None:
        """``work``: bytes (GB/s) or operations (GFLOP/s) of one call."""
        mine, other, limits = [], [], []
        ours(), theirs() if theirs else None
        repeats = max(1, int(self.seconds / 7 / max(_time(ours), 1e-6)))
        for _ in range(7):
            time.sleep(0.05)  # OpenMP's threads still spin after the other's turn
            mine.append(_time(ours, repeats))
            limits.append(self.read_limit() if unit == "GB/s" else self.multiply_limit())
            if theirs is not None:
                other.append(_time(theirs, repeats if repeats < 20 else repeats // 4))
        seconds, limit = statistics.median(mine), statistics.median(limits) / 1e9
        times = statistics.median(other) / seconds if other else None
        spread = (max(mine) - min(mine)) / 2 / seconds
        rate = work / seconds / 1e9
        row = Row(case, unit, rate, spread, rate / limit, times)
        self.rows.append(row)
        beside = "" if times is None else f"  {times:5.2f} x torch"
        print(
            f"{case:40} {rate:7.1f} {unit:8} ±{spread:4.0%}  "
            f"{rate / limit:5.0%} of {limit:5.1f}{beside}",
            flush=True,
        )


def _time(call: Call, repeats: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def linear(bench: Bench, rows: int, out: int, inner: int) -> None:
    """bf16 weights; distinct matrices in turn, so that none is still in a cache."""
    copies = max(1, (256 << 20) // (out * inner * 2)) if rows < 64 else 2
    rng = np.random.default_rng(0)
    stored = [
        rng.standard_normal((out, inner), np.float32).astype(ml_dtypes.bfloat16)
        for _ in range(copies)
    ]
    weights = [bench.native.weight(matrix) for matrix in stored]
    x = rng.standard_normal((rows, inner), np.float32)
    turn, theirs = iter(range(10**9)), None
    if torch is not None:
        tensors = [
            torch.from_numpy(matrix.view(np.int16)).view(torch.bfloat16) for matrix in stored
        ]
        tx = torch.from_numpy(x).bfloat16()
        theirs = lambda: torch.nn.functional.linear(tx, tensors[next(turn) % copies])  # noqa: E731
    few = rows <= 8
    bench.run(
        f"linear {rows} x {inner} -> {out}, bf16",
        out * inner * 2 if few else 2.0 * rows * out * inner,
        "GB/s" if few else "GFLOP/s",
        lambda: bench.native.linear(x, weights[next(turn) % copies]),
        theirs,
    )


@dataclass(frozen=True)
class Heads:
    """Query heads, KV heads and their size."""

    query: int = 32
    kv: int = 8
    dim: int = 64


@dataclass(frozen=True)
class Attending:
    """One case: scattered pages of 16 tokens, or 32 that are packed; ``new`` queries a sequence.

    Of packed pages each sequence has the first and those of its queries open, as a cache would.
    """

    sequences: int
    context: int
    new: int
    heads: Heads

    def __str__(self) -> str:
        kind, heads = "decode" if self.new == 1 else "prefill", self.heads
        shape = f"{heads.query}/{heads.kv} heads D {heads.dim}"
        return f"{kind} {self.sequences} x {self.context}, {shape}"

    def call(self, native: NativeBackend, kv_format: str) -> tuple[Call, float]:
        """What to time, and how many bytes of pages it reads."""
        heads = self.heads
        formats = parse_formats(kv_format).of_layers(1, "bf16")[0]
        size = 32 if "page" in (formats[0].kind, formats[1].kind) else 16
        shape = PageShape(size, heads.kv, heads.dim, heads.dim, *formats)
        group, packed, opened = self.tables(shape)
        pool = native.pool(shape, packed, opened)
        rng = np.random.default_rng(0)
        some = rng.standard_normal((1024, heads.kv, heads.dim)).astype(np.float32)
        start, end = (packed if opened else 0) * size, (packed + opened) * size
        for first in range(start, end, len(some)):
            slots = np.arange(first, min(first + len(some), end))
            native.append(pool, slots, some[: len(slots)], some[: len(slots)])
        if opened:
            pool.seal(packed + np.arange(packed) % opened, np.arange(packed))
        each = np.arange(self.sequences + 1, dtype=np.int64)
        positions = np.tile(np.arange(self.context - self.new, self.context), self.sequences)
        batch = PagedBatch(positions, each * self.new, (group,), (0,))
        query = rng.standard_normal((len(positions), heads.query, heads.dim), np.float32)
        held = packed * shape.bytes_per_page + opened * shape.open_shape.bytes_per_page
        return lambda: native.attend(query, pool, batch, 0), held

    def tables(self, shape: PageShape) -> tuple[GroupBatch, int, int]:
        """The pages of all sequences, how many are packed (all in other formats), how many open."""
        size, count = shape.page_size, self.sequences
        pages = self.context // size
        ids = np.random.default_rng(0).permutation(count * pages).astype(np.int64)
        each = np.arange(count + 1, dtype=np.int64)
        group = GroupBatch(
            size,
            None,
            np.empty(0, np.int64),
            each * pages,
            ids,
            np.full(count, size, np.int64),
            np.zeros(count, np.int64),
        )
        if not shape.by_page:
            return group, count * pages, 0
        own = -(-self.new // size)  # the pages that queries stand in
        packed, first = count * (pages - 1), np.full(count, pages - own)
        ids = np.random.default_rng(0).permutation(packed).reshape(count, pages - 1)
        sinks = packed + np.arange(count)[:, None]
        stood = packed + count + np.arange(count * own)
        nothing = np.empty(0, np.int64)
        return (
            replace(
                group,
                indices=np.concatenate([sinks, ids], axis=1).reshape(-1),
                open=OpenPages(each * own, stood, first, nothing, nothing),
            ),
            packed,
            count * (1 + own),
        )


def attention(bench: Bench, sequences: int, context: int, new: int, dim: int) -> None:
    """32 query and 8 KV heads, bf16 pages."""
    case = Attending(sequences, context, new, Heads(dim=dim))
    call, moved = case.call(bench.native, "bf16")
    theirs = None
    if torch is not None:
        tq = torch.randn(sequences, 32, new, dim, dtype=torch.bfloat16)
        tk, tv = (torch.randn(sequences, 8, context, dim, dtype=torch.bfloat16) for _ in range(2))
        attend = torch.nn.functional.scaled_dot_product_attention
        theirs = lambda: attend(tq, tk, tv, is_causal=new > 1, enable_gqa=True)  # noqa: E731
    seen = sequences * (new * (context - new) + new * (new + 1) / 2)
    decode = new == 1
    bench.run(
        f"{'decode' if decode else 'prefill'} attention {sequences} x {context}, D {dim}",
        moved if decode else 4.0 * seen * 32 * dim,
        "GB/s" if decode else "GFLOP/s",
        call,
        theirs,
    )


def formats(bench: Bench, names: list[str]) -> None:
    """Each format's speed relative to bf16, by the medians of rounds in which all take turns."""
    for heads in (Heads(), Heads(dim=128), Heads(12, 4, 64)):
        cases = [Attending(8, context, 1, heads) for context in (1024, 4096, 16384)]
        for case in (*cases, Attending(1, 2048, 2048, heads)):
            calls = [case.call(bench.native, name) for name in ("bf16", *names)]
            times: list[list[float]] = [[] for _ in calls]
            limits = []
            for _ in range(9):
                for taken, (call, _moved) in zip(times, calls, strict=True):
                    bench.read_limit()  # nothing is left in a cache
                    taken.append(_time(call))
                limits.append(bench.read_limit())
            limit = statistics.median(limits)
            for name, taken, (_, moved) in zip(("bf16", *names), times, calls, strict=True):
                seconds = statistics.median(taken)
                times_bf16 = statistics.median(b / t for b, t in zip(times[0], taken, strict=True))
                spread, rate = (max(taken) - min(taken)) / 2 / seconds, moved / seconds
                share = rate / limit if case.new == 1 else 0.0
                row = Row(f"{case}, {name}", "x bf16", times_bf16, spread, share, None)
                bench.rows.append(row)
                read = f"{rate / 1e9:5.1f} GB/s, {share:4.0%} of {limit / 1e9:5.1f}"
                print(
                    f"{row.case:46} {times_bf16:5.2f} x bf16 ±{spread:4.0%}  "
                    f"{read if share else ''}",
                    flush=True,
                )


def _burn(cpu: int) -> None:
    os.sched_setaffinity(0, {cpu})
    while True:
        pass


def loaded(bench: Bench) -> None:
    """One core kept busy by another process: rates beside it, relative to those without."""
    cases: list[Callable[[], None]] = [
        lambda: linear(bench, 1, 8192, 2048),
        lambda: linear(bench, 512, 8192, 2048),
        lambda: attention(bench, 8, 1024, 1, 64),
    ]
    print("\nbeside a process that keeps one core busy")
    before = len(bench.rows)
    for case in cases:
        case()
    busy = multiprocessing.Process(target=_burn, args=(max(os.sched_getaffinity(0)),), daemon=True)
    busy.start()
    try:
        for case in cases:
            case()
    finally:
        busy.kill()
    rows = bench.rows[before:]
    for quiet, beside in zip(rows[: len(cases)], rows[len(cases) :], strict=True):
        left = beside.rate / quiet.rate
        torch_left = ""
        if quiet.times_torch and beside.times_torch:
            torch_left = f", torch {left * quiet.times_torch / beside.times_torch:.0%}"
        print(f"{quiet.case:40} keeps {left:.0%} of its rate{torch_left}")


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each case")
    parser.add_argument("--json", help="write the rows to a file too")
    parser.add_argument(
        "--kv-format", action="append", metavar="FORMAT", help="attention over pages of it instead"
    )
    parser.add_argument("--loaded", action="store_true", help="only beside a busy process")
    options = parser.parse_args()
    bench, machine = Bench(options.seconds), this_machine()
    versions = f"NumPy {np.__version__}, torch {torch.__version__ if torch else 'absent'}"
    print(
        f"{machine.cpu_name}, {bench.native.variant}, {bench.native.threads} threads, {versions}\n"
    )
    if options.loaded:
        loaded(bench)
    elif options.kv_format:
        formats(bench, options.kv_format)
    else:
        _all_cases(bench)
    if options.json:
        rows = [asdict(row) for row in bench.rows]
        Path(options.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")


def _all_cases(bench: Bench) -> None:
    for rows in (1, 2, 4, 8, 32, 512, 2048):
        linear(bench, rows, 8192, 2048)
    for dim in (64, 128):
        for sequences, context in ((1, 1024), (1, 8192), (1, 32768), (8, 1024), (8, 4096)):
            attention(bench, sequences, context, 1, dim)
    for dim, context in ((64, 2048), (64, 4096), (64, 16384), (128, 4096)):
        attention(bench, 1, context, context, dim)


if __name__ == "__main__":
    main()
