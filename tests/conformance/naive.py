"""Every op in the most obvious way, in a precision of choice: float64 is the truth.

Sums run over one term after the other, as a loop would, so that in float32 this is "plain
low-precision arithmetic". Nothing is paged, tiled or masked here: a query gets the keys it sees.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_erf = np.vectorize(math.erf, otypes=[np.float64])


def total(terms: Array) -> Array:
    """Sum over the last axis, term by term, rounded after each."""
    return np.cumsum(terms, axis=-1, dtype=terms.dtype)[..., -1]


def linear(x: Array, weight: Array, bias: Array | None, dtype: Any, operand: Any = None) -> Array:
    """[T, in], [out, in], [out] -> [T, out]; x is rounded to ``operand`` before."""
    x, weight = x.astype(dtype if operand is None else operand).astype(dtype), weight.astype(dtype)
    out = np.stack([total(row * weight) for row in x]) if len(x) else np.empty((0, len(weight)))
    return (out if bias is None else out + bias.astype(dtype)).astype(dtype)


def rms_norm(x: Array, weight: Array, eps: float, dtype: Any) -> Array:
    """[..., n], [n] -> [..., n]."""
    x = x.astype(dtype)
    mean = total(x * x)[..., None] / dtype(x.shape[-1])
    return x / np.sqrt(mean + dtype(eps)) * weight.astype(dtype)


def layer_norm(x: Array, weight: Array, bias: Array, eps: float, dtype: Any) -> Array:
    """[..., n], [n], [n] -> [..., n]."""
    x, n = x.astype(dtype), dtype(x.shape[-1])
    centred = x - total(x)[..., None] / n
    variance = total(centred * centred)[..., None] / n
    return centred / np.sqrt(variance + dtype(eps)) * weight.astype(dtype) + bias.astype(dtype)


def rope(x: Array, positions: Array, inv_freq: Array, dtype: Any) -> Array:
    """[T, heads, D]; the angle is a float32 product in any precision, by definition."""
    angle = (positions.astype(np.float32)[:, None] * inv_freq).astype(dtype)[:, None]  # [T, 1, D/2]
    low, high = np.split(x.astype(dtype), 2, axis=-1)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def inverse_frequencies(
    theta: float, dim: int, dtype: Any, scale: Callable[[Any], Any] = lambda frequency: frequency
) -> Array:
    """[dim / 2]; ``scale`` stretches one frequency at a time."""
    base = (dtype(theta) ** -(dtype(2 * i) / dtype(dim)) for i in range(dim // 2))
    return np.array([scale(frequency) for frequency in base], dtype)


def llama3_scale(
    frequency: Any, factor: float, low: float, high: float, original: int, dtype: Any
) -> Any:
    """One frequency as in section 3.2.2 of arXiv:2407.21783 and its published code."""
    wavelength = dtype(2 * math.pi) / frequency
    if wavelength < original / high:
        return frequency
    if wavelength > original / low:
        return frequency / dtype(factor)
    smooth = (dtype(original) / wavelength - dtype(low)) / dtype(high - low)
    return (dtype(1) - smooth) * frequency / dtype(factor) + smooth * frequency


def activate(x: Array, kind: str, dtype: Any) -> Array:
    """Any shape."""
    x = x.astype(dtype)
    one, half = dtype(1), dtype(0.5)
    if kind == "relu":
        return np.where(x > 0, x, dtype(0))
    if kind == "silu":
        with np.errstate(over="ignore"):
            return x / (one + np.exp(-x))
    if kind == "gelu":
        return half * x * (one + _erf(x / dtype(math.sqrt(2))).astype(dtype))
    inner = dtype(math.sqrt(2 / math.pi)) * (x + dtype(0.044715) * x * x * x)
    return half * x * (one + np.tanh(inner))


def attend(
    query: Array, keys: Array, values: Array, window: int | None, dtype: Any, operand: Any = None
) -> Array:
    """The last queries of one sequence: [n, H, D] over [length, G, D] -> [n, H * D].

    Query i stands at position ``length - n + i`` and sees the keys up to there. Queries and
    weights are rounded to ``operand`` before they are multiplied; by default they are not.
    """
    operand = dtype if operand is None else operand
    query = query.astype(operand).astype(dtype)
    n, num_heads, dim = query.shape
    length, num_kv_heads, _ = keys.shape
    shared = np.arange(num_heads) // (num_heads // num_kv_heads)
    out = np.empty((n, num_heads, values.shape[-1]), dtype)
    for i in range(n):
        position = length - n + i
        first = 0 if window is None else max(0, position - window + 1)
        seen = keys[first : position + 1, shared].astype(dtype)  # [seen, H, D]
        mixed = values[first : position + 1, shared].astype(dtype)
        scores = (total(query[i] * seen) / np.sqrt(dtype(dim))).T
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= total(weights)[:, None]
        weights = weights.astype(operand).astype(dtype)
        out[i] = total(np.moveaxis(weights.T[..., None] * mixed, 0, -1))
    return out.reshape(n, num_heads * values.shape[-1])
