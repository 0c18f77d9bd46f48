"""Replays of traces: what they say of hits, memory and time is what slow and obvious models say."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caches import layout_of
from quire.analysis.hit_rates import SHARES, hit_rates, unlimited_bytes
from quire.analysis.replay import Replay, empty_cache, replay, replay_pages
from quire.analysis.replayed import Times, Timing
from quire.analysis.timeline import Moment
from quire.analysis.trace import BLOCK, Arrival, Tokens, common_prefixes, read_trace, unbounded_hits
from quire.cache import CacheUsage
from quire.engine.scheduler import Limits
from quire.errors import ConfigError
from quire.layout import CacheLayout, LayerGroup
from quire.pages import PageShape, page_format

EXAMPLE = read_trace(Path(__file__).parents[1] / "examples" / "trace.jsonl")
LIMITS = Limits(max_batch_tokens=512, max_sequences=64)
QUICK = Timing(step_seconds=0.001)
BUSY = Timing(step_seconds=0.02, prefill_seconds=1e-4, byte_seconds=1e-9)


def latent(page_size: int) -> CacheLayout:
    """One KV head whose values are part of its keys: pages of keys alone."""
    shape = PageShape(page_size, 1, 576, 0, *[page_format("bf16")] * 2)
    return CacheLayout(page_size, (LayerGroup((0, 1), None),), (shape, shape))


def packed(page_size: int, window: int | None) -> CacheLayout:
    """Two layers of int4 pages, the second with a window."""
    windows = dict.fromkeys((None, window))
    groups = [
        LayerGroup(tuple(at for at, w in enumerate((None, window)) if w == g), g) for g in windows
    ]
    shape = PageShape(page_size, 2, 64, 64, *[page_format("int4")] * 2)
    return CacheLayout(page_size, tuple(groups), (shape, shape))


LAYOUTS = {
    "plain": layout_of(16),
    "large pages": layout_of(128, format="bf16"),
    "sliding": layout_of(16, (64,)),
    "two groups": layout_of(16, (None, 100, None)),
    "int4": packed(32, None),
    "int4 and a window": packed(32, 200),
    "values packed": layout_of(16, format="k=fp32,v=int4"),
    "latent": latent(16),
}


def one_by_one(trace: Sequence[Arrival]) -> list[Arrival]:
    """The same requests, each after the end of the one before."""
    return [
        Arrival(1e6 * at, each.input_length, each.output_length, each.blocks)
        for at, each in enumerate(trace)
    ]


def own_end(arrival: Arrival, number: int) -> Arrival:
    """The same request with whole blocks, and behind them a token that no other one has."""
    blocks = arrival.blocks
    return Arrival(arrival.seconds, len(blocks) * BLOCK + 1, 1, (*blocks, -number))


def shortened(arrival: Arrival, prompt: int, reply: int) -> Arrival:
    """The first ``prompt`` tokens of a request, which comes twenty times as early."""
    length = min(prompt, arrival.input_length)
    return Arrival(arrival.seconds / 20, length, reply, arrival.blocks[: -(-length // BLOCK)])


def tokens_of(arrival: Arrival) -> int:
    return arrival.input_length + max(1, arrival.output_length)


def pages_for_all(trace: Sequence[Arrival], layout: CacheLayout) -> list[int]:
    """With so many in each area nothing is given up."""
    return [sum(tokens_of(a) // layout.page_size + 3 for a in trace)] * len(layout.areas)


# -- hits ------------------------------------------------------------------------------------


def hits_by_whole_pages(trace: Sequence[Arrival], size: int) -> int:
    """A set of all prefixes of whole pages, of prompts and replies; nothing is forgotten."""
    tokens, known, hits = Tokens(trace), set[tuple[int, ...]](), 0
    for arrival in trace:
        prompt = tokens.of_prompt(arrival)
        text = [*prompt, *tokens.of_reply(arrival)][:-1]
        whole = [tuple(text[: at * size]) for at in range(1, len(text) // size + 1)]
        found = [page for page in whole if len(page) < len(prompt) and page in known]
        hits += max(map(len, found), default=0)
        known.update(whole)
    return hits


@pytest.mark.parametrize("name", ["plain", "large pages", "latent"])
def test_hits_of_a_pool_without_limit_are_those_of_a_dict(name: str) -> None:
    """To the token: an unfinished page is found, too."""
    trace, layout = one_by_one(EXAMPLE[:32]), LAYOUTS[name]
    done = replay_pages(trace, layout, pages_for_all(trace, layout), QUICK)
    assert done.hit_tokens == unbounded_hits(trace) > 0
    assert (done.evicted_pages, done.preemptions, done.refused) == (0, 0, 0)
    assert done.prompt_tokens == sum(a.input_length for a in trace)
    fed_back = sum(max(1, a.output_length) - 1 for a in trace)
    assert done.computed_tokens == done.prompt_tokens - done.hit_tokens + fed_back
    assert done.reply_tokens == fed_back + len(trace)
    assert done.hit_rate == done.hit_tokens / done.prompt_tokens


@pytest.mark.parametrize("name", LAYOUTS)
def test_hits_of_whole_pages_are_those_of_a_set_of_prefixes(name: str) -> None:
    """Just those where shared parts end with a page; else what is shared of one may be on top."""
    trace = one_by_one([Arrival(0, 520, 7, (1, 2)), *EXAMPLE[:10]])
    layout = LAYOUTS[name]
    done = replay_pages(trace, layout, pages_for_all(trace, layout), QUICK)
    least = hits_by_whole_pages(trace, layout.page_size)
    assert 0 < least <= done.hit_tokens <= unbounded_hits(trace)
    cut = [own_end(arrival, at) for at, arrival in enumerate(trace, 1)]
    done = replay_pages(cut, layout, pages_for_all(cut, layout), QUICK)
    assert done.hit_tokens == hits_by_whole_pages(cut, layout.page_size) == unbounded_hits(cut)


def test_a_shorter_prompt_hits_all_but_its_last_token() -> None:
    trace = [Arrival(0, 1024, 1, (1, 2)), Arrival(1e3, 1000, 1, (1, 2)), Arrival(2e3, 512, 1, (1,))]
    layout = LAYOUTS["plain"]
    done = replay_pages(trace, layout, pages_for_all(trace, layout), QUICK)
    assert done.hit_tokens == unbounded_hits(trace) == 999 + 511


# -- memory ----------------------------------------------------------------------------------


def watched(replay: Replay) -> Iterator[tuple[Moment, CacheUsage]]:
    """Each step of a replay, with the account of the cache that looks at every page."""
    accounts: list[CacheUsage] = []
    commit = replay.cache.commit

    def counted(*arguments: Any) -> None:
        commit(*arguments)
        replay.cache.check()
        accounts.append(replay.cache.usage())

    replay.cache.commit = counted  # type: ignore[method-assign]
    for moment in replay.steps():
        yield moment, accounts[-1]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("room", [1.3, 4])
def test_bytes_are_what_a_look_at_every_page_counts(name: str, room: float) -> None:
    trace, layout = [shortened(a, 900, 20) for a in EXAMPLE[:24]], LAYOUTS[name]
    pages = [int(room * max(tokens_of(a) for a in trace) / layout.page_size) + 4]
    replay = Replay(trace, layout, pages * len(layout.areas), BUSY, limits=Limits(128, 8))
    moments, peak = list[Moment](), 0
    for moment, account in watched(replay):
        assert moment.held_bytes == account.allocated_bytes
        assert moment.waste_bytes == account.waste_bytes
        assert moment.cached_bytes == account.cached_bytes
        total = moment.held_bytes + moment.cached_bytes + moment.free_bytes
        assert total == account.pool_bytes
        moments.append(moment)
        peak = max(peak, moment.held_bytes)
    done = replay.result()
    assert done.requests == len(trace)
    assert done.steps == len(moments)
    assert peak <= done.peak_bytes <= done.pool_bytes
    assert done.peak_waste == max(m.waste_bytes / m.held_bytes for m in moments)
    ends = [*(m.seconds for m in moments[1:]), moments[0].seconds + done.seconds]
    held = sum(m.held_bytes * (end - m.seconds) for m, end in zip(moments, ends, strict=True))
    assert done.utilisation <= held / done.seconds / done.pool_bytes * (1 + 1e-9)
    for point in done.points:
        assert point.held_bytes + point.cached_bytes + point.free_bytes == done.pool_bytes
        assert 0 <= point.waste_bytes <= point.held_bytes
    assert max(p.held_bytes for p in done.points) == peak
    assert max(p.waiting for p in done.points) == max(m.waiting for m in moments)
    assert replay.cache.sequences == ()


def test_shares_over_time_are_weighted_by_time() -> None:
    """A prompt of 24 tokens in pages of 16: half of the second page is empty, for two steps."""
    layout = LAYOUTS["plain"]
    trace = [Arrival(5.0, 24, 2, (1,)), Arrival(10.0, 24, 1, (2,))]
    done = replay_pages(trace, layout, [8], Timing(step_seconds=1.0, prefill_seconds=0.125))
    page = layout.page_bytes(0)
    # 4 s with 24 tokens in 32 slots, 1 s with 25; idle from 10 to 10; 4 s with 24 again
    assert done.seconds == 9.0
    assert (done.busy, done.steps) == (1.0, 3)
    assert done.mean_waste == (8 * 8 + 7) / (9 * 32)
    assert done.peak_waste == 8 / 32
    assert done.utilisation == 2 / 8
    assert (done.peak_bytes, done.pool_bytes) == (2 * page, 8 * page)
    assert [p.held_bytes for p in done.points] == [2 * page] * len(done.points)


def test_idle_time_is_in_the_series_and_nothing_is_held_in_it() -> None:
    layout = LAYOUTS["plain"]
    trace = [Arrival(0.0, 16, 1, (1,)), Arrival(99.0, 16, 1, (2,))]
    done = replay_pages(trace, layout, [8], Timing(step_seconds=1.0))
    assert (done.seconds, done.busy, done.utilisation) == (100.0, 0.02, 0.02 / 8)
    held = [point.held_bytes > 0 for point in done.points]
    assert [held[0], held[-1]] == [True, True]
    assert held.count(False) / len(held) == pytest.approx(0.98, abs=0.01)
    gap = done.points[len(done.points) // 2]
    assert (gap.running, gap.waiting, gap.waste_bytes) == (0, 0, 0)
    assert gap.cached_bytes == layout.page_bytes(0)


# -- time ------------------------------------------------------------------------------------


def test_two_requests_one_after_the_other_by_hand() -> None:
    """One sequence at a time, 512 tokens a step, 1 s a step and 10 ms a prompt token.

    First: 512 tokens until 6.12 s, 88 and its first token until 8 s, two more by 10 s.
    Second, which came at 0.5 s: begins at 10 s behind 511 cached tokens, 1 token until 11.01 s, the
    second of its reply at 12.01 s.
    """
    trace = [Arrival(0.0, 600, 3, (1, 2)), Arrival(0.5, 512, 2, (1,))]
    timing = Timing(step_seconds=1.0, prefill_seconds=0.01)
    done = replay_pages(trace, LAYOUTS["plain"], [100], timing, limits=Limits(512, 1))
    assert done.hit_tokens == 511
    assert done.waiting_s == Times(0.0, 9.5, 9.5)
    close = pytest.approx
    assert done.first_token_s is not None
    assert done.completion_s is not None
    assert [done.first_token_s.p50, done.first_token_s.p99] == close([8.0, 10.51])
    assert [done.completion_s.p50, done.completion_s.p99] == close([10.0, 11.51])
    assert done.seconds == close(12.01)
    assert done.tokens_per_s == close(5 / 12.01)
    assert (done.steps, done.computed_tokens) == (6, 600 + 2 + 1 + 1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_bytes_that_are_read_take_time(name: str) -> None:
    layout = LAYOUTS[name]
    timing = Timing(step_seconds=1.0, byte_seconds=2.0**-20)
    trace = [Arrival(3.0, 300, 4, (1,))]
    done = replay_pages(trace, layout, [40] * len(layout.areas), timing, limits=Limits(200, 4))
    read = sum(layout.seen_bytes(place) for place in (199, 299, 300, 301, 302))
    assert done.seconds == 5 + read / 2**20


def test_seen_bytes_of_a_plain_layout_are_its_tokens() -> None:
    layout = LAYOUTS["plain"]
    assert layout.seen_bytes(99) == 100 * layout.token_bytes(0)


def test_who_waits_for_a_prefix_that_another_computes_does_not_compute_it() -> None:
    trace = [Arrival(0.0, 3 * BLOCK + 100, 4, (1, 2, 3, 10 + at)) for at in range(6)]
    layout = LAYOUTS["plain"]
    done = replay_pages(trace, layout, pages_for_all(trace, layout), QUICK)
    assert done.hit_tokens == unbounded_hits(trace) == 5 * 3 * BLOCK


def test_more_may_wait_than_the_scheduler_is_shown() -> None:
    trace = [Arrival(0.0, 20, 2, (at,)) for at in range(50)]
    limits = Limits(512, 3)
    steps = list(Replay(trace, LAYOUTS["plain"], [100], QUICK, limits=limits).steps())
    assert [max(0, 47 - at // 2 * 3) for at in range(len(steps))] == [m.waiting for m in steps]
    assert max(m.running for m in steps) == 3


def test_preempted_requests_are_computed_again_and_served() -> None:
    """Two that grow from 2 pages to 12 on 16 pages: the younger gives way."""
    trace = [Arrival(0.0, 32, 160, (1,)), Arrival(0.0, 32, 160, (2,))]
    done = replay_pages(trace, LAYOUTS["plain"], [16], QUICK)
    assert done.preemptions > 0
    assert (done.requests, done.reply_tokens, done.refused) == (2, 320, 0)
    assert done.computed_tokens > 2 * (32 + 159)
    assert done.hit_tokens == 0  # what is found of its own after a preemption is no hit


requests = st.tuples(
    st.integers(0, 20),  # tenths of a second
    st.integers(1, 700),
    st.integers(0, 60),
    st.integers(0, 2),
    st.integers(0, 2),
)


@given(
    st.lists(requests, min_size=1, max_size=12),
    st.sampled_from(sorted(LAYOUTS)),
    st.integers(5, 60),
    st.integers(1, 4),
    st.integers(8, 200),
)
@settings(deadline=None, max_examples=60)
def test_every_request_is_served_or_refused_on_any_pool(
    drawn: list[tuple[int, int, int, int, int]], name: str, pages: int, most: int, chunk: int
) -> None:
    trace = [
        Arrival(when / 10, prompt, reply, (one, 3 + other)[: -(-prompt // BLOCK)])
        for when, prompt, reply, one, other in drawn
    ]
    layout, limits = LAYOUTS[name], Limits(max(chunk, most), most)
    counts = [pages if not area.is_open else max(3, pages // 2) for area in layout.areas]
    replay = Replay(trace, layout, counts, BUSY, limits=limits)
    done = replay.run()
    assert done.requests + done.refused == len(trace)
    assert done.peak_bytes <= done.pool_bytes
    assert done.points == () or done.seconds > 0
    assert replay.cache.sequences == ()
    replay.cache.check()
    for times in (done.waiting_s, done.first_token_s, done.completion_s):
        assert (times is None) == (done.requests == 0)
    if done.waiting_s and done.first_token_s and done.completion_s:
        assert 0 <= done.waiting_s.p50 < done.first_token_s.p50 <= done.completion_s.p50


# -- refusals and settings -------------------------------------------------------------------


def test_what_can_never_fit_is_refused_with_numbers() -> None:
    trace = [Arrival(0.0, 32, 4, (1,)), Arrival(7.5, 3000, 5, tuple(range(6)))]
    done = replay_pages(trace, LAYOUTS["plain"], [10], QUICK)
    assert (done.requests, done.refused, done.prompt_tokens) == (1, 1, 32)
    assert done.refusals == (
        "at 7.5 s: 3,000 prompt tokens and 5 of reply need 188 pages of 16 tokens "
        "(full attention), but the pool has 10",
    )
    done = replay_pages(trace, LAYOUTS["plain"], [1000], QUICK, longest=3004)
    assert done.refusals == (
        "at 7.5 s: 3,000 prompt tokens and 5 of reply are more than the context of 3,004",
    )
    assert replay_pages(trace, LAYOUTS["plain"], [1000], QUICK, longest=3005).refused == 0


def test_a_request_that_just_fits_is_served() -> None:
    layout = LAYOUTS["plain"]
    trace = [Arrival(0.0, 150, 11, (1,))]  # the last token is not cached: 160 are
    assert replay_pages(trace, layout, [10], QUICK).requests == 1
    assert replay_pages(trace, layout, [9], QUICK).refused == 1


def test_a_trace_of_nothing_but_refusals_has_no_times() -> None:
    trace = [Arrival(float(at), 512, 1, (at,)) for at in range(20)]
    done = replay_pages(trace, LAYOUTS["plain"], [3], QUICK)
    assert (done.requests, done.refused, len(done.refusals)) == (0, 20, 8)
    assert (done.waiting_s, done.completion_s, done.hit_rate, done.steps) == (None, None, 0.0, 0)
    json.dumps(done.as_dict(), allow_nan=False)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_pool_by_its_bytes(name: str) -> None:
    layout, budget = LAYOUTS[name], 1 << 18
    trace = [Arrival(0.0, 100, 5, (1,)), Arrival(0.1, 120, 5, (1,))]
    done = replay(trace, layout, budget, BUSY, limits=Limits(64, 4))
    assert 0 < done.pool_bytes <= budget
    assert done.requests + done.refused == 2
    with pytest.raises(ConfigError, match="is below one page"):
        replay(trace, layout, 10, BUSY)


@pytest.mark.parametrize(
    "parts",
    [{"step_seconds": -1}, {"step_seconds": 0}, {"byte_seconds": float("nan")},
     {"prefill_seconds": float("inf")}],
)  # fmt: skip
def test_a_time_that_is_none_is_refused(parts: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(parts))):
        Timing(**({"step_seconds": 1.0} | parts))


def test_a_result_is_ready_for_json_and_the_same_each_time() -> None:
    layout = LAYOUTS["two groups"]
    one, other = (replay(EXAMPLE[:20], layout, 1 << 21, BUSY) for _ in range(2))
    assert one == other
    told = json.loads(json.dumps(one.as_dict(), allow_nan=False))
    assert told == one.as_dict()
    assert told["hit_rate"] == one.hit_rate
    assert one.waiting_s is not None
    assert told["waiting_s"]["p90"] == one.waiting_s.p90
    assert told["points"][0]["held_bytes"] == one.points[0].held_bytes
    assert len(told["points"]) <= 512


def test_a_replay_starts_no_backend_and_no_framework() -> None:
    program = (
        "import sys, quire.analysis.hit_rates; "
        "print([m for m in sys.modules if m in ('torch', 'transformers') or '_native' in m])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert ran.stdout.strip() == "[]"


def test_a_cache_without_an_index_shares_nothing() -> None:
    cache = empty_cache(LAYOUTS["plain"], [4], None)
    assert cache.prefix is None
    assert cache.num_pages == (4,)


# -- hit rate by size ------------------------------------------------------------------------


def test_a_larger_cache_hits_more_up_to_the_bound() -> None:
    trace, layout = one_by_one(EXAMPLE), LAYOUTS["large pages"]
    found = hit_rates(trace, layout, None, QUICK)
    asked = sum(a.input_length for a in trace)
    assert (found.prompt_tokens, found.bound) == (asked, unbounded_hits(trace) / asked)
    assert [rate.size for rate in found.rates] == [
        int(found.unlimited_bytes * share) for share in SHARES
    ]
    rates = [rate.hit_rate for rate in found.rates]
    assert rates == sorted(rates)
    assert rates[-1] == found.bound
    assert 0 < rates[-2] < found.bound
    refused = [rate.refused for rate in found.rates]
    assert refused == sorted(refused, reverse=True)
    assert (refused[-1], found.rates[-1].evicted_pages) == (0, 0)
    assert all(rate.pool_bytes <= rate.size for rate in found.rates)
    assert json.loads(json.dumps(found.as_dict())) == found.as_dict()


def test_sizes_may_be_given_and_come_in_order() -> None:
    layout = LAYOUTS["plain"]
    page = layout.page_bytes(0)
    sizes = [3000 * page, 600 * page]
    found = hit_rates(EXAMPLE[:16], layout, sizes, QUICK)
    assert [rate.size for rate in found.rates] == sorted(sizes)
    again = replay(EXAMPLE[:16], layout, sizes[0], QUICK)
    assert found.rates[-1].hit_tokens == again.hit_tokens
    with pytest.raises(ConfigError, match="is below one page"):
        hit_rates(EXAMPLE[:4], layout, [page - 1], QUICK)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_pool_without_limit_holds_what_is_foretold(name: str) -> None:
    """At most: a prompt that ends where another's page goes on leaves no page of its own."""
    trace, layout = one_by_one(EXAMPLE[:32]), LAYOUTS[name]
    replay = Replay(trace, layout, pages_for_all(trace, layout), QUICK)
    replay.run()
    kept = sum(
        n * size for n, size in zip(replay.cache.cached_pages, layout.area_bytes, strict=True)
    )
    foretold = unlimited_bytes(trace, layout)
    assert 0.98 * foretold <= kept <= foretold


def test_the_bound_knows_what_each_prompt_shares() -> None:
    assert len(common_prefixes(EXAMPLE)) == len(EXAMPLE)
