"""How a cache grows, token by token: planned on one side, counted in a real cache on the other.

A sequence is grown to 1024 tokens in five caches with the shape of quill (4 layers, 2 KV heads of
64). Bookkeeping needs no numbers, so none are computed: pages are reserved and committed, left
behind by a window, or dropped above a budget. At every token what is held is what the layout said
it would be.
"""

import dataclasses

import numpy as np

from quire.architectures import read_model_config
from quire.backends import create_backend
from quire.cache import KVCache
from quire.format_choice import parse_formats
from quire.layout import CacheLayout, cache_layout
from quire.models import resolve_model

WINDOW, BUDGET, MARKS = 128, 256, (1, 33, 128, 256, 257, 512, 1024)
quill, backend = read_model_config(resolve_model(None)), create_backend()


def layout(kv_format: str, page_size: int = 16, window: int | None = None) -> CacheLayout:
    """Pages of quill's shape."""
    model = dataclasses.replace(quill, windows=(window,) * quill.num_layers)
    return cache_layout(model, page_size, parse_formats(kv_format).of_layers(4, "bf16"))


def planned(plan: CacheLayout, tokens: int) -> int:
    """Bytes of the pages that a sequence of so many tokens holds."""
    counts = [len(numbers) for numbers in plan.held_pages(0, tokens)]
    return sum(n * each for n, each in zip(counts, plan.area_bytes, strict=True))


def grow(plan: CacheLayout, budget: int | None = None) -> list[int]:
    """Bytes that a sequence holds after each of 1024 tokens, counted by a real cache."""
    pages = [64] * len(plan.areas)
    cache = KVCache(plan, pages, [backend.pool(shape, *pages) for shape in plan.shapes])
    sequence, held = cache.create(), []
    for _ in range(1024):
        cache.commit(cache.reserve([(sequence, 1)]))
        length = cache.length(sequence)
        if budget is not None and length > budget + 16:  # a page above it: keep the newest, and
            newest = [*range(4), *range(length - budget + 4, length)]  # the first four
            keep = np.tile(np.array(newest, np.int64), (2, 1))  # each KV head could keep others
            cache.evict(sequence, [keep] * len(plan.shapes))
        held.append(cache.usage(sequence).allocated_bytes)
        assert held[-1] == planned(plan, cache.length(sequence))
    cache.check()
    return held


curves = {
    "bf16": grow(layout("bf16")),
    "int8": grow(layout("int8")),
    "int4": grow(layout("int4", 32)),
    f"window {WINDOW}": grow(layout("bf16", window=WINDOW)),
    f"budget {BUDGET}": grow(layout("bf16"), BUDGET),
}
print("KiB held after so many tokens")
print(f"{'':<12}" + "".join(f"{mark:>8}" for mark in MARKS))
for name, held in curves.items():
    print(f"{name:<12}" + "".join(f"{held[mark - 1] / 1024:>8.0f}" for mark in MARKS))

print("\nthe same as a picture: a column is 32 tokens, a # 256 KiB")
for name, held in curves.items():
    heights = [-(-held[end - 1] // 2**18) for end in range(32, 1025, 32)]
    for level in range(max(heights), 0, -1):
        line = "".join("#" if height >= level else " " for height in heights)
        print(f"{name if level == max(heights) else '':<12}|{line}".rstrip())
    print(f"{'':<12}+{'-' * 32}")
assert curves["bf16"][-1] == 1024 * 4 * 2 * 64 * 2 * 2  # layers, heads, dim, k and v, bytes
