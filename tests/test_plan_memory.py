"""Bytes of a plan: known values, slow and obvious counts, what fits."""

from fractions import Fraction

import numpy as np
import pytest

from quire.analysis.catalogue import known_model
from quire.analysis.families import read_shape
from quire.analysis.memory import (
    Load,
    fragmentation,
    kv_bytes,
    kv_fixed_bytes,
    kv_growth,
    kv_layout,
    kv_token_bytes,
    most_context,
    most_requests,
    plan_memory,
    pool_bytes,
    pool_pages,
    score_matrix_bytes,
    weight_bytes,
    workspace,
)
from quire.config import EngineConfig
from quire.errors import ConfigError
from quire.layout import fit_pages
from quire.models.source import resolve_model

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def test_llama_2_7b_takes_half_a_mebibyte_a_token_and_two_gibibytes_at_4096() -> None:
    """2 x 32 layers x 4,096 numbers x 2 bytes (Kwon et al., 2023, arXiv:2309.06180, for OPT-13B
    likewise: 800 KB).
    """
    layout = kv_layout(known_model("llama-2-7b"))
    assert layout.format_text == "fp16"
    assert kv_token_bytes(layout) == 512 * KIB
    assert kv_bytes(layout, 4096) == 2 * GIB


def test_llama_3_8b_takes_128_kibibytes_a_token() -> None:
    """2 x 32 layers x 8 KV heads x 128 numbers x 2 bytes (arXiv:2407.21783, table 3)."""
    assert kv_token_bytes(kv_layout(known_model("llama-3-8b"))) == 128 * KIB


def test_a_score_matrix_of_4096_is_64_mebibytes_and_a_tile_a_quarter() -> None:
    """4,096² and 256² numbers of 4 bytes (FlashAttention, arXiv:2205.14135, why it tiles)."""
    assert score_matrix_bytes(4096, 4096) == 64 * MIB
    assert score_matrix_bytes(256, 256) == MIB // 4


def test_deepseek_v3_keeps_576_numbers_a_token_and_layer() -> None:
    """512 compressed and 64 rotary ones, for keys and values together (arXiv:2412.19437)."""
    shape = known_model("deepseek-v3")
    assert kv_token_bytes(kv_layout(shape)) == 576 * 2 * 61
    assert kv_token_bytes(kv_layout(shape, "int8")) == (576 + 2) * 61


def test_weights_are_counted_by_part() -> None:
    shape = known_model("llama-3-8b")
    found = weight_bytes(shape)
    assert found["embeddings"] == found["head"] == 2 * 128256 * 4096
    assert found["mlp"] == 2 * 32 * 3 * 4096 * 14336
    assert found["attention"] == 2 * 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024)
    assert found["norms"] == 2 * 65 * 4096
    assert sum(found.values()) == 2 * 8_030_261_248
    assert sum(weight_bytes(shape, "fp32").values()) == 4 * 8_030_261_248
    small = weight_bytes(shape, "int8")  # embeddings, norms and the head stay as they are
    assert (small["mlp"] * 2, small["head"]) == (found["mlp"], found["head"])
    assert weight_bytes(known_model("llama-3.2-1b"))["head"] == 0  # tied


def test_parts_that_a_checkpoint_stores_smaller_are_counted_so() -> None:
    found, whole = (weight_bytes(known_model("deepseek-v3"), dtype) for dtype in (None, "bf16"))
    assert (found["experts"] * 2, found["head"]) == (whole["experts"], whole["head"])
    experts = known_model("gpt-oss-20b").numbers["experts"]
    assert weight_bytes(known_model("gpt-oss-20b"))["experts"] == experts * 17 // 32


def test_an_unknown_dtype_of_weights_brings_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown dtype of weights 'bf61'.*did you mean 'bf16'"):
        weight_bytes(known_model("gpt2"), "bf61")


# -- keys and values -------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_format", ["fp32", "bf16", "fp8", "int8", "k=int8,v=fp8"])
@pytest.mark.parametrize("page_size", [16, 48])
def test_bytes_of_a_sequence_are_those_of_its_pages(kv_format: str, page_size: int) -> None:
    shape = known_model("llama-3.2-1b")
    layout = kv_layout(shape, kv_format, page_size)
    number = {"fp32": 4, "bf16": 2}.get(kv_format, 1)
    scale = 0 if kv_format in ("fp32", "bf16") else 2
    a_token = 16 * 8 * 2 * (64 * number + scale)
    for tokens in (1, 15, 16, 17, 100, 4096):
        held, pages = 0, 0
        for token in range(tokens):  # a page whenever the last one is full
            if token % page_size == 0:
                pages += 1
            held = max(held, pages * page_size * a_token)
        assert kv_bytes(layout, tokens) == held


def test_layers_with_a_window_stop_growing() -> None:
    shape = known_model("gemma-3-27b")
    layout = kv_layout(shape)
    a_layer = 2 * 16 * 128 * 2
    assert kv_growth(layout, 100) == 62 * a_layer == kv_token_bytes(layout)
    assert kv_growth(layout, 1024) == 10 * a_layer
    assert kv_fixed_bytes(layout) == 52 * 1024 * a_layer
    far, further = kv_bytes(layout, 50_000), kv_bytes(layout, 50_016)
    assert further - far == 16 * 10 * a_layer


def test_a_window_never_holds_more_than_a_simulated_sequence_does() -> None:
    layout, chunk = kv_layout(known_model("mistral-7b"), page_size=16), 512
    a_page = layout.page_bytes(0)
    most = 0
    for prompt in range(1, 17):  # wherever chunks begin in a page
        for length in range(prompt, 12_000, chunk):
            # a step has all pages of its chunk and of what the first token of it sees
            first = max(0, length - 4096 + 1)
            most = max(most, -(-(length + chunk) // 16) - first // 16)
    assert kv_bytes(layout, 12_000, chunk) == most * a_page


def test_a_pool_for_a_load_is_what_the_engine_makes_of_as_many_bytes() -> None:
    shape, config = known_model("llama-3.2-1b"), EngineConfig()
    for kv_format in ("bf16", "int8", "int4"):
        layout = kv_layout(shape, kv_format)
        load = Load(4096, 8, config.max_batch_tokens)
        pages = pool_pages(layout, load)
        assert fit_pages(layout, pool_bytes(layout, load), 8, 512) == pages
        assert pool_bytes(layout, load) == int(np.dot(pages, layout.area_bytes))


def test_one_format_is_asked_for_where_one_vector_is_kept() -> None:
    with pytest.raises(ConfigError, match="keeps one vector for keys and values"):
        kv_layout(known_model("deepseek-v3"), "k=int8,v=int4")


@pytest.mark.parametrize("page_size", [0, -1, "half"])
def test_a_page_size_that_cannot_be_is_refused(page_size: int | str) -> None:
    with pytest.raises(ConfigError, match="page_size must be a number of tokens"):
        kv_layout(known_model("gpt2"), page_size=page_size)


def test_whole_is_a_page_of_the_models_context() -> None:
    layout = kv_layout(known_model("llama-2-7b"), page_size="whole")
    assert (layout.page_size, kv_bytes(layout, 1)) == (4096, 2 * GIB)


# -- what fits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-3-8b", "gemma-3-4b", "deepseek-v2-lite"])
@pytest.mark.parametrize("kv_format", ["bf16", "int4"])
def test_the_longest_context_fits_and_one_token_more_does_not(name: str, kv_format: str) -> None:
    shape = known_model(name)
    layout, load = kv_layout(shape, kv_format), Load(1, 4)
    budget = sum(weight_bytes(shape).values()) + 600 * MIB
    found = most_context(shape, layout, load, budget)
    assert 0 < found < shape.max_position
    assert plan_memory(shape, layout, Load(found, 4), None).total <= budget
    assert plan_memory(shape, layout, Load(found + 1, 4), None).total > budget


def test_the_most_requests_fit_and_one_more_does_not() -> None:
    shape = known_model("llama-3-8b")
    layout, load = kv_layout(shape), Load(8192)
    budget = 24 * 10**9
    found = most_requests(shape, layout, load, budget)
    assert plan_memory(shape, layout, Load(8192, found)).total <= budget
    assert plan_memory(shape, layout, Load(8192, found + 1)).total > budget
    # 24 GB, less 16.06 GB of weights, hold five contexts of 1 GiB, and workspace
    assert found in (6, 7)


def test_what_cannot_fit_is_none() -> None:
    shape = known_model("llama-3-8b")
    layout = kv_layout(shape)
    assert most_context(shape, layout, Load(1), GIB) == 0
    assert most_requests(shape, layout, Load(8192), GIB) == 0


@pytest.mark.parametrize("wrong", [{"context": 0}, {"sequences": 0}, {"chunk": -1}])
def test_a_load_of_nothing_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="a plan needs at least 1"):
        Load(**{"context": 1, **wrong})


def test_workspace_grows_with_the_chunk_and_logits_with_their_rows() -> None:
    shape = read_shape(resolve_model("quill"))
    layout = kv_layout(shape)
    small, large = (workspace(shape, layout, Load(2048, 1, chunk)) for chunk in (64, 512))
    assert large.activations > 6 * small.activations
    assert large.logits == small.logits == 4 * 4096
    assert workspace(shape, layout, Load(2048, 1, 64, logits=10)).logits == 40 * 4096


# -- waste -----------------------------------------------------------------------------------------


def test_waste_of_rows_and_pages_is_what_is_left_empty() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 2049, 200).tolist()
    found = fragmentation(lengths, 2048, 16)
    empty = sum(1 for length in lengths for slot in range(2048) if slot >= length)
    assert found.contiguous_waste == pytest.approx(empty / (200 * 2048))
    half = sum(-length % 16 for length in lengths)
    assert found.paged_waste == pytest.approx(half / (found.used + half))
    assert found.paged_waste < 0.02
    assert found.contiguous_waste > 0.4


@pytest.mark.parametrize("lengths", [[], [0], [5, 2049]])
def test_lengths_that_cannot_be_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ConfigError, match="lengths must be 1 to 2048 tokens, not"):
        fragmentation(lengths, 2048, 16)


def test_bytes_a_token_are_exact_fractions() -> None:
    assert kv_token_bytes(kv_layout(known_model("llama-3-8b"), "int4")).denominator == 1
    assert isinstance(kv_growth(kv_layout(known_model("gpt2")), 1), Fraction)
