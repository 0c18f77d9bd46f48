"""What speaks for keys when tokens are dropped, on the device: only a number a key comes back."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quire.backends.cuda.device import Device
from quire.backends.cuda.knowing import keys_kernel
from quire.backends.cuda.pool import CudaPool
from quire.backends.cuda.stored import power_of_two

__all__ = ["Weighing"]

IntArray = npt.NDArray[np.int64]
Tensor = Any

_MOST = 1 << 24  # numbers of keys, and of scores, at a time
_ROWS = 16  # keys that a program decodes at a time
_KEPT = 256  # arrays whose copies are remembered


class Weighing:
    """See :meth:`quire.backends.base.Backend.weigh_keys` and ``key_norms``; in float32.

    What it computes of a sequence depends on that alone: no other is in the same product.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._known: dict[int, tuple[IntArray, Tensor]] = {}

    def weights(self, query: Tensor, pool: CudaPool, pages: IntArray, places: IntArray) -> Tensor:
        """Queries [T, H, D] -> [G, n]."""
        (tokens, num_heads, dim), heads = query.shape, pool.shape.num_kv_heads
        share, count = num_heads // heads, int(places[-1]) + 1
        rows = query.reshape(tokens, heads, share, dim).permute(1, 2, 0, 3)
        rows = rows.reshape(heads, share * tokens, dim) * dim**-0.5
        at = self._there(places).repeat(share)
        out = self._device.empty((heads, count))
        for g, key in self._keys(pool, pages, count):
            out[g] = _weights(rows[g], key, at)
        return out

    def norms(self, pool: CudaPool, pages: IntArray, count: int) -> Tensor:
        """[G, count]."""
        out = self._device.empty((pool.shape.num_kv_heads, count))
        for g, key in self._keys(pool, pages, count):
            out[g] = torch.linalg.vector_norm(key, dim=-1)
        return out

    def _keys(self, pool: CudaPool, pages: IntArray, count: int) -> Iterator[tuple[slice, Tensor]]:
        """Some KV heads at a time, and their keys [heads, count, D] as they are decoded."""
        shape, key, ids = pool.shape, pool.pages.key, self._there(pages)
        heads, dim, size = shape.num_kv_heads, shape.key_dim, shape.page_size
        some = max(1, min(heads, _MOST // (len(ids) * size * dim)))
        for first in range(0, heads, some):
            part = slice(first, min(first + some, heads))
            out = self._device.empty((part.stop - first, len(ids) * size, dim))
            self._device.launch(
                keys_kernel, (len(ids), part.stop - first),
                out, ids, first, len(ids) * size, key.numbers, key.scale,
                G=heads, D=dim, DP=max(16, power_of_two(dim)), PAGE=size, KEY=key.format.name,
                HARDWARE=self._device.hardware, ROWS=_ROWS,
            )  # fmt: skip
            yield part, out[:, :count]

    def _there(self, array: IntArray) -> Tensor:
        """A copy of this very array, which all layers of a step hand over."""
        kept = self._known.get(id(array))
        if kept is None or kept[0] is not array:
            if len(self._known) >= _KEPT:
                self._known.clear()
            kept = self._known[id(array)] = array, self._device.integers(array)
        return kept[1]


def _weights(rows: Tensor, key: Tensor, at: Tensor) -> Tensor:
    """Softmax weights of keys [g, n, D] for rows [g, R, D] at places [R], summed: [g, n]."""
    heads, count, _ = key.shape
    out = torch.zeros((heads, count), dtype=torch.float32, device=key.device)
    place = torch.arange(count, device=key.device)
    step = max(1, _MOST // (heads * count))
    for first in range(0, rows.shape[1], step):
        scores = torch.bmm(rows[:, first : first + step], key.mT)
        scores.masked_fill_(place > at[first : first + step, None], float("-inf"))
        out += torch.softmax(scores, dim=-1).sum(dim=1)
    return out
