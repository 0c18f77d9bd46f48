"""Contexts larger than the pool: the same bits, within the pool's bytes, from memory or disk."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import quire
from quire.config import parse_bytes
from quire.engine.streaming import LayerStream
from quire.errors import RequestError
from tiny import WRITERS, random_prompt

PARAMS = quire.SamplingParams(max_new_tokens=9, ignore_eos=True, logprobs=3)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: write(root / name, dtype="bf16", max_position_embeddings=1100)
        for name, write in WRITERS.items()
    }


def engine_with(directory: Path, num_pages: int, page_size: int = 4, **tiers: Any) -> quire.Engine:
    cache = quire.CacheConfig(page_size=page_size, num_pages=num_pages, **tiers)
    return quire.Engine(directory, backend="reference", cache=cache, max_batch_tokens=37)


@pytest.mark.usefixtures("every_backend")
@pytest.mark.parametrize("kind", ["full", "mixed", "wide"])
@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("page_size", [4, 16])
def test_a_context_larger_than_the_pool_gives_the_same_bits(
    models: dict[str, Path], kind: str, tier: str, page_size: int, tmp_path: Path
) -> None:
    prompt = random_prompt(330, seed=1)
    roomy = engine_with(models[kind], 1100 // page_size, page_size, prefix_cache=False)
    [expected] = roomy.generate([prompt], PARAMS)
    tiers = {"host_cache": "8MiB"} if tier == "host" else {"cache_dir": tmp_path}
    tight = engine_with(models[kind], 200 // page_size, page_size, **tiers)
    [done] = tight.generate([prompt], PARAMS)
    assert done.token_ids == expected.token_ids
    assert done.logprobs == expected.logprobs  # in float64, of every bit of the logits
    assert done.streamed is not None
    assert ("host memory" if tier == "host" else "disk") in done.streamed
    assert done.kv_bytes_peak <= tight.cache.usage().pool_bytes
    assert expected.streamed is None
    tight.close()


@pytest.mark.usefixtures("every_backend")
def test_others_have_their_turn_before_and_after(models: dict[str, Path]) -> None:
    engine = engine_with(models["full"], 50, host_cache="8MiB")
    prompts = [random_prompt(n, seed=n) for n in (40, 300, 50, 290, 45)]
    requests = [engine.submit(prompt, PARAMS) for prompt in prompts]
    order = []
    while engine.has_work:
        order += [out.request for out in engine.step() if out.completion is not None]
        engine.cache.check()
    assert order == requests
    for prompt, request in zip(prompts, requests, strict=True):
        alone = engine_with(models["full"], 300, prefix_cache=False)
        [expected] = alone.generate([prompt], PARAMS)
        assert request.completions[0].token_ids == expected.token_ids
        assert (request.completions[0].streamed is not None) == (len(prompt) > 200)


def test_a_streamed_request_can_be_cancelled(models: dict[str, Path]) -> None:
    engine = engine_with(models["full"], 50, host_cache="8MiB")
    request = engine.submit(random_prompt(300), PARAMS)
    for _ in range(10):
        engine.step()
    engine.cancel(request)
    assert request.completions[0].finish_reason == "cancelled"
    [usage] = engine.status().tiers
    assert usage.bytes_used == 0  # what was lent came back
    [done] = engine.generate([random_prompt(30)], PARAMS)
    assert done.new_tokens == 9


def test_a_step_that_fails_can_be_repeated(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = random_prompt(300, seed=2)
    alone = engine_with(models["full"], 300, prefix_cache=False)
    [expected] = alone.generate([prompt], PARAMS)
    engine = engine_with(models["full"], 50, host_cache="8MiB")
    request = engine.submit(prompt, PARAMS)
    put_back, calls = LayerStream._put_back, iter(range(10_000))

    def failing(stream: LayerStream) -> None:
        put_back(stream)
        if next(calls) % 13 == 5:
            raise RuntimeError("broken")

    monkeypatch.setattr(LayerStream, "_put_back", failing)
    failures = 0
    while engine.has_work:
        try:
            engine.step()
        except RuntimeError:
            failures += 1
    assert failures > 3
    assert request.completions[0].token_ids == expected.token_ids


def test_what_cannot_be_streamed_is_refused_with_the_numbers(models: dict[str, Path]) -> None:
    prompt = random_prompt(300)
    with pytest.raises(RequestError, match="or give a host_cache or cache_dir to stream from"):
        engine_with(models["full"], 50).submit(prompt, PARAMS)
    small = engine_with(models["full"], 50, host_cache="20KB")
    with pytest.raises(RequestError, match=r"give a host_cache of at least"):
        small.submit(prompt, PARAMS)
    with pytest.raises(RequestError, match="and one layer of it"):
        engine_with(models["full"], 20, host_cache="8MiB").submit(prompt, PARAMS)
    two = quire.SamplingParams(max_new_tokens=9, n=2)
    with pytest.raises(RequestError, match="only one sample at a time"):
        engine_with(models["full"], 50, host_cache="8MiB").submit(prompt, two)


def test_measured_memory_stays_within_weights_and_the_pool(tmp_path: Path) -> None:
    """A context of four times the pool, in a process of its own, with its pages on disk."""
    sizes = {"num_hidden_layers": 8, "head_dim": 64, "num_key_value_heads": 4}
    directory = WRITERS["full"](
        tmp_path / "model",
        dtype="bf16",
        num_attention_heads=4,
        max_position_embeddings=20_000,
        **sizes,
    )
    per_token = 8 * 2 * 4 * 64 * 2
    pool = parse_bytes("16MiB")
    tokens = 4 * pool // per_token - 20
    code = f"""
import numpy as np, quire
from quire.machine import PeakMemory
cache = quire.CacheConfig(kv_memory={pool}, cache_dir={str(tmp_path / "store")!r})
engine = quire.Engine({str(directory)!r}, backend="native", cache=cache)
params = quire.SamplingParams(max_new_tokens=4, ignore_eos=True)
engine.generate([[1] * 3000], params)  # fills the pool
prompt = np.random.default_rng(0).integers(0, 61, {tokens}).tolist()
with PeakMemory() as memory:
    [done] = engine.generate([prompt], params)
print(memory.bytes, done.new_tokens, done.kv_bytes_peak)
print(done.streamed)
engine.close()
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    told, streamed = ran.stdout.splitlines()
    peak, new, kv_peak = map(int, told.split())
    assert new == 4
    assert "disk" in streamed
    assert kv_peak <= pool
    base = subprocess.run(
        [sys.executable, "-c", code.replace(f", {tokens})", ", 1000)")],
        capture_output=True,
        text=True,
        check=True,
    )
    # The same process with a prompt that fits: its pages, all of the pool, are resident too.
    # Beside that only what a layer's pages take on their way (8 MiB a layer), and no copy of all.
    assert peak <= int(base.stdout.split()[0]) + pool // 2 + 2 * (8 << 20)
