"""What a launch asks of memory and of the processors, counted while it runs.

Device memory moves in sectors of 32 bytes; a request is one instruction of one warp. Shared memory
has 32 banks of 4 bytes, and a request takes as many rounds as the busiest bank has words to give:
at the best one for 128 bytes. What caches hold, and what hides behind what, is not counted.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["Counts"]

Array = Any
_SECTOR, _BANKS, _ROUND = 32, 32, 128


@dataclass
class Counts:
    """Sums over a launch.

    instructions   of warps
    asked, moved   bytes of device memory that threads asked for, each once a request, and those of
                   the sectors they lie in, by "read" and "write"
    rounds, best   of shared memory, and how few there could be, by "read" and "write"
    """

    instructions: int = 0
    asked: Counter[str] = field(default_factory=Counter)
    moved: Counter[str] = field(default_factory=Counter)
    rounds: Counter[str] = field(default_factory=Counter)
    best: Counter[str] = field(default_factory=Counter)

    def device(self, what: str, warps: Array, addresses: Array, width: int) -> None:
        """One instruction: ``width`` bytes at addresses [n] for threads of ``warps`` [n]."""
        pairs = np.unique(np.stack([warps.astype(np.int64), addresses.astype(np.int64)]), axis=1)
        sectors = pairs[1] // _SECTOR
        if width > _SECTOR:
            raise ValueError(f"{width} bytes for a thread")
        moved = np.unique(np.stack([pairs[0], sectors]), axis=1).shape[1]
        self.asked[what] += pairs.shape[1] * width
        self.moved[what] += moved * _SECTOR

    def shared(self, what: str, lanes: Array, addresses: Array, width: int) -> None:
        """One instruction: ``width`` bytes at addresses [n] for ``lanes`` [n], counted through."""
        together = min(32, _ROUND // width)  # lanes of a round, where each has words of its own
        words = max(1, width // 4)
        groups = np.repeat(lanes.astype(np.int64) // together, words)
        at = (addresses.astype(np.int64)[:, None] // 4 + np.arange(words)).reshape(-1)
        groups, at = np.unique(np.stack([groups, at]), axis=1)
        _, groups = np.unique(groups, return_inverse=True)
        busy = np.bincount(groups * _BANKS + at % _BANKS, minlength=(groups.max() + 1) * _BANKS)
        self.rounds[what] += int(busy.reshape(-1, _BANKS).max(axis=1).sum())
        self.best[what] += int(groups.max()) + 1
