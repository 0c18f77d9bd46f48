"""How cache pages map to a GPU: which program reads which bytes, and why the bus decides.

No GPU is needed: this is the arithmetic of a split decode kernel (flash-decoding), and NumPy plays
its programs. A program reads one split of 256 tokens, for one KV head of one sequence, and leaves a
partial result; then the partial results of a head are merged in order of place. Splits begin at
fixed places of the text. Were their size chosen to fill the processors, as is common, a result
would depend on what else is in the batch.
"""

import numpy as np

from quire.backends import create_backend
from quire.cache import KVCache
from quire.layout import CacheLayout, LayerGroup, pages_for
from quire.pages import PageShape, page_format

PAGE, H, G, D = 16, 8, 2, 128  # tokens a page, query heads, KV heads, head_dim
bf16, rng = page_format("bf16"), np.random.default_rng(10)
shape = PageShape(PAGE, G, D, D, bf16, bf16)
backend = create_backend("reference")
pool = backend.pool(shape, num_pages=80)
cache = KVCache(CacheLayout(PAGE, (LayerGroup((0,), None),), (shape,)), [80], [pool])
lengths = {cache.create(): n for n in (300, 40, 600)}
for start in range(0, 600, 100):  # they grow in turns, so that their pages lie scattered
    step = cache.reserve([(s, min(100, n - start)) for s, n in lengths.items() if n > start])
    key, value = rng.standard_normal((2, step.batch.num_tokens, G, D)).astype(np.float32)
    backend.append(pool, step.batch.groups[0].slots, key, value)
    cache.commit(step)
query = rng.standard_normal((len(lengths), H, D)).astype(np.float32)  # the next token of each

print("the grid: a program for each split of 256 tokens, of each of 2 KV heads")
print("sequence   split   tokens    page ids                    bytes of K and V")
tables = {s: cache.page_tables(s)[0][1] for s in lengths}
for s, n in lengths.items():
    for start in range(0, n, 256):
        end = min(start + 256, n)
        ids = [str(page) for page in tables[s][start // PAGE : -(-end // PAGE)]]
        listed = " ".join([*ids[:3], "...", *ids[-2:]] if len(ids) > 5 else ids)
        tokens = f"{start}-{end - 1}"
        print(f"{s:>8} {start // 256:>7}   {tokens:<9} {listed:<24} {(end - start) * 4 * D:>15,}")
print("merged in order: split 0 with 1, the result with 2, whichever program ends first")

print("\nlines of 128 bytes that a load of keys touches: 32 lanes of 16 bytes, 4 lines at best")
lane = np.arange(32)
token, part = np.divmod(lane, D * 2 // 16)  # 16 lanes side by side read one key of 256 bytes
for name, address in (
    ("pages [head, token, dim], lanes along dim", token * D * 2 + part * 16),  # one run of 4 KiB
    ("pages [token, head, dim], lanes along dim", token * G * D * 2 + part * 16),  # of 256 bytes
    ("pages [token, head, dim], a lane a token", lane * G * D * 2),
):
    print(f"  {name} {len(np.unique(address // 128)):>6}")

Partial = tuple[np.ndarray, np.ndarray, np.ndarray]


def program(s: int, g: int, start: int, size: int) -> Partial:
    """One program: gather a split's pages; maximum, sum and mixed values of 4 query heads."""
    pages = tables[s][start // PAGE : -(-min(start + size, lengths[s]) // PAGE)]
    stored = (a.astype(np.float32).reshape(-1, G, D)[:, g] for a in pool.read_pages(pages))
    k, v = (a[: lengths[s] - start] for a in stored)
    scores = query[s, g * 4 : g * 4 + 4] @ k.T * np.float32(D**-0.5)
    peak = scores.max(axis=1, keepdims=True)
    weights = np.exp(scores - peak)
    return peak, weights.sum(axis=1, keepdims=True), weights @ v


def merge(a: Partial, b: Partial) -> Partial:
    """Two partial results on the scale of the greater maximum."""
    top = np.maximum(a[0], b[0])
    keep, add = np.exp(a[0] - top), np.exp(b[0] - top)
    return top, a[1] * keep + b[1] * add, a[2] * keep + b[2] * add


def decode(batch: list[int], size: int) -> dict[int, np.ndarray]:
    """The whole grid, its programs in any order, and the merge in the order of places."""
    grid = [(s, g, start) for s in batch for g in range(G) for start in range(0, lengths[s], size)]
    done = {grid[i]: program(*grid[i], size) for i in rng.permutation(len(grid))}
    heads = {}
    for s, g, start in grid:
        heads[s, g] = merge(heads[s, g], done[s, g, start]) if start else done[s, g, start]
    return {s: np.concatenate([heads[s, g][2] / heads[s, g][1] for g in range(G)]) for s in batch}


everyone, last = list(lengths), list(lengths)[-1]
together = decode(everyone, 256)
print("\nattention of the longest sequence, alone and in company:")
assert decode([last], 256)[last].tobytes() == together[last].tobytes()
print("  splits of 256 tokens         the same bits")
few, many = (pages_for(600 * G * n // 132 + 1, PAGE) * PAGE for n in (1, 3))
assert decode([last], few)[last].tobytes() != decode(everyone, many)[last].tobytes()
print(f"  splits of {few} and {many} tokens   other bits (so many fill 132 processors)")

u, worst = 1.001 * 2.0**-24, 0.0  # the bound of 02_cached_attention.py, merging splits
for s, n in lengths.items():
    stored = (a.astype(float).reshape(-1, G, D)[:n] for a in pool.read_pages(tables[s]))
    k, v = (a.repeat(4, axis=1) for a in stored)  # query head h reads KV head h // 4
    scores = np.einsum("hd,khd->hk", query[s], k) / D**0.5
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    unsplit = np.einsum("hk,khd->hd", weights / weights.sum(axis=1, keepdims=True), v)
    most = np.einsum("hd,khd->hk", abs(query[s]), abs(k)).max() / D**0.5
    r = u * ((D + 4) * most + (-(-n // 256) + 1) * (2 * most + 16) + n)
    assert abs(together[s] - unsplit).max() <= 2 * r / (1 - r) * abs(v).max()
    worst = max(worst, 2 * r / (1 - r) * abs(v).max())
print(f"  unsplit attention in float64 is within {worst:.4f}, the bound from counting roundings")

tokens = sum(lengths.values())
moved, sums = tokens * G * 2 * D * 2, tokens * H * 4 * D
print(f"\na step moves {moved:,} bytes of K and V for {sums:,} operations: {sums / moved:g} a byte")
# At that many operations a byte a GPU could compute all the time. Decode waits for the bus.
print("GPU (data sheet)   TFLOP/s bf16   TB/s   operations a byte   used by decode")
for name, rate, bus in (("A100 80GB SXM", 312, 2.04), ("H100 SXM", 989, 3.35), ("H200", 989, 4.8)):
    print(f"{name:<16} {rate:>14} {bus:>6} {rate / bus:>19.0f} {sums / moved * bus / rate:>16.1%}")
print(f"a prompt's chunk of 512 reads the same bytes once: {512 * sums // moved} operations a byte")
