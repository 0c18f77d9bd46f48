"""Part ``bookkeeping`` of ``bench/prefix.py``: what the cache's books cost, without any numbers.

A request is what the engine does with a prompt: match, create, reserve, commit, release, in one
step. Python's garbage collector runs as it does in an engine.

    fill     prompts that nobody asked before, into a pool that is still empty
    miss     the same into a full pool: each page that is taken is an eviction
    hit      prompts that are in the pool: all but the last token is there
    decode   one token of each of 16 sequences a step
"""

import functools
import gc
import itertools
import random
import time
import tracemalloc
from collections.abc import Iterator, Sequence

import numpy as np
from prefix_figures import Figure, Quiet, Report
from prefix_stub import LAYOUT, PAGE, stub_cache

from quire.cache import KVCache, PrefixQuery

PROMPT_PAGES = 128
PROMPT = PROMPT_PAGES * PAGE
PARTS = 7  # a figure is the median of so many parts of the requests
STAGES = ("match", "create", "reserve", "commit", "release")
DECODING = 16
ASKED = "microseconds"


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


def bookkeeping(report: Report, pools: Sequence[int], requests: int, patience: float) -> None:
    """All of it on pools of so many pages: ``requests`` a case, but as many as fill a pool.

    A case waits at most ``patience`` seconds for quiet; none can be taken again.
    """
    quiet = Quiet(patience, chances=1)
    for num_pages in pools:
        prompts = f"prompts of {PROMPT:,} tokens ({PROMPT_PAGES} pages)"
        report.title(f"bookkeeping: a pool of {num_pages:,} pages of {PAGE} tokens, {prompts}")
        cache, part = stub_cache(num_pages), f"bookkeeping {num_pages}"
        fits, seeds = num_pages // PROMPT_PAGES, random.Random(0)
        held = range(fits + requests)[-fits:][fits // 4 :]  # the oldest may have lost their tails
        cases: dict[str, Sequence[int]] = {
            "fill": range(fits),
            "miss": range(fits, fits + requests),
            "hit": seeds.choices(held, k=requests),
        }
        for name, numbers in cases.items():
            seconds = quiet.turn(functools.partial(_admit_all, cache, numbers))
            for figure in _figures(part, name, seconds):
                figure.disturbed = quiet.worst
                report.add(figure)
            quiet.take_worst()
        again = seeds.sample(held, min(len(held), DECODING))
        values = quiet.turn(functools.partial(_decode, cache, again))
        name = f"decode: {len(again)} sequences, reserve + commit"
        report.add(Figure(part, name, "us/token", values, disturbed=quiet.take_worst()))
        cache.check()


def _admit_all(cache: KVCache, numbers: Sequence[int]) -> list[list[float]]:
    return [admit(cache, prompt(number)) for number in numbers]


def _figures(part: str, name: str, seconds: list[list[float]]) -> Iterator[Figure]:
    """``seconds``: of each stage of each request, in order."""
    edges = [at * len(seconds) // PARTS for at in range(PARTS + 1)]
    pieces = [seconds[start:end] for start, end in itertools.pairwise(edges) if start < end]
    means = np.array([np.mean(piece, axis=0) for piece in pieces]) * 1e6
    whole = means.sum(axis=1)
    yield Figure(part, f"{name}: all of it", "us/token", (whole / PROMPT).tolist())
    whole /= PROMPT_PAGES
    yield Figure(part, f"{name}: all of it", "us/page", whole.tolist(), ASKED)
    for stage, values in zip(STAGES, means.T / PROMPT_PAGES, strict=True):
        yield Figure(part, f"{name}:   {stage}", "us/page", values.tolist(), ASKED)
    yield Figure(part, f"{name}: the longest request", "ms", [max(map(sum, seconds)) * 1e3])


def _decode(cache: KVCache, seeds: Sequence[int]) -> list[float]:
    """Microseconds a token in steps of one for each sequence, each behind a cached prompt."""
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
    return values


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
