"""Ways to keep a cache side by side: what each takes, how many sequences fit, what it gives up.

Everything here is arithmetic on the shape of a model, Llama-3.2-1B, for a sequence of 8000 tokens
in a context of 32,768: nothing is loaded and nothing runs. `quire.layout` is what the engine itself
sizes its pools with, so that a plan and what is then allocated agree to the byte.
"""

from quire import ModelConfig
from quire.config import RopeConfig
from quire.format_choice import parse_formats
from quire.layout import CacheLayout, cache_layout, fit_pages, pages_for

TOKENS, CONTEXT, MEMORY, MIB = 8000, 32_768, 8 * 2**30, 2**20
CHUNK, WINDOW, BUDGET = 512, 1024, 1024
LAYERS, HEADS, KV_HEADS, DIM = 16, 32, 8, 64


def layout(kv_format: str, page_size: int, window: int | None = None) -> CacheLayout:
    """The cache of Llama-3.2-1B, with a format of `--kv-format`, perhaps with a sliding window."""
    model = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=128_256,
        hidden_size=HEADS * DIM,
        intermediate_size=8192,
        num_layers=LAYERS,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        max_position=CONTEXT,
        windows=(window,) * LAYERS,
        norm_eps=1e-5,
        activation="silu",
        rope=RopeConfig(theta=500_000.0),
    )
    return cache_layout(model, page_size, parse_formats(kv_format).of_layers(LAYERS, "bf16"))


def held(plan: CacheLayout, tokens: int) -> tuple[int, ...]:
    """Pages of each area (packed ones and open ones, where pages are packed) of one sequence."""
    return tuple(len(numbers) for numbers in plan.held_pages(0, tokens))


def row(name: str, plan: CacheLayout, tokens: int, loses: str) -> int:
    """Print a strategy's line; bytes of one sequence."""
    pages = held(plan, tokens)
    size = sum(n * each for n, each in zip(pages, plan.area_bytes, strict=True))
    if plan.packs[0]:  # packed and open pages share the budget
        fitting = fit_pages(plan, MEMORY, 64, CHUNK)
        count = min(have // need for have, need in zip(fitting, pages, strict=True))
    else:
        count = MEMORY // plan.area_bytes[0] // pages[0]
    print(f"{name:<24} {size / MIB:>8.1f} {size / exact:>8.1%} {count:>10}   {loses}")
    return size


paged = layout("bf16", 16)
exact = pages_for(TOKENS, 16) * paged.page_bytes(0)
assert exact == TOKENS * LAYERS * KV_HEADS * DIM * 2 * 2  # keys and values of 2 bytes; 16 | 8000
print(f"Llama-3.2-1B, a sequence of {TOKENS} tokens, a context of {CONTEXT}, 8 GiB of memory\n")
print("                                       of  sequences")
print("strategy                      MiB  paged bf16  in 8 GiB   what it gives up")
row("contiguous fp32", layout("fp32", CONTEXT), TOKENS, "memory: the context is set aside")
row("contiguous fp16", layout("fp16", CONTEXT), TOKENS, "the same")
assert row("paged bf16", paged, TOKENS, "nothing") == exact
row("paged int8", layout("int8", 16), TOKENS, "exactness: 255 steps for a token and head")
row("paged int4", layout("int4", 32), TOKENS, "exactness: 16 steps for 32 numbers")
row("paged k=int4, v=int2", layout("k=int4,v=int2", 32), TOKENS, "exactness: 4 steps for values")
row(f"sliding window {WINDOW}", layout("bf16", 16, WINDOW), TOKENS, "older tokens (trained so)")
# Kept tokens move together into the first pages; decoding may be a page above the budget.
row(f"eviction to {BUDGET}", paged, BUDGET + 16, "tokens that a rule holds unimportant")
row(f"eviction to {BUDGET}, int8", layout("int8", 16), BUDGET + 16, "both")

print(f"\nscores of a layer of {HEADS} heads in float32 while the prompt is read:")
for name, rows, columns in (
    ("whole prompt", TOKENS, TOKENS),
    (f"chunks of {CHUNK}", CHUNK, TOKENS),
    (f"chunks of {CHUNK}, 256 keys at a time", CHUNK, 256),
):
    print(f"  {name:<34} {rows:>5} x {columns:<5} {rows * columns * HEADS * 4 / MIB:>9.1f} MiB")
