"""Why pages: memory follows what is there, beginnings are shared, and no bit of a result changes.

A contiguous cache sets aside the longest possible context for every sequence. Paged (vLLM's
PagedAttention, arXiv:2309.06180), a sequence takes a page when it needs one, from anywhere in the
pool, and its page table says in which order they are read. At most one page of a sequence is partly
empty.
"""

import numpy as np

import quire
from quire.layout import pages_for

rng = np.random.default_rng(5)
tokens = rng.integers(4, 4096, 100).tolist()

# -- pages come from anywhere ---------------------------------------------------------------------
engine = quire.Engine(cache=quire.CacheConfig(page_size=16, num_pages=64))
print("two sequences grow in turns, 20 tokens at a time, pages of 16:")
with engine.forced() as a, engine.forced() as b:  # sequences whose tokens are told, not chosen
    for end in (20, 40, 60):
        a.read(tokens[end - 20 : end])
        b.read(tokens[end - 20 : end])
    for name, text in (("a", a), ("b", b)):
        [(_, pages)] = engine.cache.page_tables(text.sequence)
        print(f"  {name}: tokens 0 to 59 are on pages {' '.join(map(str, pages))}")
        assert len(pages) == pages_for(60, 16)
assert engine.cache.free_pages == (64,)  # all given back

# -- which changes no bit -------------------------------------------------------------------------
print("\n100 tokens      pages   empty slots   logits")
sizes: tuple[int | str, ...] = ("whole", 64, 16, 5, 1)
first = None
for size in sizes:
    cache = quire.CacheConfig(page_size=size, num_pages=1 if size == "whole" else 128)
    twin = engine.twin(quire.EngineConfig(cache=cache))  # the same weights, another cache
    with twin.forced() as text:
        logits = text.score(tokens).tobytes()
        used = text.usage
        [(_, pages)] = twin.cache.page_tables(text.sequence)
    first = first or logits
    assert logits == first
    empty = used.waste_bytes // int(used.bytes_per_token)
    name = "contiguous" if size == "whole" else f"pages of {size}"
    print(f"{name:<14} {len(pages):>6} {empty:>13}   the same bits")

# -- what twenty sequences take -------------------------------------------------------------------
lengths = rng.integers(10, 400, 20)
held, per_token = int(lengths.sum()), engine.cache.usage().bytes_per_token
print(f"\n20 sequences of 10 to 400 tokens, {held} in all; the context is 2048 tokens")
print("                  MiB   share in use")
for size in (2048, 64, 16, 1):
    slots = sum(pages_for(int(n), size) * size for n in lengths)
    name = "contiguous" if size == 2048 else f"pages of {size}"
    print(f"{name:<14} {slots * per_token / 2**20:>6.2f} {held / slots:>13.0%}")
    assert size == 2048 or slots - held < 20 * size  # less than a page a sequence

# -- equal beginnings are on the same pages -------------------------------------------------------
system, once = tokens[:70], quire.SamplingParams(max_new_tokens=1, ignore_eos=True)
print("\nprompts that begin with the same 70 tokens, one after the other:")
for name, ending in (("first", tokens[70:80]), ("second", tokens[80:90])):
    done = engine.generate([system + ending], once)[0]
    print(f"  {name:<6} {done.prompt_tokens} tokens, {done.cached_tokens} of them in the cache")
assert done.cached_tokens == 70  # 4 whole pages, and 6 tokens of the fifth, which is copied
