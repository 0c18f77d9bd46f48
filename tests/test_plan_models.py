"""Shapes of models: the catalogue, and config.json of every family."""

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoints import tiny_config, write_checkpoint
from quire.analysis.catalogue import MODELS, known_model
from quire.analysis.families import FAMILIES, read_shape, shape_of
from quire.analysis.shape import Matrix
from quire.errors import CheckpointError, ConfigError, UnsupportedArchitecture
from quire.models.source import resolve_model

# Parameters as the models' own pages and papers give them, in billions, as printed there.
PUBLISHED = {
    "llama-2-7b": 6.74,
    "llama-2-70b": 68.98,  # arXiv:2307.09288 says 70B
    "llama-3-8b": 8.03,
    "llama-3-70b": 70.6,
    "llama-3.1-405b": 405.9,
    "llama-3.2-1b": 1.24,
    "llama-3.2-3b": 3.21,
    "mistral-7b": 7.24,
    "mixtral-8x7b": 46.7,
    "mixtral-8x22b": 140.6,
    "qwen2.5-7b": 7.62,
    "qwen3-8b": 8.19,
    "qwen3-30b-a3b": 30.5,
    "qwen3-235b-a22b": 235.1,
    "gemma-2-9b": 9.24,
    "gpt-oss-20b": 20.9,
    "gpt-oss-120b": 116.8,
    "deepseek-v2-lite": 15.7,
    "deepseek-v3": 671.0,
    "gpt2": 0.124,
    "gpt2-xl": 1.56,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name: str) -> None:
    billions = known_model(name).total_numbers / 1e9
    assert billions == pytest.approx(PUBLISHED[name], rel=0.004)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_that_transformers_makes(name: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    raw = dict(MODELS[name][1])
    for key in ("dtype", "quantization_config"):
        raw.pop(key, None)
    config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert known_model(name).total_numbers == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "billions"),
    [("deepseek-v3", 37), ("qwen3-235b-a22b", 22), ("mixtral-8x7b", 12.9), ("qwen3-30b-a3b", 3.3)],
)
def test_a_token_uses_the_published_part_of_a_mixture(name: str, billions: float) -> None:
    assert known_model(name).active_numbers / 1e9 == pytest.approx(billions, rel=0.03)


def test_windows_are_those_of_the_layers() -> None:
    gemma = known_model("gemma-3-27b").windows
    assert gemma[:6] == (1024,) * 5 + (None,)
    assert gemma.count(None) == 10
    assert known_model("gemma-2-2b").windows[:2] == (4096, None)
    assert known_model("gpt-oss-20b").windows[:2] == (128, None)
    assert set(known_model("mistral-7b").windows) == {4096}
    assert set(known_model("mistral-7b-v0.3").windows) == {None}
    assert set(known_model("qwen3-8b").windows) == {None}


def test_latent_attention_keeps_one_vector() -> None:
    [kept] = set(known_model("deepseek-v3").kv)
    assert (kept.num_kv_heads, kept.key_dim, kept.value_dim, kept.numbers) == (1, 576, 0, 576)


def test_names_of_the_hub_and_any_case_are_known() -> None:
    assert known_model("Meta-Llama/Meta-Llama-3-8B") == known_model("LLAMA-3-8B")


def test_an_unknown_name_brings_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no model 'lama-3-8b'.*did you mean 'llama-3-8b'"):
        known_model("lama-3-8b")


def test_the_experts_that_tokens_use_are_expected_ones() -> None:
    experts = Matrix("experts", 4, 4, copies=8, active=2)
    assert experts.expected_copies(1) == pytest.approx(2)
    assert experts.expected_copies(2) == pytest.approx(8 * (1 - 0.75**2))
    assert experts.expected_copies(10**6) == pytest.approx(8)
    assert Matrix("mlp", 4, 4).expected_copies(5) == 1


# -- config.json -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_a_checkpoint_has_the_weights_that_its_config_says(tmp_path: Path, kind: str) -> None:
    directory = write_checkpoint(tmp_path / kind, tiny_config(kind), dtype="bf16")
    size = 0
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        size += sum(
            entry["data_offsets"][1] - entry["data_offsets"][0]
            for key, entry in header.items()
            if key != "__metadata__"
        )
    assert 2 * read_shape(directory).total_numbers == size


def test_quill_is_read_from_its_config() -> None:
    shape = read_shape(resolve_model("quill"))
    assert (shape.dtype, shape.tied, shape.max_position) == ("bf16", True, 2048)
    assert shape.total_numbers == 4_000_000  # 4096 x 256, four layers of 737,280 + 512, 256


def raw(**changes: Any) -> dict[str, Any]:
    return {**MODELS["llama-3.2-1b"][1], **changes}


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnsupportedArchitecture, match=r"does not know model_type 'mamba'.*llama"):
        shape_of(raw(model_type="mamba"), "x", "config.json")


def test_a_missing_dtype_is_fp32_and_said() -> None:
    given = raw()
    del given["dtype"]
    shape = shape_of(given, "x", "config.json")
    assert shape.dtype == "fp32"
    assert "names no dtype" in shape.notes[0]


def test_the_text_part_of_a_larger_model_is_planned_and_said() -> None:
    shape = shape_of({"model_type": "gemma3", "text_config": raw()}, "x", "config.json")
    assert shape.total_numbers == known_model("llama-3.2-1b").total_numbers
    assert "text only" in shape.notes[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 0}, "at least one layer, not 0"),
        ({"hidden_size": -1}, "'hidden_size' must be at least 1, not -1"),
        ({"num_key_value_heads": 5}, "32 query heads cannot be shared evenly by 5 KV heads"),
        ({"dtype": "int3"}, "dtype 'int3' is none of float32, bfloat16, float16"),
        ({"layer_types": ["full_attention"]}, "layer_types must name the kind of each layer"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        shape_of(raw(**changes), "x", "config.json")


def test_unknown_kinds_of_layers_and_of_quantised_weights_are_refused() -> None:
    with pytest.raises(UnsupportedArchitecture, match="layer 0 is 'linear_attention'"):
        shape_of(raw(layer_types=["linear_attention"] * 16), "x", "config.json")
    with pytest.raises(UnsupportedArchitecture, match="weights quantised by 'gptq'"):
        shape_of(raw(quantization_config={"quant_method": "gptq"}), "x", "config.json")


def test_every_family_stands_in_the_catalogue_or_runs() -> None:
    kinds = {row["model_type"] for _, row in MODELS.values()}
    assert set(FAMILIES) - kinds <= {"qwen2_moe"}
