"""Tiny random Hugging Face checkpoints, written by the tests themselves.

One writer needs NumPy and safetensors only; the other lets transformers write what it reads. Both
draw weights large enough that logits are far from flat, and give every norm and bias a value that
matters. Tensor names and shapes are spelled out here on purpose, apart from Quire's own tables.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

Array = npt.NDArray[Any]
Config = dict[str, Any]

DTYPES: dict[str, Any] = {"fp32": np.float32, "bf16": ml_dtypes.bfloat16, "fp16": np.float16}

_DECODER: Config = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_BASES: dict[str, Config] = {
    "llama": {"architectures": ["LlamaForCausalLM"], **_DECODER},
    "mistral": {"architectures": ["MistralForCausalLM"], **_DECODER, "sliding_window": None},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], **_DECODER, "use_sliding_window": False},
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        **_DECODER,
        "head_dim": 12,
        "use_sliding_window": False,
    },
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 97,
        "n_embd": 32,
        "n_inner": None,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 160,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}

MIXED_WINDOWS: Config = {
    "num_hidden_layers": 3,
    "use_sliding_window": True,
    "sliding_window": 7,
    "max_window_layers": 1,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
}


def tiny_config(model_type: str, **changes: Any) -> Config:
    """A ``config.json`` of a model that computes in milliseconds."""
    return {"model_type": model_type, **_BASES[model_type], **changes}


# One of each kind of cache and wiring, for tests that go over every architecture.
VARIETY: dict[str, Config] = {
    "llama": tiny_config("llama"),
    "llama-mqa-tied": tiny_config("llama", num_key_value_heads=1, tie_word_embeddings=True),
    "mistral-window": tiny_config("mistral", sliding_window=9),
    "qwen2": tiny_config("qwen2"),
    "qwen2-mixed": tiny_config("qwen2", **MIXED_WINDOWS),
    "qwen3": tiny_config("qwen3"),
    "gpt2": tiny_config("gpt2"),
}


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors that transformers would save for ``config``."""
    return _gpt2_shapes(config) if config["model_type"] == "gpt2" else _decoder_shapes(config)


def _decoder_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    kind, hidden, inner = config["model_type"], config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or hidden // heads
    bias = config.get("attention_bias", False)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        rows = {"q": heads * dim, "k": kv_heads * dim, "v": kv_heads * dim}
        for name, size in rows.items():
            shapes[f"{at}self_attn.{name}_proj.weight"] = (size, hidden)
            if bias or kind == "qwen2":
                shapes[f"{at}self_attn.{name}_proj.bias"] = (size,)
        shapes[f"{at}self_attn.o_proj.weight"] = (hidden, heads * dim)
        if bias:
            shapes[f"{at}self_attn.o_proj.bias"] = (hidden,)
        if kind == "qwen3":
            shapes |= {f"{at}self_attn.{name}_norm.weight": (dim,) for name in "qk"}
        for name, shape in (
            ("gate", (inner, hidden)),
            ("up", (inner, hidden)),
            ("down", (hidden, inner)),
        ):
            shapes[f"{at}mlp.{name}_proj.weight"] = shape
            if config.get("mlp_bias", False):
                shapes[f"{at}mlp.{name}_proj.bias"] = shape[:1]
        shapes[f"{at}input_layernorm.weight"] = (hidden,)
        shapes[f"{at}post_attention_layernorm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def _gpt2_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    hidden, inner = config["n_embd"], config["n_inner"] or 4 * config["n_embd"]
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (config["vocab_size"], hidden),
        "transformer.wpe.weight": (config["n_positions"], hidden),
        "transformer.ln_f.weight": (hidden,),
        "transformer.ln_f.bias": (hidden,),
    }
    for layer in range(config["n_layer"]):
        at = f"transformer.h.{layer}."
        for name, shape in (
            ("attn.c_attn", (hidden, 3 * hidden)),
            ("attn.c_proj", (hidden, hidden)),
            ("mlp.c_fc", (hidden, inner)),
            ("mlp.c_proj", (inner, hidden)),
            ("ln_1", (hidden,)),
            ("ln_2", (hidden,)),
        ):
            shapes[f"{at}{name}.weight"] = shape
            shapes[f"{at}{name}.bias"] = shape[-1:]
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def random_tensor(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Array:
    """float32 [shape]: norm weights around 1, biases around 0, matrices with a gain of about 2.

    Token embeddings and biases are smaller, so that a model does not just repeat one token.
    """
    noise = rng.standard_normal(shape)
    if len(shape) == 1:
        return (0.3 * noise + 1 if name.endswith("weight") else 0.1 * noise).astype(np.float32)
    gain = 0.5 if "embed_tokens" in name or "wte" in name else 2.0
    return (noise * gain / np.sqrt(shape[-1])).astype(np.float32)


def random_tensors(config: Config, seed: int = 0) -> dict[str, Array]:
    """Every tensor of ``config``, float32, reproducible."""
    rng = np.random.default_rng(seed)
    return {name: random_tensor(rng, name, shape) for name, shape in tensor_shapes(config).items()}


def write_checkpoint(
    directory: Path,
    config: Config,
    tensors: Mapping[str, Array] | None = None,
    *,
    dtype: str = "fp32",
    shards: int = 1,
) -> Path:
    """Write ``config.json`` and safetensors without torch; returns ``directory``.

    ``tensors`` (random ones by default) are cast to ``dtype`` unless they are integers.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = random_tensors(config) if tensors is None else tensors
    stored = {
        name: np.require(array if array.dtype.kind in "iub" else _cast(array, dtype), None, "C")
        for name, array in tensors.items()
    }
    if shards == 1:
        save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: stored[name] for name in list(stored)[shard::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def _cast(array: Array, dtype: str) -> Array:
    return array.astype(DTYPES[dtype])


def write_with_transformers(directory: Path, config: Config, *, dtype: str = "fp32") -> Path:
    """The same kind of checkpoint, built and saved by transformers; returns ``directory``."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    rng = np.random.default_rng(1)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**copy.deepcopy(config))
    )  # it fills in rope
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = random_tensor(rng, name, tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(values))
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    model.to(kinds[dtype]).save_pretrained(directory)
    return directory
