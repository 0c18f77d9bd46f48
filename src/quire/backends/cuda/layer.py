"""How a decoder layer runs: four products, attention, and one kernel for each gap between them.

``norm, q k v, place, attend (two kernels, where one token is new), o, norm, gate up, gate, down``:
ten launches a layer of a step that decodes. What a layer adds to its input is added by the next
norm, so it goes from half to half as a pair, see :class:`Residual`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quire.backends.blocks import AttentionParams, MlpParams, Projection
from quire.backends.cuda.attending import Attention
from quire.backends.cuda.device import Device
from quire.backends.cuda.fused import (
    CHUNK,
    activate_kernel,
    gated_kernel,
    hadamard_kernel,
    norm_kernel,
    place_kernel,
    warps_of,
)
from quire.backends.cuda.pool import CudaPool
from quire.backends.cuda.products import KINDS, Products, as_stored
from quire.backends.cuda.steps import Step
from quire.backends.cuda.stored import power_of_two
from quire.rotation import blocks

__all__ = [
    "At",
    "FusedAttention",
    "FusedMlp",
    "Layers",
    "Residual",
    "fused",
    "plain",
    "residual",
]

Tensor = Any

_ROWS = 1024  # of gate and up at a time, or half of a step's if that is more
_BLOCK = 1024  # numbers that a program of elementwise work takes


@dataclass(frozen=True, eq=False)
class FusedAttention:
    """Parameters whose q, k and v are rows of one matrix.

    whole   [(H + 2 * G) * D, hidden]; bias as long, or None
    norms   float32 [2, D]: of each head's queries and keys, or None
    """

    params: AttentionParams
    whole: Tensor
    bias: Tensor | None
    norms: Tensor | None

    @property
    def queries(self) -> int:
        """Rows of ``whole`` that are queries'."""
        return len(self.params.q.weight)


@dataclass(frozen=True, eq=False)
class FusedMlp:
    """Parameters whose gate and up are rows of one matrix, [2 * F, hidden]; bias as long."""

    params: MlpParams
    whole: Tensor
    bias: Tensor | None


@dataclass(eq=False, slots=True)
class Residual:
    """x [T, hidden], and what is yet to be added to it; None for nothing.

    The sum is made once, in the memory of ``delta``, which is nobody else's: by the norm that comes
    next, in passing (:meth:`Layers.norm`), or by who asks for it.
    """

    x: Tensor
    delta: Tensor | None = None

    def sum(self) -> Tensor:
        """[T, hidden]."""
        if self.delta is not None:
            self.x, self.delta = torch.add(self.x, self.delta, out=self.delta), None
        return self.x


def residual(x: Tensor | Residual) -> Residual:
    """x [T, hidden] as what may be added to."""
    return x if isinstance(x, Residual) else Residual(x)


def plain(x: Tensor | Residual) -> Tensor:
    """x as a tensor."""
    return x.sum() if isinstance(x, Residual) else x


@dataclass(frozen=True, eq=False)
class At:
    """Where a layer's tokens go, and where they stand.

    group   of the layer, in the step's batch
    angles  cos and sin, float32 [T, D / 2]
    attend  queries [T, H, D] and a dtype -> [T, H * value_dim], in place of attention to all pages
    """

    pool: CudaPool
    step: Step
    group: int
    angles: tuple[Tensor, Tensor]
    attend: Callable[[Tensor, Any], Tensor] | None = None


def fused(params: AttentionParams | MlpParams) -> Any:
    """Half a layer with fewer products; ``params`` as they are if theirs cannot be one.

    The parameters' own tensors become rows of the new ones, so that nothing is held twice.
    """
    if isinstance(params, MlpParams):
        joined = _joined(params.gate, params.up)
        return params if joined is None else FusedMlp(params, *joined)
    joined = _joined(params.q, params.k, params.v)
    if joined is None or (params.q_norm is None) != (params.k_norm is None):
        return params
    norms = None if params.q_norm is None else torch.stack((params.q_norm, params.k_norm))
    return FusedAttention(params, *joined, norms)


def _joined(*parts: Projection) -> tuple[Tensor, Tensor | None] | None:
    """Weights one below the other, and biases; None where dtypes differ or some have no bias."""
    weights, biases = [p.weight for p in parts], [p.bias for p in parts]
    if len({weight.dtype for weight in weights}) > 1 or len({b is None for b in biases}) > 1:
        return None
    return _one(weights), None if biases[0] is None else _one(biases)


def _one(parts: Sequence[Tensor]) -> Tensor:
    whole = torch.cat(list(parts))
    for part, rows in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.set_(rows)
    return whole


class Layers:
    """The kernels of a layer, with their grids; all arrays are the device's."""

    def __init__(self, device: Device, products: Products, attention: Attention) -> None:
        self._device, self._products, self._attention = device, products, attention
        self._factors: dict[int, Tensor] = {}

    def norm(self, held: Residual, weight: Tensor, eps: float, dtype: Any) -> Tensor:
        """RMS norm of the sum [.., n], rounded to ``dtype``; ``held`` has the sum from then on."""
        x, delta = held.x.contiguous(), held.delta
        n, tile = x.shape[-1], min(CHUNK, power_of_two(x.shape[-1]))
        out = self._device.empty(x.shape, dtype)
        total = x if delta is None else delta
        self._device.launch(
            norm_kernel, (x.numel() // n,),
            as_stored(out), total, x, total, weight, eps, n,
            ADD=delta is not None, KIND=KINDS[dtype], HARDWARE=self._device.hardware, TILE=tile,
            num_warps=warps_of(tile),
        )  # fmt: skip
        held.x, held.delta = total, None
        return out

    def attention(self, held: Residual, block: FusedAttention, at: At) -> Residual:
        """Keys and values of a step's tokens go into the pool; what they mix is to be added."""
        params = block.params
        normed = self.norm(held, params.norm, params.norm_eps, block.whole.dtype)
        numbers = self._products(normed, block.whole)
        del normed
        query = self._place(numbers, block, at, (params.num_heads, params.num_kv_heads))
        del numbers
        return Residual(held.x, self._mixed(query, block, at))

    def keep(self, normed: Tensor, block: FusedAttention, at: At) -> None:
        """Keys and values alone, of normed [T, hidden]."""
        numbers = self._products(normed, block.whole[block.queries :])
        self._place(numbers, block, at, (0, block.params.num_kv_heads))

    def mix(self, normed: Tensor, block: FusedAttention, at: At) -> Tensor:
        """What queries of normed [R, hidden] find in the pool, [R, hidden]."""
        numbers = self._products(normed, block.whole[: block.queries])
        return self._mixed(self._place(numbers, block, at, (block.params.num_heads, 0)), block, at)

    def _mixed(self, query: Tensor, block: FusedAttention, at: At) -> Tensor:
        o = block.params.o
        if at.attend is None:
            mixed = self._attention(query, at.pool, at.step, at.group, o.weight.dtype)
        else:
            mixed = at.attend(query, o.weight.dtype)
        return self._products(mixed, o.weight, o.bias)

    def _place(
        self, numbers: Tensor, block: FusedAttention, at: At, heads: tuple[int, int]
    ) -> Tensor:
        """Products of a step's tokens with ``block.whole`` -> queries float32 [T, H, D].

        Queries are as they meet the pool's keys; keys and values are stored, and pages that they
        complete sealed. ``heads``: H and G, or 0 for the rows that were left out.
        """
        (queries, groups), pool, shape = heads, at.pool, at.pool.shape
        dim, params, norms = shape.key_dim, block.params, block.norms
        tables, key, value = at.step.batch.groups[at.group], pool.open.key, pool.open.value
        query = self._device.empty((len(numbers), queries, dim))
        bias = block.bias
        if bias is not None and not queries:
            bias = bias[block.queries :]
        self._device.launch(
            place_kernel, (len(numbers), queries + 2 * groups),
            query, numbers, query if bias is None else bias, query if norms is None else norms,
            params.norm_eps, *at.angles, self._scale(dim), at.step.held[tables.slots],
            pool.slots.start if shape.by_page else 0,
            key.numbers, key.scale, value.numbers, value.scale,
            H=queries, G=groups, D=dim, DP=power_of_two(dim), PAGE=shape.page_size,
            BIAS=bias is not None, NORM=norms is not None, ROTATED=shape.rotated,
            KEY=key.format.name, VALUE=value.format.name, HARDWARE=self._device.hardware,
            num_warps=warps_of(power_of_two(dim)),
        )  # fmt: skip
        if groups and len(tables.open.seal_from):
            pool.seal(tables.open.seal_from, tables.open.seal_to)
        return query

    def mlp(self, held: Residual, block: FusedMlp) -> Residual:
        """What the MLP gives is to be added."""
        params = block.params
        normed = self.norm(held, params.norm, params.norm_eps, block.whole.dtype)
        tokens = normed.shape[0]
        inner = self._device.empty((tokens, block.whole.shape[0] // 2), params.down.weight.dtype)
        rows = max(_ROWS, -(-tokens // 2))
        for first in range(0, tokens, rows):
            part = slice(first, first + rows)
            both = self._products(normed[part], block.whole, block.bias)
            self._gated(inner[part], both, params.activation)
            del both  # before the next ones are made
        del normed
        return Residual(held.x, self._products(inner, params.down.weight, params.down.bias))

    def _gated(self, out: Tensor, both: Tensor, activation: str) -> None:
        rows, n = out.shape
        block = min(_BLOCK, power_of_two(n))
        self._device.launch(
            gated_kernel, (rows, -(-n // block)),
            as_stored(out), both, n, ACTIVATION=activation, KIND=KINDS[out.dtype],
            HARDWARE=self._device.hardware, BLOCK=block,
        )  # fmt: skip

    def activate(self, x: Tensor, activation: str) -> Tensor:
        """Any shape -> the same."""
        x = x.contiguous()
        out = torch.empty_like(x)
        grid = (-(-x.numel() // _BLOCK),)
        named = {"ACTIVATION": activation, "BLOCK": _BLOCK}
        self._device.launch(activate_kernel, grid, out, x, x.numel(), **named)
        return out

    def hadamard(self, x: Tensor) -> Tensor:
        """[.., D] -> the same."""
        x, dim = x.contiguous(), x.shape[-1]
        out, width = torch.empty_like(x), power_of_two(x.shape[-1])
        named = {"D": dim, "DP": width, "num_warps": warps_of(width)}
        grid = (x.numel() // dim,)
        self._device.launch(hadamard_kernel, grid, out, x, self._scale(dim), **named)
        return out

    def _scale(self, dim: int) -> Tensor:
        """What a rotation multiplies each number of a head with in the end, float32 [D]."""
        if dim not in self._factors:
            sizes = [block.stop - block.start for block in blocks(dim)]
            each = np.repeat([np.float32(1 / np.sqrt(size)) for size in sizes], sizes)
            self._factors[dim] = self._device.to_device(each)
        return self._factors[dim]
