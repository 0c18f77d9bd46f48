"""Small caches over reference pools for tests, filled as a model's append would fill them.

A token is an int; what is stored for it tells its token, layer, head and channel, so that a slot
that holds another's numbers is always seen. Tokens below 2**17 are exact in float32.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from quire.backends.reference import ReferencePool
from quire.batch import PagedBatch
from quire.cache import KVCache, Reservation
from quire.format_choice import parse_formats
from quire.layout import CacheLayout, LayerGroup
from quire.pages import PagePool, PageShape

Array = npt.NDArray[Any]
Windows = tuple[int | None, ...]

HEADS, KEY_DIM, VALUE_DIM = 2, 3, 2


def ceil_div(tokens: int, page_size: int) -> int:
    """Pages of ``page_size`` that ``tokens`` fill, the last perhaps in part."""
    return (tokens + page_size - 1) // page_size


def layout_of(page_size: int, windows: Windows = (None,), format: str = "fp32") -> CacheLayout:
    """A layout with one layer for each of ``windows``; equal windows share a group.

    With ``"k=fp32,v=int4"`` pages of any size are packed, and keys still tell every token apart.
    """
    groups = tuple(
        LayerGroup(tuple(i for i, other in enumerate(windows) if other == window), window)
        for window in dict.fromkeys(windows)
    )
    [formats] = parse_formats(format).of_layers(1, "fp32")
    shape = PageShape(page_size, HEADS, KEY_DIM, VALUE_DIM, *formats)
    return CacheLayout(page_size, groups, (shape,) * len(windows))


def cache_over(
    layout: CacheLayout, num_pages: int | Sequence[int], identity: bytes | None = None
) -> KVCache:
    """An empty cache with ``num_pages`` pages, of every area or of each.

    It shares prefixes if it has an ``identity``.
    """
    counts = [num_pages] * len(layout.areas) if isinstance(num_pages, int) else list(num_pages)
    of_group: list[list[int]] = [[] for _ in layout.groups]
    for area, count in zip(layout.areas, counts, strict=True):
        of_group[area.group].append(count)
    pools = [
        ReferencePool(shape, *of_group[group])
        for shape, group in zip(layout.shapes, layout.group_of_layer, strict=True)
    ]
    return KVCache(layout, counts, pools, identity)


def cache_of(page_size: int, num_pages: int, windows: Windows = (None,)) -> KVCache:
    """An empty float32 cache."""
    return cache_over(layout_of(page_size, windows), num_pages)


def stored(layer: int, tokens: Sequence[int]) -> tuple[Array, Array]:
    """K ``[S, HEADS, KEY_DIM]`` and V of ``tokens`` in ``layer``; V is negative."""
    token = np.asarray(tokens, np.float32).reshape(-1, 1, 1) * 64 + layer * 16
    head = np.arange(HEADS, dtype=np.float32)[:, None] * 4
    channel = np.arange(max(KEY_DIM, VALUE_DIM), dtype=np.float32)
    both = token + head + channel
    return both[..., :KEY_DIM], -1 - both[..., :VALUE_DIM]


@lru_cache(maxsize=10_000)  # long histories ask for the same tokens after every step
def open_and_packed(shape: PageShape, of: tuple[int, ...], value: bytes) -> tuple[Array, Array]:
    """Values float32 [S, HEADS, VALUE_DIM] as open pages hold them, and as packed ones do."""
    numbers = np.frombuffer(value, np.float32).reshape(of)
    held = numbers.astype(ml_dtypes.bfloat16).astype(np.float32)
    coding = shape.value_format.value
    return held, coding.decode(coding.encode(held), shape.value_dim)


def as_kept(pool: PagePool, value: Array, start: int, length: int) -> Array:
    """Values [S, HEADS, VALUE_DIM] of places from ``start`` on as a sequence of ``length`` tokens
    keeps them: bf16 in its first page and its unfinished one where the others are packed.
    """
    shape = pool.shape
    if not shape.by_page:
        return value
    held, packed = open_and_packed(shape, value.shape, value.tobytes())
    page = np.arange(start, start + len(value)) // shape.page_size
    is_packed = (page > 0) & (page < length // shape.page_size)
    return np.where(is_packed[:, None, None], packed, held)


def write(cache: KVCache, batch: PagedBatch, tokens: Sequence[int]) -> None:
    """Put the new tokens of a step, one sequence behind the other, into the slots of ``batch``."""
    for layer, pool in enumerate(cache.pools):
        assert isinstance(pool, ReferencePool)
        tables = batch.groups[batch.group_of_layer[layer]]
        assert len(tables.slots) == len(tokens)
        pool.store(tables.slots, *stored(layer, tokens))
        pool.seal(tables.open.seal_from, tables.open.seal_to)


def reserve(cache: KVCache, *chunks: tuple[int, Sequence[int]]) -> Reservation:
    """Reserve and write ``(sequence, tokens)`` pairs, without the commit."""
    made = cache.reserve([(sequence, len(tokens)) for sequence, tokens in chunks])
    write(cache, made.batch, [token for _, tokens in chunks for token in tokens])
    return made


def append(cache: KVCache, *chunks: tuple[int, Sequence[int]]) -> None:
    """One whole step: reserve, write, commit."""
    cache.commit(reserve(cache, *chunks))


def filled(cache: KVCache, tokens: Sequence[int]) -> int:
    """A new sequence that holds ``tokens``."""
    sequence = cache.create()
    append(cache, (sequence, tokens))
    return sequence


def assert_holds(cache: KVCache, sequence: int, tokens: Sequence[int]) -> None:
    """``sequence`` is ``tokens``: its length, and every number that a next token could see."""
    assert cache.length(sequence) == len(tokens)
    windows = {layer: group.window for group in cache.layout.groups for layer in group.layers}
    for layer, kv in enumerate(cache.to_arrays(sequence, "BSHD").layers):
        window = windows[layer]
        start = 0 if window is None else max(0, len(tokens) - window + 1)
        key, value = stored(layer, tokens[start:])
        assert kv.start == start
        value = as_kept(cache.pools[layer], value, start, len(tokens))
        np.testing.assert_array_equal(kv.key, key[None], strict=True)
        np.testing.assert_array_equal(kv.value, value[None], strict=True)


def snapshot(cache: KVCache) -> dict[str, Any]:
    """All that a caller can see of a cache, to compare before and after."""
    cache.check()
    held: dict[str, Any] = {"free": cache.free_pages, "usage": cache.usage()}
    for sequence in cache.sequences:
        pages = cache.to_arrays(sequence, "pages").layers
        dense = cache.to_arrays(sequence, "BSHD").layers
        held[f"sequence {sequence}"] = (
            cache.length(sequence),
            cache.usage(sequence),
            cache.allocated_bytes(sequence),
            [(kv.page_table, kv.start, kv.last_page_len) for kv in pages],
            [(kv.start, kv.key.tobytes(), kv.value.tobytes()) for kv in dense],
        )
    return held
