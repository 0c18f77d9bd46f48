"""``config.json`` -> :class:`ModelShape`, for every family that can be planned for.

Wiring as in each family's paper and its code in transformers, as far as it decides how many
weights there are and what is kept of a token; tests count the parameters of transformers' own
models. No weights are read.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.analysis.shape import LayerShape, Matrix, ModelShape, Part
from quire.architectures import MODEL_TYPES, ConfigKeys, read_json
from quire.errors import CheckpointError, UnsupportedArchitecture, did_you_mean
from quire.layout import KVShape

__all__ = ["FAMILIES", "read_shape", "shape_of"]

_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class _Family:
    """What distinguishes the layers of a ``model_type``.

    norms      norms of hidden size in a layer
    qkv_bias, output_bias, mlp_bias   None: as ``attention_bias`` or ``mlp_bias`` says
    qk_norm    queries and keys are normed, each head with the same weights
    sliding    which layers slide where ``layer_types`` does not say: (keys, layer) -> bool
    experts    the keys that hold how many experts there are, and their size
    tied       if ``tie_word_embeddings`` is missing
    """

    norms: int = 2
    qkv_bias: bool | None = None
    output_bias: bool | None = None
    mlp_bias: bool | None = None
    qk_norm: bool = False
    sliding: Callable[[ConfigKeys, int], bool] = lambda _keys, _layer: False
    experts: Callable[[ConfigKeys, int], tuple[Matrix, ...] | None] = lambda _keys, _layer: None
    sinks: bool = False
    tied: bool = False
    layer: Callable[["_Family", ConfigKeys, int], LayerShape] | None = None


def _gated(part: Part, hidden: int, inner: int, *, bias: bool = False, **of: int) -> list[Matrix]:
    """Gate, up and down of a gated MLP (arXiv:2002.05202)."""
    inward = Matrix(part, hidden, inner, bias, **of)
    return [inward, inward, Matrix(part, inner, hidden, bias, **of)]


def _mixture(keys: ConfigKeys, count: int, inner: int, *, bias: bool = False) -> tuple[Matrix, ...]:
    """A router and ``count`` experts, of which each token uses ``num_experts_per_tok``."""
    hidden, active = keys.integer("hidden_size"), keys.integer("num_experts_per_tok")
    if not 0 < active <= count:
        raise CheckpointError(f"{keys.where}: {active} of {count} experts cannot be used")
    router = Matrix("experts", hidden, count, bias)
    return router, *_gated("experts", hidden, inner, bias=bias, copies=count, active=active)


def _mixtral(keys: ConfigKeys, _layer: int) -> tuple[Matrix, ...]:
    return _mixture(keys, keys.integer("num_local_experts"), keys.integer("intermediate_size"))


def _qwen_moe(keys: ConfigKeys, layer: int) -> tuple[Matrix, ...] | None:
    step, dense = keys.integer("decoder_sparse_step", 1), keys.get("mlp_only_layers") or []
    if layer in dense or (layer + 1) % max(step, 1):
        return None
    hidden, shared = keys.integer("hidden_size"), keys.integer("shared_expert_intermediate_size", 0)
    found = _mixture(keys, keys.integer("num_experts"), keys.integer("moe_intermediate_size"))
    if not shared:
        return found
    return *found, *_gated("mlp", hidden, shared), Matrix("mlp", hidden, 1)


def _deepseek_moe(keys: ConfigKeys, layer: int) -> tuple[Matrix, ...] | None:
    if layer < keys.integer("first_k_dense_replace", 0):
        return None
    hidden, inner = keys.integer("hidden_size"), keys.integer("moe_intermediate_size")
    shared = keys.integer("n_shared_experts", 0)
    found = _mixture(keys, keys.integer("n_routed_experts"), inner)
    return *found, *_gated("mlp", hidden, shared * inner)


def _gpt_oss_moe(keys: ConfigKeys, _layer: int) -> tuple[Matrix, ...]:
    inner = keys.integer("intermediate_size")
    return _mixture(keys, keys.integer("num_local_experts"), inner, bias=True)


def _all_slide(keys: ConfigKeys, _layer: int) -> bool:
    return keys.get("sliding_window", 4096) is not None


def _qwen_slides(keys: ConfigKeys, layer: int) -> bool:
    return keys.flag("use_sliding_window", False) and layer >= keys.integer("max_window_layers", 28)


def _every_other(_keys: ConfigKeys, layer: int) -> bool:
    return layer % 2 == 0


def _five_of_six(keys: ConfigKeys, layer: int) -> bool:
    return bool((layer + 1) % keys.integer("sliding_window_pattern", 6))


def _window(family: _Family, keys: ConfigKeys, layer: int) -> int | None:
    types = keys.get("layer_types")
    if types is None:
        slides = family.sliding(keys, layer)
    elif isinstance(types, list) and len(types) == keys.integer("num_hidden_layers"):
        if types[layer] not in ("full_attention", "sliding_attention"):
            raise UnsupportedArchitecture(
                f"{keys.where}: layer {layer} is {types[layer]!r}; plan knows full_attention and "
                "sliding_attention"
            )
        slides = types[layer] == "sliding_attention"
    else:
        raise CheckpointError(f"{keys.where}: layer_types must name the kind of each layer")
    return keys.integer("sliding_window", 4096) if slides else None


def _standard(family: _Family, keys: ConfigKeys, layer: int) -> LayerShape:
    """Multi-head, grouped-query or multi-query attention, and an MLP or experts."""
    hidden, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    kv_heads = keys.integer("num_key_value_heads", heads)
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise CheckpointError(
            f"{keys.where}: {heads} query heads cannot be shared evenly by {kv_heads} KV heads"
        )
    dim = keys.integer("head_dim", hidden // heads)
    said = keys.flag("attention_bias", False)
    qkv_bias = said if family.qkv_bias is None else family.qkv_bias
    output_bias = said if family.output_bias is None else family.output_bias
    inward = Matrix("attention", hidden, heads * dim, qkv_bias)
    kept = Matrix("attention", hidden, kv_heads * dim, qkv_bias)
    out = Matrix("attention", heads * dim, hidden, output_bias)
    vectors = family.norms * hidden + 2 * dim * family.qk_norm + heads * family.sinks
    return LayerShape(
        matrices=(inward, kept, kept, out, *_feed_forward(family, keys, layer)),
        vectors=vectors,
        num_heads=heads,
        score_dim=dim,
        mix_dim=dim,
        kv=KVShape(kv_heads, dim, dim),
        window=_window(family, keys, layer),
    )


def _feed_forward(family: _Family, keys: ConfigKeys, layer: int) -> tuple[Matrix, ...]:
    experts = family.experts(keys, layer)
    if experts is not None:
        return experts
    bias = keys.flag("mlp_bias", False) if family.mlp_bias is None else family.mlp_bias
    hidden, inner = keys.integer("hidden_size"), keys.integer("intermediate_size")
    return tuple(_gated("mlp", hidden, inner, bias=bias))


def _latent(family: _Family, keys: ConfigKeys, layer: int) -> LayerShape:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    Of a token one compressed vector and one rotary key are kept, for all heads. Decoding
    multiplies queries with the matrices that would expand it ("absorbed"); prefill expands it.
    """
    hidden, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    rank, rotary = keys.integer("kv_lora_rank"), keys.integer("qk_rope_head_dim")
    plain, value = keys.integer("qk_nope_head_dim"), keys.integer("v_head_dim")
    query_rank = keys.get("q_lora_rank")
    query_dim = heads * (plain + rotary)
    bias = keys.flag("attention_bias", False)
    if query_rank is None:
        queries = [Matrix("attention", hidden, query_dim)]
    else:
        queries = [
            Matrix("attention", hidden, query_rank, bias),
            Matrix("attention", query_rank, query_dim),
        ]
    return LayerShape(
        matrices=(
            *queries,
            Matrix("attention", hidden, rank + rotary, bias),
            Matrix("attention", rank, heads * (plain + value)),
            Matrix("attention", heads * value, hidden, bias),
            *_feed_forward(family, keys, layer),
        ),
        vectors=2 * hidden + rank + (query_rank or 0),
        num_heads=heads,
        score_dim=rank + rotary,
        mix_dim=rank,
        kv=KVShape(1, rank + rotary, 0),
        prefill_dims=(plain + rotary, value),
    )


def _gpt2_layer(_family: _Family, keys: ConfigKeys, _layer: int) -> LayerShape:
    hidden, heads = keys.integer("n_embd"), keys.integer("n_head")
    dim, inner = hidden // max(heads, 1), keys.integer("n_inner", 4 * hidden)
    square = Matrix("attention", hidden, hidden, bias=True)
    mlp = Matrix("mlp", hidden, inner, True), Matrix("mlp", inner, hidden, True)
    kept = KVShape(heads, dim, dim)
    return LayerShape((*[square] * 4, *mlp), 4 * hidden, heads, dim, dim, kept)


FAMILIES: dict[str, _Family] = {
    "llama": _Family(),
    "mistral": _Family(sliding=_all_slide, qkv_bias=False, output_bias=False),
    "qwen2": _Family(qkv_bias=True, output_bias=False, sliding=_qwen_slides),
    "qwen3": _Family(qk_norm=True, sliding=_qwen_slides),
    "phi3": _Family(qkv_bias=False, output_bias=False, sliding=_all_slide),
    "gemma2": _Family(norms=4, sliding=_every_other, tied=True),
    "gemma3_text": _Family(norms=4, qk_norm=True, sliding=_five_of_six, tied=True),
    "mixtral": _Family(experts=_mixtral, qkv_bias=False, output_bias=False),
    "qwen2_moe": _Family(experts=_qwen_moe, qkv_bias=True, output_bias=False, sliding=_qwen_slides),
    "qwen3_moe": _Family(experts=_qwen_moe, qk_norm=True, sliding=_qwen_slides),
    "gpt_oss": _Family(
        experts=_gpt_oss_moe, qkv_bias=True, output_bias=True, sliding=_every_other, sinks=True
    ),
    "deepseek_v2": _Family(experts=_deepseek_moe, layer=_latent),
    "deepseek_v3": _Family(experts=_deepseek_moe, layer=_latent),
    "gpt2": _Family(layer=_gpt2_layer, tied=True),
}


def read_shape(directory: Path) -> ModelShape:
    """The shape in ``directory/config.json``; CheckpointError if that cannot be read."""
    path = directory / "config.json"
    return shape_of(read_json(path), directory.name, str(path))


def shape_of(raw: Mapping[str, Any], name: str, where: str) -> ModelShape:
    """The shape in a parsed ``config.json``; ``where`` names it in errors.

    Of a model for several kinds of input the part for text is planned, and ``notes`` says so.
    Raises UnsupportedArchitecture for a ``model_type`` that plan does not know, CheckpointError
    for a key that is missing or cannot be.
    """
    notes: tuple[str, ...] = ()
    inner = raw.get("text_config")
    if isinstance(inner, Mapping):
        notes = ("the part for text only: weights for other kinds of input come on top",)
        raw = {**{k: raw[k] for k in ("dtype", "torch_dtype") if k in raw}, **inner}
    kind = str(raw.get("model_type") or _kind_of(raw.get("architectures")))
    if kind not in FAMILIES:
        raise UnsupportedArchitecture(
            f"{where}: plan does not know model_type {kind!r}{did_you_mean(kind, FAMILIES)} "
            f"(known: {', '.join(FAMILIES)})"
        )
    family, keys = FAMILIES[kind], ConfigKeys(raw, where)
    gpt2 = kind == "gpt2"
    count = keys.integer("n_layer" if gpt2 else "num_hidden_layers")
    for key in ("vocab_size", "n_embd" if gpt2 else "hidden_size"):
        if keys.integer(key) < 1:
            raise CheckpointError(f"{where}: {key!r} must be at least 1, not {keys.integer(key)}")
    if count < 1:
        raise CheckpointError(f"{where}: a model needs at least one layer, not {count}")
    make = family.layer or _standard
    hidden = keys.integer("n_embd" if gpt2 else "hidden_size")
    longest = keys.integer("n_positions" if gpt2 else "max_position_embeddings")
    dtype, dtype_notes = _dtype(keys)
    return ModelShape(
        name=name,
        source=where,
        dtype=dtype,
        vocab_size=keys.integer("vocab_size"),
        hidden_size=hidden,
        max_position=longest,
        layers=tuple(make(family, keys, layer) for layer in range(count)),
        positions=longest if gpt2 else 0,
        vectors=hidden * (2 if gpt2 else 1),
        tied=keys.flag("tie_word_embeddings", family.tied),
        stored=_stored(keys),
        notes=(*notes, *dtype_notes),
    )


def _kind_of(architectures: Any) -> str | None:
    """The ``model_type`` of an architecture that Quire runs, where only that is named."""
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    return next((kind for kind, known in MODEL_TYPES.items() if known == name), None)


def _dtype(keys: ConfigKeys) -> tuple[str, tuple[str, ...]]:
    said = keys.get("dtype") or keys.get("torch_dtype")
    if said is None:
        return "fp32", ("config.json names no dtype: fp32, as transformers takes it",)
    if said not in _DTYPES:
        raise CheckpointError(
            f"{keys.where}: dtype {said!r} is none of {', '.join(_DTYPES)}, which plan knows"
        )
    return _DTYPES[said], ()


def _stored(keys: ConfigKeys) -> tuple[tuple[Part, str], ...]:
    """Parts that ``quantization_config`` says are stored smaller; scales are left out of fp8.

    DeepSeek-V3: blocks of 128 x 128 share a scale of 4 bytes, 0.02 % (arXiv:2412.19437).
    """
    raw = keys.get("quantization_config")
    if raw is None:
        return ()
    method = raw.get("quant_method") if isinstance(raw, Mapping) else raw
    if method == "fp8":
        return ("attention", "fp8"), ("mlp", "fp8"), ("experts", "fp8")
    if method == "mxfp4":
        return (("experts", "mxfp4"),)
    raise UnsupportedArchitecture(
        f"{keys.where}: plan does not know weights quantised by {method!r} (known: fp8, mxfp4); "
        "plan for the unquantised checkpoint and name the dtype of weights"
    )
