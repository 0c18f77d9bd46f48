"""Packed pages as their format defines them, from the layout that the native kernels read.

Each head of a page is its numbers, then their minima and steps, bf16. Numbers are words of 32 bits
with ``n`` = 32 / bits in each, those with even indices in the lower half (where ``dim`` is a
multiple of n, of values: of 16, and pages of 16 tokens):

K  ``[page, head]``: ``[dim / n, token]``, then ``[token / 32, minimum and step, dim]``
V  ``[page, head]``: ``[token / n, dim]``, then ``[ceil(dim / 32), minimum and step, token]``

Else they are a stream of bits: K ``[dim, token]``, V ``[token, dim]``, each token in whole bytes.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from quire.formats import BF16, GROUP, Stored
from quire.pages import PageShape

__all__ = ["stored_keys", "stored_values"]

Array = npt.NDArray[Any]


def stored_keys(rows: Array, shape: PageShape, beside: int) -> Stored:
    """Rows uint8 [n, bytes of a page] -> payload, minimum and step of ``key_format``."""
    size, heads, dim = shape.page_size, shape.num_kv_heads, shape.key_dim
    bits = shape.key_format.bits
    payload, scales = _parts(rows, heads, size * dim * bits // 8)
    if beside > 1:
        words = payload.reshape(-1, heads, dim // beside, size * 4)
        numbers = _of_words(words, bits).transpose(0, 3, 1, 2, 4)
    else:
        numbers = _of_bits(payload, bits).reshape(-1, heads, dim, size).transpose(0, 3, 1, 2)
    scales = scales.reshape(-1, heads, size // GROUP, 2, dim).transpose(3, 0, 2, 1, 4)
    return _pack(numbers.reshape(-1, size, heads, dim), bits, -3), scales[0], scales[1]


def stored_values(rows: Array, shape: PageShape, beside: int) -> Stored:
    """Rows uint8 [n, bytes of a page] -> payload, minimum and step of ``value_format``."""
    size, heads, dim = shape.page_size, shape.num_kv_heads, shape.value_dim
    bits = shape.value_format.bits
    row = -(-dim * bits // 8)
    payload, scales = _parts(rows, heads, size * row)
    if beside > 1:
        words = payload.reshape(-1, heads, size // beside, dim * 4)
        numbers = _of_words(words, bits).transpose(0, 2, 4, 1, 3)
    else:
        every = _of_bits(payload.reshape(-1, heads, size, row), bits)
        numbers = every[..., :dim].transpose(0, 2, 1, 3)
    scales = scales.reshape(-1, heads, -(-dim // GROUP), 2, size).transpose(3, 0, 4, 1, 2)
    return _pack(numbers.reshape(-1, size, heads, dim), bits, -1), scales[0], scales[1]


def _parts(rows: Array, heads: int, payload: int) -> tuple[Array, Array]:
    """Bytes of the numbers [n, heads, payload] and bf16 behind them [n, heads, ...]."""
    each = rows.reshape(len(rows), heads, rows.shape[1] // heads)
    return (
        np.ascontiguousarray(each[..., :payload]),
        np.ascontiguousarray(each[..., payload:]).view(BF16),
    )


def _of_words(words: Array, bits: int) -> Array:
    """Bytes [..., 4 words] -> numbers uint8 [..., words, 32 / bits]."""
    n = 32 // bits
    index = np.arange(n)
    shifts = bits * (index // 2 + index % 2 * (n // 2))
    fields = words.view("<u4")[..., None] >> shifts.astype(np.uint32)
    return (fields & (2**bits - 1)).astype(np.uint8)


def _of_bits(payload: Array, bits: int) -> Array:
    """Bytes [..., m] -> numbers uint8 [..., 8 m / bits], the first in the lowest bits."""
    fields = payload[..., None] >> (bits * np.arange(8 // bits, dtype=np.uint8)) & (2**bits - 1)
    return fields.reshape(*payload.shape[:-1], -1)


def _pack(numbers: Array, bits: int, axis: int) -> Array:
    """As the definition packs them: neighbours along ``axis`` in a byte, zeros at the end."""
    per = 8 // bits
    last = np.moveaxis(numbers, axis, -1)
    fill = [(0, 0)] * (last.ndim - 1) + [(0, -last.shape[-1] % per)]
    fields = np.pad(last, fill).reshape(*last.shape[:-1], -1, per)
    shifted = fields << (bits * np.arange(per, dtype=np.uint8))
    return np.moveaxis(shifted.sum(axis=-1, dtype=np.uint8), -1, axis)
