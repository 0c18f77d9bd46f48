"""How fast a setting decodes, and how fast its attention reads the cache."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quire.engine import Engine, SamplingParams
from quire.engine.forced import ForcedText

__all__ = ["Speed", "measure_speed"]

NEW_TOKENS = 32
REPEATS = 3
ATTENTIONS = 20


@dataclass(frozen=True)
class Speed:
    """One request at a time.

    context                 tokens before the first that is decoded
    decode_tokens_per_s     median of three requests, after one that is not counted
    attention_bytes_per_s   bytes of keys and values that one token's attention reads in all
                            layers, and of what is known of pages where a policy chooses them, per
                            second of attention alone, median of 20. A cache that fits the
                            processor's own can exceed what memory gives
    """

    context: int
    decode_tokens_per_s: float
    attention_bytes_per_s: float


def measure_speed(engine: Engine, tokens: Sequence[int], repeats: int = REPEATS) -> Speed:
    """Decode after ``tokens``, which leave room for 32 more in the engine's pool and context."""
    params = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    rates = []
    for _ in range(repeats + 1):
        [done] = engine.generate([list(tokens)], params)
        rates.append(done.decode_tokens_per_s or 0.0)
    share = 1.0 if done.reading is None else done.reading.bytes_read / done.reading.bytes_held
    rate = share * _attention_rate(engine, tokens)
    return Speed(len(tokens), statistics.median(rates[1:]), rate)


def _attention_rate(engine: Engine, tokens: Sequence[int]) -> float:
    """Bytes held, over seconds of attention."""
    with engine.forced() as text:
        text.read(tokens)
        used = text.usage.used_bytes
        seconds = [_attend_once(engine, text) for _ in range(ATTENTIONS + 1)]
    return used / statistics.median(seconds[1:])


def _attend_once(engine: Engine, text: ForcedText) -> float:
    """Seconds of one token's attention in every layer; what it attends to is not looked at."""
    config, backend, cache = engine.model_config, engine.backend, engine.cache
    row = np.ones((1, config.num_heads * config.head_dim), np.float32)
    query = backend.heads(backend.embed(backend.weight(row), [0]), config.num_heads)
    reservation = cache.reserve([(text.sequence, 1)])
    try:
        started = time.perf_counter()
        attend = engine.attention([(text.sequence, [0], [0])], reservation.batch)
        for layer in range(len(cache.pools)):
            backend.to_host(attend(layer, query))
        return time.perf_counter() - started
    finally:
        cache.rollback(reservation)
