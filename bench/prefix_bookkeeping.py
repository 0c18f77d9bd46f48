"""Part ``bookkeeping`` of ``bench/prefix.py``: what the cache's books cost, without any numbers.

A request is what the engine does with a prompt: match, create, reserve, commit, release, in one
step. Python's garbage collector runs as it does in an engine.

    fill     prompts that nobody asked before, into a pool that is still empty
    miss     the same into a full pool: each page that is taken is an eviction
    hit      prompts that are in the pool: all but the last token is there
    decode   one token of each of 16 sequences a step
"""

import gc
import itertools
import random
import time
import tracemalloc
from collections.abc import Sequence

import numpy as np
from prefix_figures import Figure, Report
from prefix_stub import LAYOUT, PAGE, stub_cache

from quire.cache import KVCache, PrefixQuery

PROMPT_PAGES = 128
PROMPT = PROMPT_PAGES * PAGE
PARTS = 7  # a figure is the median of so many parts of the requests
STAGES = ("match", "create", "reserve", "commit", "release")
DECODING = 16


def prompt(seed: int) -> list[int]:
    """Token ids of prompt number ``seed``."""
    tokens: list[int] = np.random.default_rng(seed).integers(0, 1 << 17, PROMPT).tolist()
    return tokens


def admit(cache: KVCache, tokens: Sequence[int]) -> list[float]:
    """One request through the cache; seconds of each of :data:`STAGES`."""
    moments = [time.perf_counter()]
    match = cache.match(PrefixQuery(tokens), len(tokens) - 1)
    moments.append(time.perf_counter())
    sequence = cache.create(match)
    moments.append(time.perf_counter())
    reservation = cache.reserve([(sequence, len(tokens) - match.tokens)])
    moments.append(time.perf_counter())
    cache.commit(reservation, [tokens[match.tokens :]])
    moments.append(time.perf_counter())
    cache.release(sequence)
    moments.append(time.perf_counter())
    return [end - start for start, end in itertools.pairwise(moments)]


def bookkeeping(report: Report, pools: Sequence[int], requests: int) -> None:
    """All of it on pools of so many pages; at most ``requests`` a case, but as many as fill one."""
    for num_pages in pools:
        prompts = f"prompts of {PROMPT:,} tokens ({PROMPT_PAGES} pages)"
        report.title(f"bookkeeping: a pool of {num_pages:,} pages of {PAGE} tokens, {prompts}")
        cache = stub_cache(num_pages)
        fits = num_pages // PROMPT_PAGES
        seeds = random.Random(0)
        order = {
            "fill": range(fits),
            "miss": range(fits, fits + requests),
        }
        for name, numbers in order.items():
            _tell(report, num_pages, name, [admit(cache, prompt(n)) for n in numbers])
        held = range(fits + requests)[-fits:][fits // 4 :]  # the oldest may have lost their tails
        hits = [admit(cache, prompt(seeds.choice(held))) for _ in range(requests)]
        _tell(report, num_pages, "hit", hits)
        _decode(report, num_pages, cache, seeds.sample(held, min(len(held), DECODING)))
        if num_pages <= 100_000:  # it takes minutes for a million
            cache.check()


def _tell(report: Report, num_pages: int, name: str, seconds: list[list[float]]) -> None:
    """``seconds``: of each stage of each request, in order."""
    part = f"bookkeeping {num_pages}"
    parts = [
        seconds[at * len(seconds) // PARTS : (at + 1) * len(seconds) // PARTS]
        for at in range(PARTS)
    ]
    means = np.array([np.mean(each, axis=0) for each in parts if each])
    whole = means.sum(axis=1) * 1e6
    report.add(Figure(part, f"{name}: all of it", "us/token", (whole / PROMPT).tolist()))
    asked = "microseconds"
    report.add(
        Figure(part, f"{name}: all of it", "us/page", (whole / PROMPT_PAGES).tolist(), asked)
    )
    for stage, values in zip(STAGES, means.T * 1e6 / PROMPT_PAGES, strict=True):
        report.add(Figure(part, f"{name}:   {stage}", "us/page", values.tolist(), asked))
    longest = max(map(sum, seconds))
    report.add(Figure(part, f"{name}: the longest request", "ms", [longest * 1e3]))


def _decode(report: Report, num_pages: int, cache: KVCache, seeds: Sequence[int]) -> None:
    """Steps of one token for each sequence, each behind a prompt that is cached."""
    sequences = []
    for seed in seeds:
        tokens = prompt(seed)
        sequences.append(cache.create(cache.match(PrefixQuery(tokens), len(tokens) - 1)))
    chunks = [(sequence, 1) for sequence in sequences]
    values = []
    for turn in range(PARTS):
        start = time.perf_counter()
        for step in range(2 * PAGE):
            cache.commit(cache.reserve(chunks), [[turn * 100 + step]] * len(chunks))
        each = (time.perf_counter() - start) / (2 * PAGE * len(chunks))
        values.append(each * 1e6)
    for sequence in sequences:
        cache.release(sequence)
    name = f"decode: {len(chunks)} sequences, reserve + commit"
    report.add(Figure(f"bookkeeping {num_pages}", name, "us/token", values))


def memory(report: Report, num_pages: int) -> None:
    """Python memory of the books, a page, as tracemalloc counts it."""
    report.title(f"bookkeeping: memory of the books, {num_pages:,} pages")
    part = f"memory {num_pages}"
    traced = {}
    for shares in (True, False):
        gc.collect()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        cache = stub_cache(num_pages, shares=shares)
        empty = tracemalloc.get_traced_memory()[0] - before
        for seed in range(num_pages // PROMPT_PAGES if shares else 0):
            admit(cache, prompt(seed))
        gc.collect()
        traced[shares] = empty, tracemalloc.get_traced_memory()[0] - before - empty
        tracemalloc.stop()
        del cache
    page = LAYOUT.page_bytes(0)
    filled = num_pages // PROMPT_PAGES * PROMPT_PAGES
    allocator, index = traced[False][0] / num_pages, traced[True][1] / filled
    index += (traced[True][0] - traced[False][0]) / num_pages
    share = f"{(allocator + index) / page:.2%} of a page of {page:,} bytes with both"
    report.add(Figure(part, "allocator", "B/page", [allocator]))
    report.add(Figure(part, "prefix index, pool full of it", "B/page", [index], note=share))
