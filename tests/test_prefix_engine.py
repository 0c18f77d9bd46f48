"""Shared prefixes in the engine: hits are real, change no bit, and are explained."""

from pathlib import Path

import pytest

import quire
from quire.errors import ConfigError, RequestError
from recording import Recorder, assert_warm_is_cold
from tiny import WRITERS, random_prompt, tiny_engine, write_llama

SHORT = quire.SamplingParams(max_new_tokens=4, ignore_eos=True)


def computed(recorder: Recorder) -> int:
    """Tokens that went through the model."""
    return len(recorder.rows)


@pytest.mark.usefixtures("every_backend")
@pytest.mark.parametrize("kind", list(WRITERS))
@pytest.mark.parametrize("page_size", [4, 5, 16])
def test_warm_equals_cold_after_whole_and_partial_page_hits(
    models: dict[str, Path], kind: str, page_size: int
) -> None:
    engine = tiny_engine(models[kind], page_size=page_size, num_pages=96, max_batch_tokens=13)
    first = random_prompt(37, seed=1)
    [done] = engine.generate([first], SHORT)
    recorder = Recorder(engine, all_rows=True)
    # The same again; the prompt and its reply go on; a prompt that parts inside a page.
    again = engine.submit(first, SHORT)
    further = engine.submit([*first, *done.token_ids, *random_prompt(9, seed=2)], SHORT)
    parted = engine.submit([*first[:22], *random_prompt(9, seed=3)], SHORT)
    while engine.has_work:
        engine.step()
        engine.cache.check()
    for request in (again, further, parted):
        [completion] = request.completions
        assert completion.cached_tokens == sum(completion.cached_tokens_by_tier.values())
    if kind == "full":  # a window gives pages back, so hits are shorter there
        assert again.completions[0].cached_tokens == 36
        assert further.completions[0].cached_tokens == 37 + 3  # the last token was never fed back
        assert parted.completions[0].cached_tokens == 22
    else:
        assert again.completions[0].cached_tokens > 0
        assert further.completions[0].cached_tokens > 0
    assert_warm_is_cold(models[kind], recorder)


@pytest.mark.usefixtures("every_backend")
def test_warm_equals_cold_after_forks_and_preemptions(models: dict[str, Path]) -> None:
    engine = tiny_engine(models["mixed"], page_size=4, num_pages=17, max_batch_tokens=9)
    recorder = Recorder(engine, all_rows=True)
    params = quire.SamplingParams(max_new_tokens=12, n=2, temperature=1.0, seed=3, ignore_eos=True)
    base = random_prompt(18, seed=4)
    requests = [engine.submit([*base, *random_prompt(5, seed=i)], params) for i in range(3)]
    while engine.has_work:
        engine.step()
        engine.cache.check()
    assert engine.status().preemptions
    assert any(c.cached_tokens for r in requests for c in r.completions)
    assert_warm_is_cold(models["mixed"], recorder)


def test_a_prefix_that_many_ask_for_at_once_is_computed_once(models: dict[str, Path]) -> None:
    engine = tiny_engine(models["full"], page_size=4, num_pages=256, max_batch_tokens=512)
    recorder = Recorder(engine, all_rows=True)
    shared = random_prompt(40, seed=5)
    one_token = quire.SamplingParams(max_new_tokens=1, ignore_eos=True)
    engine.generate([[*shared, i, i, i] for i in range(8)], one_token)
    assert computed(recorder) == 43 + 7 * 3


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_samples_of_one_prompt_share_its_computation(
    models: dict[str, Path], prefix_cache: bool
) -> None:
    engine = tiny_engine(models["full"], num_pages=96, prefix_cache=prefix_cache)
    recorder = Recorder(engine, all_rows=True)
    params = quire.SamplingParams(max_new_tokens=5, n=4, temperature=1.0, seed=1, ignore_eos=True)
    samples = engine.generate([random_prompt(30, seed=6)], params)
    assert computed(recorder) == 30 + 4 * 4
    assert [sample.cached_tokens for sample in samples] == [0, 30, 30, 30]
    assert len({sample.token_ids for sample in samples}) > 1
    assert_warm_is_cold(models["full"], recorder)


def test_more_samples_than_places_find_the_prompt_later(models: dict[str, Path]) -> None:
    engine = tiny_engine(models["full"], num_pages=96, max_sequences=2)
    params = quire.SamplingParams(max_new_tokens=5, n=5, temperature=1.0, seed=1, ignore_eos=True)
    samples = engine.generate([random_prompt(30, seed=6)], params)
    assert [sample.cached_tokens for sample in samples] == [0, 30, 29, 29, 29]


def test_tenants_share_nothing(models: dict[str, Path]) -> None:
    engine = tiny_engine(models["full"], num_pages=96)
    prompt = random_prompt(30, seed=7)

    def cached(salt: str) -> int:
        request = engine.submit(prompt, SHORT, salt=salt)
        while not request.finished:
            engine.step()
        return request.completions[0].cached_tokens

    assert [cached(salt) for salt in ("a", "a", "b", "", "b", "")] == [0, 29, 0, 0, 29, 29]
    with pytest.raises(RequestError, match="salt must be text"):
        engine.submit(prompt, SHORT, salt=7)  # type: ignore[arg-type]


def test_switched_off_it_caches_nothing(models: dict[str, Path]) -> None:
    engine = tiny_engine(models["full"], num_pages=96, prefix_cache=False)
    prompt = random_prompt(30, seed=8)
    for _ in range(2):
        [done] = engine.generate([prompt], SHORT)
        assert done.cached_tokens_by_tier == {"pool": 0, "host": 0, "disk": 0}
    assert engine.cache.cached_pages == (0,)
    assert "off" in engine.explain_prefix(prompt).reasons[0]
    with pytest.raises(ConfigError, match="prefix_cache must be True or False"):
        quire.CacheConfig(prefix_cache="yes")  # type: ignore[arg-type]


def test_a_full_pool_gives_up_what_was_used_longest_ago(models: dict[str, Path]) -> None:
    engine = tiny_engine(models["full"], page_size=4, num_pages=16)  # 64 tokens
    one = quire.SamplingParams(max_new_tokens=1, ignore_eos=True)
    old, new = random_prompt(24, seed=9), random_prompt(24, seed=10)
    engine.generate([old, new, random_prompt(28, seed=11)], one)  # 19 pages: old loses three
    assert engine.explain_prefix(new).cached_tokens == 23
    explained = engine.explain_prefix(old)
    assert explained.cached_tokens == 12  # its tail went, its head is still there
    assert "evicted" in explained.reasons[0]
    assert "least recently used" in explained.reasons[0]


def test_a_pinned_prefix_stays_and_gives_way_only_to_what_could_not_run(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("quire.engine.pins.time.monotonic", lambda: now[0])
    engine = tiny_engine(models["full"], page_size=4, num_pages=16)
    one = quire.SamplingParams(max_new_tokens=1, ignore_eos=True)
    pinned = random_prompt(24, seed=12)
    assert engine.pin(pinned, 60) == 0  # nothing is there yet
    engine.generate([pinned], one)
    assert engine.pin(pinned, 60) == 24
    for seed in range(4):
        engine.generate([random_prompt(38, seed=20 + seed)], one)
        assert engine.explain_prefix(pinned).cached_tokens == 23
    engine.generate([random_prompt(60, seed=30)], one)  # 15 pages: cannot run beside the pin
    assert engine.explain_prefix(pinned).cached_tokens < 23
    assert engine.status().pins_dropped == 1
    engine.generate([pinned], one)
    assert engine.pin(pinned, 60) == 24
    now[0] += 61
    engine.generate([random_prompt(60, seed=31)], one)
    assert engine.explain_prefix(pinned).cached_tokens < 23
    assert engine.status().pins_dropped == 1
    for seconds in (0, -1, float("inf"), float("nan"), "1", True):
        with pytest.raises(RequestError, match="positive number of seconds"):
            engine.pin(pinned, seconds)  # type: ignore[arg-type]


def test_a_miss_is_explained_by_where_the_nearest_prompt_parts(tmp_path: Path) -> None:
    engine = tiny_engine(write_llama(tmp_path, tokenizer=True), page_size=4, num_pages=64)
    one = quire.SamplingParams(max_new_tokens=1, ignore_eos=True)
    asked = "the quick brown fox jumps over the lazy dog"
    assert "no cached prompt begins like this one" in engine.explain_prefix(asked).reasons[0]
    engine.generate([asked], one)
    whole = engine.explain_prefix(asked)
    assert whole.cached_tokens == whole.prompt_tokens - 1
    assert "the last token is always computed" in whole.reasons[0]
    other = engine.explain_prefix("the quick brown fox, then the dog")
    assert 0 < other.cached_tokens < other.prompt_tokens - 1
    assert f"parts at token {other.cached_tokens}" in other.reasons[0]
    assert "then" in other.reasons[0]
    assert "jumps" in other.reasons[0]
    longer = engine.explain_prefix(asked + " and the other fox")
    assert "ends at token" in longer.reasons[0]
    assert str(longer).startswith(f"{longer.cached_tokens} of {longer.prompt_tokens} prompt tokens")
    tenant = engine.explain_prefix(asked, salt="tenant")
    assert tenant.cached_tokens == 0
    assert any("another salt" in reason for reason in tenant.reasons)
