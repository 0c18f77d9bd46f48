"""Plans against what happens: every term of ``quire plan --verify``, several times over.

    python bench/plan.py --model quill --model path/to/160m --model path/to/1b [--rounds 5]

Each round measures this machine, runs the model in processes of its own, measures the machine
again, and compares; rounds of all cases take turns, so that a restless machine is restless for all.
Prints the median of each term's difference and its range, as a table of Markdown; --json FILE has
every round.
Models of the shapes that other benchmarks use are written by bench/peers.py into its --cache.
"""

import argparse
import json
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import quire
from quire.analysis.calibrate import measure_machine
from quire.analysis.memory import Load, kv_layout
from quire.analysis.plan import Asked, make_plan, plan_shape
from quire.analysis.verify import Row, verify
from quire.machine import this_machine

FORMATS = ("bf16", "int8", "int4")
Case = tuple[str, str]


def compare(case: Case, context: int, requests: int) -> list[Row]:
    """One round of a case: (model, page format)."""
    model, kv_format = case
    shape, threads = plan_shape(model), this_machine().threads
    load = Load(context, requests, threads=threads)
    layout = kv_layout(shape, kv_format)
    hardware, timer = measure_machine(shape, layout, threads)
    asked = Asked(shape, load, hardware, hardware.memory_bytes, formats=(kv_format,))
    made = make_plan(asked, timer)
    return verify(made, model, timer, lambda: measure_machine(shape, layout, threads)[1])


def differences(rounds: Sequence[Sequence[Row]]) -> dict[str, list[float]]:
    """Of each term with a prediction and a measurement: measured over predicted, less 1."""
    found: dict[str, list[float]] = {}
    for rows in rounds:
        for row in rows:
            if row.predicted and row.measured is not None:
                found.setdefault(row.name, []).append(row.measured / row.predicted - 1)
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", action="append", metavar="DIR", help="or quill, the default")
    parser.add_argument("--kv-format", action="append", metavar="F")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    models, formats = args.model or ["quill"], args.kv_format or FORMATS
    cases = [(model, kv_format) for model in models for kv_format in formats]
    rounds: dict[Case, list[list[Row]]] = {case: [] for case in cases}
    for _ in range(args.rounds):
        for case in cases:
            rounds[case].append(compare(case, args.context, args.requests))
    machine = this_machine()
    print(
        f"Quire {quire.__version__}, Python {platform.python_version()}, {machine.cpu_name}, "
        f"{machine.threads} threads; {args.requests} requests of {args.context} tokens, median of "
        f"{args.rounds} (range)\n"
    )
    print_table(rounds)
    if args.json is not None:
        args.json.write_text(json.dumps(as_dicts(rounds), indent=1), encoding="utf-8")


def print_table(rounds: dict[Case, list[list[Row]]]) -> None:
    """Terms down, cases across."""
    by_case = {case: differences(found) for case, found in rounds.items()}
    names = list(next(iter(by_case.values())))
    titles = [f"{Path(model).name} {kv_format}" for model, kv_format in by_case]
    print("| term | " + " | ".join(titles) + " |")
    print("|---" * (1 + len(titles)) + "|")
    for name in names:
        cells = [_cell(found.get(name, [])) for found in by_case.values()]
        print(f"| {name} | " + " | ".join(cells) + " |")


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    low, high = min(values), max(values)
    middle = f"{statistics.median(values):+.1%}"
    return middle if high - low < 0.002 else f"{middle} ({low:+.0%} to {high:+.0%})"


def as_dicts(rounds: dict[Case, list[list[Row]]]) -> list[dict[str, Any]]:
    """For JSON."""
    return [
        {"model": Path(model).name, "kv_format": kv_format, "rows": [r.as_dict() for r in rows]}
        for (model, kv_format), found in rounds.items()
        for rows in found
    ]


if __name__ == "__main__":
    main()
