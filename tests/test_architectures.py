"""``config.json`` to ModelConfig: facts, defaults, and refusals by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoints import Config, tiny_config
from quire.architectures import SUPPORTED, model_config, read_model_config
from quire.config import ModelConfig, RopeConfig
from quire.errors import CheckpointError, UnsupportedArchitecture

DECODERS = ("llama", "mistral", "qwen2", "qwen3")
ALL = (*DECODERS, "gpt2")
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def without(config: Config, *keys: str) -> Config:
    return {key: value for key, value in config.items() if key not in keys}


# -- facts ---------------------------------------------------------------------------------------


def test_llama_facts() -> None:
    assert model_config(tiny_config("llama")) == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=97,
        hidden_size=32,
        intermediate_size=44,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_position=160,
        windows=(None, None),
        norm_eps=1e-5,
        activation="silu",
        rope=RopeConfig(theta=10_000.0),
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def test_gpt2_facts() -> None:
    assert model_config(tiny_config("gpt2")) == ModelConfig(
        architecture="GPT2LMHeadModel",
        vocab_size=97,
        hidden_size=32,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=8,
        max_position=160,
        windows=(None, None),
        norm_eps=1e-5,
        activation="gelu_new",
        rope=None,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tied_embeddings=True,
        bos_token_id=1,
        eos_token_ids=(2,),
    )


@pytest.mark.parametrize(
    ("model_type", "changes", "flags"),
    [
        ("llama", {}, ()),
        ("llama", {"attention_bias": True}, ("qkv_bias", "output_bias")),
        ("llama", {"mlp_bias": True}, ("mlp_bias",)),
        ("llama", {"tie_word_embeddings": True}, ("tied_embeddings",)),
        ("mistral", {}, ()),
        ("qwen2", {}, ("qkv_bias",)),
        ("qwen3", {}, ("qk_norm",)),
        ("qwen3", {"attention_bias": True}, ("qkv_bias", "output_bias", "qk_norm")),
        ("gpt2", {}, ("qkv_bias", "output_bias", "mlp_bias", "tied_embeddings")),
        ("gpt2", {"tie_word_embeddings": False}, ("qkv_bias", "output_bias", "mlp_bias")),
    ],
)
def test_flags_of_each_architecture(
    model_type: str, changes: Config, flags: tuple[str, ...]
) -> None:
    config = model_config(tiny_config(model_type, **changes))
    every = ("qkv_bias", "output_bias", "mlp_bias", "qk_norm", "tied_embeddings")
    assert tuple(name for name in every if getattr(config, name)) == flags


@pytest.mark.parametrize("model_type", ALL)
def test_the_model_type_is_enough_where_no_architecture_is_named(model_type: str) -> None:
    config = tiny_config(model_type)
    assert model_config(without(config, "architectures")) == model_config(config)


@pytest.mark.parametrize(
    ("model_type", "key", "field", "default"),
    [
        ("llama", "num_key_value_heads", "num_kv_heads", 4),
        ("llama", "rms_norm_eps", "norm_eps", 1e-6),
        ("llama", "hidden_act", "activation", "silu"),
        ("llama", "tie_word_embeddings", "tied_embeddings", False),
        ("llama", "bos_token_id", "bos_token_id", None),
        ("llama", "eos_token_id", "eos_token_ids", ()),
        ("qwen3", "head_dim", "head_dim", 128),
        ("gpt2", "n_inner", "intermediate_size", 128),
        ("gpt2", "layer_norm_epsilon", "norm_eps", 1e-5),
        ("gpt2", "activation_function", "activation", "gelu_new"),
        ("gpt2", "tie_word_embeddings", "tied_embeddings", True),
    ],
)
def test_defaults_of_keys_that_may_be_absent(
    model_type: str, key: str, field: str, default: Any
) -> None:
    assert getattr(model_config(without(tiny_config(model_type), key)), field) == default


def test_null_stands_for_an_absent_key() -> None:
    nulls = {"num_key_value_heads": None, "head_dim": None, "eos_token_id": None}
    config = model_config(tiny_config("llama", rope_scaling=None, **nulls))
    assert (config.num_kv_heads, config.head_dim, config.eos_token_ids) == (4, 8, ())
    assert model_config(tiny_config("gpt2", n_inner=None)).intermediate_size == 128


def test_explicit_sizes_win() -> None:
    config = model_config(tiny_config("llama", head_dim=16))
    assert (config.head_dim, config.hidden_size) == (16, 32)
    assert model_config(tiny_config("gpt2", n_inner=72)).intermediate_size == 72


def test_several_eos_tokens() -> None:
    assert model_config(tiny_config("llama", eos_token_id=[3, 5])).eos_token_ids == (3, 5)


def test_eos_of_generation_config_wins(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("llama")))
    assert read_model_config(tmp_path).eos_token_ids == (2,)
    generation = tmp_path / "generation_config.json"
    generation.write_text(json.dumps({"temperature": 0.6}))
    assert read_model_config(tmp_path).eos_token_ids == (2,)
    generation.write_text(json.dumps({"eos_token_id": [7, 2]}))
    assert read_model_config(tmp_path).eos_token_ids == (7, 2)


# -- rotary embedding ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({}, RopeConfig()),
        ({"rope_theta": 5e5}, RopeConfig(theta=5e5)),
        ({"rope_theta": 1_000_000}, RopeConfig(theta=1e6)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, RopeConfig(theta=5e5)),
        ({"rope_parameters": {"rope_theta": 5e5}}, RopeConfig(theta=5e5)),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "default"}}, RopeConfig(theta=5e5)),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            RopeConfig(theta=5e5, kind="linear", factor=2.0),
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 4}},
            RopeConfig(kind="linear", factor=4.0),
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
            RopeConfig(theta=5e5, kind="linear", factor=2.0),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            RopeConfig(theta=5e5, kind="llama3", factor=8.0, original_max_position=64),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
            RopeConfig(theta=5e5, kind="llama3", factor=8.0, original_max_position=64),
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 5e5,
                    **LLAMA3,
                    "low_freq_factor": 2.0,
                    "high_freq_factor": 6.0,
                }
            },
            RopeConfig(
                theta=5e5,
                kind="llama3",
                factor=8.0,
                low_freq_factor=2.0,
                high_freq_factor=6.0,
                original_max_position=64,
            ),
        ),
    ],
)
@pytest.mark.parametrize("model_type", DECODERS)
def test_rope_in_the_new_and_the_old_spelling(
    model_type: str, keys: Config, rope: RopeConfig
) -> None:
    assert model_config(tiny_config(model_type, **keys)).rope == rope


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope", "su", 7, None])
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_other_kinds_of_rope_are_refused_by_name(key: str, kind: Any) -> None:
    with pytest.raises(UnsupportedArchitecture, match="default, linear, llama3") as caught:
        model_config(tiny_config("llama", **{key: {"rope_type": kind, "factor": 2.0}}))
    assert repr(kind) in str(caught.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 1e4}},
    ],
)
def test_partial_rotary_embedding_is_refused(keys: Config) -> None:
    with pytest.raises(UnsupportedArchitecture, match=r"partial.rotary"):
        model_config(tiny_config("llama", **keys))


def test_rope_that_differs_by_layer_type_is_refused() -> None:
    nested = {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e5}}
    with pytest.raises(UnsupportedArchitecture, match="rope parameters"):
        model_config(tiny_config("qwen2", rope_parameters=nested))


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear"},
        *[{"rope_type": "llama3", **without(LLAMA3, key)} for key in LLAMA3 if "factor" in key],
    ],
)
def test_rope_scaling_without_its_numbers_is_an_error(scaling: Config) -> None:
    """A factor that is not there must not become one that is: transformers raises KeyError."""
    with pytest.raises(CheckpointError, match="factor"):
        model_config(tiny_config("llama", rope_scaling=scaling))


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 0.0},
        {"rope_theta": -1e4},
        {"rope_theta": float("nan")},
        {"rope_scaling": {"rope_type": "linear", "factor": 0.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": -2.0}},
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "factor": float("inf")}},
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}},
        {
            "rope_scaling": {
                "rope_type": "llama3",
                **LLAMA3,
                "original_max_position_embeddings": 0,
            }
        },
    ],
)
def test_rope_numbers_that_give_no_angles_are_refused(keys: Config) -> None:
    with pytest.raises(CheckpointError):
        model_config(tiny_config("llama", **keys))


# -- windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "keys", "windows"),
    [
        ("llama", {}, (None, None)),
        ("llama", {"sliding_window": 8}, (None, None)),
        ("mistral", {"sliding_window": None}, (None, None)),
        ("mistral", {"sliding_window": 8}, (8, 8)),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 8}, (None, None)),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, (None, None)),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
            (8, 8),
        ),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            (None, 8),
        ),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
            (None, None),
        ),
        (
            "qwen2",
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            (8, None),
        ),
        ("qwen2", {"layer_types": ["full_attention"] * 2, "sliding_window": None}, (None, None)),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            (None, 8),
        ),
    ],
)
def test_windows_of_the_layers(
    model_type: str, keys: Config, windows: tuple[int | None, ...]
) -> None:
    assert model_config(tiny_config(model_type, **keys)).windows == windows


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ({"layer_types": "full_attention"}, "layer_types"),
        ({"layer_types": ["full_attention"]}, "1 layer types for 2 layers"),
        ({"layer_types": ["sliding_attention"] * 2, "sliding_window": None}, "sliding_window"),
        ({"layer_types": [["full_attention"], {}]}, "layer_types"),
    ],
)
def test_layer_types_that_cannot_be_used_are_refused(keys: Config, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        model_config(tiny_config("qwen2", use_sliding_window=True, **keys))


@pytest.mark.parametrize("window", [0, -1, 2.5, "8", True])
def test_a_window_must_be_a_positive_int(window: Any) -> None:
    with pytest.raises(CheckpointError, match="sliding_window"):
        model_config(tiny_config("mistral", sliding_window=window))


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        {"architectures": ["MixtralForCausalLM"]},
        {"architectures": ["MambaForCausalLM"], "model_type": "mamba"},
        {"architectures": None, "model_type": "mamba"},
        {"architectures": [], "model_type": None},
        {"architectures": "LlamaForCausalLMs"},
        {"architectures": [{}]},
    ],
)
def test_an_unsupported_architecture_is_refused_with_the_list(keys: Config) -> None:
    with pytest.raises(UnsupportedArchitecture) as caught:
        model_config({**tiny_config("llama"), **keys})
    assert all(name in str(caught.value) for name in SUPPORTED)


def test_the_refused_architecture_is_named_and_the_nearest_suggested() -> None:
    with pytest.raises(UnsupportedArchitecture) as caught:
        model_config(tiny_config("llama", architectures=["LlamaForCausalLMs"]))
    assert "LlamaForCausalLMs" in str(caught.value)
    assert "did you mean 'LlamaForCausalLM'" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("num_experts", 8),
        ("num_local_experts", 8),
        ("partial_rotary_factor", 0.25),
    ],
)
def test_a_feature_that_changes_the_arithmetic_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(UnsupportedArchitecture, match=key):
        model_config(tiny_config("llama", **{key: value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
    ],
)
def test_gpt2_variants_are_refused_by_name(key: str, value: bool) -> None:
    with pytest.raises(UnsupportedArchitecture, match=key):
        model_config(tiny_config("gpt2", **{key: value}))


@pytest.mark.parametrize(
    ("model_type", "key"), [("llama", "hidden_act"), ("gpt2", "activation_function")]
)
@pytest.mark.parametrize("name", ["quick_gelu", None, 3, ["silu"]])
def test_an_unknown_activation_is_refused_with_the_list(
    model_type: str, key: str, name: Any
) -> None:
    with pytest.raises(UnsupportedArchitecture, match="silu, gelu, gelu_new") as caught:
        model_config(tiny_config(model_type, **{key: name}))
    assert repr(name) in str(caught.value)


REQUIRED = {
    **dict.fromkeys(
        DECODERS,
        (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        ),
    ),
    "gpt2": ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions"),
}


@pytest.mark.parametrize(
    ("model_type", "key"), [(model_type, key) for model_type in ALL for key in REQUIRED[model_type]]
)
def test_a_missing_key_is_named(model_type: str, key: str) -> None:
    with pytest.raises(CheckpointError, match=f"somewhere lacks '{key}'"):
        model_config(without(tiny_config(model_type), key), "somewhere")


@pytest.mark.parametrize("value", ["32", 32.0, True, [32], {}])
def test_a_key_of_the_wrong_type_is_named(value: Any) -> None:
    with pytest.raises(CheckpointError, match="'hidden_size' must be an int"):
        model_config(tiny_config("llama", hidden_size=value))


@pytest.mark.parametrize(
    ("model_type", "keys", "words"),
    [
        ("llama", {"rms_norm_eps": "1e-5"}, "'rms_norm_eps' must be a number"),
        ("llama", {"attention_bias": 1}, "'attention_bias' must be true or false"),
        ("llama", {"eos_token_id": ["</s>"]}, "'eos_token_id' must hold token ids"),
        ("llama", {"rope_theta": "1e4"}, "'rope_theta' must be a number"),
        ("llama", {"num_key_value_heads": 3}, "4 query heads cannot be shared evenly by 3"),
        ("llama", {"head_dim": 7}, "even head_dim"),
        ("llama", {"rms_norm_eps": 0}, "norm_eps"),
        ("llama", {"rms_norm_eps": float("nan")}, "norm_eps"),
        ("llama", {"num_hidden_layers": 0}, "num_layers"),
        ("llama", {"num_attention_heads": 0}, "num_heads"),
        ("gpt2", {"n_head": 0}, r"n_head|num_heads"),
        ("gpt2", {"n_head": 5}, "n_embd 32 is not a multiple of n_head 5"),
        ("gpt2", {"n_positions": -1}, "max_position"),
    ],
)
def test_values_that_cannot_be_are_refused(model_type: str, keys: Config, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        model_config(tiny_config(model_type, **keys))


ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 3, 0.5, float("nan"), float("inf"), "", "x"),
    *([], [None], ["x"], [[1]], {}, {"x": 1}, {"rope_type": []}),
)


@pytest.mark.parametrize("model_type", ALL)
def test_no_value_of_any_key_gets_another_exception(model_type: str) -> None:
    extra = (
        *("rope_theta", "rope_scaling", "rope_parameters", "layer_types", "sliding_window"),
        *("max_window_layers", "use_sliding_window", "head_dim", "attention_bias", "mlp_bias"),
        *("quantization_config", "partial_rotary_factor", "num_experts", "n_inner"),
    )
    config = tiny_config(model_type)
    others = []
    for key in sorted({*config, *extra}):
        for value in ODD_VALUES:
            try:
                model_config({**config, key: value})
            except CheckpointError:
                pass
            except Exception as error:
                others.append((key, value, error))
    assert not others


# -- keys that nobody reads ----------------------------------------------------------------------


def test_unknown_keys_are_reported() -> None:
    config = model_config(tiny_config("llama", zeta=1, alpha={"beta": 2}, torch_dtype="float32"))
    assert config.ignored_keys == ("alpha", "zeta")


@pytest.mark.parametrize("model_type", ALL)
def test_keys_that_say_nothing_of_inference_are_not_reported(model_type: str) -> None:
    inert = {"transformers_version": "5.0", "initializer_range": 0.02, "use_cache": True}
    assert model_config(tiny_config(model_type, **inert)).ignored_keys == ()


# -- the file ------------------------------------------------------------------------------------


def test_a_missing_config_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json"):
        read_model_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not valid JSON"),
        (b'{"model_type": ', "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[1, 2]", "must hold a JSON object, not list"),
        (b"null", "must hold a JSON object, not NoneType"),
        (b"[" * 100_000, "not valid JSON"),
    ],
    ids=["empty", "cut", "not text", "list", "null", "deep"],
)
def test_a_damaged_config_file_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_model_config(tmp_path)
    assert "config.json" in str(caught.value)


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(without(tiny_config("llama"), "vocab_size")))
    with pytest.raises(CheckpointError) as caught:
        read_model_config(tmp_path)
    assert str(path) in str(caught.value)
