"""Part ``moving`` of ``bench/gpu.py``: whole pages to and from host memory, alone and beside steps.

What is moved goes no further than the backend's pinned memory and one array: no tier is asked. Of
steps that decode, the mean time is compared with that of the same steps without it.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from gpu_rows import summary
from gpu_steps import Decoding
from gpu_timing import Setting

__all__ = ["moving"]


class Moved:
    """Pages of an engine's pool that no sequence uses, in as many pieces as move at once."""

    def __init__(self, engine: Any) -> None:
        self.raw = engine.cache.raw
        count = self.raw.depth * self.raw.piece(0, 0)
        free = min(count, engine.cache.free_pages[0] // 2)
        self._reservation = engine.cache.reserve_whole(engine.cache.create(), free)
        pages = self._reservation.new_pages[0]
        piece = -(-len(pages) // self.raw.depth)
        self.pieces = [pages[at : at + piece] for at in range(0, len(pages), piece)]
        self.data = [self.raw.read(0, pages) for pages in self.pieces]
        self.bytes = sum(data.nbytes for data in self.data)

    def down(self, beside: Callable[[], Any] | None = None) -> None:
        """All pieces once, and meanwhile whatever ``beside`` does."""
        exports = [self.raw.begin_read(0, pages) for pages in self.pieces]
        if beside is not None:
            beside()
        for export in exports:
            export.take()

    def up(self) -> None:
        """All pieces once; the computing stream waits for them."""
        incoming = self.raw.begin_write()
        for pages, data in zip(self.pieces, self.data, strict=True):
            incoming.put(0, pages, data)
        incoming.end()

    def up_beside(self, run: Callable[[], Any]) -> int:
        """Pieces from a thread for as long as ``run`` takes; the bytes that were put."""
        incoming, over, put = self.raw.begin_write(), threading.Event(), [0]

        def move() -> None:
            while not over.is_set():
                for pages, data in zip(self.pieces, self.data, strict=True):
                    incoming.put(0, pages, data)
                    put[0] += data.nbytes

        thread = threading.Thread(target=move)
        thread.start()
        try:
            run()
        finally:
            over.set()
            thread.join()
            incoming.end()
        return put[0]


def moving(setting: Setting) -> None:
    """Rates of moving pages, and what they cost steps that run beside it."""
    sequences = setting.choose(8, 8, 1)
    decoding = Decoding(setting, "cuda", 2 * sequences)
    moved = Moved(decoding.engine)
    bare = _bare(setting, moved.bytes)
    for way, move in (("down", moved.down), ("up", moved.up)):
        case = f"pages {way}, nothing else runs"
        setting.attempt(case, partial(_alone, setting, case, move, (moved.bytes, bare[way])))
    requests = decoding.start(sequences)
    try:
        setting.attempt("beside steps", partial(_beside, setting, decoding, moved, bare))
    finally:
        decoding.end(requests)


def _bare(setting: Setting, count: int) -> dict[str, float]:
    """Bytes a second of one copy to, and from, pinned memory."""
    here = torch.empty(count, dtype=torch.uint8, pin_memory=setting.kind == "cuda")
    there = torch.empty(count, dtype=torch.uint8, device=setting.kind)
    calls = {
        "down": lambda: here.copy_(there, non_blocking=True),
        "up": lambda: there.copy_(here, non_blocking=True),
    }
    repeats, rates = setting.choose(11, 5, 2), {}
    taken = setting.watch.rounds(calls, repeats)
    for way in calls:
        seconds, spread = summary(taken[way])
        rates[way] = count / seconds
        setting.row(f"pinned copy {way}", rates[way] / 1e9, "GB/s", spread, repeats)
    return rates


def _alone(setting: Setting, case: str, move: Callable[[], None], of: tuple[int, float]) -> None:
    (count, bare), repeats = of, setting.choose(11, 5, 2)
    move()
    seconds, spread = summary([setting.watch.wall(move)[0] for _ in range(repeats)])
    rate = count / seconds
    setting.row(case, rate / 1e9, "GB/s", spread, repeats, "wall", rate / bare, "the pinned copy")


def _beside(setting: Setting, decoding: Decoding, moved: Moved, bare: dict[str, float]) -> None:
    """Windows of steps alone, with pages going down in each, and with a thread bringing them up."""
    steps, wall = decoding.steps, setting.watch.wall
    plain, down, up, rates = list[float](), list[float](), list[float](), list[float]()
    for _ in range(max(1, decoding.windows // 3)):  # contexts have room for so many steps
        plain.append(wall(partial(decoding.run, steps))[0] / steps)
        step = partial(moved.down, decoding.engine.step)
        down.append(wall(lambda step=step: [step() for _ in range(steps)])[0] / steps)
        seconds, put = wall(partial(moved.up_beside, partial(decoding.run, steps)))
        up.append(seconds / steps)
        rates.append(put / seconds)
    alone = float(np.median(plain))
    size = f"{moved.bytes / 2**20:.0f} MiB"
    for case, taken, rate, way in (
        (f"step beside {size} down", down, moved.bytes / float(np.median(down)), "down"),
        ("step beside pages up without end", up, float(np.median(rates)), "up"),
    ):
        seconds, spread = summary(taken)
        setting.row(
            case, seconds * 1e3, "ms", spread, len(taken), "wall", seconds / alone,
            "the step alone", note=f"alone {alone * 1e3:.4g} ms", seconds=seconds,
        )  # fmt: skip
        setting.row(
            f"pages {way} beside steps", rate / 1e9, "GB/s", spread, len(taken), "wall",
            rate / bare[way], "the pinned copy",
        )  # fmt: skip
