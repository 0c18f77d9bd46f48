"""Native kernels against this machine's own limits and against PyTorch, in one run.

    python bench/kernels.py [--seconds 0.5] [--json FILE] [--loaded]

Prints, for each case, the median and the spread of several rounds in which the contestants and the
machine's limit take turns: bytes moved or operations done per second, and the share of the limit:
reading memory (256 MiB, many times the last cache), or multiply-adds in registers. Virtual machines
share their bus with others, so a limit holds for its own case only.
PyTorch is optional (any CPU build); it gets the same number of threads.

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from quire.backends.native import NativeBackend
from quire.batch import GroupBatch, PagedBatch
from quire.machine import this_machine
from quire.pages import PageShape, page_format

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


def attention(bench: Bench, sequences: int, context: int, new: int, dim: int) -> None:
    """32 query and 8 KV heads, bf16 pages of 16 tokens, scattered; ``new`` queries a sequence."""
    pages = context // 16
    rng = np.random.default_rng(0)
    bf16 = page_format("bf16")
    pool = bench.native.pool(PageShape(16, 8, dim, dim, bf16, bf16), sequences * pages)
    pool.key[:] = rng.standard_normal(pool.key.shape, np.float32)
    pool.value[:] = rng.standard_normal(pool.value.shape, np.float32)
    each = np.arange(sequences + 1, dtype=np.int64)
    group = GroupBatch(
        16,
        None,
        np.empty(0, np.int64),
        each * pages,
        rng.permutation(sequences * pages).astype(np.int64),
        np.full(sequences, 16, np.int64),
        np.zeros(sequences, np.int64),
    )
    positions = np.tile(np.arange(context - new, context), sequences)
    batch = PagedBatch(positions, each * new, (group,), (0,))
    query = rng.standard_normal((sequences * new, 32, dim), np.float32)
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
        sequences * context * 8 * dim * 2 * 2 if decode else 4.0 * seen * 32 * dim,
        "GB/s" if decode else "GFLOP/s",
        lambda: bench.native.attend(query, pool, batch, 0),
        theirs,
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
    parser.add_argument("--loaded", action="store_true", help="only beside a busy process")
    options = parser.parse_args()
    bench, machine = Bench(options.seconds), this_machine()
    versions = f"NumPy {np.__version__}, torch {torch.__version__ if torch else 'absent'}"
    print(
        f"{machine.cpu_name}, {bench.native.variant}, {bench.native.threads} threads, {versions}\n"
    )
    if options.loaded:
        loaded(bench)
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
