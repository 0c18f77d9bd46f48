"""Part ``reading`` of ``bench/gpu.py``: tokens that choose the pages they read."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from gpu_dense import copying
from gpu_pages import FullPool, Heads
from gpu_rows import Row, summary
from gpu_timing import Call, Setting, paired

from quire.backends import attend_chosen, create_backend
from quire.batch import Candidates, PagedBatch

__all__ = ["reading"]

POLICIES = {"quest": 0, "lsh": 128}  # bits of a signature
LARGE, SMALL = Heads(32, 8, 128), Heads(4, 2, 32)


def reading(setting: Setting) -> None:
    """One token of each sequence that reads a budget of tokens, beside one that reads all.

    Scores, choice and attention, as a layer that chooses has them; what is known of pages is made
    before. Bytes are those of chosen pages and of what is known of all.
    """
    backend = create_backend("cuda")
    cases = setting.choose(((8, 8192), (8, 32768), (64, 32768)), ((8, 32768),), ((2, 128),))
    most = max(s for s, _ in cases), max(s * c for s, c in cases)
    full = FullPool(backend, setting.kind, "bf16", setting.choose(LARGE, LARGE, SMALL), most)
    known = {name: backend.summaries(full.pool, name, bits) for name, bits in POLICIES.items()}
    copy = copying(setting)
    for sequences, context in cases:
        measure = partial(_case, setting, full, known, copy)
        setting.attempt(f"{sequences} x {context}", partial(measure, (sequences, context)))


def _case(
    setting: Setting,
    full: FullPool,
    known: dict[str, Any],
    ceiling: tuple[Call, float],
    case: tuple[int, int],
) -> None:
    backend, (copy, copied), (sequences, context) = full.backend, ceiling, case
    pages = setting.choose(2048, 2048, 64) // full.shape.page_size
    batch, fresh = full.batch(sequences, context, 1), np.arange(full.pages)
    rows = np.arange(sequences)
    query = torch.randn(sequences, full.heads.query, full.heads.dim, device=setting.kind)
    choosing = {name: _choosing(full, batch, pages) for name in known}
    for name, summaries in known.items():  # all pages are fresh, once
        candidates = replace(choosing[name].candidates, fresh=fresh)
        backend.choose_pages(query, summaries, candidates)
    backend.take_step(rows, batch, rows, [(rows, part) for part in choosing.values()])
    calls: dict[str, Call] = {
        "copy": copy,
        "all": partial(backend.attend, query, full.pool, batch, 0),
    }
    for name, summaries in known.items():
        calls[name] = partial(attend_chosen, backend, query, full.pool, choosing[name], summaries)
    repeats = setting.choose(11, 5, 2)
    taken = setting.watch.rounds(calls, repeats)
    for name in ("all", *known):
        seconds, spread = summary(taken[name])
        moved = full.moved(sequences, context)
        if name != "all":
            each = pages * full.shape.bytes_per_page
            each += (context // full.shape.page_size - 2) * known[name].bytes_per_page
            moved = sequences * each
        share = moved / copied * paired(taken[name], taken["copy"])
        setting.emit(
            Row(
                setting.part, f"{sequences} x {context}, {name}", sequences / seconds, "tokens/s",
                spread, repeats, seconds=seconds, bytes=moved,
                ratio=paired(taken[name], taken["all"]), of="reading all pages",
                note=f"{share:.0%} of the copy bandwidth",
            )
        )  # fmt: skip


def _choosing(full: FullPool, batch: PagedBatch, pages: int) -> PagedBatch:
    """The same tokens, which choose ``pages`` pages each."""
    [tables], count = batch.groups, batch.num_sequences
    candidates = Candidates.of(
        tables.page_size,
        full.heads.kv,
        (tables.indptr, tables.indices),
        counts=[pages] * count,
        last_page_len=tables.last_page_len.tolist(),
        fresh=np.empty(0, np.int64),
    )
    return replace(batch, candidates=candidates)
