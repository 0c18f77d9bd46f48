"""A long prompt in chunks: less memory at a time, nobody waits for it, and the same bits.

A prompt need not go through the model in one step. Each chunk leaves its keys and values in the
cache, and the next one attends to them. The table of scores is then as high as a chunk, not as the
prompt, and other requests decode a token in every step instead of standing still. In Quire every
query reads its keys from the cache, also those of its own chunk, so that where chunks end cannot be
seen in the result.
"""

import numpy as np

import quire

TOKENS = 300
tokens = np.random.default_rng(7).integers(4, 4096, TOKENS).tolist()
cache = quire.CacheConfig(page_size=16, num_pages=64, prefix_cache=False)
engine = quire.Engine(cache=cache, max_batch_tokens=TOKENS)
heads = engine.model_config.num_heads

# -- the same bits --------------------------------------------------------------------------------
print(f"a prompt of {TOKENS} tokens, {heads} heads; scores of a layer in float32:")
print("chunk   steps   largest table of scores   logits of all tokens")
whole = None
for chunk in (300, 128, 64, 17, 1):
    with engine.forced() as text:
        logits = text.score(tokens, step=chunk).tobytes()
    whole = whole or logits
    assert logits == whole
    ends = [*range(chunk, TOKENS, chunk), TOKENS]
    starts = [0, *ends[:-1]]
    table = max(end - start for start, end in zip(starts, ends, strict=True)) * TOKENS
    print(f"{chunk:>5} {len(ends):>7} {table * heads * 4 / 1024:>15.1f} KiB       the same bits")

# Not even that table is made: keys are taken 256 at a time (in `reference` 16), with a running
# maximum and sum. The bound on what a step takes is what chunks are for.

# -- nobody waits ---------------------------------------------------------------------------------
# One request is decoding when the long prompt arrives. A step has room for 64 tokens: the one that
# decodes comes first, the prompt gets what is left.
steps = engine.twin(quire.EngineConfig(cache=cache, max_batch_tokens=64))
talk = steps.submit(tokens[:10], quire.SamplingParams(max_new_tokens=9, ignore_eos=True))
long, read = None, 0
print("\nstep   tokens decoded   tokens of the long prompt   its first token")
for step in range(1, 9):
    if step == 3:
        long = steps.submit(tokens, quire.SamplingParams(max_new_tokens=1, ignore_eos=True))
    outputs = steps.step()
    decoded = sum(output.request is talk for output in outputs)
    assert decoded == 1, "the request that decodes gets a token in every step"
    now = 0 if long is None else TOKENS if long.finished else long.samples[0].computed
    chunk, read = now - read, now
    done = any(output.request is long for output in outputs)
    assert chunk + decoded <= 64
    print(f"{step:>4} {decoded:>16} {chunk:>27}   {'here' if done else ''}".rstrip())
assert read == TOKENS
