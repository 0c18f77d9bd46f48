"""The scheduler as a pure function, on made-up caches; then on the real KVCache to the end."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire import KVCache, SamplingParams
from quire.backends.reference import ReferencePool
from quire.cache import PrefixMatch, PrefixQuery
from quire.engine.request import Request, Sample, Status
from quire.engine.scheduler import CacheView, Limits, StepPlan, plan_step
from quire.layout import CacheLayout, LayerGroup
from quire.pages import PageShape, page_format

Pages = tuple[int, ...]


@dataclass
class FakeCache:
    """A cache view in a few lines: one group that keeps everything and, if asked, one windowed.

    ``shared`` are the pages of a sequence that someone else holds, too.
    """

    page_size: int
    free_pages: Pages
    window: int | None = None
    lengths: dict[int, int] = field(default_factory=dict)
    shared: dict[int, int] = field(default_factory=dict)

    def _held(self, length: int) -> Pages:
        """Pages of each group that a sequence of ``length`` tokens holds between steps."""
        end = -(-length // self.page_size)
        if self.window is None:
            return (end,)
        return end, end - max(0, length - self.window + 1) // self.page_size

    def match(self, query: PrefixQuery, limit: int) -> None:
        """Nothing is cached."""

    def shareable(self, tokens: int) -> int:
        return 0

    def cost(self, sequence: int | PrefixMatch | None, new_tokens: int) -> Pages:
        assert not isinstance(sequence, PrefixMatch)
        length = 0 if sequence is None else self.lengths[sequence]
        more = -(-(length + new_tokens) // self.page_size) - -(-length // self.page_size)
        return (more,) * len(self.free_pages)

    def growth(self, sequence: int | PrefixMatch | None, new_tokens: int) -> Pages:
        """By growing it, token by token."""
        assert not isinstance(sequence, PrefixMatch)
        length = 0 if sequence is None else self.lengths[sequence]
        start = self._held(length)
        most = [0] * len(start)
        for at in range(length, length + new_tokens):
            taken = -(-(at + 1) // self.page_size) - -(-at // self.page_size)
            for group, held in enumerate(self._held(at)):
                most[group] = max(most[group], held + taken - start[group])
        return tuple(most)

    def freed_by_release(self, sequence: int) -> Pages:
        held = self._held(self.lengths[sequence])
        return tuple(max(0, pages - self.shared.get(sequence, 0)) for pages in held)


def sample_of(arrival: int, tokens: int, computed: int = 0, sequence: int | None = None) -> Sample:
    request = Request(arrival, (1,), SamplingParams(), 0, 0.0)
    sample = Sample(request, 0, [1] * tokens, sequence=sequence, computed=computed)
    sample.status = Status.WAITING if sequence is None else Status.RUNNING
    return sample


@dataclass(repr=False)
class Case:
    """One call of ``plan_step``."""

    cache: FakeCache
    limits: Limits
    running: list[Sample]
    waiting: list[Sample]

    def __repr__(self) -> str:
        running = [f"{s.computed}+{s.pending}" for s in self.running]
        return f"{self.cache} {self.limits} {running} {[s.pending for s in self.waiting]}"

    def plan(self) -> StepPlan:
        return plan_step(self.running, self.waiting, self.limits, self.cache)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    page_size = draw(st.sampled_from([1, 2, 4, 16]))
    window = draw(st.sampled_from([None, None, 1, 3, 8]))
    groups = 1 if window is None else 2
    free = tuple(draw(st.integers(0, 12)) for _ in range(groups))
    cache = FakeCache(page_size, free, window)
    running = []
    for arrival in range(draw(st.integers(0, 6))):
        computed = draw(st.integers(0, 40))
        pending = 1 if draw(st.booleans()) else draw(st.integers(1, 40))
        cache.lengths[arrival] = computed
        cache.shared[arrival] = draw(st.sampled_from([0, 0, 0, 1, 50]))
        running.append(sample_of(arrival, computed + pending, computed, sequence=arrival))
    waiting = [sample_of(10 + i, draw(st.integers(1, 40))) for i in range(draw(st.integers(0, 4)))]
    limits = Limits(draw(st.sampled_from([1, 2, 3, 5, 8, 20, 64])), draw(st.integers(1, 8)))
    return Case(cache, limits, running, waiting)


def add(*parts: Sequence[int]) -> Pages:
    return tuple(map(sum, zip(*parts, strict=True)))


def cost_of(case: Case, chunks: Sequence[tuple[Sample, int]]) -> Pages:
    nothing = (0,) * len(case.cache.free_pages)
    return add(nothing, *(case.cache.cost(sample.sequence, count) for sample, count in chunks))


def freed_by(case: Case, samples: Sequence[Sample]) -> Pages:
    released = [case.cache.freed_by_release(s.sequence) for s in samples if s.sequence is not None]
    return add(case.cache.free_pages, *released)


def fits(need: Pages, free: Pages) -> bool:
    return all(n <= f for n, f in zip(need, free, strict=True))


def given_cases(test: Callable[[Case], None]) -> Callable[[], None]:
    return settings(deadline=None, max_examples=200)(given(case=cases())(test))


@given_cases
def test_a_plan_keeps_the_budget_and_the_limit_of_sequences(case: Case) -> None:
    plan = case.plan()
    assert sum(count for _, count in plan.chunks) <= case.limits.max_batch_tokens
    left = len(case.running) - len(plan.preempt)
    assert left + len(plan.admit) <= max(left, case.limits.max_sequences)
    assert all(1 <= count <= sample.pending for sample, count in plan.chunks)
    planned = [id(sample) for sample, _ in plan.chunks]
    assert len(planned) == len(set(planned))


@given_cases
def test_a_plan_never_takes_more_pages_than_are_free_or_given_back(case: Case) -> None:
    plan = case.plan()
    free = freed_by(case, [preemption.sample for preemption in plan.preempt])
    assert fits(cost_of(case, plan.chunks), free)


@given_cases
def test_the_oldest_makes_progress_if_it_could_alone(case: Case) -> None:
    if not case.running:
        return
    oldest, *behind = case.running
    could = fits(case.cache.cost(oldest.sequence, 1), freed_by(case, behind))
    plan = case.plan()
    assert oldest not in [preemption.sample for preemption in plan.preempt]
    assert could == (oldest in [sample for sample, _ in plan.chunks])


@given_cases
def test_only_the_youngest_give_way_and_only_to_older_ones(case: Case) -> None:
    plan = case.plan()
    victims = [preemption.sample for preemption in plan.preempt]
    assert victims == case.running[::-1][: len(victims)]
    planned = [sample.request.arrival for sample, _ in plan.chunks]
    assert all(arrival < victim.request.arrival for victim in victims for arrival in planned)
    if victims:
        assert not plan.admit  # or pages would go to and fro


@given_cases
def test_nobody_gives_way_without_need(case: Case) -> None:
    """Without what the last victim gave, some older sample could not run after those before it."""
    plan = case.plan()
    victims = [preemption.sample for preemption in plan.preempt]
    if not victims:
        return
    free, taken, starved = freed_by(case, victims[:-1]), cost_of(case, ()), False
    given_tokens = {id(sample): count for sample, count in plan.chunks}
    for sample in case.running[: -len(victims)]:
        starved |= not fits(add(taken, case.cache.cost(sample.sequence, 1)), free)
        taken = add(taken, case.cache.cost(sample.sequence, given_tokens.get(id(sample), 0)))
    assert starved


@given_cases
def test_admission_is_in_order_of_arrival(case: Case) -> None:
    plan = case.plan()
    assert list(plan.admit) == case.waiting[: len(plan.admit)]
    order = [sample.request.arrival for sample, _ in plan.chunks]
    assert order == sorted(order)
    started = [sample for sample, _ in plan.chunks if sample.sequence is None]
    assert started == list(plan.admit)


@given_cases
def test_an_admitted_sample_fits_with_all_its_tokens(case: Case) -> None:
    """Beside what older ones still need for the tokens they have: else it would soon give way."""
    plan = case.plan()
    if not plan.admit:
        return
    wanted = [(sample.sequence, sample.pending) for sample in [*case.running, *plan.admit]]
    need = add(*(case.cache.growth(sequence, pending) for sequence, pending in wanted))
    if case.cache.window is None:  # pages behind a window come back, so there they may be lent
        assert fits(need, case.cache.free_pages)


@given_cases
def test_decodes_come_before_prefills(case: Case) -> None:
    plan = case.plan()
    victims = [preemption.sample for preemption in plan.preempt]
    given_tokens = {id(sample): count for sample, count in plan.chunks}
    decodes = [sample for sample in case.running if sample.pending == 1 and sample not in victims]
    if len(case.running) <= case.limits.max_batch_tokens:
        need_no_page = [s for s in decodes if not any(case.cache.cost(s.sequence, 1))]
        assert all(given_tokens.get(id(sample)) == 1 for sample in need_no_page)
    for sample in case.running:
        if sample.pending > 1 and id(sample) in given_tokens:
            younger = [d for d in decodes if d.request.arrival > sample.request.arrival]
            room = case.limits.max_batch_tokens - len(younger)
            assert given_tokens[id(sample)] <= max(1, room)


@given_cases
def test_a_plan_changes_nothing_and_is_repeatable(case: Case) -> None:
    def state() -> tuple[Any, ...]:
        samples = [*case.running, *case.waiting]
        facts = [(id(s), s.status, s.sequence, s.computed, list(s.tokens)) for s in samples]
        return facts, copy.deepcopy(vars(case.cache)), len(case.running), len(case.waiting)

    before = state()
    first = case.plan()
    assert state() == before
    assert case.plan() == first


# -- single cases, by hand


def test_a_long_prompt_is_prefilled_in_chunks_beside_decodes() -> None:
    cache = FakeCache(4, (100,), lengths={0: 0, 1: 9, 2: 5})
    prefill, one, two = sample_of(0, 50, 0, 0), sample_of(1, 10, 9, 1), sample_of(2, 6, 5, 2)
    plan = plan_step([prefill, one, two], [], Limits(16, 8), cache)
    assert plan.chunks == ((prefill, 14), (one, 1), (two, 1))


def test_budget_that_is_left_admits_waiting_samples() -> None:
    cache = FakeCache(4, (100,), lengths={0: 9})
    running, first, second, third = sample_of(0, 10, 9, 0), *(sample_of(i, 6) for i in (1, 2, 3))
    plan = plan_step([running], [first, second, third], Limits(10, 8), cache)
    assert plan.chunks == ((running, 1), (first, 6), (second, 3))
    assert plan.admit == (first, second)


def test_a_short_request_does_not_overtake_one_that_waits_for_pages() -> None:
    cache = FakeCache(4, (3,), lengths={0: 9})
    large, small = sample_of(1, 30), sample_of(2, 1)
    plan = plan_step([sample_of(0, 10, 9, 0)], [large, small], Limits(64, 8), cache)
    assert plan.admit == ()


def test_one_spare_page_for_each_running_sample_is_kept() -> None:
    lengths = {0: 8, 1: 8}  # two decodes that take a page each now
    running = [sample_of(i, 9, 8, i) for i in (0, 1)]
    enough = FakeCache(4, (2 + 1 + 2,), lengths=lengths)
    assert plan_step(running, [sample_of(2, 4)], Limits(64, 8), enough).admit
    tight = FakeCache(4, (2 + 1 + 1,), lengths=lengths)
    assert not plan_step(running, [sample_of(2, 4)], Limits(64, 8), tight).admit


def test_the_youngest_gives_its_pages_to_the_oldest_and_the_reason_says_so() -> None:
    cache = FakeCache(4, (0,), lengths={3: 8, 4: 6, 5: 7})
    old, middle, young = sample_of(3, 9, 8, 3), sample_of(4, 7, 6, 4), sample_of(5, 8, 7, 5)
    plan = plan_step([old, middle, young], [sample_of(6, 1)], Limits(64, 8), cache)
    assert [preemption.sample for preemption in plan.preempt] == [young]
    assert plan.chunks == ((old, 1), (middle, 1))
    assert plan.preempt[0].reason == (
        "8 tokens gave way at 7 computed: request 3, which is older, needed pages and (0,) were "
        "free"
    )


def test_the_youngest_waits_in_place_when_there_is_no_page() -> None:
    cache = FakeCache(4, (0,), lengths={0: 5, 1: 8})
    old, young = sample_of(0, 6, 5, 0), sample_of(1, 9, 8, 1)
    plan = plan_step([old, young], [], Limits(64, 8), cache)
    assert plan.chunks == ((old, 1),)
    assert plan.preempt == ()


def test_the_youngest_gives_way_to_an_older_one_that_waits_when_nothing_can_run() -> None:
    cache = FakeCache(4, (0,), lengths={1: 8, 4: 8})
    # A beam that waits for its sibling, which was preempted, and a younger one without a page.
    held, young = sample_of(1, 8, 8, 1), sample_of(4, 9, 8, 4)
    waiting = [sample_of(1, 9), sample_of(6, 2)]
    plan = plan_step([held, young], waiting, Limits(64, 8), cache)
    assert (plan.chunks, plan.admit) == ((), ())
    assert [preemption.sample for preemption in plan.preempt] == [young]
    # Nobody gives way to a younger one.
    assert plan_step([held, young], waiting[1:], Limits(64, 8), cache).preempt == ()


def test_a_prefill_takes_the_part_that_fits() -> None:
    cache = FakeCache(4, (2,), lengths={0: 3})
    sample = sample_of(0, 40, 3, 0)
    plan = plan_step([sample], [], Limits(64, 8), cache)
    assert plan.chunks == ((sample, 9),)  # one slot of its page and two pages


def test_more_decodes_than_budget_serve_the_oldest_first() -> None:
    running = [sample_of(i, 10, 9, i) for i in range(5)]
    cache = FakeCache(4, (100,), lengths=dict.fromkeys(range(5), 9))
    plan = plan_step(running, [], Limits(3, 8), cache)
    assert plan.chunks == tuple((sample, 1) for sample in running[:3])


def test_nothing_to_do_is_an_empty_plan() -> None:
    assert plan_step([], [], Limits(8, 8), FakeCache(4, (4,))) == StepPlan((), (), (), ())


def test_a_kvcache_is_a_cache_view() -> None:
    view: CacheView = small_cache(4, (4,), [None])
    assert view.free_pages == (4,)


# -- to the end, on the real cache


def small_cache(page_size: int, num_pages: Pages, windows: Sequence[int | None]) -> KVCache:
    shape = PageShape(page_size, 1, 1, 1, *[page_format("fp16")] * 2)
    groups = tuple(LayerGroup((layer,), window) for layer, window in enumerate(windows))
    layout = CacheLayout(page_size, groups, (shape,) * len(groups))
    return KVCache(layout, num_pages, [ReferencePool(shape, pages) for pages in num_pages])


class Simulation:
    """Queues and a cache without a model: what the engine does with plans, and nothing else."""

    def __init__(self, cache: KVCache, limits: Limits) -> None:
        self.cache, self.limits = cache, limits
        self.running: list[Sample] = []
        self.waiting: list[Sample] = []
        self.finished: list[int] = []
        self.preemptions = 0

    def submit(self, arrival: int, prompt: int) -> None:
        self.waiting.append(sample_of(arrival, prompt))

    def step(self, lengths: dict[int, int]) -> None:
        """One step; a sample is done when it has the tokens that ``lengths`` gives its request."""
        plan = plan_step(self.running, self.waiting, self.limits, self.cache)
        for sample in [preemption.sample for preemption in plan.preempt]:
            self._leave(sample)
            self.waiting.append(sample)
            self.preemptions += 1
        for sample in plan.admit:
            sample.sequence = self.cache.create()
            self.waiting.remove(sample)
            self.running.append(sample)
        self.waiting.sort(key=lambda sample: sample.request.arrival)
        self.running.sort(key=lambda sample: sample.request.arrival)
        assert plan.chunks, "a step that does nothing would never end"
        assert len(self.running) <= self.limits.max_sequences
        chunks = [(s.sequence, count) for s, count in plan.chunks if s.sequence is not None]
        self.cache.commit(self.cache.reserve(chunks))
        for sample, count in plan.chunks:
            sample.computed += count
            if sample.pending == 0:
                sample.tokens.append(1)
                if len(sample.tokens) >= lengths[sample.request.arrival]:
                    self._leave(sample)
                    self.finished.append(sample.request.arrival)
        self.cache.check()

    def _leave(self, sample: Sample) -> None:
        assert sample.sequence is not None
        self.cache.release(sample.sequence)
        self.running.remove(sample)
        sample.sequence, sample.computed = None, 0


def simulate(seed: int, windows: Sequence[int | None]) -> Simulation:
    """A random workload until all is done; the bound on steps is generous and finite."""
    random = np.random.default_rng(seed)
    page_size = int(random.choice([1, 2, 4, 8]))
    prompts = random.integers(1, 40, random.integers(3, 12)).tolist()
    lengths = {i: prompt + int(random.integers(1, 30)) for i, prompt in enumerate(prompts)}
    longest = max(lengths.values()) - 1  # the last token is never fed back
    smallest = [LayerGroup((0,), window).most_pages(longest, 1, page_size) for window in windows]
    extra = int(random.integers(0, 2 * max(smallest)))
    cache = small_cache(page_size, tuple(pages + extra for pages in smallest), windows)
    limits = Limits(int(random.choice([1, 3, 8, 64])), int(random.choice([1, 2, 4, 16])))
    simulation = Simulation(cache, limits)
    todo = list(enumerate(prompts))
    worst = sum(lengths.values()) * (len(prompts) + 1)
    for _ in range(worst):
        while todo and (random.random() < 0.5 or not (simulation.running or simulation.waiting)):
            simulation.submit(*todo.pop(0))
        simulation.step(lengths)
        if not todo and not simulation.running and not simulation.waiting:
            break
    assert sorted(simulation.finished) == list(range(len(prompts)))
    assert cache.free_pages == cache.num_pages
    assert cache.sequences == ()
    return simulation


@pytest.mark.parametrize("windows", [[None], [None, 6], [5]], ids=str)
def test_random_workloads_end_and_every_request_completes(windows: list[int | None]) -> None:
    preempting = sum(simulate(seed, windows).preemptions > 0 for seed in range(40))
    if None in windows:
        assert preempting >= 4  # the pools are tight enough to mean something
