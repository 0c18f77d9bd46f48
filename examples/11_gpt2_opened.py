"""GPT-2 generates, then its cache is opened: page tables, tensors, and where the positions are.

A tiny GPT-2 with random weights is written to a directory as Hugging Face does it (`config.json`
and `model.safetensors`), loaded and run. What it left in its cache is then compared with NumPy: the
keys of layer 0 are `layer_norm(x) @ W_k + b`, within a bound from the number of roundings. In GPT-2
`x` is token embedding plus *position* embedding, so that a position is baked into every key: cached
pages are good at their place in the text and nowhere else.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import quire

VOCAB, HIDDEN, LAYERS, HEADS, CONTEXT, PAGE = 97, 32, 2, 4, 64, 8
DIM = HIDDEN // HEADS
config = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    **{"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS},
    **{"n_positions": CONTEXT, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5},
}
matrices = {"wte": (VOCAB, HIDDEN), "wpe": (CONTEXT, HIDDEN)}
norms = ["ln_f"]
for at in (f"h.{layer}." for layer in range(LAYERS)):
    matrices |= {at + "attn.c_attn": (HIDDEN, 3 * HIDDEN), at + "attn.c_proj": (HIDDEN, HIDDEN)}
    matrices |= {at + "mlp.c_fc": (HIDDEN, 4 * HIDDEN), at + "mlp.c_proj": (4 * HIDDEN, HIDDEN)}
    norms += [at + "ln_1", at + "ln_2"]
rng, w = np.random.default_rng(51), {}
for name, shape in matrices.items():
    deviation = {"wte": 0.1, "wpe": 1}.get(name, shape[0] ** -0.5)
    w[f"{name}.weight"] = deviation * rng.standard_normal(shape)
    w[f"{name}.bias"] = 0.1 * rng.standard_normal(shape[1])
for name in norms:
    w[f"{name}.weight"], w[f"{name}.bias"] = 1 + 0.3 * rng.standard_normal((2, HIDDEN))
w = {name: t.astype(np.float32) for name, t in w.items() if name not in ("wte.bias", "wpe.bias")}

prompt = [5, 17, 42, 17, 8, 17, 3, 60, 17, 9]  # 17 stands at places 1, 3, 5 and 8
with tempfile.TemporaryDirectory() as directory:
    (Path(directory) / "config.json").write_text(json.dumps(config))
    tensors = {f"transformer.{name}": tensor for name, tensor in w.items()}
    save_file(tensors, Path(directory) / "model.safetensors")
    engine = quire.Engine(directory, cache=quire.CacheConfig(page_size=PAGE, num_pages=8))
    done = engine.generate([prompt], quire.SamplingParams(max_new_tokens=8))[0]
    print("prompt    ", *prompt)
    print("generated ", *done.token_ids)

    # -- the cache, opened ------------------------------------------------------------------------
    text = engine.forced()  # the same tokens once more, in a sequence that stays open
    tokens = [*prompt, *done.token_ids[:-1]]  # nobody has asked for the last one's key yet
    logits = text.score(tokens)
    assert logits[len(prompt) - 1 :].argmax(axis=1).tolist() == list(done.token_ids)
cache, pool = engine.cache, engine.cache.pools[0]
[(_, pages)] = cache.page_tables(text.sequence)
print(f"\n{len(tokens)} tokens are on pages {pages} of {PAGE}, in each of {LAYERS} layers")
raw_key, raw_value = pool.read_pages(pages)
print(f"pool.read_pages(...)        {raw_key.shape}   page, slot, head, dim ({raw_key.dtype})")
arrays = cache.to_arrays(text.sequence, "BHSD")  # as `past_key_values` of transformers
print(f"cache.to_arrays(...)      {arrays.layers[0].key.shape}   batch, head, token, dim")
key = raw_key.reshape(-1, HEADS, DIM)[: len(tokens)]  # slots behind the last token are empty
assert np.array_equal(key, arrays.layers[0].key[0].transpose(1, 0, 2))

# -- keys of layer 0 from the weights, in float64 -------------------------------------------------
w = {name: tensor.astype(np.float64) for name, tensor in w.items()}
x = w["wte.weight"][tokens] + w["wpe.weight"][: len(tokens)]
centred, n = x - x.mean(axis=1, keepdims=True), HIDDEN
deviation = np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
normed = centred / deviation * w["h.0.ln_1.weight"] + w["h.0.ln_1.bias"]
W_q, W_k, W_v = np.split(w["h.0.attn.c_attn.weight"], 3, axis=1)
b_q, b_k, b_v = np.split(w["h.0.attn.c_attn.bias"], 3)
expected = normed @ W_k + b_k

# Roundings, of u each: n + 4 of the greatest |x| in what is left of x without its mean, n + 8 of
# the deviation that it is divided by, a scale and a shift; then n products and sums.
u = 1.001 * 2.0**-24  # 1.001: terms in u^2
off = (n + 4) * u * abs(x).max(axis=1, keepdims=True) / deviation
off_normed = abs(w["h.0.ln_1.weight"]) * (off + abs(centred / deviation) * (off + (n + 8) * u))
off_normed += 2 * u * (abs(normed) + abs(w["h.0.ln_1.bias"]))
bound = off_normed @ abs(W_k) + (n + 2) * u * (abs(normed) @ abs(W_k) + abs(b_k))
difference = abs(key.reshape(len(tokens), -1) - expected)
assert (difference <= bound).all()
print("\nkeys of layer 0 and layer_norm(x) @ W_k + b:")
print(f"  largest key {abs(key).max():.4f}, largest difference {difference.max():.4f}, ", end="")
print(f"bound from counting roundings {bound.max():.4f}")

print("\nkeys of token 17, layer 0, head 0: one token, another key at every place")
for place in (1, 3, 5, 8):
    print(f"  place {place}  " + " ".join(f"{number:>6.2f}" for number in key[place, 0]))
assert len({key[place].tobytes() for place in (1, 3, 5, 8)}) == 4

# -- what the last token looks at -----------------------------------------------------------------
query = (normed @ W_q + b_q).reshape(-1, HEADS, DIM)[-1]
scores = np.einsum("hd,thd->ht", query, key) / np.sqrt(DIM)
weights = np.exp(scores - scores.max(axis=1, keepdims=True))
weights /= weights.sum(axis=1, keepdims=True)
print(f"\nattention of place {len(tokens) - 1} in layer 0, in percent, over places 0, 1, 2, ...")
for head, row in enumerate(weights):
    print(f"  head {head} " + " ".join(f"{100 * share:>3.0f}" for share in row))
text.close()
