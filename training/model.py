"""quill's network: a small Llama (RMSNorm, RoPE, SwiGLU, grouped-query attention) in plain torch.

Module and parameter names are Hugging Face's `LlamaForCausalLM` names, so that a state dict of
`Quill` is an export as it stands.

Sources: Llama, Touvron et al. 2023 (arXiv:2302.13971); RoPE, Su et al. 2021 (arXiv:2104.09864), in
Hugging Face's rotate-half layout; RMSNorm, Zhang & Sennrich 2019 (arXiv:1910.07467); SwiGLU,
Shazeer 2020 (arXiv:2002.05202); grouped-query attention, Ainslie et al. 2023 (arXiv:2305.13245).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class QuillConfig:
    """Sizes of the network. The defaults are quill as shipped."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    def to_hf(self, *, bos_token_id: int, eos_token_id: int) -> dict[str, Any]:
        """The contents of a Hugging Face `config.json`."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "rms_norm_eps": self.rms_norm_eps,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "use_cache": True,
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "torch_dtype": "bfloat16",
        }


def rope_tables(config: QuillConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, each [length, head_dim], float32."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    frequency = config.rope_theta ** (-half / config.head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequency)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE (rotate-half) to x [batch, heads, time, head_dim]; tables [time, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight.float()).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query self-attention over [batch, time, hidden]."""

    def __init__(self, config: QuillConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        query = config.num_attention_heads * config.head_dim
        kv = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv, bias=False)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, time, _ = x.shape
        shape = (batch, time, -1, self.head_dim)
        q = rotate(self.q_proj(x).view(shape).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(shape).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        # Repeated, since not every backend's fused kernel takes fewer KV heads than query heads.
        k = k.repeat_interleave(self.groups, dim=1)
        v = v.repeat_interleave(self.groups, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, time, -1))
        return mixed


class SwiGLU(nn.Module):
    """Feed-forward down(silu(gate(x)) * up(x))."""

    def __init__(self, config: QuillConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: QuillConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        middle: Tensor = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = middle + self.mlp(self.post_attention_layernorm(middle))
        return out


class Decoder(nn.Module):
    """Embedding, layers and final norm: token ids [batch, time] to states [batch, time, hidden]."""

    def __init__(self, config: QuillConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        cos, sin = rope_tables(self.config, ids.shape[1], ids.device)
        x: Tensor = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        out: Tensor = self.norm(x)
        return out


class Quill(nn.Module):
    """The language model; the output projection is the embedding (tied)."""

    def __init__(self, config: QuillConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [batch, time, vocab] for ids [batch, time]."""
        return F.linear(self.model(ids), self.model.embed_tokens.weight)

    def loss(self, ids: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Mean of -log p(target) (nats) weighted by weights; all three [batch, time]."""
        logits = self(ids).flatten(0, 1).float()
        nats = F.cross_entropy(logits, targets.flatten(), reduction="none")
        flat = weights.flatten()
        return (nats * flat).sum() / flat.sum()


def initialise(model: Quill, seed: int) -> None:
    """Normal(0, 0.02) weights; projections that write to the residual stream scaled by 1/sqrt(2L).

    Source: GPT-2, Radford et al. 2019.
    """
    generator = torch.Generator().manual_seed(seed)
    residual = 1.0 / math.sqrt(2 * model.config.num_hidden_layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim != 2:
                continue
            narrow = name.endswith(("o_proj.weight", "down_proj.weight"))
            parameter.normal_(0.0, 0.02 * (residual if narrow else 1.0), generator=generator)


def parameter_count(model: nn.Module) -> int:
    """Number of scalars in the model; the tied embedding counts once."""
    return sum(parameter.numel() for parameter in model.parameters())
