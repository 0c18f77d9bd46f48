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
            out = self._device.empty((len(x), len(weight)))
            return self._in_order(out, x.contiguous(), weight, bias)
        if weight.dtype == torch.float32:
            return torch.nn.functional.linear(x, weight, bias)
        out = self._fastest(x, weight, None)
        return out if bias is None else out + bias

    def into(self, out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Without bias, and written to ``out`` float32 [T, out], which is given back."""
        if self._exact:
            return self._in_order(out, x.contiguous(), weight, None)
        return self._fastest(x, weight, out)

    def _fastest(self, x: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
        narrow = x.to(weight.dtype)
        if self._device.hardware and weight.dtype != torch.float32:
            return torch.mm(narrow, weight.t(), out_dtype=torch.float32, out=out)
        return torch.mm(narrow.float(), weight.float().t(), out=out)

    def _in_order(self, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Tiles that are fewer than the card's processors are split along what is summed over."""
        (rows, inner), columns = x.shape, len(weight)
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
