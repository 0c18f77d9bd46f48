"""One suite for every tier, against a plain dict; and what host memory promises beside it."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.cache.disk import DiskTier
from quire.cache.tiers import HostTier, PageRecord, Tier
from quire.errors import ConfigError
from tier_records import ROOT, Clock, DictTier, chain, payload, record

BUDGET = 8 << 20
PAGE = 300_000  # bytes: some two dozen fit
IDENTITY = {"weights": "0123", "format": "bf16", "model": "tiny"}

Make = Callable[[], Tier]


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.cache.disk_store.SYNCHRONOUS", "OFF")  # nothing is killed here


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["host", "disk"])
def make(request: pytest.FixtureRequest, clock: Clock, tmp_path: Path) -> Iterator[Make]:
    """Makes an empty tier of each kind, as often as called."""
    made: list[Tier] = []

    def new() -> Tier:
        tier: Tier
        if request.param == "host":
            tier = HostTier(BUDGET, clock=clock)
        else:
            directory = tmp_path / f"cache{len(made)}"
            tier = DiskTier(directory, BUDGET, IDENTITY, clock=clock)
        made.append(tier)
        return tier

    yield new
    for tier in made:
        tier.close()


@pytest.fixture
def tier(make: Make) -> Tier:
    return make()


def put(tier: Tier, page: PageRecord, data: bytes) -> None:
    """Put and wait: the queue never fills up."""
    assert tier.put(page, data)
    tier.flush()


def held(tier: Tier, pages: list[PageRecord]) -> list[int]:
    """Positions in ``pages`` of those that are held."""
    return [i for i, there in enumerate(tier.contains([p.key for p in pages])) if there]


def test_a_page_comes_back_as_it_was_put(tier: Tier) -> None:
    sizes = (0, 1, 2, 3, 50_000, 1_000_001)
    for i, size in enumerate(sizes):
        assert tier.put(record(i), payload(i, size))
        assert tier.get(record(i)) == payload(i, size)  # at once, before anything is flushed
    tier.flush()
    assert [tier.get(record(i)) for i in range(6)] == [payload(i, s) for i, s in enumerate(sizes)]
    usage = tier.usage()
    assert (usage.stored, usage.pages, usage.hits, usage.misses) == (6, 6, 12, 0)
    assert (usage.dropped, usage.damaged, usage.queued, usage.off) == (0, 0, 0, None)


def test_a_payload_is_copied(tier: Tier) -> None:
    data = np.arange(5000, dtype=np.uint8)
    expected = data.tobytes()
    assert tier.put(record(1), data)
    data[:] = 0
    assert tier.get(record(1)) == expected
    assert tier.put(record(2), memoryview(bytearray(expected)))
    tier.flush()
    assert tier.get(record(2)) == expected


def test_what_is_not_there_is_a_miss(tier: Tier) -> None:
    assert tier.get(record(1)) is None
    assert tier.contains([record(1).key, record(2).key]) == [False, False]
    assert tier.contains([]) == []
    assert tier.usage().misses == 1


@pytest.mark.parametrize("flushed", [False, True])
@pytest.mark.parametrize("part", ["parent", "tokens"])
def test_other_parents_or_tokens_under_the_same_key_are_a_miss(
    tier: Tier, part: str, flushed: bool
) -> None:
    mine = replace(record(1), key=b"short")
    other = replace(mine, **{part: b"\xff" + getattr(mine, part)[1:]})
    assert tier.put(mine, b"mine" * 100)
    if flushed:
        tier.flush()
    assert tier.get(other) is None
    assert tier.get(mine) == b"mine" * 100
    assert tier.put(other, b"other" * 100)  # replaces
    assert tier.get(mine) is None
    tier.flush()
    assert (tier.get(mine), tier.get(other)) == (None, b"other" * 100)
    assert (tier.usage().pages, tier.usage().damaged) == (1, 0)


def test_what_is_held_is_not_written_again(tier: Tier) -> None:
    put(tier, record(1), b"same" * 100)
    put(tier, record(1), b"same" * 100)
    assert tier.get(record(1)) == b"same" * 100
    assert (tier.usage().stored, tier.usage().pages) == (1, 1)


def test_discarded_pages_are_gone_at_once(tier: Tier) -> None:
    pages = [record(i) for i in range(4)]
    for i, page in enumerate(pages[:3]):
        put(tier, page, payload(i, 1000))
    tier.put(pages[3], payload(3, 1000))
    tier.discard([pages[0].key, pages[3].key, b"unknown"])
    assert held(tier, pages) == [1, 2]
    assert tier.get(pages[0]) is None
    tier.flush()
    assert held(tier, pages) == [1, 2]
    put(tier, pages[0], payload(0, 1000))
    assert tier.get(pages[0]) == payload(0, 1000)


def test_the_least_recently_used_go_first(tier: Tier, clock: Clock) -> None:
    pages = [record(i) for i in range(40)]
    for i in range(16):
        clock.now += 1
        put(tier, pages[i], payload(i, PAGE))
    clock.now += 1
    assert tier.get(pages[0]) is not None
    assert tier.get(pages[3]) is not None
    for i in range(16, 32):
        clock.now += 1
        put(tier, pages[i], payload(i, PAGE))
    survivors = held(tier, pages)
    assert {0, 3} <= set(survivors)
    rest = [i for i in survivors if i not in (0, 3)]
    assert rest == list(range(32 - len(rest), 32))  # the newest
    usage = tier.usage()
    assert usage.evicted == 32 - len(survivors)
    assert len(survivors) * PAGE > BUDGET * 0.6  # the budget is made use of


def test_of_equally_recent_pages_the_deepest_go_first(tier: Tier, clock: Clock) -> None:
    pages = chain(0, 15)
    for i in reversed(range(15)):
        put(tier, pages[i], payload(i, PAGE))
    clock.now += 1
    for i in range(15, 28):
        put(tier, record(i), payload(i, PAGE))
    survivors = held(tier, pages)
    assert 0 < len(survivors) < 15
    assert survivors == list(range(len(survivors)))  # the head of the chain


def test_a_page_larger_than_the_tier_takes_is_refused_with_the_numbers(tier: Tier) -> None:
    assert not tier.put(record(1), bytes(BUDGET + 1))
    usage = tier.usage()
    assert (usage.dropped, usage.stored, usage.pages) == (1, 0, 0)
    assert usage.last_drop is not None
    assert "8 MiB" in usage.last_drop


def test_room_is_what_would_be_taken_now(tier: Tier) -> None:
    number = 0
    while tier.room() >= PAGE and number < 100:
        assert tier.put(record(number), payload(number, PAGE))
        number += 1
    assert number > 5
    tier.flush()
    assert tier.room() > PAGE
    tier.close()
    assert tier.room() == 0
    assert tier.usage().dropped == 0


def test_a_closed_tier_holds_and_takes_nothing(tier: Tier) -> None:
    put(tier, record(1), b"x" * 100)
    tier.close()
    tier.close()
    assert tier.contains([record(1).key]) == [False]
    assert tier.get(record(1)) is None
    assert not tier.put(record(2), b"y")
    tier.flush()
    tier.discard([record(1).key])
    assert "closed" in str(tier.usage().off)
    assert "closed" in str(tier.usage().last_drop)


def test_threads_get_what_was_put_under_their_key_or_nothing(tier: Tier) -> None:
    wrong: list[int] = []
    pages = [record(i) for i in range(60)]  # more than fit

    def work(seed: int) -> None:
        generator = np.random.default_rng(seed)
        for _ in range(60):
            i = int(generator.integers(60))
            verb = int(generator.integers(8))
            if verb < 3:
                tier.put(pages[i], payload(i, PAGE))
            elif verb == 3:
                tier.discard([pages[i].key])
            elif verb == 4:
                tier.contains([page.key for page in pages])
            elif tier.get(pages[i]) not in (None, payload(i, PAGE)):
                wrong.append(i)
            if tier.usage().bytes_used > BUDGET:
                wrong.append(-1)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tier.flush()
    assert wrong == []
    assert (tier.usage().off, tier.usage().damaged) == (None, 0)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "put", "get", "get", "discard", "wait", "flush"]),
        st.integers(0, 7),  # key
        st.integers(0, 1),  # variant: other tokens under the same key
    ),
    max_size=40,
)


def variant(key: int, tokens: int) -> PageRecord:
    return PageRecord(b"key%d" % key, ROOT, b"%d" % tokens, key % 3, 1)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=STEPS)
def test_any_history_without_pressure_is_that_of_a_dict(
    make: Make, clock: Clock, steps: list[tuple[str, int, int]]
) -> None:
    tier, model = make(), DictTier()
    for verb, key, tokens in steps:
        page, data = variant(key, tokens), payload(2 * key + tokens, 100 + key)
        if verb == "put":
            assert tier.put(page, data)
            model.put(page, data, clock.now)
        elif verb == "get":
            assert tier.get(page) == model.get(page, clock.now)
        elif verb == "discard":
            tier.discard([page.key])
            model.discard(page.key)
        elif verb == "flush":
            tier.flush()
        clock.now += verb == "wait"
    keys = [b"key%d" % key for key in range(8)]
    for _ in ("queued", "written"):
        assert tier.contains(keys) == [key in model.held for key in keys]
        for page, data in model.held.values():
            assert tier.get(page) == data
        tier.flush()
    assert tier.usage().pages == len(model.held)
    tier.close()


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["put", "get", "wait"]), st.integers(0, 39)),
        min_size=30,
        max_size=60,
    )
)
def test_under_pressure_whoever_goes_was_not_used_after_one_who_stays(
    make: Make, clock: Clock, steps: list[tuple[str, int]]
) -> None:
    tier, model = make(), DictTier()
    pages = [record(i, depth=i % 5) for i in range(40)]
    keys = [page.key for page in pages]
    for i in range(22):  # nearly full
        put(tier, pages[i], payload(i, PAGE))
        model.put(pages[i], payload(i, PAGE), clock.now)
    before = {key for key, there in zip(keys, tier.contains(keys), strict=True) if there}
    for verb, i in steps:
        clock.now += verb == "wait"
        if verb == "get" and keys[i] in before:
            assert tier.get(pages[i]) == model.get(pages[i], clock.now)
            tier.flush()
        elif verb == "put":
            put(tier, pages[i], payload(i, PAGE))
            after = {key for key, there in zip(keys, tier.contains(keys), strict=True) if there}
            gone, stayed = before - after, before & after - {keys[i]}
            assert all(model.order(a) <= model.order(b) for a in gone for b in stayed)
            assert keys[i] in after
            model.put(pages[i], payload(i, PAGE), clock.now)
            before = after
        assert tier.usage().bytes_used <= BUDGET
    tier.close()


# -- host memory alone


def test_the_host_tier_counts_token_ids_and_its_books() -> None:
    tier = HostTier(100_000)
    page = replace(record(1), tokens=bytes(50_000))
    assert tier.put(page, bytes(10_000))
    assert 60_000 < tier.usage().bytes_used < 62_000
    assert not tier.put(replace(record(2), tokens=bytes(99_000)), b"")


def test_a_host_budget_must_be_a_size() -> None:
    with pytest.raises(ConfigError, match="positive"):
        HostTier(0)


def test_many_uses_do_not_grow_the_books(clock: Clock) -> None:
    tier = HostTier(1 << 20, clock=clock)
    for i in range(4):
        tier.put(record(i), bytes(100))
    for i in range(4000):
        clock.now += 1
        assert tier.get(record(i % 4)) is not None
    tier.put(record(5), bytes(1 << 19))
    assert tier.put(record(6), bytes((1 << 20) - 5000))  # pushes out what is least recent
    assert held(tier, [record(i) for i in range(7)])[-1] == 6
