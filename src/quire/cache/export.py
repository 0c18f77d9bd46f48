"""A sequence's keys and values as plain arrays, in the layouts that other programs use."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.cache.table import PageTable
from quire.errors import ConfigError, did_you_mean
from quire.pages import PagePool
from quire.rotation import rotate

__all__ = ["LAYOUTS", "KVArrays", "LayerKV", "arrange", "layer_arrays"]

Array = npt.NDArray[Any]

# From tokens [sequence, heads, dim] to each named order of (batch, heads, sequence, dim), batch 1.
_AXES = {"BHSD": (0, 2, 1, 3), "BSHD": (0, 1, 2, 3), "HBSD": (2, 0, 1, 3)}

LAYOUTS = (*_AXES, "pages")


@dataclass(frozen=True)
class LayerKV:
    """One layer's keys and values, copies: in the stored dtype, or, of a quantised format, decoded
    to float32, which is exact; rotated keys are turned back, which rounds.

    In a named layout: ``key`` and ``value`` of positions ``start`` to ``start + S - 1`` (a sliding
    window starts where the next token would look first). In layout ``"pages"``: ``[pages,
    page_size, heads, dim]``, ``page_table`` their ids, ``start`` the position of the first slot,
    ``last_page_len`` the tokens in the last page; slots behind those have undefined content.
    """

    key: Array
    value: Array
    start: int
    page_table: tuple[int, ...] = ()
    last_page_len: int = 0


@dataclass(frozen=True)
class KVArrays:
    """Every layer of one sequence in one layout."""

    layout: str
    layers: tuple[LayerKV, ...]


def require_layout(layout: str) -> None:
    """Raise ConfigError, naming the nearest, unless ``layout`` is one of :data:`LAYOUTS`."""
    if layout not in LAYOUTS:
        raise ConfigError(
            f"unknown KV layout {layout!r}{did_you_mean(layout, LAYOUTS)} "
            f"(layouts: {', '.join(LAYOUTS)})"
        )


def arrange(tokens: Array, layout: str) -> Array:
    """``tokens`` [sequence, heads, dim] in a named layout, C-contiguous."""
    return np.ascontiguousarray(tokens[None].transpose(_AXES[layout]))


def layer_arrays(pool: PagePool, table: PageTable, seen: tuple[int, int], layout: str) -> LayerKV:
    """One layer of a sequence; ``seen``: the places that the next token sees, and no others."""
    size, held = pool.shape.page_size, table.first_page * pool.shape.page_size
    formats = pool.shape.key_format, pool.shape.value_format
    key, value = (  # all pages of a sequence may be open still, and those are stored as bf16
        read if format.lossless else read.astype(np.float32, copy=False)
        for read, format in zip(pool.read_pages(table.pages), formats, strict=True)
    )
    if pool.shape.rotated:
        key = rotate(key)
    start, end = seen
    if layout == "pages":
        last = end - (table.end_page - 1) * size if table.pages else 0
        return LayerKV(key, value, held, tuple(table.pages), last)
    places = slice(start - held, end - held)
    tokens = [a.reshape(-1, *a.shape[2:])[places] for a in (key, value)]
    return LayerKV(arrange(tokens[0], layout), arrange(tokens[1], layout), start)
