"""Well-known models by name: what their published ``config.json`` says that decides their shape.

Each row is the keys of that file, in its own words, so that one reader serves both; ``source`` is
the model's name on the hub. Sizes are checked against published parameter counts in the tests.
"""

from collections.abc import Mapping
from typing import Any

from quire.analysis.families import shape_of
from quire.analysis.shape import ModelShape
from quire.errors import ConfigError, did_you_mean

__all__ = ["MODELS", "known_model"]


def _decoder(  # one line a model below
    kind: str,
    shape: tuple[int, ...],
    vocab: int,
    longest: int,
    dtype: str = "bfloat16",
    **more: Any,
) -> dict[str, Any]:
    """``shape``: hidden size, MLP size, layers, query heads, KV heads."""
    hidden, inner, layers, heads, kv_heads = shape
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": longest,
        "dtype": dtype,
        **more,
    }


_TIED: dict[str, Any] = {"tie_word_embeddings": True}
_FP8: dict[str, Any] = {"quantization_config": {"quant_method": "fp8"}}
_MXFP4: dict[str, Any] = {"quantization_config": {"quant_method": "mxfp4"}}


def _llama2(*shape: int) -> dict[str, Any]:
    return _decoder("llama", shape, 32000, 4096, "float16")


def _llama3(*shape: int, longest: int = 131072, **more: Any) -> dict[str, Any]:
    return _decoder("llama", shape, 128256, longest, **more)


def _qwen25(*shape: int, vocab: int = 152064, **more: Any) -> dict[str, Any]:
    return _decoder("qwen2", shape, vocab, 32768, **more)


def _qwen3(*shape: int, kind: str = "qwen3", **more: Any) -> dict[str, Any]:
    more = {"head_dim": 128, **more}
    return _decoder(kind, shape, 151936, 40960, **more)


def _qwen3_moe(*shape: int, inner: int) -> dict[str, Any]:
    experts: dict[str, Any] = {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": inner,
    }
    return _qwen3(*shape, kind="qwen3_moe", **experts)


def _gemma3(*shape: int, window: int, head_dim: int = 256, **more: Any) -> dict[str, Any]:
    more = {"vocab": 262208, "longest": 131072, **more}
    vocab, longest = more["vocab"], more["longest"]
    slides: dict[str, Any] = {
        "sliding_window": window,
        "sliding_window_pattern": 6,
        "head_dim": head_dim,
    }
    return _decoder("gemma3_text", shape, vocab, longest, **slides, **_TIED)


def _gpt_oss(layers: int, experts: int) -> dict[str, Any]:
    shape = (2880, 2880, layers, 64, 8)
    more: dict[str, Any] = {"head_dim": 64, "sliding_window": 128, "num_local_experts": experts}
    return _decoder("gpt_oss", shape, 201088, 131072, num_experts_per_tok=4, **more, **_MXFP4)


def _deepseek(kind: str, shape: tuple[int, int, int, int, int], vocab: int, **more: Any) -> Any:
    latent: dict[str, Any] = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
    return _decoder(kind, shape, vocab, 163840, v_head_dim=128, **latent, **more)


def _gpt2(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": 1024,
        "vocab_size": 50257,
        "dtype": "float32",
    }


_V3 = {
    "q_lora_rank": 1536,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
}
_V2_LITE = {
    "q_lora_rank": None,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
}

# name: (name on the hub, keys of its config.json)
MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("openai-community/gpt2", _gpt2(768, 12, 12)),
    "gpt2-xl": ("openai-community/gpt2-xl", _gpt2(1600, 48, 25)),
    "tinyllama-1.1b": (
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        _decoder("llama", (2048, 5632, 22, 32, 4), 32000, 2048),
    ),
    "llama-2-7b": ("meta-llama/Llama-2-7b-hf", _llama2(4096, 11008, 32, 32, 32)),
    "llama-2-13b": ("meta-llama/Llama-2-13b-hf", _llama2(5120, 13824, 40, 40, 40)),
    "llama-2-70b": ("meta-llama/Llama-2-70b-hf", _llama2(8192, 28672, 80, 64, 8)),
    "llama-3-8b": ("meta-llama/Meta-Llama-3-8B", _llama3(4096, 14336, 32, 32, 8, longest=8192)),
    "llama-3-70b": ("meta-llama/Meta-Llama-3-70B", _llama3(8192, 28672, 80, 64, 8, longest=8192)),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B", _llama3(4096, 14336, 32, 32, 8)),
    "llama-3.1-70b": ("meta-llama/Llama-3.1-70B", _llama3(8192, 28672, 80, 64, 8)),
    "llama-3.1-405b": ("meta-llama/Llama-3.1-405B", _llama3(16384, 53248, 126, 128, 8)),
    "llama-3.2-1b": (
        "meta-llama/Llama-3.2-1B",
        _llama3(2048, 8192, 16, 32, 8, head_dim=64, **_TIED),
    ),
    "llama-3.2-3b": (
        "meta-llama/Llama-3.2-3B",
        _llama3(3072, 8192, 28, 24, 8, head_dim=128, **_TIED),
    ),
    "mistral-7b": (
        "mistralai/Mistral-7B-v0.1",
        _decoder("mistral", (4096, 14336, 32, 32, 8), 32000, 32768, sliding_window=4096),
    ),
    "mistral-7b-v0.3": (
        "mistralai/Mistral-7B-v0.3",
        _decoder("mistral", (4096, 14336, 32, 32, 8), 32768, 32768, sliding_window=None),
    ),
    "mixtral-8x7b": (
        "mistralai/Mixtral-8x7B-v0.1",
        _decoder(
            *("mixtral", (4096, 14336, 32, 32, 8), 32000, 32768),
            num_local_experts=8,
            num_experts_per_tok=2,
        ),
    ),
    "mixtral-8x22b": (
        "mistralai/Mixtral-8x22B-v0.1",
        _decoder(
            *("mixtral", (6144, 16384, 56, 48, 8), 32000, 65536),
            num_local_experts=8,
            num_experts_per_tok=2,
        ),
    ),
    "qwen2.5-0.5b": ("Qwen/Qwen2.5-0.5B", _qwen25(896, 4864, 24, 14, 2, vocab=151936, **_TIED)),
    "qwen2.5-1.5b": ("Qwen/Qwen2.5-1.5B", _qwen25(1536, 8960, 28, 12, 2, vocab=151936, **_TIED)),
    "qwen2.5-7b": ("Qwen/Qwen2.5-7B-Instruct", _qwen25(3584, 18944, 28, 28, 4)),
    "qwen2.5-32b": ("Qwen/Qwen2.5-32B-Instruct", _qwen25(5120, 27648, 64, 40, 8)),
    "qwen2.5-72b": ("Qwen/Qwen2.5-72B-Instruct", _qwen25(8192, 29568, 80, 64, 8)),
    "qwen3-0.6b": ("Qwen/Qwen3-0.6B", _qwen3(1024, 3072, 28, 16, 8, **_TIED)),
    "qwen3-1.7b": ("Qwen/Qwen3-1.7B", _qwen3(2048, 6144, 28, 16, 8, **_TIED)),
    "qwen3-4b": ("Qwen/Qwen3-4B", _qwen3(2560, 9728, 36, 32, 8, **_TIED)),
    "qwen3-8b": ("Qwen/Qwen3-8B", _qwen3(4096, 12288, 36, 32, 8)),
    "qwen3-14b": ("Qwen/Qwen3-14B", _qwen3(5120, 17408, 40, 40, 8)),
    "qwen3-32b": ("Qwen/Qwen3-32B", _qwen3(5120, 25600, 64, 64, 8)),
    "qwen3-30b-a3b": ("Qwen/Qwen3-30B-A3B", _qwen3_moe(2048, 6144, 48, 32, 4, inner=768)),
    "qwen3-235b-a22b": ("Qwen/Qwen3-235B-A22B", _qwen3_moe(4096, 12288, 94, 64, 4, inner=1536)),
    "phi-3-mini": (
        "microsoft/Phi-3-mini-4k-instruct",
        _decoder("phi3", (3072, 8192, 32, 32, 32), 32064, 4096, sliding_window=2047),
    ),
    "gemma-2-2b": (
        "google/gemma-2-2b",
        _decoder(
            *("gemma2", (2304, 9216, 26, 8, 4), 256000, 8192),
            head_dim=256,
            sliding_window=4096,
        ),
    ),
    "gemma-2-9b": (
        "google/gemma-2-9b",
        _decoder(
            *("gemma2", (3584, 14336, 42, 16, 8), 256000, 8192),
            head_dim=256,
            sliding_window=4096,
        ),
    ),
    "gemma-2-27b": (
        "google/gemma-2-27b",
        _decoder(
            *("gemma2", (4608, 36864, 46, 32, 16), 256000, 8192),
            head_dim=128,
            sliding_window=4096,
        ),
    ),
    "gemma-3-1b": (
        "google/gemma-3-1b-pt",
        _gemma3(1152, 6912, 26, 4, 1, window=512, vocab=262144, longest=32768),
    ),
    "gemma-3-4b": ("google/gemma-3-4b-pt", _gemma3(2560, 10240, 34, 8, 4, window=1024)),
    "gemma-3-12b": ("google/gemma-3-12b-pt", _gemma3(3840, 15360, 48, 16, 8, window=1024)),
    "gemma-3-27b": (
        "google/gemma-3-27b-pt",
        _gemma3(5376, 21504, 62, 32, 16, window=1024, head_dim=128),
    ),
    "gpt-oss-20b": ("openai/gpt-oss-20b", _gpt_oss(24, 32)),
    "gpt-oss-120b": ("openai/gpt-oss-120b", _gpt_oss(36, 128)),
    "deepseek-v2-lite": (
        "deepseek-ai/DeepSeek-V2-Lite",
        _deepseek("deepseek_v2", (2048, 10944, 27, 16, 16), 102400, **_V2_LITE),
    ),
    "deepseek-v3": (
        "deepseek-ai/DeepSeek-V3",
        _deepseek("deepseek_v3", (7168, 18432, 61, 128, 128), 129280, **_V3, **_FP8),
    ),
}


def known_model(name: str) -> ModelShape:
    """The shape of a model of the catalogue, by its name there or on the hub, in any case.

    Raises ConfigError, with the nearest names, for one that is not there.
    """
    folded = name.lower()
    for short, (hub, raw) in MODELS.items():
        if folded in (short, hub.lower()):
            return shape_of(raw, short, f"catalogue, {hub}")
    raise ConfigError(
        f"no model {name!r} in the catalogue{did_you_mean(folded, MODELS)} "
        f"(there are: {', '.join(MODELS)})"
    )
