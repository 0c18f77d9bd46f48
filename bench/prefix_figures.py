"""What the parts of ``bench/prefix.py`` share: a figure with its spread, and turns in quiet."""

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import peers

T = TypeVar("T")


@dataclass
class Figure:
    """One measured figure: ``values`` in ``unit``; ``asked`` is what was asked for, in words.

    ``disturbed``: most processors that others kept busy during a value; None if nobody watched.
    """

    part: str
    name: str
    unit: str
    values: list[float]
    asked: str = ""
    note: str = ""
    disturbed: float | None = None

    @property
    def median(self) -> float:
        """Of all values."""
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Half of greatest less least, relative to the median."""
        return (max(self.values) - min(self.values)) / 2 / self.median if self.median else 0.0

    def line(self) -> str:
        """For a person."""
        text = f"{self.name:46} {peers.figure(self.median):>9} {self.unit:9}"
        if len(self.values) > 1:
            text += f" ±{self.spread:4.0%}"
        asked = f"  asked: {self.asked}" if self.asked else ""
        loud = self.disturbed is not None and self.disturbed > peers.QUIET
        busy = f"  [others kept {self.disturbed:.2f} processors busy]" if loud else ""
        return text + asked + (f"  ({self.note})" if self.note else "") + busy


@dataclass
class Report:
    """Figures, printed as they come."""

    figures: list[Figure] = field(default_factory=list)

    def add(self, figure: Figure) -> None:
        """Print and keep a figure."""
        self.figures.append(figure)
        print(figure.line(), flush=True)

    def title(self, text: str) -> None:
        """Head a part."""
        print(f"\n{text}", flush=True)


@dataclass
class Quiet:
    """Takes turns when the machine is quiet, and again if others disturbed them.

    patience   most seconds to wait before a turn
    chances    turns at most
    """

    patience: float = 30.0
    chances: int = 3
    worst: float = 0.0

    def turn(self, work: Callable[[], T]) -> T:
        """What ``work`` returns; called again, twice at most, if others were busy meanwhile."""
        for chance in reversed(range(self.chances)):
            peers.wait_until_quiet(self.patience)
            start, busy = time.perf_counter(), peers.busy_seconds() - _own_seconds()
            result = work()
            others = peers.busy_seconds() - _own_seconds() - busy
            disturbed = max(0.0, others / (time.perf_counter() - start))
            if disturbed <= peers.QUIET or not chance:
                break
        self.worst = max(self.worst, disturbed)
        return result

    def take_worst(self) -> float:
        """The greatest disturbance since this was asked last."""
        worst, self.worst = round(self.worst, 2), 0.0
        return worst


def _own_seconds() -> float:
    """Processor time of this process and of its ended children."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def ratios(mine: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """``mine`` over ``theirs``, round by round."""
    return [a / b for a, b in zip(mine, theirs, strict=True)]
