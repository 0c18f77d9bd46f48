"""Counts what the cuda backend's attention asks of a card, on one in software; needs no GPU.

Run as ``python tests/cuda_counts.py 90 [--only int4,decode]``: for each page format, decode of one
token after 4,096 and, where pages are not packed, prefill of 512 tokens (32 query heads, 8 KV heads
of 128), one line: bytes of device memory moved beside those of the pages, instructions of a thread
for each number of K and V that the context has, and how many rounds shared memory takes beside the
fewest that could do. PTX is counted, which the assembler still shortens; ``cuda_compile.py`` reads
what it makes of it.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import torch
from gpu_pages import FullPool, Heads

from quire.backends.cuda import CudaBackend
from softcard.card import Card, plugged_in
from softcard.counting import Counts

FORMATS = ("bf16", "fp16", "fp8", "int8", "int4", "int2")
PACKED = ("int4", "int2")
HEADS = Heads(32, 8, 128)
CASES = {"decode": (4096, 1), "prefill": (512, 512)}


def line(counts: Counts, pages: int, numbers: int) -> str:
    """What is told of one launch that reads ``numbers`` of K and V in ``pages`` bytes."""

    def share(all_of: str) -> str:
        rounds, best = counts.rounds[all_of], counts.best[all_of]
        return f"{rounds / best:.2f}" if best else "none"

    return (
        f"{counts.moved['read'] / pages:.3f} x the pages' bytes read in sectors "
        f"({counts.asked['read'] / pages:.3f} asked for), {counts.moved['write'] / pages:.3f} "
        f"written; {counts.instructions * 32 / numbers:.2f} instructions a number; shared memory: "
        f"rounds over the fewest {share('read')} reading, {share('write')} writing, "
        f"{sum(counts.rounds.values()) * 128 / pages:.2f} rounds for 128 B of pages"
    )


def counted(card: Card, format: str, context: int, new: int) -> tuple[Counts, int]:
    """Counts of attention of the last ``new`` tokens of ``context``, and bytes of their pages."""
    backend = CudaBackend()
    pool = FullPool(backend, "cpu", format, HEADS, (1, 2 * context))
    query = torch.randn(new, HEADS.query, HEADS.dim)
    card.counts.clear()
    card.counting = True
    backend.attend(query, pool.pool, pool.batch(1, context, new), 0)
    card.counting = False
    kernel = "decode_kernel" if new == 1 else "prefill_kernel"
    return card.counts[kernel], pool.moved(1, context)


def lines(capability: int, wanted: set[str]) -> Iterator[str]:
    """All of it, but for formats and cases that ``wanted`` leaves out, if it names any."""
    with plugged_in(capability) as card:
        for format in FORMATS:
            for case, (context, new) in CASES.items():
                if wanted <= {format, case} and (case == "decode" or format not in PACKED):
                    numbers = 2 * HEADS.kv * HEADS.dim * context
                    told = line(*counted(card, format, context, new), numbers)
                    yield f"{capability} {format} {case}: {told}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("capability", type=int)
    parser.add_argument("--only", default="", help="format and case, with commas between")
    options = parser.parse_args()
    for text in lines(options.capability, set(filter(None, options.only.split(",")))):
        print(text, flush=True)
