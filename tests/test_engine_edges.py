"""Corners of the engine that a review found broken."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

import quire
from caches import append, cache_over, layout_of, reserve
from quire.cache import KVCache, PrefixQuery
from quire.errors import CacheFull, RequestError, TierError
from tiny import VOCAB, random_prompt, tiny_engine

GREEDY = quire.SamplingParams(max_new_tokens=6, ignore_eos=True)


def run_all(engine: quire.Engine, most: int = 500) -> None:
    for _ in range(most):
        if not engine.has_work:
            return
        engine.step()
        engine.cache.check()
    raise AssertionError("it hangs")


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_samples_in_a_pool_that_just_holds_one_take_turns(
    models: dict[str, Path], prefix_cache: bool
) -> None:
    """All pages are shared right after the fork: preempting a sample frees none of them."""
    engine = tiny_engine(models["full"], num_pages=15, prefix_cache=prefix_cache)
    params = quire.SamplingParams(max_new_tokens=4, n=2, ignore_eos=True)
    done = engine.generate([random_prompt(57)], params)
    alone = tiny_engine(models["full"], num_pages=80).generate([random_prompt(57)], params)
    assert [c.token_ids for c in done] == [c.token_ids for c in alone]


def test_a_page_taken_from_a_prefix_whose_own_pages_are_gone() -> None:
    """Only the taken page kept its parent in the index."""
    cache = cache_over(layout_of(4, (2,)), 4, b"")
    tokens = list(range(1, 8))

    def extend(cache: KVCache, sequence: int, new: list[int]) -> None:
        cache.commit(reserve(cache, (sequence, new)), [new])
        cache.check()

    first = cache.create(cache.match(PrefixQuery(tokens)))
    for token in tokens:
        extend(cache, first, [token])
    cache.release(first)
    for _ in range(3):  # the page that left the window goes
        append(cache, (cache.create(), [9]))
    match = cache.match(PrefixQuery([*tokens, 8, 9]), 8)
    assert match.tokens == 7
    sequence = cache.create(match.choices()[1])
    extend(cache, sequence, [8])
    cache.release(sequence)
    cache.check()


@pytest.mark.parametrize("kind", ["full", "mixed"])
def test_beams_without_a_prefix_cache_come_back_after_a_preemption(
    models: dict[str, Path], kind: str
) -> None:
    for pages in range(12, 40, 2):
        engine = tiny_engine(models[kind], page_size=2, num_pages=pages, prefix_cache=False)
        engine.submit(random_prompt(5, 1), quire.SamplingParams(max_new_tokens=7, ignore_eos=True))
        beams = quire.SamplingParams(max_new_tokens=3, beam_width=2, ignore_eos=True)
        for length in range(2 * pages, 0, -1):
            try:
                engine.submit(random_prompt(length, 2), beams)
                break
            except RequestError:
                continue
        run_all(engine)


def test_a_search_counts_as_all_of_its_beams(models: dict[str, Path]) -> None:
    engine = tiny_engine(models["full"], num_pages=90, max_sequences=4)
    requests = [engine.submit(random_prompt(5, seed), GREEDY) for seed in range(3)]
    wide = quire.SamplingParams(max_new_tokens=9, beam_width=4, ignore_eos=True)
    requests.append(engine.submit(random_prompt(5, 9), wide))
    while engine.has_work:
        engine.step()
        assert len(engine._queues.running) <= 4
    assert all(request.finished for request in requests)


def test_more_beams_than_tokens_are_refused(models: dict[str, Path]) -> None:
    engine = tiny_engine(models["full"], num_pages=900)
    params = quire.SamplingParams(max_new_tokens=2, beam_width=VOCAB + 1, n=VOCAB + 1)
    with pytest.raises(RequestError, match=f"{VOCAB + 1} beams cannot begin with different tokens"):
        engine.submit([1, 2], params)
    assert len(engine._replies) == 0


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_interrupt_between_two_choices_leaves_samples_that_go_on(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    engine = tiny_engine(models["full"], num_pages=60)
    requests = [engine.submit(random_prompt(5, seed), GREEDY) for seed in range(3)]
    engine.step()
    decide, calls = engine._replies.decide, iter(range(1, 1000))

    def interrupted(sample: Any, logits: Any) -> Any:
        if next(calls) == at:
            raise KeyboardInterrupt
        return decide(sample, logits)

    monkeypatch.setattr(engine._replies, "decide", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    run_all(engine)
    for seed, request in enumerate(requests):
        [alone] = tiny_engine(models["full"]).generate([random_prompt(5, seed)], GREEDY)
        assert request.completions[0].token_ids == alone.token_ids


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_interrupt_between_the_choices_of_forks_leaves_them_all_going_on(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    params = quire.SamplingParams(n=3, temperature=1.0, seed=4, max_new_tokens=6, ignore_eos=True)
    law = tiny_engine(models["full"], num_pages=60).generate([random_prompt(5)], params)
    engine = tiny_engine(models["full"], num_pages=60)
    request = engine.submit(random_prompt(5), params)
    decide, calls = engine._replies.decide, iter(range(1, 1000))

    def interrupted(sample: Any, choice: Any) -> Any:
        if next(calls) == at:
            raise KeyboardInterrupt
        return decide(sample, choice)

    monkeypatch.setattr(engine._replies, "decide", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    run_all(engine)
    assert [c.token_ids for c in request.completions] == [c.token_ids for c in law]


# -- streamed contexts


def streaming_engine(directory: Path, **tiers: Any) -> quire.Engine:
    cache = quire.CacheConfig(page_size=4, num_pages=9, **tiers)
    return quire.Engine(directory, backend="reference", cache=cache, max_batch_tokens=13)


def test_a_stream_that_cannot_be_opened_ends_in_an_error_and_holds_nobody_up(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = streaming_engine(models["full"], host_cache="4MiB")
    kept = random_prompt(9, 1)
    engine.generate([kept], GREEDY)

    def full(*args: Any) -> None:
        raise TierError("no room")

    monkeypatch.setattr("quire.engine.streamed.MemoryStore", full)
    long = engine.submit(random_prompt(60), GREEDY)
    short = engine.submit(kept, GREEDY)
    run_all(engine)
    assert long.completions[0].finish_reason == "error"
    assert "cannot be streamed: no room" in str(long.completions[0].error)
    assert short.completions[0].finish_reason == "length"
    assert short.completions[0].cached_tokens == 8  # nothing was thrown away for it
    assert engine.status().tiers[0].bytes_used == 0


def test_an_interrupt_before_a_streamed_token_is_chosen_loses_nothing(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = streaming_engine(models["full"], host_cache="4MiB")
    request = engine.submit(random_prompt(60), GREEDY)
    decide, calls = engine._replies.decide, iter(range(100))

    def interrupted(sample: Any, logits: Any) -> Any:
        if next(calls) % 2 == 0:
            raise KeyboardInterrupt
        return decide(sample, logits)

    monkeypatch.setattr(engine._replies, "decide", interrupted)
    interrupts = 0
    while engine.has_work:
        try:
            engine.step()
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts == 6
    plain = quire.CacheConfig(page_size=4, num_pages=40, prefix_cache=False)
    alone = quire.Engine(models["full"], backend="reference", cache=plain)
    [expected] = alone.generate([random_prompt(60)], GREEDY)
    assert request.completions[0].token_ids == expected.token_ids


def test_what_is_lent_for_streaming_counts_in_the_disks_budget(
    models: dict[str, Path], tmp_path: Path
) -> None:
    engine = streaming_engine(
        models["full"], cache_dir=tmp_path / "store", disk_cache=(8 << 20) + 40_000
    )
    for seed in range(40):
        engine.generate([random_prompt(30, seed)], GREEDY)
    engine.flush()
    request = engine.submit(random_prompt(60), GREEDY)
    while not request.finished:
        engine.step()
        [usage] = engine.status().tiers
        assert usage.bytes_used <= usage.budget
    assert request.completions[0].streamed is not None
    engine.close()


def test_the_pool_is_left_alone_while_a_context_is_streamed(
    models: dict[str, Path], tmp_path: Path
) -> None:
    engine = streaming_engine(models["full"], host_cache="4MiB")
    done = engine.submit(random_prompt(20, 1), GREEDY)
    run_all(engine)
    engine.save_session(done, tmp_path / "short")
    long = engine.submit(random_prompt(60), GREEDY)
    engine.step()
    for call in (
        lambda: engine.pin([1, 2], 9),
        lambda: engine.logits([1, 2]),
        lambda: engine.save_session(done, tmp_path / "other"),
    ):
        with pytest.raises(CacheFull, match="larger than the pool is running"):
            call()
    assert "larger than the pool is running" in str(engine.load_session(tmp_path / "short").reason)
    run_all(engine)
    assert long.finished
    assert engine.load_session(tmp_path / "short").reason is None
    # Of what was streamed no pages are saved, and it says so.
    assert engine.save_session(long, tmp_path / "long", extra={"note": 1}) == 0
    loaded = engine.load_session(tmp_path / "long")
    assert (loaded.tokens, dict(loaded.extra)) == ((), {"note": 1})
    assert "holds no pages" in str(loaded.reason)


def test_pages_do_not_pile_up_for_a_disk_that_takes_none(
    models: dict[str, Path], tmp_path: Path
) -> None:
    cache = quire.CacheConfig(page_size=4, num_pages=12, cache_dir=tmp_path)
    engine = quire.Engine(models["full"], backend="reference", cache=cache)
    assert engine._tiers is not None
    disk: Any = engine._tiers.tiers["disk"]
    disk.room = lambda: 0  # slow
    for seed in range(30):
        engine.generate([random_prompt(40, seed)], GREEDY)
    assert len(engine._tiers._fresh) <= 2 * 12
    disk._no_writes = "the disk is full"
    engine.generate([random_prompt(40, 99)], GREEDY)
    assert not engine._tiers._fresh
    engine.close()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_an_engine_that_nobody_holds_is_gone_at_once(models: dict[str, Path], backend: str) -> None:
    """With the files that its weights are mapped from, before any collection of cycles."""
    engine = quire.Engine(models["full"], backend=backend)
    engine.generate([random_prompt(5)], GREEDY)
    watched = weakref.ref(engine), weakref.ref(engine._loaded.model)
    gc.disable()
    try:
        del engine
        assert [each() for each in watched] == [None, None]
    finally:
        gc.enable()
