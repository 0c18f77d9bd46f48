"""A whole transformer through the cache: prefill the prompt once, then decode token by token.

quill is a 4-layer Llama that ships with Quire. *Prefill* runs the prompt through the model in one
step and leaves its keys and values in the cache; each step of *decode* runs one token, which
attends to all that is cached. The same is then computed without a cache, the whole text again for
every new token. The logits are not merely close: they are the same bits.
"""

import numpy as np

from quire.backends import create_backend
from quire.cache import KVCache
from quire.layout import cache_layout
from quire.models import load_model, resolve_model
from quire.pages import page_format

backend = create_backend()
quill = load_model(resolve_model(None), backend)
assert quill.codec is not None
bf16 = page_format("bf16")
layout = cache_layout(quill.config, 16, [(bf16, bf16)] * quill.config.num_layers)
cache = KVCache(layout, [32], [backend.pool(shape, 32) for shape in layout.shapes])


def forward(sequence: int, tokens: list[int]) -> np.ndarray:
    """Run new tokens of a sequence through the model; logits [vocab] of the last one."""
    step = cache.reserve([(sequence, len(tokens))])  # pages, and where each token goes
    logits = quill.model.forward(tokens, step.batch, cache.pools, rows=[len(tokens) - 1]).host()
    cache.commit(step)
    return logits[0]


def recompute(tokens: list[int]) -> np.ndarray:
    """The same without anything remembered: a new sequence, all tokens, nothing kept."""
    fresh = cache.create()
    logits = forward(fresh, tokens)
    cache.release(fresh)
    return logits


prompt = quill.codec.encode("class Stack:\n")
text, sequence, new = list(prompt), cache.create(), list(prompt)
tokens_with = tokens_without = 0
print("           tokens computed   keys read from     logits   next")
print("step       with    without   cache a layer      alike    token")
for n in range(7):
    before = cache.length(sequence)
    logits = forward(sequence, new)  # all of the prompt first, one token afterwards
    assert logits.tobytes() == recompute(text).tobytes()
    token = int(logits.argmax())
    kind = "decode" if n else "prefill"
    shown = repr(quill.codec.decode([token]))
    print(f"{kind:<8} {len(new):>6} {len(text):>10} {before:>16}     {'all bits':>8}   {shown}")
    tokens_with, tokens_without = tokens_with + len(new), tokens_without + len(text)
    text, new = [*text, token], [token]

print(f"{'in all':<8} {tokens_with:>6} {tokens_without:>10}")
print(f"\n{quill.codec.decode(text)}")
held = cache.usage(sequence)
print(f"\n{held.tokens} tokens x {held.bytes_per_token} bytes = {held.used_bytes} in the cache")
# keys and values x layers x KV heads x head_dim x bytes of bf16
assert held.bytes_per_token == 2 * 4 * 2 * 64 * 2
assert tokens_with == len(prompt) + 6
