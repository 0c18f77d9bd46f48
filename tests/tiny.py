"""Tiny random checkpoints and engines for the engine's tests. NumPy and safetensors only."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

import quire

VOCAB = 61
WINDOW = 7
END = 0  # the tokenizer's only special token
DTYPES = {"fp32": np.float32, "bf16": ml_dtypes.bfloat16, "fp16": np.float16}

_TEXT = (
    "the quick brown fox jumps over the lazy dog and the other fox, then the dog too. Ünïcödé ☃ 🦊"
)

# Sizes are odd on purpose: no dimension is a multiple of a vector register or of a tile.
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}


def write_llama(directory: Path, *, tokenizer: bool = False, **changes: Any) -> Path:
    """A Llama whose two layers keep every token."""
    config = {"architectures": ["LlamaForCausalLM"], **_SIZES}
    return _write(directory, config, False, tokenizer, changes)


def write_mixed(directory: Path, *, tokenizer: bool = False, **changes: Any) -> Path:
    """A Qwen2 with biases; its first layer keeps every token, its second a window of WINDOW."""
    config = {"architectures": ["Qwen2ForCausalLM"], **_SIZES}
    config |= {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1}
    return _write(directory, config, True, tokenizer, changes)


def write_sliding(directory: Path, **changes: Any) -> Path:
    """A Mistral: every layer keeps a window of WINDOW tokens."""
    config = {"architectures": ["MistralForCausalLM"], **_SIZES, "sliding_window": WINDOW}
    return _write(directory, config, False, False, changes)


# Each kind of cache there is.
WRITERS: dict[str, Callable[..., Path]] = {
    "full": write_llama,
    "mixed": write_mixed,
    "sliding": write_sliding,
    # Heads of whole vectors, which native kernels multiply as pairs; more than one split of keys.
    "wide": partial(write_mixed, head_dim=32, max_position_embeddings=1100, sliding_window=300),
}


def tiny_engine(
    directory: Path,
    *,
    page_size: int | str = 4,
    num_pages: int = 64,
    kv_format: str = "auto",
    prefix_cache: bool = True,
    **limits: Any,
) -> quire.Engine:
    """An engine on the reference backend with a pool of ``num_pages`` pages a group."""
    cache = quire.CacheConfig(
        page_size=page_size, num_pages=num_pages, kv_format=kv_format, prefix_cache=prefix_cache
    )
    return quire.Engine(directory, backend="reference", cache=cache, **limits)


def random_prompt(length: int, seed: int = 0) -> list[int]:
    """``length`` token ids of the tiny vocabulary."""
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def _write(
    directory: Path, config: dict[str, Any], qkv_bias: bool, tokenizer: bool, changes: Any
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    dtype, seed = DTYPES[changes.pop("dtype", "fp32")], changes.pop("seed", 0)
    if tokenizer:
        made = train_tokenizer([_TEXT])
        made.save(str(directory / "tokenizer.json"))
        config["vocab_size"] = made.get_vocab_size()
    config |= changes
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    random = np.random.default_rng(seed)
    tensors = {}
    for name, shape in _shapes(config, qkv_bias).items():
        scale = 1.5 / np.sqrt(shape[-1]) if len(shape) == 2 else 0.2
        centre = 1.0 if "norm" in name else 0.0
        tensors[name] = (centre + scale * random.standard_normal(shape)).astype(dtype)
    save_file(tensors, directory / "model.safetensors")
    return directory


def _shapes(config: dict[str, Any], qkv_bias: bool) -> dict[str, tuple[int, ...]]:
    hidden, inner, vocab = (
        config[key] for key in ("hidden_size", "intermediate_size", "vocab_size")
    )
    outs = {
        "self_attn.q_proj": config["num_attention_heads"] * config["head_dim"],
        "self_attn.k_proj": config["num_key_value_heads"] * config["head_dim"],
        "self_attn.v_proj": config["num_key_value_heads"] * config["head_dim"],
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}{name}.weight": (out, hidden) for name, out in outs.items()}
        if qkv_bias:
            shapes |= {f"{at}{name}.bias": (out,) for name, out in outs.items()}
        shapes[f"{at}self_attn.o_proj.weight"] = (hidden, outs["self_attn.q_proj"])
        shapes |= {f"{at}mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {
            f"{at}{name}.weight": (hidden,)
            for name in ("input_layernorm", "post_attention_layernorm")
        }
    return shapes


def train_tokenizer(texts: Sequence[str], vocab_size: int = 300) -> Tokenizer:
    """A byte-level BPE of 256 bytes, END and some merges."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts * 3, trainer)
    return tokenizer
