"""Tiers below the pool: what was computed once comes back, the same bits, after anything."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quire
from quire.cache import KVCache
from quire.cache.tiers import HostTier
from quire.engine.tiering import Pace
from quire.errors import ConfigError
from recording import Recorder, assert_warm_is_cold
from tiny import WRITERS, random_prompt, write_llama

ONE = quire.SamplingParams(max_new_tokens=1, ignore_eos=True)
SHORT = quire.SamplingParams(max_new_tokens=5, ignore_eos=True)


def engine_with(
    directory: Path, num_pages: int = 12, *, eager: bool = True, **settings: Any
) -> quire.Engine:
    """An engine that, if ``eager``, takes its model for slow: tiny ones would never load."""
    cache = quire.CacheConfig(**({"page_size": 4, "num_pages": num_pages} | settings))
    engine = quire.Engine(directory, backend="reference", cache=cache, max_batch_tokens=13)
    if eager and engine._tiers is not None:
        engine._tiers.compute_pace.add = lambda seconds, units: None  # type: ignore[method-assign]
        engine._tiers.compute_pace.seconds = 1e3
    return engine


def run(engine: quire.Engine, prompt: list[int], params: quire.SamplingParams) -> quire.Completion:
    [completion] = engine.generate([prompt], params)
    engine.cache.check()
    return completion


@pytest.mark.usefixtures("every_backend")
@pytest.mark.parametrize("kind", list(WRITERS))
def test_pages_that_the_pool_gave_up_come_back_from_host_memory(
    models: dict[str, Path], kind: str
) -> None:
    engine = engine_with(models[kind], host_cache="4MiB")
    first, other = random_prompt(38, seed=1), random_prompt(46, seed=2)
    run(engine, first, ONE)
    run(engine, other, ONE)  # takes every page of the pool
    recorder = Recorder(engine, all_rows=True)
    again = run(engine, [*first, *random_prompt(3, seed=3)], SHORT)
    tiers = again.cached_tokens_by_tier
    assert tiers["pool"] + tiers["host"] == 36
    assert tiers["host"] >= 12
    assert tiers["disk"] == 0
    assert again.tier_decision is not None
    assert "loaded" in again.tier_decision
    assert_warm_is_cold(models[kind], recorder)


@pytest.mark.usefixtures("every_backend")
@pytest.mark.parametrize("kind", list(WRITERS))
def test_a_restart_finds_its_prefixes_on_disk(
    models: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    prompt = random_prompt(38, seed=4)
    with engine_with(models[kind], num_pages=24, cache_dir=tmp_path) as engine:
        run(engine, prompt, ONE)
    with engine_with(models[kind], num_pages=24, cache_dir=tmp_path) as engine:
        explained = engine.explain_prefix(prompt)
        assert explained.cached_tokens_by_tier == {"pool": 0, "host": 0, "disk": 36}
        assert "36 on disk" in explained.reasons[0]
        recorder = Recorder(engine, all_rows=True)
        again = run(engine, [*prompt, *random_prompt(3, seed=5)], SHORT)
        assert again.cached_tokens_by_tier == {"pool": 0, "host": 0, "disk": 36}
        assert_warm_is_cold(models[kind], recorder)
        explained = engine.explain_prefix([*prompt, 1, 2])
        assert explained.cached_tokens_by_tier["pool"] == 38
        warm = run(engine, prompt, ONE)
        assert warm.cached_tokens_by_tier == {"pool": 37, "host": 0, "disk": 0}


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_another_process_reads_what_this_one_stored(
    models: dict[str, Path], tmp_path: Path, backend: str
) -> None:
    code = f"""
import quire, sys
cache = quire.CacheConfig(page_size=4, num_pages=24, cache_dir=sys.argv[2])
with quire.Engine(sys.argv[1], backend={backend!r}, cache=cache) as engine:
    engine._tiers.compute_pace.seconds = 1e3  # a tiny model would never load
    params = quire.SamplingParams(max_new_tokens=3, ignore_eos=True, logprobs=5)
    [done] = engine.generate([{random_prompt(38, seed=6)}], params)
print(done.cached_tokens_by_tier["disk"])
print(done.logprobs)  # float64, of every bit of the logits
"""
    told = [
        subprocess.run(
            [sys.executable, "-c", code, models["full"], tmp_path],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        for _ in range(2)
    ]
    assert [int(first) for first, _ in told] == [0, 36]
    assert told[0][1] == told[1][1]


def test_other_weights_or_settings_never_meet(models: dict[str, Path], tmp_path: Path) -> None:
    prompt = random_prompt(38, seed=7)
    other_weights = write_llama(tmp_path / "other", dtype="bf16", seed=1)
    other_rope = write_llama(tmp_path / "rope", dtype="bf16", rope_theta=20_000.0)
    store = tmp_path / "store"

    def cached(directory: Path, salt: str = "", **settings: Any) -> int:
        with engine_with(directory, 24, cache_dir=store, **settings) as engine:
            request = engine.submit(prompt, ONE, salt=salt)
            while not request.finished:
                engine.step()
            return request.completions[0].cached_tokens

    assert cached(models["full"]) == 0
    assert cached(other_weights) == 0
    assert cached(other_rope) == 0
    assert cached(models["full"], kv_format="fp32") == 0
    assert cached(models["full"], page_size=2) == 0
    assert cached(models["full"], salt="tenant") == 0
    assert cached(models["full"]) == 36
    assert cached(models["full"], salt="tenant") == 36


def test_a_tier_that_is_slower_than_computing_is_not_used(models: dict[str, Path]) -> None:
    engine = engine_with(models["full"], eager=False, host_cache="4MiB")
    assert engine._tiers is not None
    first = random_prompt(38, seed=8)
    run(engine, first, ONE)
    run(engine, random_prompt(46, seed=9), ONE)
    engine._tiers._paces["host"].add(1e6, 1)
    again = run(engine, first, ONE)
    assert again.cached_tokens_by_tier["host"] == 0
    assert again.tier_decision is not None
    assert "computed: loading is expected to take" in again.tier_decision


def test_a_pace_is_that_of_what_takes_long() -> None:
    """Ten milliseconds to begin and one a token: short chunks behind a long one say little."""
    pace = Pace(5.0)
    assert pace.of(2) == 10.0  # a guess
    pace.add(0.522, 512)
    assert pace.of(512) == pytest.approx(0.522)
    for _ in range(10):
        pace.add(0.017, 7)
    assert 1.0 < pace.of(1000) < 1.25  # each by itself: 2.4
    pace.add(0.0, 0)
    for _ in range(12):
        pace.add(2.0, 512)  # it has become slow
    assert pace.of(512) == pytest.approx(2.0, rel=0.01)


def test_preempted_samples_are_swapped_and_not_computed_again(models: dict[str, Path]) -> None:
    params = quire.SamplingParams(max_new_tokens=24, ignore_eos=True)
    prompts = [random_prompt(17, seed=10), random_prompt(18, seed=11)]

    def computed(**tiers: Any) -> tuple[int, list[tuple[int, ...]]]:
        engine = engine_with(models["full"], num_pages=14, **tiers)
        recorder = Recorder(engine, all_rows=True)
        done = engine.generate(prompts, params)
        assert engine.status().preemptions
        if tiers:
            assert_warm_is_cold(models["full"], recorder)
        return len(recorder.rows), [completion.token_ids for completion in done]

    without, expected = computed()
    swapped, tokens = computed(host_cache="4MiB")
    assert tokens == expected
    once = sum(len(prompt) for prompt in prompts) + 2 * 23
    assert once <= swapped < without  # but for the tokens of an unfinished page


def test_many_that_wait_for_one_prefix_load_it_once(
    models: dict[str, Path], tmp_path: Path
) -> None:
    shared = random_prompt(36, seed=12)
    with engine_with(models["full"], num_pages=64, cache_dir=tmp_path) as engine:
        run(engine, [*shared, 1], ONE)
    with engine_with(models["full"], num_pages=64, cache_dir=tmp_path) as engine:
        done = engine.generate([[*shared, i, i] for i in range(6)], ONE)
        by_tier = [completion.cached_tokens_by_tier for completion in done]
        assert [tiers["disk"] for tiers in by_tier] == [36, 0, 0, 0, 0, 0]
        assert [tiers["pool"] for tiers in by_tier] == [0, 36, 36, 36, 36, 36]


@pytest.mark.parametrize("num_pages", [(40, 6), (40, 8), (24, 4)])
def test_a_windows_few_pages_only_shorten_what_is_loaded(
    models: dict[str, Path], tmp_path: Path, num_pages: tuple[int, int]
) -> None:
    """A long prompt is loaded at once; the pool of a windowed group need not hold all of it."""
    prompt = random_prompt(70, seed=22)
    with engine_with(models["mixed"], num_pages=40, cache_dir=tmp_path) as engine:
        expected = run(engine, prompt, SHORT).token_ids
    make = KVCache.__init__

    def narrow(cache: KVCache, layout: Any, counts: Any, pools: Any, identity: Any = None) -> None:
        make(cache, layout, num_pages, pools, identity)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVCache, "__init__", narrow)
        engine = engine_with(models["mixed"], num_pages=40, cache_dir=tmp_path)
    with engine:
        done = run(engine, prompt, SHORT)
        assert done.token_ids == expected
        assert done.cached_tokens_by_tier["disk"] <= num_pages[1] * 4


def test_a_request_can_be_cancelled_while_it_loads(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = random_prompt(38, seed=13)
    with engine_with(models["full"], num_pages=24, cache_dir=tmp_path) as engine:
        run(engine, prompt, ONE)
    with engine_with(models["full"], num_pages=24, cache_dir=tmp_path) as engine:
        assert engine._tiers is not None
        disk, gate = engine._tiers.tiers["disk"], threading.Event()
        get = disk.get
        monkeypatch.setattr(disk, "get", lambda record: gate.wait(10) and get(record))
        request = engine.submit(prompt, ONE)
        other = engine.submit(random_prompt(9, seed=14), ONE)
        engine.step()
        assert other.finished  # steps go on while the other loads
        assert not request.finished
        gate.set()
        engine.cancel(request)
        assert request.finished
        engine.cache.check()
        assert engine.cache.sequences == ()


def test_damage_and_loss_in_a_tier_only_cost_time(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = random_prompt(38, seed=15)
    with engine_with(models["full"], num_pages=24, cache_dir=tmp_path) as engine:
        expected = run(engine, prompt, SHORT).token_ids
    with engine_with(models["full"], num_pages=24, cache_dir=tmp_path) as engine:
        assert engine._tiers is not None
        disk, calls = engine._tiers.tiers["disk"], iter(range(100))
        get = disk.get
        monkeypatch.setattr(disk, "get", lambda record: get(record) if next(calls) < 4 else None)
        again = run(engine, prompt, SHORT)
        assert again.cached_tokens_by_tier["disk"] == 16
        assert again.token_ids == expected


def test_settings_that_cannot_work_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    for wrong, message in [
        ({"disk_cache": "1GiB"}, "disk_cache needs a cache_dir"),
        ({"host_cache": "1GiB", "prefix_cache": False}, "host_cache needs prefix_cache"),
        ({"cache_dir": tmp_path, "page_size": "whole"}, "never whole"),
        ({"cache_dir": 7}, "cache_dir must be a path"),
        ({"host_cache": "lots"}, "not a size in bytes"),
    ]:
        with pytest.raises(ConfigError, match=message):
            quire.CacheConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="too small for pages of"):
        engine_with(models["full"], host_cache=64)


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_exported_pages_come_back_the_same(models: dict[str, Path], page_size: int) -> None:
    cache = quire.CacheConfig(page_size=page_size, num_pages=40, prefix_cache=False)
    for backend in ("reference", "native"):
        engine = quire.Engine(models["wide"], backend=backend, cache=cache)
        engine.logits(random_prompt(30, seed=16))
        for group in range(len(engine.cache.layout.groups)):
            pages = [3, 0, 7]
            data = engine.cache.raw.read(group, pages)
            assert data.shape == (3, engine.cache.layout.page_bytes(group))
            layer = engine.cache.layout.groups[group].layers[0]
            before = engine.cache.pools[layer].read_pages(pages)
            engine.cache.raw.write(group, [11, 12, 13], data)
            after = engine.cache.pools[layer].read_pages([11, 12, 13])
            for one, other in zip(before, after, strict=True):
                assert one.tobytes() == other.tobytes()
                assert np.asarray(one, np.float32).any()


def test_a_host_tier_is_what_the_engine_reports(models: dict[str, Path]) -> None:
    engine = engine_with(models["full"], host_cache="4MiB")
    run(engine, random_prompt(38, seed=17), ONE)
    run(engine, random_prompt(46, seed=18), ONE)
    [usage] = engine.status().tiers
    assert usage.name == HostTier.name
    assert 0 < usage.bytes_used <= usage.budget == 4 * 2**20
    assert usage.pages >= 9


def test_a_full_disk_is_said_and_costs_nothing_else(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """Files of this process may not grow beyond 400 KB: what a full disk is to the store."""
    prompts = [random_prompt(90, seed=seed) for seed in range(20)]
    code = f"""
import resource, sys
import quire
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
cache = quire.CacheConfig(page_size=4, num_pages=60, cache_dir=sys.argv[2], kv_format="fp32")
params = quire.SamplingParams(max_new_tokens=3, ignore_eos=True)
with quire.Engine(sys.argv[1], backend="reference", cache=cache) as engine:
    for prompt in {prompts}:
        [done] = engine.generate([prompt], params)
        print(*done.token_ids)
    engine.flush()
    [usage] = engine.status().tiers
    print(usage.no_writes or usage.off)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, models["full"], tmp_path / "store"],
        capture_output=True,
        text=True,
        check=True,
    )
    *told, reason = ran.stdout.splitlines()
    plain = engine_with(models["full"], 60, kv_format="fp32", prefix_cache=False)
    for prompt, line in zip(prompts, told, strict=True):
        [done] = plain.generate([prompt], quire.SamplingParams(max_new_tokens=3, ignore_eos=True))
        assert line.split() == [str(token) for token in done.token_ids]
    assert reason != "None"
