"""CudaBackend: the Backend protocol over PyTorch and the Triton kernels."""

import functools
import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton

from quire.backends.blocks import (
    AttentionParams,
    MlpParams,
    attention_block,
    attention_rows,
    mlp_block,
)
from quire.backends.cuda import steps
from quire.backends.cuda.attending import Attention
from quire.backends.cuda.device import find_device
from quire.backends.cuda.pool import CudaPool, power_of_two, require_formats
from quire.backends.cuda.rows import (
    layer_norm_kernel,
    linear_kernel,
    rms_norm_kernel,
    rope_kernel,
)
from quire.batch import PagedBatch
from quire.errors import BackendError
from quire.pages import PageFormat, PagePool, PageShape

__all__ = ["CudaBackend"]

Array = npt.NDArray[Any]
Tensor = Any

_KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_EXACT_TILES = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}


class CudaBackend:
    """See :class:`quire.backends.base.Backend` for what each op does, with shapes and sources.

    exact   True: a token's bits do not depend on what is computed beside it (batch-invariant):
            linear layers and attention sum in one order for any batch. False: the fastest
            products that PyTorch finds for a shape, and splits as long as the batch allows.

    Activations are float32 tensors. A linear layer rounds them to its weights' dtype, multiplies
    on tensor cores, and adds up in float32; weights in fp32 are multiplied in fp32, without TF32.
    Runs on CPU tensors where Triton interprets (TRITON_INTERPRET=1), which is for tests. Raises
    BackendError where there is neither that nor a GPU.
    """

    name = "cuda"

    def __init__(self, exact: bool = False) -> None:
        self.exact, self.device = exact, find_device()
        self._attention = Attention(self.device, exact)
        self._last: steps.Step | None = None
        self._angles: tuple[Array, Array, Tensor, Tensor] | None = None

    @property
    def identity(self) -> str:
        """Card, versions and a digest of the kernels decide bits; so does what ``exact`` says."""
        kind = "exact" if self.exact else "fast"
        return (
            f"cuda {kind}, {self.device.name}, torch {torch.__version__}, "
            f"triton {triton.__version__}, {_kernels_digest()}"
        )

    def weight(self, array: Array) -> Tensor:
        """A matrix in its dtype, a vector as float32, on the device."""
        if array.ndim == 1:
            array = np.asarray(array, dtype=np.float32)
        array = np.ascontiguousarray(array)
        bits = array.view(np.int16) if array.dtype.name == "bfloat16" else array
        with warnings.catch_warnings():  # read-only memory is only read
            warnings.simplefilter("ignore", UserWarning)
            tensor = torch.from_numpy(bits)
        try:
            tensor = tensor.to(self.device.kind, copy=True)
        except torch.OutOfMemoryError as error:
            raise BackendError(
                f"no memory on {self.device.name} for weights of {array.nbytes} bytes; "
                "take a smaller model"
            ) from error
        return tensor.view(torch.bfloat16) if array.dtype.name == "bfloat16" else tensor

    def require_formats(self, key: PageFormat, value: PageFormat) -> None:
        """Keys and values apart; not yet those that store whole pages at once."""
        require_formats(key, value)

    def pool(self, shape: PageShape, num_pages: int, open_pages: int = 0) -> CudaPool:
        """Zeroed pages in the device's memory; no open ones yet, which int4 and int2 need."""
        if open_pages:
            raise BackendError("the cuda backend cannot store open pages yet; choose int8 or fp8")
        return CudaPool(self.device, shape, num_pages)

    def embed(self, table: Tensor, ids: Sequence[int]) -> Tensor:
        """[vocab, hidden], [T] -> [T, hidden]."""
        return table.index_select(0, self.device.integers(ids)).float()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """[T, in], [out, in], [out] -> [T, out]."""
        if self.exact:
            return self._exact_linear(x, weight, bias)
        narrow = x.to(weight.dtype)
        if weight.dtype == torch.float32:
            return torch.nn.functional.linear(narrow, weight, bias)
        if self.device.hardware:
            out = torch.mm(narrow, weight.t(), out_dtype=torch.float32)
        else:
            out = torch.nn.functional.linear(narrow.float(), weight.float())
        return out if bias is None else out + bias

    def _exact_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        (rows, inner), columns, tiles = x.shape, len(weight), _EXACT_TILES
        out = self.device.empty((rows, columns))
        kind = _KINDS[weight.dtype]
        grid = -(-columns // tiles["BLOCK_N"]), -(-rows // tiles["BLOCK_M"])
        self.device.launch(
            linear_kernel, grid,
            out, x.contiguous(), weight.view(torch.int16) if kind == "bf16" else weight,
            out if bias is None else bias, rows, columns, inner,
            KIND=kind, BIAS=bias is not None, HARDWARE=self.device.hardware, **tiles,
        )  # fmt: skip
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[..., n], [n] -> [..., n]."""
        x, n = x.contiguous(), x.shape[-1]
        out = torch.empty_like(x)
        grid = (x.numel() // n,)
        self.device.launch(rms_norm_kernel, grid, out, x, weight, eps, n, BLOCK=power_of_two(n))
        return out

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """[..., n], [n], [n] -> [..., n]."""
        x, n = x.contiguous(), x.shape[-1]
        out = torch.empty_like(x)
        args = out, x, weight, bias, eps, n
        self.device.launch(layer_norm_kernel, (x.numel() // n,), *args, BLOCK=power_of_two(n))
        return out

    def rope(self, x: Tensor, positions: Array, inv_freq: Array) -> Tensor:
        """[T, heads, D], int64 [T], float32 [D/2] -> [T, heads, D]."""
        cos, sin = self._cos_and_sin(positions, inv_freq)
        tokens, heads, dim = x.shape
        x = x.contiguous()
        out = torch.empty_like(x)
        block = power_of_two(dim // 2)
        self.device.launch(
            rope_kernel, (tokens * heads,), out, x, cos, sin, heads, HALF=dim // 2, BLOCK=block
        )
        return out

    def activate(self, x: Tensor, kind: str) -> Tensor:
        """Any shape -> the same."""
        if kind == "relu":
            return torch.relu(x)
        if kind == "silu":
            return torch.nn.functional.silu(x)
        return torch.nn.functional.gelu(x, approximate="none" if kind == "gelu" else "tanh")

    def multiply(self, x: Tensor, y: Tensor) -> Tensor:
        """Equal shapes -> the same."""
        return x * y

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Equal shapes -> the same."""
        return x + y

    def heads(self, x: Tensor, num_heads: int) -> Tensor:
        """[T, num_heads * D] -> [T, num_heads, D]."""
        return x.reshape(len(x), num_heads, x.shape[1] // num_heads)

    def append(self, pool: PagePool, slots: Array, key: Tensor, value: Tensor) -> None:
        """Slots int64 [T], key and value [T, G, D], into the pool in its format."""
        assert isinstance(pool, CudaPool)
        if not len(slots) == len(key) == len(value):
            raise BackendError(f"{len(slots)} slots for {len(key)} tokens")
        last = pool.num_pages * pool.shape.page_size - 1
        if len(slots) and (slots.min() < 0 or slots.max() > last):
            raise BackendError(f"tokens are to be stored outside of slots 0 to {last}")
        pool.store(self._on_device(slots), key.contiguous(), value.contiguous())

    def attend(self, query: Tensor, pool: PagePool, batch: PagedBatch, group: int) -> Tensor:
        """[T, H, D] -> [T, H * D]."""
        assert isinstance(pool, CudaPool)
        step = self._step(batch)
        if len(query) != batch.num_tokens:
            raise BackendError(f"{len(query)} queries for {batch.num_tokens} tokens")
        if step.groups[group].last_page >= pool.num_pages:
            raise BackendError(
                f"page {step.groups[group].last_page} of a pool of {pool.num_pages} is to be read"
            )
        return self._attention(query.contiguous(), pool, step, group)

    def rows(self, x: Tensor, indices: Sequence[int]) -> Tensor:
        """[T, n], [R] -> [R, n]."""
        if len(indices) == len(x) and list(indices) == list(range(len(x))):
            return x  # a step that only decodes
        return x.index_select(0, self.device.integers(indices))

    def block(self, params: AttentionParams | MlpParams) -> Any:
        """The parameters as they are."""
        return params

    def attention_block(
        self, x: Tensor, block: Any, batch: PagedBatch, pool: PagePool, group: int
    ) -> Tensor:
        """[T, hidden] -> [T, hidden], op by op."""
        self._step(batch)  # before its positions and slots are asked for one by one
        return attention_block(self, x, block, batch, pool, group=group)

    def attention_rows(
        self,
        x: Tensor,
        block: Any,
        batch: PagedBatch,
        pool: PagePool,
        *,
        group: int,
        rows: Sequence[int],
    ) -> Tensor:
        """[T, hidden] -> [R, hidden], op by op."""
        self._step(batch)
        return attention_rows(self, x, block, batch, pool, group=group, rows=rows)

    def mlp_block(self, x: Tensor, block: Any) -> Tensor:
        """[T, hidden] -> [T, hidden], op by op."""
        return mlp_block(self, x, block)

    def layers(
        self,
        x: Tensor,
        blocks: Sequence[tuple[Any, Any]],
        batch: PagedBatch,
        pools: Sequence[PagePool],
    ) -> Tensor:
        """[T, hidden] -> [T, hidden], half by half."""
        for (attention, mlp), pool, group in zip(blocks, pools, batch.group_of_layer, strict=False):
            x = self.mlp_block(self.attention_block(x, attention, batch, pool, group), mlp)
        return x

    def to_host(self, x: Tensor) -> npt.NDArray[np.float32]:
        """A copy in host memory; waits for what it depends on."""
        return self.device.to_host(x).numpy()

    def _step(self, batch: PagedBatch) -> steps.Step:
        """The batch on the device, handed over once a step."""
        if self._last is None or self._last.batch is not batch:
            self._last = steps.to_device(batch, self.device)
        return self._last

    def _on_device(self, array: Array) -> Tensor:
        known = None if self._last is None else self._last.find(array)
        return self.device.integers(array) if known is None else known

    def _cos_and_sin(self, positions: Array, inv_freq: Array) -> tuple[Tensor, Tensor]:
        """cos and sin float32 [T, D/2] of a step's tokens: of float32 products, in float64."""
        last = self._angles
        if last is None or last[0] is not positions or last[1] is not inv_freq:
            at = self._on_device(positions).float()
            angles = (at[:, None] * self.device.to_device(inv_freq)[None, :]).double()
            last = positions, inv_freq, torch.cos(angles).float(), torch.sin(angles).float()
            self._angles = last
        return last[2], last[3]


@functools.cache
def _kernels_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
