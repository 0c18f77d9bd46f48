"""Sequences of different lengths in one step, without padding, and without changing each other.

A batch is *ragged*: tokens of all sequences lie one behind the other, and a few arrays of whole
numbers (in CSR form, with FlashInfer's names) say whose they are and where their pages lie. Some
sequences may read a prompt while others decode one token. What a sequence computes does not depend
on its company: its logits are the same bits alone and in any batch.
"""

import numpy as np

from quire.backends import create_backend
from quire.cache import KVCache
from quire.layout import cache_layout
from quire.models import load_model, resolve_model
from quire.pages import page_format

PAGE = 16
backend = create_backend()
quill = load_model(resolve_model(None), backend)
bf16 = page_format("bf16")
layout = cache_layout(quill.config, PAGE, [(bf16, bf16)] * quill.config.num_layers)
cache = KVCache(layout, [32], [backend.pool(shape, 32) for shape in layout.shapes])


def forward(parts: list[tuple[int, list[int]]]) -> np.ndarray:
    """One step of (sequence, new tokens) pairs; logits [sequences, vocab] of each one's last."""
    step = cache.reserve([(sequence, len(tokens)) for sequence, tokens in parts])
    packed = [token for _, tokens in parts for token in tokens]
    last = step.batch.query_indptr[1:] - 1
    logits = quill.model.forward(packed, step.batch, cache.pools, last.tolist()).host()
    cache.commit(step)
    batches.append(step.batch)
    return logits


def print_array(name: str, numbers: np.ndarray, what: str) -> None:
    """An array of a batch and what it means; long ones shortened."""
    text = " ".join(map(str, numbers if len(numbers) < 12 else numbers[:8]))
    print(f"  {name:<14} {text + (' ...' if len(numbers) >= 12 else ''):<32} {what}")


batches: list = []
rng = np.random.default_rng(4)
lengths = {"a": 5, "b": 50, "c": 18}
texts = {name: rng.integers(4, 4096, n).tolist() for name, n in lengths.items()}

# c has read its prompt before; now it decodes one token while a and b read theirs.
a, b, c = (cache.create() for _ in texts)
forward([(c, texts["c"][:-1])])
together = forward([(a, texts["a"]), (b, texts["b"]), (c, texts["c"][-1:])])

batch = batches[-1]
tables = batch.groups[0]
print("one step: a reads 5 tokens, b reads 50, c decodes 1 behind 17 cached ones")
print_array("query_indptr", batch.query_indptr, "new tokens: a has 0 to 4, b 5 to 54, c 55")
print_array("positions", batch.positions, "where each new token stands in its text")
print_array("indptr", tables.indptr, "pages: a has 1, b 4, c 2")
print_array("indices", tables.indices, "their ids, in order of the text")
print_array("last_page_len", tables.last_page_len, "tokens in the last page of each")
print_array("slots", tables.slots, "page id x 16 + offset, for each new token")
assert np.diff(batch.query_indptr).tolist() == [5, 50, 1]
assert tables.last_page_len.tolist() == [5, 50 - 3 * PAGE, 18 - PAGE]

# Each alone, from the beginning, in one go:
print("\n             tokens   logits alone and together")
for name, row in zip(texts, together, strict=True):
    alone = cache.create()
    same = forward([(alone, texts[name])])[0].tobytes() == row.tobytes()
    assert same
    print(f"  sequence {name} {lengths[name]:>7}   the same bits")

longest, count = max(lengths.values()), len(lengths)
ragged, held = batch.num_tokens, len(tables.indices) * PAGE
print(f"\n{'':<24}   ragged   padded to {longest}")
print(f"{'tokens computed':<24} {ragged:>8} {count * longest:>14}")
print(f"{'places kept in the cache':<24} {held:>8} {count * longest:>14}")
