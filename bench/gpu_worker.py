"""One part of ``bench/gpu.py`` in a process of its own, so that none can take others with it.

    python gpu_worker.py PART MODE WORK SECONDS

Answers on stdout in JSON, a line each: ``{"about": {...}}`` once, ``{"row": {...}}`` for each row,
``{"done": true}``. What libraries print goes to stderr.
"""

import datetime
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from gpu_rows import Row
from gpu_timing import Setting, Stopwatch

import quire
from quire.backends.cuda.device import find_device

PARTS = {  # where the function of that name is
    "ceilings": "gpu_dense",
    "decode": "gpu_attention",
    "prefill": "gpu_attention",
    "linear": "gpu_dense",
    "streaming": "gpu_streaming",
    "step": "gpu_steps",
    "exact": "gpu_steps",
    "moving": "gpu_moving",
    "reading": "gpu_reading",
    "transformers": "gpu_transformers",
}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"
    return done.stdout.split("\n")[0].strip()


def about(kind: str) -> dict[str, Any]:
    """What the figures are of."""
    told: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "quire": quire.__version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "transformers")},
        "cuda": torch.version.cuda or "none",
    }
    if kind != "cuda":
        return told | {"card": "none: a dry run on this CPU, whose figures mean nothing"}
    card = torch.cuda.get_device_properties()
    return told | {
        "card": card.name,
        "driver": _driver(),
        "memory": card.total_memory,
        "processors": card.multi_processor_count,
        "capability": f"{card.major}.{card.minor}",
    }


def main() -> None:
    """Run the part."""
    part, mode, work, seconds = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(**told: Any) -> None:
        answers.write(json.dumps(told) + "\n")
        answers.flush()

    def emit(row: Row) -> None:
        if mode == "dry" and row.value is not None:  # nothing is asked of what means nothing
            row = replace(row, at_least=None, at_most=None)
        answer(row=asdict(row))

    kind = find_device().kind if mode == "dry" else "cuda"
    answer(about=about(kind))
    watch = Stopwatch(kind)
    end = time.monotonic() + float(seconds)
    setting = Setting(part, mode, Path(work), end, emit, watch)
    run = getattr(importlib.import_module(PARTS[part]), part)
    setting.attempt("all of it", lambda: run(setting))
    answer(done=True, late=watch.late)


if __name__ == "__main__":
    main()
