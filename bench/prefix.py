"""What a kept prefix saves, and what keeping it costs; Quire alone, ratios from one run.

    python bench/prefix.py (--model DIR | --cache DIR [--envs DIR]) [--threads N] [--rounds 3]
                           [--parts shared,restart,bookkeeping,trace] [--quick]
                           [--trace FILE] [--requests 3000] [--json FILE]

    shared       16 requests that share 2,048 tokens, against the same without a prefix cache
    restart      seconds to the first token of a prompt of 2k, 8k and 32k tokens: cold, and in a new
                 process from a disk store (once with its file in the operating system's memory,
                 once without) or a session file; and, in one process, from host memory after the
                 pool gave it up, against computing it again. Starting the engine is apart
    bookkeeping  microseconds a token and a page of KVCache over pools of 10,000, 100,000 and
                 1,000,000 pages that hold nothing, and the memory of the books
    trace        thousands of requests with shared prefixes through the real scheduler and cache,
                 without a model: hit rate and memory over pool sizes; synthetic, or a file in the
                 format of the Mooncake traces (prefix_trace.py makes the one,
                 quire.analysis.trace reads the other)

Only ``shared`` and ``restart`` compute with a model: the one of --model, or the random 160m of
bench/peers.py, made once in --cache. A figure is the median of several, ± half of greatest less
least; what was asked for stands beside it. As in bench/peers.py, turns begin when the machine is
quiet and are taken again if others disturbed them. --quick is small and does not wait: it shows
that everything runs, not how fast.
"""

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import peers
from prefix_bookkeeping import bookkeeping, memory
from prefix_engine import Setting, restart, shared
from prefix_figures import Quiet, Report
from prefix_replay import replay
from prefix_trace import synthetic

import quire
from quire.analysis.trace import read_trace
from quire.architectures import read_model_config
from quire.machine import this_machine

PARTS = ("shared", "restart", "bookkeeping", "trace")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="checkpoint to compute with")
    parser.add_argument("--cache", type=Path, help="folder for the random 160m checkpoint")
    parser.add_argument("--envs", type=Path, help="folder of the environments that can make it")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="small, and without waiting for quiet")
    parser.add_argument("--trace", type=Path, help="requests to replay, one JSON object a line")
    parser.add_argument("--requests", type=int, default=3000, help="most requests of the trace")
    parser.add_argument("--json", type=Path, help="write the figures to a file too")
    options = parser.parse_args(arguments)
    options.parts = options.parts.split(",")
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"{part!r} is not one of {', '.join(PARTS)}")
    if {"shared", "restart"} & set(options.parts) and not (options.model or options.cache):
        parser.error("shared and restart need --model, or --cache to make one in")
    if min(options.rounds, options.requests, options.threads) < 1:
        parser.error("--rounds, --requests and --threads must be at least 1")
    most = min(options.requests, 60) if options.quick else options.requests
    try:
        options.arrivals = read_trace(options.trace, most) if options.trace else synthetic(most)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return options


def setting(options: argparse.Namespace) -> Setting:
    """What ``shared`` and ``restart`` compute with. Raises Failure if it cannot be made."""
    model = options.model
    if model is None:
        options.cache.mkdir(parents=True, exist_ok=True)
        model = peers.make_model("160m", "transformers", options.cache, options.envs, "bf16")
    quiet = Quiet(0.0, 1) if options.quick else Quiet()
    config = read_model_config(model)
    return Setting(
        model, options.threads, options.rounds, quiet, config.max_position, config.vocab_size
    )


def run(options: argparse.Namespace, report: Report) -> None:
    """The parts that were asked for."""
    quick = options.quick
    computing = setting(options) if {"shared", "restart"} & set(options.parts) else None
    if computing is not None:
        print(f"model: {computing.model.name}")
    if "shared" in options.parts and computing is not None:
        shared(report, computing, 2 if quick else 16)
    if "restart" in options.parts and computing is not None:
        restart(report, computing, (512,) if quick else (2048, 8192, 32_768))
    if "bookkeeping" in options.parts:
        pools = (2000,) if quick else (10_000, 100_000, 1_000_000)
        bookkeeping(report, pools, 14 if quick else 210, 0.0 if quick else 30.0)
        memory(report, 2000 if quick else 100_000)
    if "trace" in options.parts:
        name = options.trace.name if options.trace else "synthetic, seed 0"
        replay(report, options.arrivals, name)


def main() -> None:
    """Measure and print."""
    options, report = parse(), Report()
    machine: dict[str, Any] = {
        "cpu": this_machine().cpu_name,
        "system": this_machine().system,
        "threads": options.threads,
        "quire": quire.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "quick": options.quick,
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    try:
        run(options, report)
    finally:
        if options.json:
            rows = [{**asdict(each), "median": each.median} for each in report.figures]
            text = json.dumps({"machine": machine, "figures": rows}, indent=1)
            options.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
