"""Part ``trace`` of ``bench/prefix.py``: a trace through the real scheduler, cache and index.

There is no model (:mod:`quire.analysis.replay`): a pretended one takes 20 ms a step, and computes
so many prompt tokens a second beside as keep it busy for 70 % of the trace if nothing were shared.
"""

import time
from collections.abc import Sequence

from prefix_figures import Figure, Report
from prefix_stub import LAYOUT, PAGE

from quire.analysis.replay import Replay
from quire.analysis.replayed import Replayed, Timing
from quire.analysis.trace import Arrival, unbounded_hits
from quire.config import format_bytes
from quire.layout import pages_for

BUSY = 0.7
STEP_SECONDS = 0.02
SHARES = (1 / 64, 1 / 16, 1 / 4)  # of the pages that a pool without limit comes to hold


def pages_wanted(trace: Sequence[Arrival]) -> int:
    """Pages with which nothing is evicted."""
    return sum(pages_for(a.input_length + max(1, a.output_length), PAGE) + 1 for a in trace)


def natural_speed(trace: Sequence[Arrival]) -> float:
    """Tokens a second that keep the pretended engine busy for :data:`BUSY` of the trace."""
    tokens = sum(arrival.input_length + arrival.output_length for arrival in trace)
    return tokens / BUSY / max(1.0, trace[-1].seconds - trace[0].seconds)


def pretended(speed: float) -> Timing:
    """The steps of a model that computes ``speed`` prompt tokens a second."""
    return Timing(STEP_SECONDS, 1 / speed)


def replay(report: Report, trace: Sequence[Arrival], name: str) -> None:
    """A trace on pools of several sizes, against one without limit."""
    asked = sum(arrival.input_length for arrival in trace)
    replies = sum(max(1, arrival.output_length) for arrival in trace)
    span = trace[-1].seconds - trace[0].seconds
    speed = natural_speed(trace)
    report.title(
        f"trace: {name}, {len(trace):,} requests in {span:,.0f} s, {asked:,} prompt tokens, "
        f"{replies:,} of replies; {speed:,.0f} tokens a second"
    )
    timing = pretended(speed)
    kept, hit_rate = _run(report, "without limit", trace, pages_wanted(trace), timing)
    report.add(
        Figure("trace", "hit rate: a dict of prefixes", "of asked", [unbounded_hits(trace) / asked])
    )
    for share in SHARES:
        num_pages = max(1, int(kept * share))
        size = format_bytes(num_pages * LAYOUT.page_bytes(0))
        _run(report, f"{num_pages:,} pages ({size})", trace, num_pages, timing, endless=hit_rate)


def _run(
    report: Report,
    name: str,
    trace: Sequence[Arrival],
    num_pages: int,
    timing: Timing,
    *,
    endless: float | None = None,
) -> tuple[int, float]:
    """Replay on so many pages and tell of it; pages in the index at the end, and the hit rate.

    endless   the hit rate of a pool without limit
    """
    replay = Replay(trace, LAYOUT, [num_pages], timing)
    start = time.perf_counter()
    done = replay.run()
    seconds = time.perf_counter() - start
    [kept] = replay.cache.cached_pages
    of_best = f"{done.hit_rate / max(1e-9, endless or done.hit_rate):.0%} of what no limit gives"
    report.title(f"  {name}")
    for figure in _figures(f"trace, {name}", done, kept, seconds, of_best):
        report.add(figure)
    return kept, done.hit_rate


def _figures(part: str, done: Replayed, kept: int, seconds: float, of_best: str) -> list[Figure]:
    page = LAYOUT.page_bytes(0)
    token = seconds * 1e6 / max(1, done.prompt_tokens + done.computed_tokens)
    rows: list[tuple[str, str, float, str]] = [
        ("hit rate", "of asked", done.hit_rate, of_best),
        ("pages in the index at the end", "pages", kept, format_bytes(kept * page)),
        ("most pages held by sequences", "pages", done.peak_bytes // page, ""),
        ("evicted", "pages", done.evicted_pages, ""),
        ("preemptions", "", done.preemptions, ""),
        ("requests too long for the pool", "", done.refused, ""),
        ("waste of held pages, over time", "of slots", done.mean_waste, ""),
        ("waste of held pages, at the most", "of slots", done.peak_waste, ""),
        ("bookkeeping a token asked or computed", "us", token, f"{done.steps:,} steps"),
    ]
    return [Figure(part, row, unit, [value], note=note) for row, unit, value, note in rows]
