"""Decode speed behind a long context, with and without policies that choose pages.

    python bench/reading.py --context 16384 --sequences 1 --evict quest:budget=1024

A model of random weights (160M shapes) whose cache is filled with random keys and values: what is
timed does not depend on them. Prints a JSON object for each policy: tokens a second, milliseconds a
step, what was read, and bytes of summaries.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

import quire
from quire.engine.forced import ForcedText, score_together

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8192,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 500_000.0,
    "tie_word_embeddings": True,
}


def tensors() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all weights."""
    hidden, inner, dim = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["head_dim"]
    wide, narrow = CONFIG["num_attention_heads"] * dim, CONFIG["num_key_value_heads"] * dim
    yield "model.embed_tokens.weight", (CONFIG["vocab_size"], hidden)
    yield "model.norm.weight", (hidden,)
    for layer in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name, out in (("q", wide), ("k", narrow), ("v", narrow)):
            yield f"{at}self_attn.{name}_proj.weight", (out, hidden)
        yield f"{at}self_attn.o_proj.weight", (hidden, wide)
        yield f"{at}mlp.gate_proj.weight", (inner, hidden)
        yield f"{at}mlp.up_proj.weight", (inner, hidden)
        yield f"{at}mlp.down_proj.weight", (hidden, inner)
        yield f"{at}input_layernorm.weight", (hidden,)
        yield f"{at}post_attention_layernorm.weight", (hidden,)


def write_model(directory: Path) -> None:
    """A checkpoint of random bf16 weights."""
    random = np.random.default_rng(0)
    made = {
        name: (random.standard_normal(shape) / np.sqrt(shape[-1])).astype(ml_dtypes.bfloat16)
        for name, shape in tensors()
    }
    (directory / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    save_file(made, directory / "model.safetensors")


def fill(engine: quire.Engine, text: ForcedText, context: int, page: Any) -> None:
    """Give ``text`` so many tokens of a prompt, without computing them."""
    text.begin(context)
    reservation = engine.cache.reserve([(text.sequence, context)])
    engine.cache.commit(reservation)
    [(_, pages)] = engine.cache.page_tables(text.sequence)
    for pool in engine.cache.pools:
        rows = np.take(page, np.arange(len(pages)) % len(page), axis=0)
        pool.import_pages(pages, rows)


def random_pages(engine: quire.Engine) -> Any:
    """Some pages as they lie in a pool: numbers of the model's own size."""
    with engine.forced() as text:
        text.read(np.random.default_rng(1).integers(0, CONFIG["vocab_size"], 512).tolist())
        [(_, pages)] = engine.cache.page_tables(text.sequence)
        return engine.cache.pools[-1].export_pages(pages)


def measure(directory: Path, evict: str, args: argparse.Namespace) -> dict[str, Any]:
    """Figures of one policy."""
    size = args.page_size
    pages = args.sequences * -(-(args.context + args.steps + 8) // size) + 64
    settings = quire.CacheConfig(
        page_size=size, num_pages=pages, evict=evict, kv_format=args.kv_format
    )
    engine = quire.Engine(directory, threads=args.threads, cache=settings)
    with ExitStack() as stack:
        texts = [stack.enter_context(engine.forced()) for _ in range(args.sequences)]
        some = random_pages(engine)
        for text in texts:
            fill(engine, text, args.context, some)
        started = time.perf_counter()
        score_together(texts, [5] * len(texts))
        first, seconds = time.perf_counter() - started, []
        for step in range(args.steps):
            started = time.perf_counter()
            score_together(texts, [step + 7] * len(texts))
            seconds.append(time.perf_counter() - started)
    step_s, status = statistics.median(seconds), engine.status().reading
    return {
        "evict": evict,
        "kv_format": args.kv_format,
        "context": args.context,
        "sequences": args.sequences,
        "tokens_per_s": round(args.sequences / step_s, 1),
        "step_ms": round(1000 * step_s, 2),
        "first_step_ms": round(1000 * first, 1),  # with summaries of the whole prompt
        "read": None if status is None else str(status.usage),
        "summary_bytes": 0 if status is None else status.bytes,
        "kv_bytes": int(engine.cache.usage().bytes_per_token * args.context * args.sequences),
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--kv-format", default="auto")
    parser.add_argument("--evict", action="append")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory))
        for evict in ["none", *(args.evict or [])]:
            print(json.dumps(measure(Path(directory), evict, args)), flush=True)


if __name__ == "__main__":
    main()
