"""Settings: sizes in bytes, unknown names and values that cannot be used."""

import dataclasses
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.config import (
    CacheConfig,
    EngineConfig,
    ModelConfig,
    RopeConfig,
    format_bytes,
    parse_bytes,
)
from quire.errors import ConfigError

MODEL: dict[str, Any] = {
    "architecture": "Test",
    "vocab_size": 10,
    "hidden_size": 24,
    "intermediate_size": 8,
    "num_layers": 2,
    "num_heads": 6,
    "num_kv_heads": 3,
    "head_dim": 4,
    "max_position": 64,
    "windows": (None, 4),
    "norm_eps": 1e-5,
    "activation": "silu",
    "rope": RopeConfig(),
}

UNITS = {
    "B": 1,
    "KB": 1000,
    "MB": 1000**2,
    "GB": 1000**3,
    "TB": 1000**4,
    "KiB": 1024,
    "MiB": 1024**2,
    "GiB": 1024**3,
    "TiB": 1024**4,
}


# -- bytes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (1, 1),
        (4096, 4096),
        ("4096", 4096),
        ("640B", 640),
        ("512 MB", 512_000_000),
        ("2GiB", 2 << 30),
        ("  1.5 KiB ", 1536),
        ("0.5gib", 1 << 29),
        ("2TIB", 2 << 40),
    ],
)
def test_sizes_are_read_with_and_without_units(text: int | str, count: int) -> None:
    assert parse_bytes(text) == count


@given(st.integers(1, 10**6), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " "]))
def test_every_unit_in_any_case(number: int, unit: str, space: str) -> None:
    for word in (unit, unit.lower(), unit.upper()):
        assert parse_bytes(f"{number}{space}{word}") == number * UNITS[unit]


@given(st.integers(0, 10**6), st.integers(0, 999), st.sampled_from(sorted(UNITS)[1:]))
def test_decimals_that_are_whole_bytes_are_exact(whole: int, thousandths: int, unit: str) -> None:
    count = Fraction(whole * 1000 + thousandths, 1000) * UNITS[unit]
    if count > 0 and count.denominator == 1:
        assert parse_bytes(f"{whole}.{thousandths:03}{unit}") == count


@pytest.mark.parametrize("digits", ["9007199254740993", "9" * 400], ids=["2**53 + 1", "10**400"])
def test_large_sizes_are_exact(digits: str) -> None:
    assert parse_bytes(digits) == int(digits)


@pytest.mark.parametrize(
    "wrong",
    ["", "GiB", "1XB", "-1", "1e3", "1 2", "1,5GB", ".5GB", "nan", "inf", "1 GiB per GPU", "٣GB"],
)
def test_text_that_is_no_size_is_refused_with_the_units(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a size in bytes; .* KiB, MiB, GiB, TiB"):
        parse_bytes(wrong)


@pytest.mark.parametrize("wrong", [None, True, 1.5, [1], b"2GiB"], ids=repr)
def test_what_is_neither_int_nor_text_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="must be an int or text"):
        parse_bytes(wrong)


@pytest.mark.parametrize("wrong", [0, -5, "0", "0.0GiB", "0.0001KB"])
def test_less_than_a_byte_is_refused(wrong: int | str) -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        parse_bytes(wrong)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (640, "640 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1_572_864, "1.5 MiB"),
        (2 << 30, "2 GiB"),
        (3 << 40, "3 TiB"),
        (5000 << 40, "5000 TiB"),
        (-2048, "-2 KiB"),
        (123_456_789, "117.7 MiB"),
    ],
)
def test_bytes_are_written_for_a_person(count: int, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(1, 1023), st.sampled_from(["B", "KiB", "MiB", "GiB", "TiB"]))
def test_whole_units_survive_a_round_trip(number: int, unit: str) -> None:
    assert parse_bytes(format_bytes(number * UNITS[unit])) == number * UNITS[unit]


# -- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "given", "wrong", "nearest"),
    [
        (CacheConfig, {}, "page_sise", "page_size"),
        (CacheConfig, {"page_size": 4}, "kv_formt", "kv_format"),
        (CacheConfig, {}, "memory", "kv_memory"),
        (EngineConfig, {}, "max_batch_token", "max_batch_tokens"),
        (EngineConfig, {"backend": "auto"}, "max_seqs", "max_sequences"),
        (ModelConfig, MODEL, "num_layer", "num_layers"),
        (ModelConfig, MODEL, "sliding_windows", "windows"),
        (RopeConfig, {}, "rope_theta", "theta"),
    ],
)
def test_an_unknown_option_names_the_nearest_and_all(
    config: type, given: dict[str, Any], wrong: str, nearest: str
) -> None:
    expected = f"{config.__name__} has no option '{wrong}'; did you mean '{nearest}'"
    with pytest.raises(ConfigError, match=expected) as caught:
        config(**given, **{wrong: 1})
    for field in dataclasses.fields(config):
        assert field.name in str(caught.value)


def test_an_option_like_no_other_suggests_nothing() -> None:
    with pytest.raises(ConfigError, match=r"CacheConfig has no option 'zzz' \(options:"):
        CacheConfig(zzz=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("config", [CacheConfig, EngineConfig, RopeConfig])
def test_settings_are_frozen_and_by_keyword(config: type) -> None:
    field = dataclasses.fields(config)[0].name
    made = config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, field, getattr(made, field))
    with pytest.raises(TypeError):
        config(getattr(made, field))
    assert config() == made
    assert hash(config()) == hash(made)


# -- values ----------------------------------------------------------------------------------


def test_defaults_are_sixteen_tokens_a_page_and_memory_that_the_backend_knows() -> None:
    config = CacheConfig()
    assert (config.page_size, config.kv_format, config.kv_memory) == (16, "auto", "auto")
    assert config.num_pages is None
    assert EngineConfig().cache == config
    assert CacheConfig(kv_memory="1.5MiB").kv_memory == 1_572_864
    assert CacheConfig(page_size="whole").page_size == "whole"


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *(("page_size", value) for value in (0, -1, 1.5, True, "16", "all", None)),
        *(("num_pages", value) for value in (0, -1, 2.0, True, "8")),
        *(("kv_format", value) for value in (None, 16)),
    ],
)
def test_cache_settings_that_cannot_be_used_are_refused(name: str, wrong: Any) -> None:
    with pytest.raises(ConfigError, match=f"CacheConfig: {name} must be"):
        CacheConfig(**{name: wrong})


@pytest.mark.parametrize("wrong", [0, -1, True, None, "2 gigs"])
def test_cache_memory_that_cannot_be_used_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="size in bytes"):
        CacheConfig(kv_memory=wrong)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *(("max_batch_tokens", value) for value in (0, -1, 1.0, True, "512")),
        *(("max_sequences", value) for value in (0, -1, 1.0, True, None)),
        *(("cache", value) for value in (None, {"page_size": 4})),
        *(("backend", value) for value in (None, 1)),
    ],
)
def test_engine_settings_that_cannot_be_used_are_refused(name: str, wrong: Any) -> None:
    with pytest.raises(ConfigError, match=f"EngineConfig: {name} must be"):
        EngineConfig(**{name: wrong})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        *(
            ({name: value}, f"Test: {name} must be an int of at least 1, not {value!r}")
            for name in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_layers",
                "num_heads",
                "num_kv_heads",
                "head_dim",
                "max_position",
            )
            for value in (0, -1, 2.0, True, None)
        ),
        ({"num_kv_heads": 4}, "6 query heads cannot be shared evenly by 4 KV heads"),
        ({"head_dim": 5}, "rotary embedding needs an even head_dim, not 5"),
        ({"windows": (None,)}, "1 layer types for 2 layers"),
        ({"windows": (None, 0)}, "sliding_window must be an int of at least 1, not 0"),
        ({"windows": (None, 2.5)}, "sliding_window must be an int of at least 1, not 2.5"),
        *(
            ({"norm_eps": value}, "norm_eps must be")
            for value in (0.0, -1e-5, float("nan"), float("inf"))
        ),
    ],
)
def test_model_facts_that_cannot_be_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**{**MODEL, **changed})


def test_an_odd_head_is_fine_without_rotary_embedding() -> None:
    assert ModelConfig(**{**MODEL, "head_dim": 5, "rope": None}).head_dim == 5


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("theta", 0.0),
        ("theta", -1.0),
        ("theta", float("nan")),
        ("kind", "yarn"),
        ("factor", 0.0),
        ("factor", float("inf")),
        ("original_max_position", 0),
    ],
)
def test_rotary_settings_that_cannot_be_used_are_refused(name: str, wrong: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        RopeConfig(**{name: wrong})
