"""Shadows: what is re-run, what is counted, what it may take."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quire
from quire.engine import shadow as shadow_module
from quire.engine.forced import ForcedText
from quire.engine.shadow import is_chosen
from quire.errors import ConfigError, QuireError
from quire.pages import page_format
from tiny import random_prompt, tiny_engine


def found(engine: quire.Engine) -> quire.engine.ShadowUsage:
    usage = engine.status().shadow
    assert usage is not None
    return usage


def ask(engine: quire.Engine, requests: int = 3, **params: Any) -> list[quire.Completion]:
    prompts = [random_prompt(9 + 5 * i, seed=i) for i in range(requests)]
    chosen = quire.SamplingParams(max_new_tokens=8, ignore_eos=True, **params)
    return engine.generate(prompts, chosen)


@pytest.mark.parametrize("kind", ["full", "mixed", "sliding"])
@pytest.mark.parametrize("params", [{}, {"temperature": 0.9, "seed": 3, "repetition_penalty": 1.2}])
def test_an_exact_cache_never_diverges(
    models: dict[str, Path], kind: str, params: dict[str, Any], every_backend: None
) -> None:
    engine = tiny_engine(models[kind], shadow=1.0, max_batch_tokens=5)
    ask(engine, **params)
    usage = found(engine)
    assert (usage.requests, usage.skipped, usage.pending) == (3, 0, 0)
    assert (usage.tokens, usage.diverged) == (24, 0)
    assert (usage.kl_tokens, usage.kl_mean) == (24, 0.0)
    assert usage.bytes == 0 < usage.bytes_peak
    assert engine.status().lossy == ()
    engine.cache.check()


def test_another_format_diverges_by_as_much_as_two_engines_show(models: dict[str, Path]) -> None:
    engine = tiny_engine(models["full"], kv_format="fp32", shadow=1.0)
    [done] = ask(engine, 1)
    tokens = [*random_prompt(9), *done.token_ids]
    exact = tiny_engine(models["full"]).logits(tokens[:-1])[8:].astype(np.float64)
    other = tiny_engine(models["full"], kv_format="fp32").logits(tokens[:-1])[8:].astype(np.float64)
    p, q = (np.exp(rows - rows.max(1, keepdims=True)) / 1.0 for rows in (exact, other))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    usage = found(engine)
    assert usage.kl_mean == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-6, abs=1e-12)
    assert usage.kl_mean > 0
    assert usage.diverged == (exact.argmax(1) != np.array(done.token_ids)).sum()


def test_a_cache_that_loses_much_is_seen_to(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exact run is what is bent here: it sees other logits than the requests did."""
    score = ForcedText.score
    monkeypatch.setattr(ForcedText, "score", lambda self, tokens: -score(self, tokens))
    engine = tiny_engine(models["full"], shadow=1.0)
    ask(engine)
    assert found(engine).diverged == found(engine).tokens == 24
    assert (found(engine).kl_mean or 0) > 0.1


def test_the_share_is_chosen_by_number_and_seed_and_not_by_time(models: dict[str, Path]) -> None:
    engine = tiny_engine(models["full"], shadow=0.3)
    params = quire.SamplingParams(max_new_tokens=1)
    requests = [engine.submit([1, 2], params) for _ in range(40)]
    chosen = [is_chosen(request, 0.3) for request in requests]
    again = tiny_engine(models["full"])
    assert chosen == [is_chosen(again.submit([1, 2], params), 0.3) for _ in range(40)]
    assert not any(is_chosen(request, 0.0) for request in requests)
    assert all(is_chosen(request, 1.0) for request in requests)
    while engine.has_work:
        engine.step()
    assert found(engine).requests == sum(chosen)
    assert 4 <= sum(chosen) <= 20


def test_shadows_run_between_steps_a_chunk_at_a_time(models: dict[str, Path]) -> None:
    engine = tiny_engine(models["full"], shadow=1.0, max_batch_tokens=4)
    params = quire.SamplingParams(max_new_tokens=2, ignore_eos=True)
    request = engine.submit(random_prompt(20), params)
    while not request.finished:
        engine.step()
    assert (found(engine).pending, found(engine).requests) == (1, 0)
    held = found(engine).bytes
    assert held > 0  # the kept logits and, after the first chunk, the exact pool
    steps = 0
    while engine.has_work:
        assert engine.step() == []
        steps += 1
    assert steps == 5  # 19 tokens of the prompt in 5 chunks, the first with the last request step
    assert (found(engine).pending, found(engine).requests, found(engine).bytes) == (0, 1, 0)


def test_what_is_not_shadowed_is_counted(models: dict[str, Path]) -> None:
    engine = tiny_engine(models["full"], shadow=1.0)
    engine.generate([1, 2, 3], quire.SamplingParams(max_new_tokens=3, beam_width=2, n=2))
    assert (found(engine).requests, found(engine).skipped) == (0, 2)
    engine.cancel(engine.submit([1, 2]))
    assert found(engine).skipped == 3
    request = engine.submit(random_prompt(6), quire.SamplingParams(max_new_tokens=2))
    while not request.finished:
        engine.step()
    engine.close()
    assert (found(engine).pending, found(engine).bytes, found(engine).skipped) == (0, 0, 4)


def test_an_exact_run_larger_than_the_pool_is_skipped_with_the_reason(tmp_path: Path) -> None:
    from tiny import write_llama

    write_llama(tmp_path)  # of fp32: the exact cache takes twice what the pool of bf16 does
    engine = tiny_engine(tmp_path, kv_format="bf16", num_pages=5, shadow=1.0)
    engine.generate(random_prompt(12), quire.SamplingParams(max_new_tokens=4, ignore_eos=True))
    usage = found(engine)
    assert (usage.requests, usage.skipped) == (0, 1)
    assert usage.last_error is not None
    assert "15 tokens in an exact cache take" in usage.last_error


def test_the_memory_for_logits_is_bounded(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shadow_module, "KEPT_BYTES", 5 * 61 * 4)
    engine = tiny_engine(models["full"], shadow=1.0)
    ask(engine, 1)
    assert (found(engine).tokens, found(engine).kl_tokens) == (8, 5)


def test_an_error_of_a_shadow_does_not_reach_the_requests(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: ForcedText, tokens: object) -> None:
        raise QuireError("no more")

    monkeypatch.setattr(ForcedText, "score", refuse)
    engine = tiny_engine(models["full"], shadow=1.0)
    assert len(ask(engine)) == 3
    assert (found(engine).skipped, found(engine).last_error) == (3, "no more")


def test_forks_and_preempted_samples_are_shadowed_too(models: dict[str, Path]) -> None:
    engine = tiny_engine(models["full"], num_pages=9, shadow=1.0, max_batch_tokens=8)
    done = ask(engine, temperature=0.8, seed=1, n=2)
    assert any(completion.preemptions for completion in done)
    assert (found(engine).requests, found(engine).diverged) == (6, 0)
    assert found(engine).kl_mean == 0


@pytest.mark.parametrize("shadow", [-0.1, 1.01, float("nan"), "1%", True])
def test_a_share_outside_0_to_1_is_refused(shadow: Any) -> None:
    with pytest.raises(ConfigError, match="share of requests from 0 to 1"):
        quire.EngineConfig(shadow=shadow)


def test_without_shadow_there_are_no_counters(models: dict[str, Path]) -> None:
    assert tiny_engine(models["full"]).status().shadow is None


# -- twins and forced text, which shadows are made of


def test_a_twin_has_settings_of_its_own_and_the_same_answers(models: dict[str, Path]) -> None:
    engine = tiny_engine(models["mixed"])
    cache = quire.CacheConfig(page_size=8, num_pages=20, prefix_cache=False)
    twin = engine.twin(quire.EngineConfig(backend="reference", cache=cache))
    prompt = random_prompt(30)
    assert np.array_equal(engine.logits(prompt), twin.logits(prompt))
    assert (twin.cache.layout.page_size, engine.cache.layout.page_size) == (8, 4)
    assert twin.identity != engine.identity
    assert twin.cache is not engine.cache
    with pytest.raises(ConfigError, match="a twin computes with backend and threads"):
        engine.twin(quire.EngineConfig(backend="native"))


@pytest.mark.parametrize("kind", ["full", "mixed"])
def test_forced_text_has_the_same_bits_in_any_steps(
    models: dict[str, Path], kind: str, every_backend: None
) -> None:
    engine, prompt = tiny_engine(models[kind], max_batch_tokens=16), random_prompt(40)
    whole = engine.logits(prompt)
    for step in (1, 3, None):
        with engine.forced() as text:
            text.read(prompt[:25], step)
            assert np.array_equal(text.score(prompt[25:], step), whole[25:])
            assert text.usage.tokens == 40
    assert engine.status().kv.tokens == 0


def test_lossy_layers_are_named_together(models: dict[str, Path]) -> None:
    from dataclasses import replace

    from quire.engine.status import lossy_layers

    layout = tiny_engine(models["full"]).cache.layout
    shape = layout.shapes[0]
    lossy = replace(shape, key_format=page_format("int8"), value_format=page_format("int8"))
    mixed = replace(layout, shapes=(shape, lossy, lossy, shape, lossy))
    assert lossy_layers(mixed) == ("layers 1-2: int8 pages", "layer 4: int8 pages")
