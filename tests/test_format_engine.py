"""Engines over quantised pages: what is refused, what it takes, and that no route changes a bit.

tests/test_exactness.py has random schedules over these formats.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quire
from quire.errors import BackendError, ConfigError, RequestError
from recording import Recorder, assert_warm_is_cold
from tiny import WRITERS, random_prompt, tiny_engine

SHORT = quire.SamplingParams(max_new_tokens=5, ignore_eos=True)
ONE = quire.SamplingParams(max_new_tokens=1, ignore_eos=True)
PARAMS = quire.SamplingParams(max_new_tokens=9, ignore_eos=True, logprobs=3)

FORMATS = ("int8", "k=int8,v=fp8", "fp8+k=bf16,v=int8@last", "int8:rotated")
every_format = pytest.mark.parametrize("kv_format", FORMATS)
every_kind = pytest.mark.parametrize("kind", list(WRITERS))


def engine_with(directory: Path, num_pages: int, **settings: Any) -> quire.Engine:
    """An engine that takes its model for slow, so that it loads what it can."""
    cache = quire.CacheConfig(**({"page_size": 4, "num_pages": num_pages} | settings))
    engine = quire.Engine(directory, backend="reference", cache=cache, max_batch_tokens=37)
    if engine._tiers is not None:
        engine._tiers.compute_pace.add = lambda seconds, units: None  # type: ignore[method-assign]
        engine._tiers.compute_pace.seconds = 1e3
    return engine


# -- refused -------------------------------------------------------------------------------------


@pytest.fixture
def stores_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The native backend without kernels for packed pages."""
    pool = pytest.importorskip("quire.backends.native.pool")
    monkeypatch.setattr(pool, "_FORMATS", ("fp32", "bf16", "int8"))


@pytest.mark.usefixtures("stores_few")
@pytest.mark.parametrize("kv_format", ["int4", "int2", "k=int8,v=int4", "int8+int2@first"])
def test_formats_that_a_backend_does_not_store_are_refused_before_loading(
    tmp_path: Path, kv_format: str
) -> None:
    cache = quire.CacheConfig(kv_format=kv_format)
    with pytest.raises(BackendError, match="cannot store "):
        quire.Engine(tmp_path, backend="native", cache=cache)


@pytest.mark.usefixtures("stores_few")
def test_what_auto_stands_for_is_refused_when_it_is_known(models: dict[str, Path]) -> None:
    cache = quire.CacheConfig(kv_format="k=auto,v=int4", num_pages=4)
    with pytest.raises(BackendError, match=r"cannot store .*int4"):
        quire.Engine(models["full"], backend="native", cache=cache)


@pytest.mark.parametrize("kv_format", ["int8", "k=fp8,v=bf16", "k=fp32,v=int8", "bf16+fp8@0"])
def test_the_native_backend_generates_over_formats_that_store_each_token(
    models: dict[str, Path], kv_format: str
) -> None:
    pytest.importorskip("quire.backends.native")
    cache = quire.CacheConfig(kv_format=kv_format, num_pages=16, page_size=16)
    params = quire.SamplingParams(max_new_tokens=8)
    prompt = random_prompt(50, seed=1)
    engine = quire.Engine(models["full"], backend="native", cache=cache)
    [first, second] = engine.generate([prompt, prompt], params)
    assert first.token_ids == second.token_ids
    assert len(first.token_ids) == 8


def test_a_layer_that_the_model_lacks_is_refused(models: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="layer 2, and the model has 2 layers"):
        tiny_engine(models["full"], kv_format="int8+fp8@2")


# -- bytes ---------------------------------------------------------------------------------------


def test_each_layer_has_its_formats_and_bytes(models: dict[str, Path]) -> None:
    """Two KV heads of 6 numbers: int8 and fp8 take 8 bytes a vector, bf16 takes 12."""
    engine = tiny_engine(models["full"], kv_format="int8+k=bf16,v=fp8@last", num_pages=10)
    layout = engine.cache.layout
    assert [shape.bytes_per_token for shape in layout.shapes] == [2 * 2 * 8, 2 * (12 + 8)]
    assert layout.format_text == "int8+k=bf16,v=fp8@1"
    [done] = engine.generate([random_prompt(9)], SHORT)
    assert done.kv_bytes_peak == 4 * 4 * (32 + 40)  # pages of four tokens
    pools = [(*pool.key, *pool.value) for pool in engine.cache.pools]  # type: ignore[attr-defined]
    held = sum(array.nbytes for pool in pools for array in pool)
    assert held == engine.status().kv.pool_bytes == 10 * 4 * 72
    assert engine.decode_bytes(7) - engine.decode_bytes(6) == 72


def test_a_budget_holds_more_tokens_in_smaller_formats(models: dict[str, Path]) -> None:
    pages = {}
    for kv_format in ("fp32", "bf16", "int8"):
        cache = quire.CacheConfig(kv_format=kv_format, kv_memory="64KiB")
        engine = quire.Engine(models["wide"], backend="reference", cache=cache)
        pages[kv_format] = engine.cache.num_pages[0]
        assert engine.status().kv.pool_bytes <= 64 << 10
    assert pages["fp32"] < pages["bf16"] < pages["int8"]


# -- no route changes a bit ----------------------------------------------------------------------


@every_format
@every_kind
def test_warm_equals_cold_after_hits_forks_and_preemptions(
    models: dict[str, Path], kind: str, kv_format: str
) -> None:
    engine = tiny_engine(models[kind], num_pages=17, max_batch_tokens=9, kv_format=kv_format)
    recorder = Recorder(engine, all_rows=True)
    params = quire.SamplingParams(max_new_tokens=12, n=2, temperature=1.0, seed=3, ignore_eos=True)
    base = random_prompt(18, seed=4)
    requests = [engine.submit([*base, *random_prompt(5, seed=i)], params) for i in range(3)]
    while engine.has_work:
        engine.step()
        engine.cache.check()
    if kind in ("full", "mixed"):
        assert engine.status().preemptions
    assert any(c.cached_tokens for r in requests for c in r.completions)
    assert_warm_is_cold(models[kind], recorder)


@every_format
@every_kind
def test_a_session_goes_on_with_the_same_bits(
    models: dict[str, Path], kind: str, kv_format: str, tmp_path: Path
) -> None:
    engine = tiny_engine(models[kind], page_size=5, kv_format=kv_format)
    request = engine.submit(random_prompt(37, seed=1), SHORT)
    while engine.has_work:
        engine.step()
    path = tmp_path / "talk.quire"
    engine.save_session(request, path)
    tokens = request.samples[0].tokens
    other = tiny_engine(models[kind], page_size=5, kv_format=kv_format)
    assert other.load_session(path).tokens == tuple(tokens[:-1])
    recorder = Recorder(other, all_rows=True)
    [done] = other.generate([[*tokens, *random_prompt(4, seed=2)]], SHORT)
    assert done.cached_tokens == len(tokens) - 1
    assert_warm_is_cold(models[kind], recorder)


@every_format
@every_kind
def test_tiers_give_back_the_same_bits(
    models: dict[str, Path], kind: str, kv_format: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"kv_format": kv_format, "cache_dir": tmp_path / "store"}
    first, other = random_prompt(38, seed=1), random_prompt(46, seed=2)
    with engine_with(models[kind], 12, host_cache="4MiB", **settings) as engine:
        engine.generate([first], ONE)
        engine.generate([other], ONE)  # takes every page of the pool
        recorder = Recorder(engine, all_rows=True)
        [again] = engine.generate([[*first, *random_prompt(3, seed=3)]], SHORT)
        assert again.cached_tokens_by_tier["host"] >= 12
        assert_warm_is_cold(models[kind], recorder)
    with engine_with(models[kind], 24, **settings) as engine:
        recorder = Recorder(engine, all_rows=True)
        [again] = engine.generate([[*first, *random_prompt(3, seed=5)]], SHORT)
        assert again.cached_tokens_by_tier == {"pool": 0, "host": 0, "disk": 36}
        assert_warm_is_cold(models[kind], recorder)


@every_format
@pytest.mark.parametrize("layers", [4, 8])
@pytest.mark.parametrize("kind", ["full", "mixed"])
def test_a_context_larger_than_the_pool_gives_the_same_bits(
    tmp_path: Path, kind: str, layers: int, kv_format: str
) -> None:
    """With layers of two shapes too: each has staging pools of its own."""
    sizes = {"num_hidden_layers": layers, "max_position_embeddings": 400}
    directory = WRITERS[kind](tmp_path / "model", dtype="bf16", **sizes)
    prompt = random_prompt(330, seed=1)
    [expected] = engine_with(directory, 110, kv_format=kv_format).generate([prompt], PARAMS)
    assert expected.streamed is None
    tight = engine_with(directory, 60, kv_format=kv_format, host_cache="8MiB")
    [done] = tight.generate([prompt], PARAMS)
    assert done.token_ids == expected.token_ids
    assert done.logprobs == expected.logprobs  # in float64, of every bit of the logits
    assert done.streamed is not None
    assert done.kv_bytes_peak <= tight.cache.usage().pool_bytes
    shapes = dict.fromkeys(tight.cache.layout.shapes)
    assert len(shapes) == 1 + ("@" in kv_format)
    one_of_each = 85 * sum(shape.bytes_per_page for shape in shapes)
    assert done.kv_bytes_peak == one_of_each * (1 if layers == 4 and len(shapes) == 2 else 2)


def test_staging_pools_of_two_shapes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    directory = WRITERS["full"](tmp_path / "model", dtype="bf16", max_position_embeddings=400)
    prompt = random_prompt(330, seed=1)
    for kv_format in ("int8", "int8+fp8@0"):
        engine = engine_with(directory, 60, kv_format=kv_format, host_cache="8MiB")
        if kv_format == "int8":
            assert engine.generate([prompt], PARAMS)[0].streamed is not None
            continue
        with pytest.raises(
            RequestError, match=r"and one layer of each shape .*, more than the pool"
        ):
            engine.submit(prompt, PARAMS)


def test_pages_of_other_formats_never_meet(models: dict[str, Path], tmp_path: Path) -> None:
    prompt, path = random_prompt(38, seed=7), tmp_path / "talk.quire"
    formats = (
        "int8",
        "fp8",
        "k=int8,v=fp8",
        "k=fp8,v=int8",
        "int8+fp8@0",
        "int8+fp8@1",
        "auto",
        "int8:rotated",
    )
    engine = engine_with(models["full"], 24, kv_format="int8")
    request = engine.submit(prompt, SHORT)
    while engine.has_work:
        engine.step()
    engine.save_session(request, path)
    for turn, kv_format in enumerate([*formats, "k=int8,v=int8+int8@last"]):
        settings = {"kv_format": kv_format, "cache_dir": tmp_path / "store"}
        with engine_with(models["full"], 24, **settings) as engine:
            [done] = engine.generate([prompt], ONE)
            assert done.cached_tokens == (36 if turn == len(formats) else 0), kv_format
            session = engine.load_session(path)
            if kv_format in ("int8", "k=int8,v=int8+int8@last"):
                assert session.reason is None
            else:
                assert "page_format" in str(session.reason)


@every_format
def test_exported_arrays_are_decoded(models: dict[str, Path], kv_format: str) -> None:
    tokens = random_prompt(11, seed=8)
    engine = tiny_engine(models["full"], kv_format=kv_format, prefix_cache=False)
    exact = tiny_engine(models["full"], kv_format="fp32", prefix_cache=False)
    found = []
    for each in (engine, exact):
        sequence = each.cache.create()
        each._forward.prefill(sequence, tokens)
        found.append(each.cache.to_arrays(sequence).layers[0])
    key, value = (np.abs(getattr(found[1], side)).max(axis=-1) for side in ("key", "value"))
    for mine, theirs, peak in zip(
        (found[0].key, found[0].value), (found[1].key, found[1].value), (key, value), strict=True
    ):
        assert mine.dtype == np.float32
        error = np.abs(mine - theirs).max(axis=-1)
        assert (error > 0).any()
        assert (error <= peak / 16).all()  # half a step of e4m3, the coarser of the two


def test_quill_over_int8_says_what_it_says_exactly() -> None:
    """On real text: next-token logits move by little, and the greedy text stays."""
    prompt = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push("
    texts, logits = [], []
    for kv_format in ("auto", "int8"):
        cache = quire.CacheConfig(kv_format=kv_format, kv_memory="16MiB")
        engine = quire.Engine(backend="reference", cache=cache)
        texts.append(engine.generate([prompt], quire.SamplingParams(max_new_tokens=8))[0].text)
        logits.append(engine.logits(prompt))
    assert texts[0] == texts[1]
    assert 0 < np.abs(logits[0] - logits[1]).mean() < 0.02 * np.abs(logits[0]).mean()
