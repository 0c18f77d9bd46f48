"""Attention through the cache against attention computed from nothing, with a proven bound.

Without a cache, the model computes keys and values of all earlier tokens again for every new token.
With one it computes each once, stores it, and reads it back. Here one layer of grouped-query
attention (4 query heads share 2 KV heads) reads 40 tokens one at a time through pages, and NumPy in
float64 computes all of them from a full causal score matrix. How far float32 may be off follows
from the number of roundings; nothing is tuned.
"""

import numpy as np

from quire.backends import create_backend
from quire.cache import KVCache
from quire.layout import CacheLayout, LayerGroup
from quire.pages import PageShape, page_format

T, H, G, D, PAGE = 40, 4, 2, 64, 16  # tokens, query heads, KV heads, head_dim, tokens a page
rng = np.random.default_rng(0)
query = rng.standard_normal((T, H, D)).astype(np.float32)
key, value = rng.standard_normal((2, T, G, D)).astype(np.float32)

# -- with the cache: one token a step -------------------------------------------------------------
fp32 = page_format("fp32")
shape = PageShape(PAGE, G, D, D, fp32, fp32)
layout = CacheLayout(PAGE, (LayerGroup((0,), None),), (shape,))
backend = create_backend()  # C++ kernels
pool = backend.pool(shape, num_pages=3)
cache = KVCache(layout, [3], [pool])
sequence = cache.create()
cached = np.empty((T, H * D), np.float32)
for t in range(T):
    step = cache.reserve([(sequence, 1)])
    backend.append(pool, step.batch.groups[0].slots, key[t : t + 1], value[t : t + 1])
    cached[t] = backend.attend(query[t : t + 1], pool, step.batch, group=0)[0]
    cache.commit(step)

# -- from nothing: the textbook, in float64 -------------------------------------------------------
q, k, v = (x.astype(np.float64) for x in (query, key, value))
k, v = (np.repeat(x, H // G, axis=1) for x in (k, v))  # query head h reads KV head h // (H / G)
scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(D)
scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
weights /= weights.sum(axis=-1, keepdims=True)
full = np.einsum("hqk,khd->qhd", weights, v).reshape(T, H * D)

# -- how far they may be apart --------------------------------------------------------------------
# A rounding of float32 changes a number by at most a share u = 2^-24. Relative to S, the greatest
# sum of |q k| / sqrt(D): a score takes D + 4 roundings. A weight takes a subtraction of at most 2 S
# and an exponential (16 roundings is generous), once for itself and once for every block of 16 keys
# that is merged; T sums follow. So numerator and denominator are each off by a share r at most,
# their quotient, a mean of values, by 2 r / (1 - r) of the greatest value.
u = 1.001 * 2.0**-24  # 1.001: terms in u^2
most = np.einsum("qhd,khd->hqk", abs(q), abs(k)).max() / np.sqrt(D)
merges = -(-T // 16) + 1
r = u * ((D + 4) * most + merges * (2 * most + 16) + T)
bound = 2 * r / (1 - r) * abs(v).max()
difference = abs(cached - full).max()
print(f"largest number in the result       {abs(full).max():8.4f}")
print(f"largest difference from float64    {difference:8.4f}")
print(f"bound from counting roundings      {bound:8.4f}")
assert difference <= bound

# -- what it saved --------------------------------------------------------------------------------
print("\ntokens   keys and values computed       scores of a head computed")
print("so far   with cache   without        with cache   without")
for n in (1, 10, 20, 40):
    rows = n * (n + 1) // 2  # 1 + 2 + ... + n
    tables = sum(i * (i + 1) // 2 for i in range(1, n + 1))  # a causal triangle for every token
    print(f"{n:>6}   {n:>10}   {rows:>7}        {rows:>10}   {tables:>7}")
assert cache.length(sequence) == T  # each token's key and value were appended once
