"""The rotation of keys and queries that spreads outliers, where a page format asks for it.

Each head's vector is multiplied by an orthonormal, symmetric matrix: Walsh-Hadamard matrices of
the largest powers of two that add up to its dimension, side by side (64; 64 and 32 for 96; 64 and
16 for 80). Keys and queries turned alike have the products that they had, but for rounding, and a
channel that is large in every key becomes a little of all (QuaRot, Ashkboos et al., 2024,
arXiv:2404.00456). The transform is that of Fino & Algazi, 1976, doi:10.1109/TC.1976.1674569.

This is the definition: kernels do the same float32 operations in the same order.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["blocks", "rotate"]

Array = npt.NDArray[Any]


def rotate(x: Array) -> Array:
    """float32 [..., D] -> the same shape, a new array. Twice gives x back, but for rounding.

    In each block, numbers 1, 2, 4, ... apart become their sum and their difference; then all are
    multiplied by 1 / sqrt(block). An infinity or a NaN makes its block infinite or NaN.
    """
    out = np.array(x, np.float32, order="C")
    with np.errstate(over="ignore", invalid="ignore"):
        for block in blocks(x.shape[-1]):
            part = out[..., block]
            size, apart = block.stop - block.start, 1
            while apart < size:
                pairs = part.reshape(*part.shape[:-1], size // (2 * apart), 2, apart)
                low, high = pairs[..., 0, :], pairs[..., 1, :]
                part = np.stack([low + high, low - high], axis=-2).reshape(part.shape)
                apart *= 2
            out[..., block] = part * np.float32(1 / np.sqrt(size))
    return out


def blocks(dim: int) -> Iterator[slice]:
    """The largest powers of two that add up to ``dim``, the largest first."""
    start = 0
    while start < dim:
        size = 1 << ((dim - start).bit_length() - 1)
        yield slice(start, start + size)
        start += size
