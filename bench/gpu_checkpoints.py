"""Random Llama checkpoints for ``bench/gpu.py``, as Quire and transformers both read them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

__all__ = ["LLAMA_1B", "STREAMED", "TINY", "LlamaShape", "checkpoint"]


@dataclass(frozen=True)
class LlamaShape:
    """What config.json says; ``tied`` is of the embeddings and the head."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    dim: int
    vocabulary: int
    longest: int
    tied: bool

    def config(self, dtype: str) -> dict[str, Any]:
        """config.json; the base of rotary embedding where older and newer readers look for it."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": dtype,
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.dim,
            "max_position_embeddings": self.longest,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "rope_theta": 10_000.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
            "tie_word_embeddings": self.tied,
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes."""
        queries, keys = self.heads * self.dim, self.kv_heads * self.dim
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden),
            "model.norm.weight": (self.hidden,),
        }
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            parts = {
                "self_attn.q_proj": (queries, self.hidden),
                "self_attn.k_proj": (keys, self.hidden),
                "self_attn.v_proj": (keys, self.hidden),
                "self_attn.o_proj": (self.hidden, queries),
                "mlp.gate_proj": (self.inner, self.hidden),
                "mlp.up_proj": (self.inner, self.hidden),
                "mlp.down_proj": (self.hidden, self.inner),
                "input_layernorm": (self.hidden,),
                "post_attention_layernorm": (self.hidden,),
            }
            shapes |= {f"model.layers.{layer}.{at}.weight": size for at, size in parts.items()}
        return shapes


LLAMA_1B = LlamaShape(16, 2048, 8192, 32, 8, 64, 128_256, 16_384, True)
STREAMED = LlamaShape(6, 768, 2048, 12, 12, 64, 32_000, 32_768, False)
TINY = LlamaShape(2, 32, 48, 2, 2, 16, 61, 512, False)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def checkpoint(work: Path, shape: LlamaShape, dtype: str, kind: str) -> Path:
    """A directory under ``work`` with random weights of ``dtype``; written once.

    Normal numbers over the root of the inner size, the same for every dtype but for rounding;
    drawn on the device ``kind``, which is faster.
    """
    directory = work / f"llama-{shape.hidden}-{shape.layers}-{dtype}"
    done = directory / "config.json"
    if done.exists():
        return directory
    directory.mkdir(exist_ok=True)
    random = torch.Generator(kind).manual_seed(0)
    tensors = {}
    for name, size in shape.tensors().items():
        if len(size) == 1:
            numbers = torch.ones(size)
        else:
            numbers = torch.randn(size, generator=random, device=kind) / size[-1] ** 0.5
        tensors[name] = numbers.to(_DTYPES[dtype]).cpu()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    done.write_text(json.dumps(shape.config(dtype), indent=1), encoding="utf-8")
    return directory
