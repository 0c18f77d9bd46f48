"""A cache small enough to check by hand: pages, page tables, steps and forks.

A KV cache keeps one key and one value for every token, in every layer and KV head. Quire keeps them
in *pages* of a fixed number of tokens. Who owns which page is bookkeeping in whole numbers
(`KVCache`); the numbers themselves lie in a *pool* for each layer. Here there is one layer with one
head of two dimensions, a page holds four tokens, and the key of token `t` is `[t, t + 0.5]`.
"""

import textwrap

import numpy as np

from quire.backends import create_backend
from quire.cache import KVCache
from quire.errors import CacheFull
from quire.layout import CacheLayout, LayerGroup
from quire.pages import PageShape, page_format

fp32 = page_format("fp32")
shape = PageShape(4, 1, 2, 2, fp32, fp32)  # tokens, KV heads, key and value dimensions, formats
layout = CacheLayout(4, (LayerGroup(layers=(0,), window=None),), (shape,))
backend = create_backend("reference")  # plain NumPy
pool = backend.pool(shape, num_pages=5)
cache = KVCache(layout, num_pages=[5], pools=[pool])
print(f"a page: 4 tokens x (2 + 2) numbers x 4 bytes = {layout.page_bytes(0)} bytes; 5 pages\n")


def append(sequence: int, tokens: list[int]) -> None:
    """One step: set pages aside, store keys and values in their slots, make them count."""
    step = cache.reserve([(sequence, len(tokens))])
    numbers = np.array(tokens, np.float32)
    key = np.stack([numbers, numbers + 0.5], axis=-1)[:, None]  # [tokens, heads, dim]
    backend.append(pool, step.batch.groups[0].slots, key, -key)
    cache.commit(step)


def show(event: str) -> None:
    """What every sequence holds now; `check` proves that no page is lost or held twice."""
    cache.check()
    held = [f"{cache.length(s)} tokens on pages {cache.page_tables(s)[0][1]}" for s in names]
    print(f"{event:<30} free {cache.free_pages[0]}   " + "; ".join(held))


names = [cache.create()]
a = names[0]
show("a is created")
append(a, [0, 1, 2, 3, 4, 5])
show("a appends 6 tokens")
use = cache.usage(a)
print(f"{'':<30} {use.used_bytes} bytes used, {use.waste_bytes} wasted (2 empty slots)")
assert (use.used_bytes, use.waste_bytes) == (6 * 16, 2 * 16)

# A fork shares all pages. The first to write to the unfinished page gets a copy of it.
b = cache.fork(a)
names.append(b)
show("b is forked from a")
append(b, [60, 70])
show("b appends 2 tokens")
assert cache.page_tables(a)[0][1][0] == cache.page_tables(b)[0][1][0]  # the first is still shared
key = cache.to_arrays(b, "BSHD").layers[0].key[0, :, 0]  # [tokens, dim]
print(f"{'':<30} b's keys begin with {' '.join(f'{x:g}' for x in key[:, 0])}")
assert key[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 60, 70]

# What is reserved counts only when it is committed. A step that fails leaves nothing behind.
step = cache.reserve([(a, 4)])
assert cache.free_pages == (1,)
cache.rollback(step)
show("a's step is rolled back")

try:
    cache.reserve([(a, 3), (b, 5)])  # all or none
except CacheFull as error:
    show("a step that does not fit")
    print(textwrap.indent(textwrap.fill(str(error), 66), " " * 31))

cache.truncate(b, 3)
show("b goes back to 3 tokens")
cache.release(a)
names.remove(a)
show("a is released")
assert cache.to_arrays(b, "BSHD").layers[0].key[0, :, 0, 0].tolist() == [0, 1, 2]
