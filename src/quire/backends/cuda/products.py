"""Linear layers: PyTorch's products, or those whose order of summing is Quire's own."""

from typing import Any

import torch

from quire.backends.cuda.device import Device
from quire.backends.cuda.rows import add_spans_kernel, linear_kernel

__all__ = ["KINDS", "Products", "as_stored"]

Tensor = Any

KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_TILES = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "SPAN": 1024}
_ADDED = 1024  # numbers that a program adds the spans of


def as_stored(tensor: Tensor) -> Tensor:
    """What a kernel is given: bfloat16 as its bits, see ``codec.py``."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


class Products:
    """``x @ weight.T + bias``; ``exact`` as CudaBackend has it.

    Numbers are rounded to the weights' dtype, multiplied on tensor cores and added up in float32;
    weights in fp32 are multiplied in fp32, without TF32.
    """

    def __init__(self, device: Device, exact: bool) -> None:
        self._device, self._exact = device, exact

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in], float32 or rounded already, weight [out, in] -> float32 [T, out]."""
        if self._exact:
            return self._in_order(x.contiguous(), weight, bias)
        narrow = x.to(weight.dtype)
        if weight.dtype == torch.float32:
            return torch.nn.functional.linear(narrow, weight, bias)
        if self._device.hardware:
            out = torch.mm(narrow, weight.t(), out_dtype=torch.float32)
        else:
            out = torch.nn.functional.linear(narrow.float(), weight.float())
        return out if bias is None else out + bias

    def _in_order(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Tiles that are fewer than the card's processors are split along what is summed over."""
        (rows, inner), columns = x.shape, len(weight)
        out = self._device.empty((rows, columns))
        tiles = -(-columns // _TILES["BLOCK_N"]), -(-rows // _TILES["BLOCK_M"])
        spans = -(-inner // _TILES["SPAN"]) if tiles[0] * tiles[1] < self._device.processors else 1
        into = out if spans == 1 else self._device.empty((spans, rows, columns))
        added = out if bias is None else bias
        self._device.launch(
            linear_kernel, (*tiles, spans),
            into, as_stored(x), as_stored(weight), added,
            rows, columns, inner, KIND=KINDS[weight.dtype], ROUNDED=x.dtype == weight.dtype,
            BIAS=bias is not None and spans == 1, PARTS=spans > 1,
            HARDWARE=self._device.hardware, **_TILES,
        )  # fmt: skip
        if spans > 1:
            self._device.launch(
                add_spans_kernel, (-(-out.numel() // _ADDED),), out, into, added, out.numel(),
                columns, spans, BIAS=bias is not None, BLOCK=_ADDED,
            )  # fmt: skip
        return out
