"""The plan that an engine makes before it loads: sizes of pools, and what is refused."""

import dataclasses
import logging
from pathlib import Path

import pytest

import quire
from checkpoints import tiny_config, write_checkpoint
from quire.analysis.families import read_shape
from quire.analysis.memory import kv_token_bytes
from quire.engine import engine as engine_module
from quire.engine.sizing import Room, plan_engine
from quire.errors import ConfigError
from quire.layout import fit_pages
from quire.machine import Machine, this_machine
from quire.models.source import resolve_model

MIB = 1 << 20
QUILL = resolve_model("quill")


def machine(available: int | None) -> Machine:
    return dataclasses.replace(this_machine(), available_bytes=available)


def plan(available: int | None, **cache: object) -> "quire.engine.sizing.EnginePlan":
    config = quire.EngineConfig(cache=quire.CacheConfig(**cache), threads=2)
    return plan_engine(QUILL, config, "bf16", Room(2, available))


def test_the_pool_has_two_gibibytes_where_there_is_room() -> None:
    made = plan(64 << 30)
    assert made.memory.kv == 2 << 30
    assert made.num_pages == ((2 << 30) // (16 * 2048),)
    assert made.tokens == (2 << 30) // 2048
    assert plan(None).num_pages == made.num_pages  # where nothing is known of the machine


def test_the_pool_has_what_is_left_where_that_is_less() -> None:
    made = plan(400 * MIB)
    assert made.memory.total <= 0.95 * 400 * MIB
    assert 0.95 * 400 * MIB - made.memory.total < 16 * 2048  # not even a page is wasted


def test_a_memory_of_the_backends_own_is_used_whole() -> None:
    config = quire.EngineConfig(threads=2)
    made = plan_engine(QUILL, config, "bf16", Room(2, 8 << 30, is_own=True))
    assert 0.95 * (8 << 30) - made.memory.total < 16 * 2048
    assert made.memory.kv > 7 << 30


@pytest.mark.parametrize("evict", ["quest:budget=128,dense=1", "lsh:budget=128,bits=64"])
@pytest.mark.parametrize("kv_format", ["bf16", "int4"])
def test_what_the_own_policy_knows_of_pages_has_its_place(evict: str, kv_format: str) -> None:
    """As much as the status of an engine says of the same pool that has chosen pages."""
    made = plan(400 * MIB, evict=evict, kv_format=kv_format, page_size=32)
    least = plan(400 * MIB, kv_format=kv_format, page_size=32)
    assert made.memory.total <= 0.95 * 400 * MIB
    assert made.memory.kv < least.memory.kv
    assert made.memory.summaries > 0
    assert "summaries " in str(made)
    settings = {"evict": evict, "kv_format": kv_format, "page_size": 32}
    engine = quire.Engine(cache=quire.CacheConfig(**settings, num_pages=24), max_batch_tokens=200)
    engine.generate([list(range(5, 180))], quire.SamplingParams(max_new_tokens=2, ignore_eos=True))
    status = engine.status()
    assert status.reading is not None
    assert status.reading.bytes_most == engine.plan.memory.summaries


def test_too_many_pages_with_what_is_known_of_them_are_refused_with_the_most_that_fit() -> None:
    evict = "quest:budget=128,dense=1"
    with pytest.raises(ConfigError) as raised:
        plan(500 * MIB, evict=evict, kv_memory="460MiB")
    most = int(str(raised.value).split("lower kv_memory to at most ")[1].split(maxsplit=1)[0])
    assert plan(500 * MIB, evict=evict, kv_memory=most).memory.total <= 475 * MIB
    with pytest.raises(ConfigError):
        plan(500 * MIB, evict=evict, kv_memory=most + 3 * 16 * 2048)


def test_weights_are_those_of_the_checkpoint() -> None:
    assert plan(None).memory.weight_bytes == 2 * 4_000_000
    config = quire.EngineConfig(backend="reference", threads=2)
    made = plan_engine(QUILL, config, "bf16", Room(2, None))
    assert made.memory.weight_bytes == 4 * 4_000_000  # a float32 copy
    twin = plan_engine(QUILL, config, "bf16", Room(2, None), loaded=True)
    assert twin.memory.weight_bytes == 0


@pytest.mark.parametrize("cache", [{"kv_memory": "1GiB"}, {"num_pages": 32768}])
def test_what_is_asked_for_and_does_not_fit_is_refused_with_numbers(
    cache: dict[str, object],
) -> None:
    with pytest.raises(ConfigError) as raised:
        plan(500 * MIB, **cache)
    said = str(raised.value)
    assert "the model does not fit: weights 7.629 MiB, KV 1 GiB, workspace" in said
    assert "475 MiB can be had (500 MiB are available, of which 5% are left to others)" in said
    most = int(said.split("lower kv_memory to at most ")[1].split(maxsplit=1)[0])
    assert plan(500 * MIB, kv_memory=most).memory.total <= 475 * MIB
    with pytest.raises(ConfigError):
        plan(500 * MIB, kv_memory=most + 16 * 2048)


def test_a_model_that_does_not_fit_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose a smaller model, or free memory"):
        plan(10 * MIB)


def test_an_engine_makes_the_plan_before_it_loads(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "quire"):
        engine = quire.Engine(cache=quire.CacheConfig(kv_memory="4MiB"))
    assert engine.cache.num_pages == engine.plan.num_pages == (4 * MIB // (16 * 2048),)
    assert engine.cache.usage().pool_bytes == engine.plan.memory.kv == 4 * MIB
    assert f"plan: {engine.plan}" in caplog.messages
    assert "KV 4 MiB" in str(engine.plan)
    assert "2,048 tokens of bf16 keys and values" in str(engine.plan)

    def no_load(*_: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(engine_module, "load_model", no_load)
    monkeypatch.setattr(engine_module, "this_machine", lambda: machine(10 * MIB))
    with pytest.raises(ConfigError, match="the model does not fit"):
        quire.Engine()


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
@pytest.mark.parametrize("kv_format", ["auto", "int8", "k=fp8,v=int8"])
def test_pools_are_those_of_the_plan(tmp_path: Path, kind: str, kv_format: str) -> None:
    window = {"sliding_window": 24} if kind == "mistral" else {}
    directory = write_checkpoint(tmp_path / kind, tiny_config(kind, **window), dtype="bf16")
    cache = quire.CacheConfig(kv_format=kv_format, kv_memory="1MiB")
    engine = quire.Engine(directory, cache=cache)
    layout = engine.cache.layout
    assert engine.plan.num_pages == engine.cache.num_pages == fit_pages(layout, MIB, 64, 512)
    a_token = sum(shape.bytes_per_token for shape in layout.shapes)
    assert kv_token_bytes(layout) == a_token
    assert engine.cache.usage().pool_bytes == engine.plan.memory.kv <= MIB


def test_a_config_without_model_type_is_read_by_its_architecture(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "m", tiny_config("qwen3"))
    assert read_shape(directory).layers[0].vectors == 2 * 32 + 2 * 12
