"""Timing for the parts of ``bench/gpu.py``: contestants in turns, by CUDA events.

An event is passed when the work before it is done, so a span between two events holds the host's
time too wherever the host is slower than the device. Before each sample the device is therefore
kept busy with overwriting a buffer (which also empties its cache) for longer than the host needs to
queue the call; a sample whose first event had passed by then is taken again.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from gpu_rows import Row, failed

__all__ = ["Call", "Setting", "Stopwatch", "paired"]

Call = Callable[[], Any]
T = TypeVar("T")

_MOST_FLUSHES = 256
_BUFFER = 256 << 20  # bytes; many times a card's last cache


class Stopwatch:
    """Seconds of calls on the device, or on this CPU where ``kind`` is ``"cpu"``.

    late   samples that hold some of the host's time, although the device was kept busy
    """

    def __init__(self, kind: str) -> None:
        self.kind, self.late, self._flushes = kind, 0, 4
        size = _BUFFER if kind == "cuda" else 64
        self._buffer = torch.empty(size, dtype=torch.uint8, device=kind)

    def synchronize(self) -> None:
        """Wait until the device has done all that is queued."""
        if self.kind == "cuda":
            torch.cuda.synchronize()

    def sample(self, call: Call) -> float:
        """Seconds of one call, after one that is not timed: what it hands over is there."""
        call()
        if self.kind != "cuda":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        while True:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(self._flushes):
                self._buffer.zero_()
            begin.record()
            call()
            end.record()
            queued = not begin.query()
            end.synchronize()
            if queued or self._flushes >= _MOST_FLUSHES:
                self.late += not queued
                return float(begin.elapsed_time(end)) / 1e3
            self._flushes *= 2

    def rounds(self, calls: Mapping[str, Call], repeats: int) -> dict[str, list[float]]:
        """``repeats`` samples of each, in turns; every round begins with another one."""
        names = list(calls)
        for name in names:  # compiles, and finds the library's plans
            calls[name]()
        taken: dict[str, list[float]] = {name: [] for name in names}
        for at in range(repeats):
            first = at % len(names)
            for name in names[first:] + names[:first]:
                taken[name].append(self.sample(calls[name]))
        return taken

    def wall(self, call: Callable[[], T]) -> tuple[float, T]:
        """Seconds by the host's clock, from an idle device to an idle one, and the result."""
        self.synchronize()
        start = time.perf_counter()
        result = call()
        self.synchronize()
        return time.perf_counter() - start, result


def paired(one: Sequence[float], other: Sequence[float]) -> float:
    """How many times ``other``'s seconds are ``one``'s: the median over rounds."""
    return statistics.median(b / a for a, b in zip(one, other, strict=True))


@dataclass
class Setting:
    """How a part is to run.

    mode   ``full``, ``quick``, or ``dry``: tiny shapes on this CPU, to see that it runs
    work   a directory for files that parts may share
    end    when, by ``time.monotonic()``, no new case is to begin
    emit   called with each row
    """

    part: str
    mode: str
    work: Path
    end: float
    emit: Callable[[Row], None]
    watch: Stopwatch

    @property
    def kind(self) -> str:
        """The torch device."""
        return self.watch.kind

    def choose(self, full: T, quick: T, dry: T) -> T:
        """What belongs to the mode."""
        return {"full": full, "quick": quick, "dry": dry}[self.mode]

    def row(self, case: str, *values: Any, **named: Any) -> None:
        """Emit a row of this part; see :class:`gpu_rows.Row` for the rest."""
        self.emit(Row(self.part, case, *values, **named))

    def attempt(self, case: str, call: Callable[[], T]) -> T | None:
        """The result; or None, and a row that says what was raised or that time is up."""
        if time.monotonic() > self.end:
            self.row(case, note="skipped: no time left")
            return None
        try:
            return call()
        except Exception as error:
            text = str(error).strip().splitlines()
            reason = f"{type(error).__name__}: {text[0][:200] if text else ''}"
            self.emit(failed(self.part, case, reason))
            return None
