"""What a worker of ``bench/peers.py`` says and hears: one JSON object a line, on stdin and stdout.

Only the standard library, so that it runs in every peer's environment.

    {"do": "load", "model": PATH, "threads": N, "tokens": N, "longest": N, "sequences": N,
     "chunk": N, "prefix_cache": false, "set": {}}
        -> {"seconds": s, "about": "version and settings"}
    {"do": "run", "prompts": [[id, ...], ...], "new": N}
        -> {"times": [[s, ...], ...], "ids": [[id, ...], ...], "peak": bytes}

``tokens`` is the most that are in the cache at a time, ``longest`` the most of one sequence,
``chunk`` the most that are computed in a step, ``prefix_cache`` whether what runs had in common
with earlier ones is kept (not, if it is left out), ``set`` what --set says. ``times`` are seconds
from the moment the prompts were handed over to the arrival of each token of each sequence,
``peak`` the most memory that was resident meanwhile. An exception answers ``{"error": text}``,
what an engine cannot do ``{"unsupported": reason}``.
"""

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

Times = list[list[float]]
Ids = list[list[int]]


class Unsupported(Exception):
    """The engine has no way to do this; the text says why."""


class Worker(Protocol):
    """One engine, in this process."""

    def load(self, message: dict[str, Any]) -> str:
        """Load ``model``; returns version and settings in words."""

    def run(self, prompts: Sequence[Sequence[int]], new: int) -> tuple[Times, Ids]:
        """``new`` greedy tokens after each prompt, end of text ignored; reused is only what
        ``prefix_cache`` allows."""


class Clock:
    """Arrival times of tokens since the prompts were handed over."""

    def __init__(self, sequences: int) -> None:
        self.times: Times = [[] for _ in range(sequences)]
        self.ids: Ids = [[] for _ in range(sequences)]
        self._start = time.perf_counter()

    def arrived(self, tokens: dict[int, int | Sequence[int]]) -> None:
        """Tokens of one step, by sequence."""
        now = time.perf_counter() - self._start
        for sequence, new in tokens.items():
            fresh = [new] if isinstance(new, int) else list(new)
            self.times[sequence] += [now] * len(fresh)
            self.ids[sequence] += fresh


def peak_memory() -> int | None:
    """Greatest resident bytes of this process since :func:`forget_peak`; None where unknown."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    kib = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(kib[0]) * 1024 if kib else None


def forget_peak() -> None:
    """Start counting the peak again; where that is not allowed, the older peak stays."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _answer(worker: Worker, message: dict[str, Any]) -> dict[str, Any]:
    if message["do"] == "load":
        start = time.perf_counter()
        about = worker.load(message)
        return {"seconds": time.perf_counter() - start, "about": about}
    forget_peak()
    times, ids = worker.run(message["prompts"], message["new"])
    return {"times": times, "ids": ids, "peak": peak_memory()}


def serve(worker: Worker) -> None:
    """Answer until stdin ends. What libraries print goes to stderr, not among the answers."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = _answer(worker, json.loads(line))
        except Unsupported as reason:
            answer = {"unsupported": str(reason)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
