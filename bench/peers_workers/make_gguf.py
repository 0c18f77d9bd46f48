"""Writes a Llama checkpoint as GGUF, as llama.cpp's own converter does. Needs the gguf package.

    python make_gguf.py DIRECTORY FILE bf16|f16

The converter itself is not in the wheels. What it does for a Llama is little: other names, and
the rows of query and key matrices in the order of rotary embedding by neighbouring pairs. The
vocabulary is a dummy, since token ids go in.
"""

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor of transformers' Llama."""
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{_NAMES[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_NAMES[part]}.weight"


def pair_rows(matrix: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of [heads x dim, inner] so that the halves of a head alternate."""
    out, inner = matrix.shape
    halves = matrix.reshape(heads, 2, out // heads // 2, inner)
    return halves.swapaxes(1, 2).reshape(out, inner)


def _metadata(writer: Any, config: dict[str, Any], kind: str) -> None:
    heads = config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    types = gguf.LlamaFileType
    writer.add_file_type(types.MOSTLY_BF16 if kind == "bf16" else types.MOSTLY_F16)
    writer.add_tokenizer_model("no_vocab")


def _tensor(writer: Any, name: str, value: np.ndarray[Any, Any], kind: str) -> None:
    if value.ndim == 1:
        writer.add_tensor(name, value.astype(np.float32))
    elif kind == "f16":
        writer.add_tensor(name, value.astype(np.float16))
    else:
        stored = np.ascontiguousarray(value.astype(ml_dtypes.bfloat16)).view(np.uint8)
        writer.add_tensor(name, stored, raw_dtype=gguf.GGMLQuantizationType.BF16)


def main() -> None:
    """Read, rename, write."""
    directory, target, kind = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(target, "llama")
    _metadata(writer, config, kind)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for path in sorted(directory.glob("*.safetensors")):
        for name, value in load_file(path).items():
            part = name.removesuffix(".weight").rsplit(".", 1)[-1]
            if part in heads:
                value = pair_rows(value, heads[part])  # noqa: PLW2901
            _tensor(writer, gguf_name(name), value, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
