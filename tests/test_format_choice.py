"""Which format where: the text, its errors, and what a layout makes of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.config import CacheConfig
from quire.errors import ConfigError
from quire.format_choice import Formats, describe_formats, parse_formats
from quire.formats import PAGE_FORMATS

names = st.sampled_from([*PAGE_FORMATS, "auto"])


def names_of(text: str, num_layers: int, auto: str = "bf16") -> list[str]:
    """``key/value`` of each layer."""
    formats = parse_formats(text).of_layers(num_layers, auto)
    return [f"{key.name}/{value.name}" for key, value in formats]


@pytest.mark.parametrize("name", PAGE_FORMATS)
def test_one_name_is_for_keys_and_values_of_all_layers(name: str) -> None:
    assert names_of(name, 3) == [f"{name}/{name}"] * 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto", ["bf16/bf16"] * 4),
        ("k=int8,v=fp8", ["int8/fp8"] * 4),
        ("v=fp8,k=int8", ["int8/fp8"] * 4),
        ("k=auto,v=fp8", ["bf16/fp8"] * 4),
        ("int4+int8@first,last", ["int8/int8", "int4/int4", "int4/int4", "int8/int8"]),
        ("int4+int8@0,-1", ["int8/int8", "int4/int4", "int4/int4", "int8/int8"]),
        ("auto+k=int8,v=fp8@1,-2", ["bf16/bf16", "int8/fp8", "int8/fp8", "bf16/bf16"]),
        ("fp8+int8@first+auto@3", ["int8/int8", "fp8/fp8", "fp8/fp8", "bf16/bf16"]),
        (
            " k = int8 , v=fp8 + int8 @ 0 , last ",
            ["int8/int8", "int8/fp8", "int8/fp8", "int8/int8"],
        ),
        ("fp8+int8@0+int8@first", ["int8/int8", "fp8/fp8", "fp8/fp8", "fp8/fp8"]),
    ],
)
def test_texts_say_which_layer_has_what(text: str, expected: list[str]) -> None:
    assert names_of(text, 4) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int9", r"unknown page format 'int9'; did you mean 'int.'\?"),
        ("fp61", r"'fp61'; did you mean 'fp16'\? \(formats: auto, fp32, bf16, fp16, fp8, int8"),
        ("k=int8,v=bf61", r"'bf61'; did you mean 'bf16'"),
        ("int8+fp88@0", r"'fp88'; did you mean 'fp8'"),
        ("", r"unknown page format ''"),
        ("k=int8", r"kv_format 'k=int8': 'k=int8' gives a format for keys only; give both"),
        ("v=int8", "for values only"),
        ("k=int8,k=fp8", "neither one format nor one each for k and v"),
        ("int8,fp8", "neither one format nor one each for k and v"),
        ("key=int8,v=fp8", "neither one format nor one each for k and v"),
        ("int8+fp8", "'fp8' does not say for which layers it is"),
        ("int8@0", r"unknown page format 'int8@0'"),
        ("bf16:rotated", "bf16 does not quantise: it would change bits for nothing"),
        ("k=auto:rotated,v=int4", "own dtype is lossless"),
        ("k=int4,v=int4:rotated", "only keys are rotated.* write v=int4"),
        ("int4:rotate", r"unknown page format .* did you mean 'int4:rotated'"),
        ("int4:rotated:rotated", "unknown page format"),
        ("int8+", "'' does not say for which layers"),
        ("int8+fp8@", "'' is no layer"),
        ("int8+fp8@frist", "'frist' is no layer; write a number"),
        ("int8+fp8@0-1", "'0-1' is no layer"),
        ("int8+fp8@+1", "'' is no layer"),
        ("int8+fp8@1.0", "'1.0' is no layer"),
        ("int8+fp8@0@1", "'0@1' is no layer"),
    ],
)
def test_texts_that_say_nothing_are_refused_at_once(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CacheConfig(kv_format=text)


def test_layers_that_are_not_there_are_refused_with_the_number() -> None:
    for layer in (4, -5, 100):
        with pytest.raises(ConfigError, match=rf"layer {layer}, and the model has 4 layers \(0 to"):
            parse_formats(f"int8+fp8@{layer}").of_layers(4, "bf16")


def test_two_formats_for_a_layer_are_refused() -> None:
    parsed = parse_formats("fp8+int8@first+k=bf16,v=int8@-2")
    assert parsed.of_layers(3, "bf16")
    with pytest.raises(ConfigError, match="layer 0 twice, as int8 and as k=bf16,v=int8"):
        parsed.of_layers(2, "bf16")


@given(st.lists(st.tuples(names, names), min_size=1, max_size=6))
def test_the_description_says_the_same_as_the_formats(pairs: list[tuple[str, str]]) -> None:
    layers: list[Formats] = [
        (PAGE_FORMATS[k if k != "auto" else "bf16"], PAGE_FORMATS[v if v != "auto" else "bf16"])
        for k, v in pairs
    ]
    text = describe_formats(layers)
    assert list(parse_formats(text).of_layers(len(layers), "fp32")) == layers
    assert describe_formats(parse_formats(text).of_layers(len(layers), "fp32")) == text


@pytest.mark.parametrize(
    ("text", "num_layers", "expected"),
    [
        ("auto", 2, "bf16"),
        ("k=int8,v=int8", 3, "int8"),
        ("int4+int8@last,first", 5, "int4+int8@0,4"),
        ("int8+fp8@0,1,2", 4, "fp8+int8@3"),
        ("k=bf16,v=int8+bf16@1+fp8@2", 4, "k=bf16,v=int8+bf16@1+fp8@2"),
        ("k=int4:rotated,v=int4", 2, "int4:rotated"),
        (
            "int2:rotated+k=int8:rotated,v=int4@0+int2@1",
            4,
            ("int2:rotated+k=int8:rotated,v=int4@0+int2@1"),
        ),
    ],
)
def test_a_description_is_the_shortest_of_its_kind(
    text: str, num_layers: int, expected: str
) -> None:
    assert describe_formats(parse_formats(text).of_layers(num_layers, "bf16")) == expected


# -- page sizes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *(("auto", 16), ("int8", 16), ("k=int8,v=fp8+bf16@0", 16)),
        *(("int4", 32), ("k=bf16,v=int2", 32), ("int8+int4@last", 32)),
    ],
)
def test_the_page_size_follows_the_format_unless_it_is_given(text: str, size: int) -> None:
    assert CacheConfig(kv_format=text).page_size == size
    assert CacheConfig(kv_format=text, page_size=64).page_size == 64


@pytest.mark.parametrize("size", [1, 16, 48, "whole"])
def test_page_sizes_that_cut_groups_are_refused(size: int) -> None:
    assert CacheConfig(kv_format="int8", page_size=size).page_size == size
    for text in ("int4", "k=int8,v=int2", "int8+int4@0"):
        with pytest.raises(ConfigError, match=f"must be a multiple of 32, not {size!r}"):
            CacheConfig(kv_format=text, page_size=size)
