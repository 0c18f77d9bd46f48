"""Hugging Face ``config.json`` -> :class:`ModelConfig`, for the architectures Quire knows.

Reads facts only: no weights, no tensors. Keys that change the arithmetic in a way Quire does not
implement are refused; keys it has never heard of are reported in ``ModelConfig.ignored_keys``.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quire.config import ModelConfig, RopeConfig
from quire.errors import CheckpointError, ConfigError, UnsupportedArchitecture, did_you_mean

__all__ = [
    "MODEL_TYPES",
    "SUPPORTED",
    "ConfigKeys",
    "model_config",
    "read_json",
    "read_model_config",
]

# Keys that say nothing about the arithmetic of inference.
_INERT = frozenset(
    [
        "_name_or_path",
        "architectures",
        "model_type",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "use_cache",
        "initializer_range",
        "attention_dropout",
        "hidden_dropout",
        "pad_token_id",
        "unk_token_id",
        "pretraining_tp",
        "attn_pdrop",
        "embd_pdrop",
        "resid_pdrop",
        "summary_type",
        "summary_use_proj",
        "summary_activation",
        "summary_proj_to_labels",
        "summary_first_dropout",
        "n_ctx",
        "task_specific_params",
        "output_hidden_states",
        "output_attentions",
        "return_dict",
        "id2label",
        "label2id",
        "problem_type",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "is_decoder",
        "gradient_checkpointing",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "attn_implementation",
        "use_bfloat16",
    ]
)

# Keys whose other values would change the arithmetic: (key, the values that change nothing).
_NEUTRAL: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("quantization_config", (None,)),
    ("partial_rotary_factor", (None, 1.0)),
    ("scale_attn_weights", (True,)),
    ("scale_attn_by_inverse_layer_idx", (False,)),
    ("reorder_and_upcast_attn", (False, True)),
    ("add_cross_attention", (False, None)),
    ("cross_attention_hidden_size", (None,)),
    ("attn_logit_softcapping", (None,)),
    ("final_logit_softcapping", (None,)),
    ("num_experts", (None, 0)),
    ("num_local_experts", (None, 0)),
)

_DEFAULT_WINDOW = 4096  # of Mistral and Qwen, where config.json does not say

_ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError if it is missing or is no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


class ConfigKeys:
    """Typed, once-only reading of config keys; remembers which were used."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw, self.where, self.used = raw, where, set[str]()

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is; ``default`` if the key is missing."""
        self.used.add(key)
        return self.raw.get(key, default)

    def integer(self, key: str, default: int | None = None) -> int:
        """An int; CheckpointError for anything else, or if it is missing and has no default."""
        value = self.get(key)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"{self.where} lacks {key!r}")
        if isinstance(value, bool) or not isinstance(value, int):
            raise CheckpointError(f"{self.where}: {key!r} must be an int, not {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number, likewise."""
        value = self.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.where} lacks {key!r}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{self.where}: {key!r} must be a number, not {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false, likewise."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.where}: {key!r} must be true or false, not {value!r}")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One token id or a list of them; none if the key is missing."""
        value = self.get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
            raise CheckpointError(f"{self.where}: {key!r} must hold token ids, not {value!r}")
        return tuple(values)


def _activation(keys: ConfigKeys, key: str, default: str) -> str:
    name = keys.get(key, default)
    if name not in _ACTIVATIONS:
        raise UnsupportedArchitecture(
            f"{keys.where}: activation {name!r} is not supported (supported: "
            f"{', '.join(_ACTIVATIONS)})"
        )
    return str(name)


def _rope(keys: ConfigKeys) -> RopeConfig:
    """From ``rope_parameters`` (transformers 5) or ``rope_theta`` + ``rope_scaling`` (before)."""
    theta = keys.number("rope_theta", 10_000.0)
    scaling = keys.get("rope_scaling")
    raw = keys.get("rope_parameters") or scaling or {}
    if not isinstance(raw, dict) or any(isinstance(value, dict) for value in raw.values()):
        raise UnsupportedArchitecture(f"{keys.where}: rope parameters {raw!r} are not supported")
    kind = raw.get("rope_type", raw.get("type", "default"))
    inner = ConfigKeys(raw, f"{keys.where}, rope parameters")
    if inner.number("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedArchitecture(f"{inner.where}: partial rotary embedding is not supported")
    theta = inner.number("rope_theta", theta)
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(kind="linear", factor=inner.number("factor"), theta=theta)
    if kind == "llama3":
        return RopeConfig(
            kind="llama3",
            factor=inner.number("factor"),
            low_freq_factor=inner.number("low_freq_factor"),
            high_freq_factor=inner.number("high_freq_factor"),
            original_max_position=inner.integer("original_max_position_embeddings"),
            theta=theta,
        )
    raise UnsupportedArchitecture(
        f"{keys.where}: rope type {kind!r} is not supported (supported: default, linear, llama3)"
    )


def _windows(keys: ConfigKeys, num_layers: int, default: tuple[int | None, ...]) -> tuple[Any, ...]:
    """One window a layer: from ``layer_types`` where given, else ``default``."""
    types = keys.get("layer_types")
    if types is None:
        return default
    window = keys.get("sliding_window")
    known = {"full_attention": None, "sliding_attention": window}
    if not isinstance(types, list) or not all(t in known for t in map(str, types)):
        raise UnsupportedArchitecture(
            f"{keys.where}: layer_types {types!r} are not supported (supported: {sorted(known)})"
        )
    if window is None and "sliding_attention" in types:
        raise CheckpointError(f"{keys.where}: sliding layers without 'sliding_window'")
    return tuple(known[kind] for kind in types)


def _decoder(keys: ConfigKeys, **flags: Any) -> ModelConfig:
    """What Llama and its kin have in common; ``flags`` are the architecture's own."""
    hidden, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    layers = keys.integer("num_hidden_layers")
    head_dim = flags.pop("head_dim", None) or hidden // max(heads, 1)
    default_windows = flags.pop("windows", (None,) * layers)
    return ModelConfig(
        vocab_size=keys.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=keys.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=keys.integer("num_key_value_heads", heads),
        head_dim=keys.integer("head_dim", head_dim),
        max_position=keys.integer("max_position_embeddings"),
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        activation=_activation(keys, "hidden_act", "silu"),
        rope=_rope(keys),
        windows=_windows(keys, layers, default_windows),
        tied_embeddings=keys.flag("tie_word_embeddings", False),
        **flags,
    )


def _llama(keys: ConfigKeys, **common: Any) -> ModelConfig:
    if "sliding_attention" in str(keys.get("layer_types")):
        raise UnsupportedArchitecture(f"{keys.where}: Llama has no sliding layers")
    bias = keys.flag("attention_bias", False)
    mlp_bias = keys.flag("mlp_bias", False)
    return _decoder(keys, qkv_bias=bias, output_bias=bias, mlp_bias=mlp_bias, **common)


def _mistral(keys: ConfigKeys, **common: Any) -> ModelConfig:
    window = keys.get("sliding_window", _DEFAULT_WINDOW)
    windows = (window,) * keys.integer("num_hidden_layers")
    return _decoder(keys, windows=windows, **common)


def _qwen_windows(keys: ConfigKeys) -> tuple[int | None, ...]:
    """Qwen slides in the layers from ``max_window_layers`` on, if ``use_sliding_window``."""
    layers = keys.integer("num_hidden_layers")
    sliding = keys.flag("use_sliding_window", False)
    window = keys.get("sliding_window", _DEFAULT_WINDOW) if sliding else None
    first = keys.integer("max_window_layers", 28)
    return tuple(window if layer >= first else None for layer in range(layers))


def _qwen2(keys: ConfigKeys, **common: Any) -> ModelConfig:
    return _decoder(keys, qkv_bias=True, windows=_qwen_windows(keys), **common)


def _qwen3(keys: ConfigKeys, **common: Any) -> ModelConfig:
    bias = keys.flag("attention_bias", False)
    flags = {"qkv_bias": bias, "output_bias": bias, "qk_norm": True, "head_dim": 128}
    return _decoder(keys, windows=_qwen_windows(keys), **flags, **common)


def _gpt2(keys: ConfigKeys, **common: Any) -> ModelConfig:
    hidden, heads = keys.integer("n_embd"), keys.integer("n_head")
    layers = keys.integer("n_layer")
    if hidden % max(heads, 1):
        raise CheckpointError(f"{keys.where}: n_embd {hidden} is not a multiple of n_head {heads}")
    return ModelConfig(
        vocab_size=keys.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=keys.integer("n_inner", 4 * hidden),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // max(heads, 1),
        max_position=keys.integer("n_positions"),
        norm_eps=keys.number("layer_norm_epsilon", 1e-5),
        activation=_activation(keys, "activation_function", "gelu_new"),
        rope=None,
        windows=(None,) * layers,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tied_embeddings=keys.flag("tie_word_embeddings", True),
        **common,
    )


SUPPORTED: dict[str, Callable[..., ModelConfig]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "GPT2LMHeadModel": _gpt2,
}

MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}


def _architecture(raw: Mapping[str, Any], where: str) -> str:
    names = raw.get("architectures") or [MODEL_TYPES.get(str(raw.get("model_type")), "")]
    name = str(names[0]) if isinstance(names, list) and names else ""
    if name in SUPPORTED:
        return name
    said = name or f"model_type {raw.get('model_type')!r}"
    raise UnsupportedArchitecture(
        f"{where}: architecture {said} is not supported{did_you_mean(name, SUPPORTED)} "
        f"(supported: {', '.join(SUPPORTED)})"
    )


def model_config(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The facts in a parsed ``config.json``; ``where`` names it in errors.

    Raises UnsupportedArchitecture for an unknown architecture or feature, CheckpointError for a
    key that is missing or of the wrong type.
    """
    name = _architecture(raw, where)
    keys = ConfigKeys(raw, where)
    for key, harmless in _NEUTRAL:
        value = keys.get(key, harmless[0])
        if value not in harmless:
            raise UnsupportedArchitecture(f"{where}: {key}={value!r} is not supported")
    bos = keys.token_ids("bos_token_id")
    try:
        config = SUPPORTED[name](
            keys,
            architecture=name,
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=keys.token_ids("eos_token_id"),
        )
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error
    optional = {"layer_types", "sliding_window", "use_sliding_window", "max_window_layers"}
    unknown = sorted(set(raw) - keys.used - _INERT - optional)
    object.__setattr__(config, "ignored_keys", tuple(unknown))
    return config


def read_model_config(directory: Path) -> ModelConfig:
    """The facts in ``directory/config.json``, with EOS ids from ``generation_config.json``."""
    config = model_config(read_json(directory / "config.json"), str(directory / "config.json"))
    path = directory / "generation_config.json"
    if path.exists():
        ids = ConfigKeys(read_json(path), str(path)).token_ids("eos_token_id")
        if ids:
            object.__setattr__(config, "eos_token_ids", ids)
    return config
