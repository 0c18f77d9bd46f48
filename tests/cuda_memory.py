"""Counts the memory of the page-streaming experiment at its real size, here and in the plain loop.

Run as ``python tests/cuda_memory.py``; needs no GPU. Part ``streaming`` of ``bench/gpu.py`` asks a
card for the same: weights, pages and what a prefill needs beside them, at most at a time. Here they
are asked of a card in software that computes nothing, and hands memory out as torch does, in pieces
of 512 bytes; what libraries take for themselves (cuBLAS) is not among them.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from gpu_checkpoints import STREAMED, checkpoint
from gpu_streaming import DTYPES, Contest, _our_prefill, _their_prefill
from gpu_timing import Setting

from softcard.whole import whole_card

__all__ = ["peaks"]


def peaks(work: Path, mode: str, *, computes: bool = False) -> Iterator[tuple[int, dict[str, int]]]:
    """For each prompt of ``mode`` (``full``, ``dry``) its tokens, and bytes of each contestant."""

    def wall(call: Callable[[], Any]) -> tuple[float, Any]:
        return 0.0, call()

    watch: Any = SimpleNamespace(kind="cuda", wall=wall)
    contest = Contest(Setting("streaming", mode, work, float("inf"), print, watch))
    for name in DTYPES.values():  # drawn before there is a card that draws nothing
        checkpoint(work, contest.shape, name, "cpu")
    with whole_card(90, total=64 << 30, processors=132, computes=computes):
        for prompt in contest.prompts:
            for name in DTYPES:
                _our_prefill(contest, name, prompt, 0)
            _their_prefill(contest, prompt, 0)
            names = (*DTYPES, "loop")
            yield prompt, {name: contest.peaks[name, prompt] for name in names}


if __name__ == "__main__":
    print(f"{STREAMED}, bytes at most at a time")
    with tempfile.TemporaryDirectory() as directory:
        for tokens, found in peaks(Path(directory), "full"):
            shares = ", ".join(f"{name} {found[name] / found['loop']:.3f}" for name in DTYPES)
            print(f"prefill {tokens}: {found}; of the loop's: {shares}", flush=True)
