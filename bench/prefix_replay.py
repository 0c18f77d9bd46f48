"""Part ``trace`` of ``bench/prefix.py``: a trace through the real scheduler, cache and index.

There is no model: a pretended one takes 20 ms a step, and computes so many tokens a second beside
as keep it busy for 70 % of the trace if nothing were shared; replies are ids that nothing else has.
Everything that decides what is cached is the engine's own: ``plan_step``, ``Queues``, ``KVCache``.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from prefix_figures import Figure, Report
from prefix_stub import LAYOUT, PAGE, stub_cache
from prefix_trace import Arrival, Tokens, unbounded_hits

from quire.cache import KVCache
from quire.cache.prefix import PrefixNode
from quire.config import format_bytes
from quire.engine.queues import Queues
from quire.engine.request import Request, Sample, SamplingParams, Status
from quire.engine.scheduler import Limits, plan_step
from quire.layout import pages_for

LIMITS = Limits(max_batch_tokens=512, max_sequences=64)  # the engine's defaults
BUSY = 0.7
STEP_SECONDS = 0.02
SHARES = (1 / 64, 1 / 16, 1 / 4)  # of the pages that a pool without limit comes to hold
LOOK = 512  # steps between two looks at the waste


@dataclass
class Replayed:
    """What came of a trace on one pool; pages and tokens.

    asked, hits    prompt tokens, and those of them that were cached when their request began
    refused        requests that need more pages than the pool has
    evicted        pages that left the index
    held           most pages that sequences held at a time
    kept           pages in the index at the end
    waste          greatest share of held slots without a token, of the looks taken
    computed       tokens that went through the pretended model
    seconds        the replay took, all of it bookkeeping
    """

    num_pages: int
    requests: int = 0
    asked: int = 0
    hits: int = 0
    refused: int = 0
    evicted: int = 0
    preempted: int = 0
    held: int = 0
    kept: int = 0
    waste: list[float] = field(default_factory=list)
    computed: int = 0
    steps: int = 0
    seconds: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Share of the prompt tokens."""
        return self.hits / max(1, self.asked)

    def added(self, node: PrefixNode, group: int) -> None:
        """A page came into the index."""

    def leaving(self, node: PrefixNode, group: int) -> None:
        """A page leaves it."""
        self.evicted += 1


def pages_wanted(trace: Sequence[Arrival]) -> int:
    """Pages with which nothing is evicted."""
    return sum(pages_for(a.input_length + max(1, a.output_length), PAGE) + 1 for a in trace)


def natural_speed(trace: Sequence[Arrival]) -> float:
    """Tokens a second that keep the pretended engine busy for :data:`BUSY` of the trace."""
    tokens = sum(arrival.input_length + arrival.output_length for arrival in trace)
    return tokens / BUSY / max(1.0, trace[-1].seconds - trace[0].seconds)


class Replay:
    """One trace on one pool. ``cache`` and ``done`` can be looked at afterwards."""

    def __init__(self, trace: Sequence[Arrival], num_pages: int, speed: float) -> None:
        self.cache: KVCache = stub_cache(num_pages)
        self.done = Replayed(num_pages)
        assert self.cache.prefix is not None
        self.cache.prefix.observer = self.done
        self._queues = Queues(self.cache)
        self._tokens, self._speed = Tokens(trace), speed
        self._coming = deque(trace)
        self._replies: dict[Sample, deque[int]] = {}
        self._now = 0.0

    def run(self) -> Replayed:
        """Until every request was served."""
        start, queues = time.perf_counter(), self._queues
        while self._coming or queues.waiting or queues.running:
            if not queues.waiting and not queues.running:
                self._now = max(self._now, self._coming[0].seconds)
            while self._coming and self._coming[0].seconds <= self._now:
                self._submit(self._coming.popleft())
            if queues.waiting or queues.running:
                self._step()
        self.done.seconds = time.perf_counter() - start
        [self.done.kept] = self.cache.cached_pages
        return self.done

    def _submit(self, arrival: Arrival) -> None:
        done = self.done
        reply = self._tokens.of_reply(arrival)
        if pages_for(arrival.input_length + len(reply) - 1, PAGE) > done.num_pages:
            done.refused += 1
            return
        tokens = self._tokens.of_prompt(arrival)
        params = SamplingParams(max_new_tokens=len(reply), ignore_eos=True)
        request = Request(done.requests, tuple(tokens), params, 0, self._now)
        sample = Sample(request, 0, tokens)
        request.samples = (sample,)
        self._replies[sample] = deque(reply)
        self._queues.add(sample)
        done.requests, done.asked = done.requests + 1, done.asked + arrival.input_length

    def _step(self) -> None:
        """What Engine.step does, without the model."""
        done, cache, queues = self.done, self.cache, self._queues
        plan = plan_step(queues.running, queues.waiting, LIMITS, cache)
        for preemption in plan.preempt:
            queues.preempt(preemption.sample, preemption.reason)
            done.preempted += 1
        for sample, match in zip(plan.admit, plan.matches, strict=True):
            first = sample.cached_tokens is None
            queues.admit(sample, cache.create(match))
            done.hits += sample.computed if first else 0
        if not plan.chunks:
            raise RuntimeError(f"no sample can run on {done.num_pages} pages")
        chunks, ids = [], []
        for sample, count in plan.chunks:
            assert sample.sequence is not None
            chunks.append((sample.sequence, count))
            ids.append(sample.tokens[sample.computed : sample.computed + count])
        cache.commit(cache.reserve(chunks), ids)
        self._look()
        for sample, count in plan.chunks:
            self._advance(sample, count)
        tokens = sum(count for _, count in chunks)
        done.computed, done.steps = done.computed + tokens, done.steps + 1
        self._now += STEP_SECONDS + tokens / self._speed

    def _look(self) -> None:
        [free], done = self.cache.free_pages, self.done
        done.held = max(done.held, done.num_pages - free)
        if done.steps % LOOK == 0:
            usage = self.cache.usage()
            done.waste.append(usage.waste_bytes / max(1, usage.allocated_bytes))

    def _advance(self, sample: Sample, count: int) -> None:
        """Count ``count`` computed tokens; the next of the reply, or the end."""
        sample.computed += count
        if sample.computed < len(sample.tokens):
            return
        reply = self._replies[sample]
        sample.tokens.append(reply.popleft())
        if not reply:
            del self._replies[sample]
            self._queues.leave(sample, Status.FINISHED)


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
    endless = Replay(trace, pages_wanted(trace), speed).run()
    best = unbounded_hits(trace) / asked
    report.add(Figure("trace", "hit rate: a dict of prefixes", "of asked", [best]))
    _tell(report, "without limit", endless, endless)
    for share in SHARES:
        num_pages = max(1, int(endless.kept * share))
        done = Replay(trace, num_pages, speed).run()
        size = format_bytes(num_pages * LAYOUT.page_bytes(0))
        _tell(report, f"{num_pages:,} pages ({size})", done, endless)


def _tell(report: Report, name: str, done: Replayed, endless: Replayed) -> None:
    part = f"trace, {name}"
    size = format_bytes(done.kept * LAYOUT.page_bytes(0))
    of_best = f"{done.hit_rate / max(1e-9, endless.hit_rate):.0%} of what no limit gives"
    seconds = done.seconds * 1e6 / max(1, done.asked + done.computed)
    rows = [
        ("hit rate", "of asked", done.hit_rate, of_best),
        ("pages in the index at the end", "pages", done.kept, size),
        ("most pages held by sequences", "pages", done.held, ""),
        ("evicted", "pages", done.evicted, ""),
        ("preemptions", "", done.preempted, ""),
        ("requests too long for the pool", "", done.refused, ""),
        ("waste of held pages, at the most", "of slots", max(done.waste), ""),
        ("bookkeeping a token asked or computed", "us", seconds, f"{done.steps:,} steps"),
    ]
    report.title(f"  {name}")
    for row, unit, value, note in rows:
        report.add(Figure(part, row, unit, [value], note=note))
