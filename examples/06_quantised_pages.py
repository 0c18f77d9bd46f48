"""Smaller numbers in pages: how keys are quantised, what a token costs, what it does to a model.

`fp8` and `int8` give every token and head a scale; `int4` and `int2` (after KIVI, arXiv:2402.02750)
give a range to every *channel* of 32 tokens' keys, because keys have channels that are large in
every token and would spoil the scale of all others. How far a number is off at most follows, and is
asserted. Results are no longer those of the exact cache, but still the same bits in any chunks.
"""

import math

import numpy as np

import quire
from quire.pages import PageShape, page_format

FORMATS = ("bf16", "fp8", "int8", "int4", "int2")

# -- numbers: 32 tokens, one head, 64 channels, one of them twenty times as large -----------------
rng = np.random.default_rng(6)
keys = rng.standard_normal((32, 1, 64)).astype(np.float32)
keys[..., 3] *= 20
others = np.arange(64) != 3
print("keys of deviation 1 (and 20 in one channel), read back:")
print("format          bits a number   largest error   in the large channel")
codings = {name: page_format(name).key for name in FORMATS}
codings["int4, by token"] = page_format("int4").value  # values have no large channels
for name, coding in codings.items():
    error = abs(coding.decode(coding.encode(keys), 64) - keys)
    bits = coding.page_bytes(32, 1, 64) * 8 / keys.size  # scales included
    small, large = error[..., others].max(), error[..., 3].max()
    print(f"{name:<14} {bits:>14.2f} {small:>15.2f} {large:>22.2f}")

# A large channel sets the scale of its token's other channels, or, by channel, its own alone.
# The bounds: bf16 keeps 8 bits of a number, fp8 (at full scale) 4. int8 rounds to a step of
# max|key| / 127 for each token and head, int4 and int2 to one of (max - min) / 15 or / 3 of each
# channel: half a step is lost. Scales and steps are kept in bf16, rounded up by 2^-7 at most; so is
# the minimum, rounded down, which widens the range.
top, low = abs(keys).max(axis=-1, keepdims=True) * (1 + 2**-7), keys.min(axis=0)
bounds = {"bf16": abs(keys) / 2**8, "int8": top / 127 / 2 + 0 * keys}
bounds["fp8"] = np.maximum(abs(keys) / 2**4, top / 448 / 2**10)
for name, levels in (("int4", 15), ("int2", 3)):
    span = keys.max(axis=0) - low + abs(low) * 2**-7
    bounds[name] = span / levels / 2 * (1 + 2**-7) + 0 * keys
for name, bound in bounds.items():
    off = abs(codings[name].decode(codings[name].encode(keys), 64) - keys)
    assert (off <= bound + 2**-20 * abs(keys)).all()  # and float32's own rounding

# -- memory: what a token costs in a Llama-3.2-1B (16 layers, 8 KV heads of 64) --------------------
print("\nformat   bytes a token   share of bf16   8192 tokens")
plain = PageShape(32, 8, 64, 64, page_format("bf16"), page_format("bf16")).bytes_per_token
for name in FORMATS:
    form = page_format(name)
    cost = 16 * PageShape(32, 8, 64, 64, form, form).bytes_per_token
    share = cost / 16 / plain
    print(f"{name:<6} {cost:>15,.0f} {share:>15.1%} {cost * 8192 / 2**20:>9.0f} MiB")

# -- a model: quill reads 126 tokens of Python -----------------------------------------------------
# In NumPy, so that figures do not depend on kernels. int4 and int2 keep a sequence's first page and
# its unfinished one in bf16: of these pages two are packed. docs/measure.md reads longer texts.
source = (
    "import os\nimport sys\n\n\nclass Stack:\n    def __init__(self):\n        self.items = []\n\n"
    "    def push(self, item):\n        self.items.append(item)\n\n    def pop(self):\n"
    "        if not self.items:\n            raise IndexError('pop from an empty stack')\n"
    "        return self.items.pop()\n\n    def __len__(self):\n        return len(self.items)\n\n"
    "\ndef main():\n    stack = Stack()\n    for arg in sys.argv[1:]:\n        stack.push(arg)\n"
    "    while stack:\n        print(stack.pop())\n\n\nif __name__ == '__main__':\n    main()\n"
)
engine = quire.Engine(backend="reference", cache=quire.CacheConfig(num_pages=16))
assert engine.codec is not None
tokens = engine.codec.encode(source)
print(f"\nformat   perplexity   logits of {len(tokens)} tokens in one step and 7 at a time")
for name in FORMATS:
    cache = quire.CacheConfig(kv_format=name, page_size=32, num_pages=16)
    twin = engine.twin(quire.EngineConfig(backend="reference", cache=cache))
    with twin.forced() as text, twin.forced() as chunked:
        logits = text.score(tokens)
        assert logits.tobytes() == chunked.score(tokens, step=7).tobytes()
    wide = logits[:-1].astype(np.float64)
    log_sum = np.log(np.exp(wide - wide.max(axis=-1, keepdims=True)).sum(axis=-1))
    chosen = wide[np.arange(len(wide)), tokens[1:]] - wide.max(axis=-1) - log_sum
    print(f"{name:<6} {math.exp(-chosen.mean()):>12.2f}   the same bits")
