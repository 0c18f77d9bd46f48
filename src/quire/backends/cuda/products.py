"""Linear layers: PyTorch's products, or those whose order of summing is Quire's own."""

from typing import Any

import torch

from quire.backends.cuda.device import Device
from quire.backends.cuda.rows import linear_kernel

__all__ = ["KINDS", "Products", "as_stored"]

Tensor = Any

KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_TILES = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}


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
        (rows, inner), columns = x.shape, len(weight)
        out = self._device.empty((rows, columns))
        grid = -(-columns // _TILES["BLOCK_N"]), -(-rows // _TILES["BLOCK_M"])
        self._device.launch(
            linear_kernel, grid,
            out, as_stored(x), as_stored(weight), out if bias is None else bias,
            rows, columns, inner, KIND=KINDS[weight.dtype], ROUNDED=x.dtype == weight.dtype,
            BIAS=bias is not None, HARDWARE=self._device.hardware, **_TILES,
        )  # fmt: skip
        return out
