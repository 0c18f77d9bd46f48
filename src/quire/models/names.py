"""Where each parameter of a model lies in its checkpoint: declarative name maps.

A parameter has Quire's name (``layers.3.q``), the checkpoint's (``model.layers.3.self_attn.q_proj
.weight``) and the shape that the config implies. Linear weights are [out, in] after loading.
"""

import re
from dataclasses import dataclass

from quire.config import ModelConfig

__all__ = ["IGNORED", "TensorSpec", "tensor_specs"]

# Buffers that older checkpoints carry and that say nothing new.
IGNORED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|h\.\d+\.attn\.(masked_)?bias)")


@dataclass(frozen=True)
class TensorSpec:
    """One parameter.

    key         Quire's name
    name        the checkpoint's name
    shape       the shape in the checkpoint
    transposed  True if the checkpoint keeps [in, out] (GPT-2's Conv1D)
    part        (i, n): the i-th of n equal parts along the output axis
    """

    key: str
    name: str
    shape: tuple[int, ...]
    transposed: bool = False
    part: tuple[int, int] = (0, 1)


def tensor_specs(config: ModelConfig) -> list[TensorSpec]:
    """Every parameter of a model, in the order of computation."""
    return _gpt2(config) if config.architecture == "GPT2LMHeadModel" else _decoder(config)


def _decoder(config: ModelConfig) -> list[TensorSpec]:
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = (
        ("q", "self_attn.q_proj", (queries, hidden), config.qkv_bias),
        ("k", "self_attn.k_proj", (keys, hidden), config.qkv_bias),
        ("v", "self_attn.v_proj", (keys, hidden), config.qkv_bias),
        ("o", "self_attn.o_proj", (hidden, queries), config.output_bias),
        ("gate", "mlp.gate_proj", (inner, hidden), config.mlp_bias),
        ("up", "mlp.up_proj", (inner, hidden), config.mlp_bias),
        ("down", "mlp.down_proj", (hidden, inner), config.mlp_bias),
    )
    norms = [
        ("attn_norm", "input_layernorm", hidden),
        ("mlp_norm", "post_attention_layernorm", hidden),
    ]
    if config.qk_norm:
        norms += [(f"{x}_norm", f"self_attn.{x}_norm", config.head_dim) for x in "qk"]
    specs = [TensorSpec("embed", "model.embed_tokens.weight", (vocab, hidden))]
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."
        for key, name, size in norms:
            specs.append(TensorSpec(ours + key, f"{theirs}{name}.weight", (size,)))
        for key, name, shape, bias in linears:
            specs.append(TensorSpec(ours + key, f"{theirs}{name}.weight", shape))
            if bias:
                specs.append(TensorSpec(f"{ours}{key}_bias", f"{theirs}{name}.bias", shape[:1]))
    specs.append(TensorSpec("norm", "model.norm.weight", (hidden,)))
    if not config.tied_embeddings:
        specs.append(TensorSpec("head", "lm_head.weight", (vocab, hidden)))
    return specs


def _gpt2(config: ModelConfig) -> list[TensorSpec]:
    hidden, inner = config.hidden_size, config.intermediate_size
    specs = [
        TensorSpec("embed", "transformer.wte.weight", (config.vocab_size, hidden)),
        TensorSpec("positions", "transformer.wpe.weight", (config.max_position, hidden)),
    ]
    linears = (
        ("q", "attn.c_attn", (hidden, 3 * hidden), (0, 3)),
        ("k", "attn.c_attn", (hidden, 3 * hidden), (1, 3)),
        ("v", "attn.c_attn", (hidden, 3 * hidden), (2, 3)),
        ("o", "attn.c_proj", (hidden, hidden), (0, 1)),
        ("up", "mlp.c_fc", (hidden, inner), (0, 1)),
        ("down", "mlp.c_proj", (inner, hidden), (0, 1)),
    )
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}.", f"transformer.h.{layer}."
        for key, name in (("attn_norm", "ln_1"), ("mlp_norm", "ln_2")):
            specs += _norm_pair(ours + key, theirs + name, hidden)
        for key, name, shape, part in linears:
            specs += [
                TensorSpec(ours + key, f"{theirs}{name}.weight", shape, True, part),
                TensorSpec(f"{ours}{key}_bias", f"{theirs}{name}.bias", shape[1:], False, part),
            ]
    specs += _norm_pair("norm", "transformer.ln_f", hidden)
    if not config.tied_embeddings:
        specs.append(TensorSpec("head", "lm_head.weight", (config.vocab_size, hidden)))
    return specs


def _norm_pair(key: str, name: str, size: int) -> list[TensorSpec]:
    return [
        TensorSpec(key, f"{name}.weight", (size,)),
        TensorSpec(f"{key}_bias", f"{name}.bias", (size,)),
    ]
