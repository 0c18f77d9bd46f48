"""Eviction policies against the papers' rules, and in the engine: budgets, company, refusals."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quire
from checkpoints import tiny_config, write_checkpoint
from naive_eviction import NaiveLlama, heavy_hitters, low_norms, snap, streaming_llm
from quire.errors import ConfigError, RequestError, SessionError
from quire.evict_choice import parse_eviction
from quire.layout import pages_for
from tiny import random_prompt, write_llama, write_mixed

BUDGET, PAGE, CHUNK = 20, 4, 16
POLICIES = {
    "window:budget=20,sink=3": streaming_llm(BUDGET, 3),
    "knorm:budget=20,recent=25%": low_norms(BUDGET, 5),
    "snapkv:budget=20,window=6,kernel=3": snap(BUDGET, 6, 3),
    "h2o:budget=20,recent=50%": heavy_hitters(BUDGET, 10),
}
LARGE = ("window:budget=90", "knorm:budget=100%", "snapkv:budget=90", "h2o:budget=90")
each_policy = pytest.mark.parametrize("policy", POLICIES)
each_backend = pytest.mark.parametrize("backend", ["reference", "native"])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Equal tokens have keys of equal norm in the first layer: there is one for each place."""
    return write_llama(tmp_path_factory.mktemp("llama"), vocab_size=96)


def open_engine(directory: Path, evict: str = "none", **options: Any) -> quire.Engine:
    limits = {"max_batch_tokens": CHUNK} | {
        name: options.pop(name)
        for name in ("max_batch_tokens", "max_sequences", "shadow")
        if name in options
    }
    backend = options.pop("backend", "reference")
    cache = {"page_size": PAGE, "num_pages": 64, "evict": evict} | options
    return quire.Engine(directory, backend=backend, cache=quire.CacheConfig(**cache), **limits)


@each_backend
@each_policy
def test_what_is_kept_and_computed_is_what_the_paper_says(
    policy: str, backend: str, llama: Path
) -> None:
    """Logits of float64 attention over exactly the tokens that the rule keeps, where they were."""
    naive, rule = NaiveLlama(llama), POLICIES[policy]
    tokens = np.random.default_rng(0).permutation(96)[:69].tolist()
    prompt, reply = tokens[:55], tokens[55:]
    engine = open_engine(llama, policy, backend=backend)
    voted = False
    with engine.forced() as text:
        for at in [*range(0, 55, CHUNK), *range(55, 55 + len(reply))]:
            tokens = prompt[at : at + CHUNK] if at < 55 else [reply[at - 55]]
            found, wanted = text.score(tokens), naive.feed(tokens)
            np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-4)
            kept = len(naive.held[0][0])
            if kept > BUDGET + (0 if at < 55 else PAGE - 1):
                late_snap = policy.startswith("snapkv") and voted and at >= 55
                # After the prompt SnapKV's choice stands; of later tokens the oldest go.
                naive.drop(streaming_llm(BUDGET, BUDGET - 6) if late_snap else rule)
                voted = True
            assert_keeps(text, naive)
        assert engine.cache.dropped(text.sequence) == 69 - len(naive.held[0][0]) > 40
        assert text.tokens == 69
        engine.cache.check()


def assert_keeps(text: Any, naive: NaiveLlama) -> None:
    for layer, kv in enumerate(text.cache.to_arrays(text.sequence, "BHSD").layers):
        for head in naive.heads:
            kept = naive.held[layer][head]
            np.testing.assert_allclose(kv.key[0, head], [t["key"] for t in kept], atol=2e-4)
            np.testing.assert_allclose(kv.value[0, head], [t["value"] for t in kept], atol=2e-4)


@each_backend
@pytest.mark.parametrize("policy", LARGE)
def test_a_budget_beyond_the_context_changes_no_bit(policy: str, backend: str, llama: Path) -> None:
    prompt = random_prompt(50)
    exact = open_engine(llama, backend=backend)
    evicting = open_engine(llama, policy, backend=backend)
    np.testing.assert_array_equal(exact.logits(prompt[:40]), evicting.logits(prompt[:40]))
    params = quire.SamplingParams(max_new_tokens=30, ignore_eos=True)
    [one], [other] = exact.generate([prompt], params), evicting.generate([prompt], params)
    if policy != "knorm:budget=100%":
        assert one.token_ids == other.token_ids
        assert other.evicted_tokens == 0


@pytest.mark.parametrize(("backend", "format"), [("reference", "int8"), ("native", "bf16")])
@each_policy
def test_requests_stay_within_their_budgets_in_company(
    policy: str, backend: str, format: str, llama: Path
) -> None:
    """Chunks, batches, and a pool so small that requests are preempted and computed again."""
    engine = open_engine(llama, policy, backend=backend, kv_format=format, num_pages=16)
    params = quire.SamplingParams(max_new_tokens=20, ignore_eos=True)
    lengths = 9, 8, 7, 40, 41
    requests = [engine.submit(random_prompt(n, seed=n), params) for n in lengths]
    preempted = 0
    while not all(request.finished for request in requests):
        engine.step()
        engine.cache.check()
        for sequence in engine.cache.sequences:
            assert engine.cache.length(sequence) <= BUDGET + PAGE
    page = engine.cache.layout.page_bytes(0)
    for request in requests:
        [done] = request.completions
        assert done.new_tokens == 20
        assert done.kv_bytes_peak <= pages_for(BUDGET + CHUNK, PAGE) * page
        preempted += len(done.preemptions)
    evicted = [request.completions[0].evicted_tokens for request in requests]
    assert all(n + 19 - BUDGET - PAGE < e < n for n, e in zip(lengths, evicted, strict=True))
    assert preempted > 0
    assert engine.cache.usage().allocated_bytes == 0


def test_a_request_that_fits_only_with_eviction_is_admitted(llama: Path) -> None:
    engine = open_engine(llama, num_pages=6)
    prompt, params = random_prompt(60), partial(quire.SamplingParams, max_new_tokens=10)
    with pytest.raises(RequestError, match="need 18 pages of 4 tokens"):
        engine.submit(prompt, params())
    with pytest.raises(RequestError, match=r"eviction keeps 28 at a time.* need 7 pages"):
        engine.submit(prompt, params(evict="window:budget=24"))
    [done] = engine.generate([prompt], params(evict="window:budget=20", ignore_eos=True))
    assert done.new_tokens == 10
    assert done.evicted_tokens >= 69 - 24
    [done] = engine.generate([prompt], params(evict="knorm:budget=25%", ignore_eos=True))
    assert done.evicted_tokens >= 69 - 19


@each_policy
def test_exact_prefixes_are_used_and_nothing_that_changed_is_shared(
    policy: str, llama: Path
) -> None:
    engine = open_engine(llama)
    prompt, params = random_prompt(60), partial(quire.SamplingParams, max_new_tokens=12)
    [first] = engine.generate([prompt], params(ignore_eos=True))
    hits = []
    for _ in range(2):
        [lossy] = engine.generate([prompt], params(evict=policy, ignore_eos=True))
        hits.append(lossy.cached_tokens)
        [again] = engine.generate([prompt], params(ignore_eos=True))
        assert again.token_ids == first.token_ids
        assert again.cached_tokens == 59
        engine.cache.check()
    assert hits == [0, 0] if policy.startswith("h2o") else [BUDGET, BUDGET]


def test_pages_that_others_hold_are_left_to_them_until_they_are_free(llama: Path) -> None:
    """The only free page is needed elsewhere; the request waits above its budget, and goes on."""
    engine = open_engine(llama, num_pages=18)
    prompt = random_prompt(28)
    exact = engine.submit(prompt, quire.SamplingParams(max_new_tokens=40, ignore_eos=True))
    engine.step(), engine.step()
    params = quire.SamplingParams(max_new_tokens=40, ignore_eos=True, evict="knorm:budget=8")
    lossy = engine.submit(prompt, params)
    while not (exact.finished and lossy.finished):
        engine.step()
        engine.cache.check()
    alone = open_engine(llama).generate([prompt], exact.params)[0]
    assert exact.completions[0].token_ids == alone.token_ids
    assert lossy.completions[0].new_tokens == 40


def run(engine: quire.Engine) -> None:
    while engine.has_work:
        engine.step()


def test_an_interrupted_compaction_is_computed_again(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(llama, "window:budget=12", prefix_cache=False)  # chunks as before
    pool, inner = engine.cache.pools[1], engine.cache.pools[1].gather_tokens
    calls = []

    def gather(source: Any, target: Any) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt
        inner(source, target)

    monkeypatch.setattr(pool, "gather_tokens", gather)
    request = engine.submit(random_prompt(50), quire.SamplingParams(max_new_tokens=5))
    with pytest.raises(KeyboardInterrupt):
        run(engine)
    engine.cache.check()
    run(engine)
    [done] = request.completions
    [alone] = open_engine(llama, "window:budget=12").generate([random_prompt(50)], request.params)
    assert done.token_ids == alone.token_ids
    assert "interrupted" in done.preemptions[0]


def test_status_lists_what_is_lossy_and_the_shadow_counts_it(llama: Path) -> None:
    engine = open_engine(llama, "window:budget=10,sink=2", shadow=1.0)
    assert engine.status().lossy == ("all layers: evict window:budget=10,sink=2",)
    engine.generate([random_prompt(40)], quire.SamplingParams(max_new_tokens=8, ignore_eos=True))
    shadow = engine.status().shadow
    assert shadow is not None
    assert (shadow.requests, shadow.tokens) == (1, 8)
    assert shadow.kl_mean is not None
    assert shadow.kl_mean > 0


def test_a_request_can_do_without_the_engines_policy(llama: Path) -> None:
    prompt, params = random_prompt(40), quire.SamplingParams(max_new_tokens=8, evict="none")
    [done] = open_engine(llama, "window:budget=10").generate([prompt], params)
    [exact] = open_engine(llama).generate([prompt], params)
    assert done.token_ids == exact.token_ids
    assert done.evicted_tokens == 0


def test_what_cannot_be_combined_is_refused_with_the_reason(llama: Path, tmp_path: Path) -> None:
    mixed = write_mixed(tmp_path / "mixed")
    with pytest.raises(ConfigError, match="where layers keep a sliding window 7"):
        open_engine(mixed, "window:budget=10")
    params = partial(quire.SamplingParams, evict="window:budget=10", max_new_tokens=4)
    with pytest.raises(RequestError, match="sliding window 7"):
        open_engine(mixed).submit([1, 2], params())
    with pytest.raises(ConfigError, match="page_size 'whole' free no memory"):
        open_engine(llama, "window:budget=10", page_size="whole")
    engine = open_engine(llama)
    with pytest.raises(RequestError, match="follows one sample, but n is 2"):
        engine.submit([1, 2], params(n=2))
    with pytest.raises(RequestError, match="beam_width 3"):
        engine.submit([1, 2], params(beam_width=3))
    request = engine.submit(random_prompt(40), params())
    while not request.finished:
        engine.step()
    with pytest.raises(SessionError, match=r"eviction dropped 3. tokens of this request"):
        engine.save_session(request, tmp_path / "session")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h2p:budget=5", r"unknown eviction policy 'h2p'; did you mean 'h2o'\?"),
        ("window", "has no budget; write window:budget=512 or =25%"),
        ("window:budget=5,sinks=2", r"window has no option 'sinks'; did you mean 'sink'\?"),
        ("window:budget=5,budget=6", "budget is given twice"),
        ("window:budget=4", "a budget of 4 tokens leaves none to choose; give at least 5"),
        ("snapkv:budget=32", "give at least 33"),
        ("snapkv:budget=50,kernel=4", "kernel must be odd"),
        ("h2o:budget=0", "budget must be a number of tokens above 0, or a share"),
        ("h2o:budget=120%", "not '120%'"),
        ("window:budget=9,sink=10%", "sink must be a whole number, not '10%'"),
    ],
)
def test_texts_that_mean_nothing_are_refused_by_name(text: str, message: str) -> None:
    for make, error in [
        (parse_eviction, ConfigError),
        (lambda t: quire.CacheConfig(evict=t), ConfigError),
        (lambda t: quire.SamplingParams(evict=t), RequestError),
    ]:
        with pytest.raises(error, match=message):
            make(text)


def test_what_a_text_means() -> None:
    assert parse_eviction("none") is None
    choice = parse_eviction("h2o:budget=25%")
    assert str(choice) == "h2o:budget=25%,recent=50%"
    assert choice is not None
    assert [choice.tokens(prompt) for prompt in (1, 100, 101)] == [2, 25, 26]
    assert [choice.recent_of(budget) for budget in (2, 25)] == [1, 13]
    with pytest.raises(ConfigError, match="must be text such as"):
        parse_eviction(None)


def test_what_a_pin_holds_is_left_as_it_is(llama: Path) -> None:
    engine = open_engine(llama)
    prompt = random_prompt(40)
    exact = quire.SamplingParams(max_new_tokens=6, ignore_eos=True)
    [first] = engine.generate([prompt], exact)
    assert engine.pin(prompt, 1000) == 40
    engine.generate([prompt], quire.SamplingParams(max_new_tokens=30, evict="knorm:budget=12"))
    [again] = engine.generate([prompt], exact)
    assert (again.token_ids, again.cached_tokens) == (first.token_ids, 39)
    engine.cache.check()


def test_a_tier_brings_no_more_than_the_budget_and_nothing_is_streamed(llama: Path) -> None:
    engine = open_engine(llama, host_cache="4MiB", num_pages=16)
    prompt, params = random_prompt(60), partial(quire.SamplingParams, max_new_tokens=30)
    with pytest.raises(RequestError, match="of which eviction keeps 74 at a time"):
        engine.submit(prompt, params(evict="window:budget=70"))
    engine.generate([random_prompt(50)], params(max_new_tokens=4))
    engine.generate([random_prompt(50, seed=1)], params(max_new_tokens=4))
    for policy in POLICIES:
        [done] = engine.generate([prompt], params(evict=policy, ignore_eos=True))
        assert done.cached_tokens <= BUDGET
        assert done.streamed is None
        assert done.kv_bytes_peak <= pages_for(BUDGET + CHUNK, PAGE) * (
            engine.cache.layout.page_bytes(0)
        )
        engine.cache.check()
    engine.close()


@each_backend
@pytest.mark.parametrize("model", ["gpt2", "qwen3"])
def test_other_models_are_watched_without_changing_a_bit(
    model: str, backend: str, tmp_path: Path
) -> None:
    """Learned positions and normed queries; h2o sees every query whatever the budget."""
    directory = write_checkpoint(tmp_path, tiny_config(model))
    engine = open_engine(directory, backend=backend)
    prompt = (random_prompt(30) * 2)[: engine.model_config.max_position - 8]
    watched = open_engine(directory, "h2o:budget=500", backend=backend)
    np.testing.assert_array_equal(engine.logits(prompt), watched.logits(prompt))
    for policy in POLICIES:
        params = quire.SamplingParams(max_new_tokens=8, ignore_eos=True, evict=policy)
        [done] = engine.generate([prompt], params)
        assert done.evicted_tokens >= len(prompt) - BUDGET
