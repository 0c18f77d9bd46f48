"""CudaBackend: the Backend protocol over PyTorch and the Triton kernels."""

import functools
import hashlib
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton

from quire.backends.base import Compute, Logits, SomeRows, Summaries
from quire.backends.blocks import (
    AttentionParams,
    MlpParams,
    Network,
    attention_block,
    attention_rows,
    mlp_block,
)
from quire.backends.cuda import steps
from quire.backends.cuda.attending import Attention
from quire.backends.cuda.device import find_device
from quire.backends.cuda.graphs import StepGraph, shape_of
from quire.backends.cuda.layer import At, Layers, Residual, fused, plain, residual
from quire.backends.cuda.memory import tells_of_memory
from quire.backends.cuda.pool import CudaPool, require_formats
from quire.backends.cuda.products import Products
from quire.backends.cuda.refusals import (
    require,
    require_ids,
    require_readable,
    require_slots,
)
from quire.backends.cuda.rows import layer_norm_kernel, rope_kernel
from quire.backends.cuda.sampling import CudaLogits
from quire.backends.cuda.stored import power_of_two
from quire.backends.cuda.summaries import CudaSummaries, choose
from quire.backends.cuda.weighing import Weighing
from quire.batch import Candidates, ChosenPages, PagedBatch
from quire.errors import BackendError
from quire.pages import PageFormat, PagePool, PageShape

__all__ = ["CudaBackend"]

Array = npt.NDArray[Any]
Tensor = Any


@tells_of_memory
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

    replays = True

    def __init__(self, exact: bool = False) -> None:
        self.name = "cuda-exact" if exact else "cuda"
        self.exact, self.device = exact, find_device()
        self._attention = Attention(self.device, exact)
        self._products = Products(self.device, exact)
        self._weighing = Weighing(self.device)
        self._layers = Layers(self.device, self._products, self._attention)
        self._taken: steps.Taken | None = None
        self._beside: steps.Step | None = None  # of a batch that no model handed over as a step
        self._angles: tuple[Array, Array, Tensor, Tensor] | None = None
        self._frequencies: tuple[Array, Tensor] | None = None

    @property
    def identity(self) -> str:
        """Card, versions and a digest of the kernels decide bits; so does what ``exact`` says."""
        kind = "exact" if self.exact else "fast"
        return (
            f"cuda {kind}, {self.device.name}, torch {torch.__version__}, "
            f"triton {triton.__version__}, {_kernels_digest()}"
        )

    @property
    def own_memory(self) -> int | None:
        """What the card has free, but for a tenth of all it has."""
        return self.device.own_memory

    def weight(self, array: Array) -> Tensor:
        """A matrix in its dtype, a vector as float32, on the device."""
        if array.ndim == 1:
            array = np.asarray(array, dtype=np.float32)
        array = np.ascontiguousarray(array)
        bits = array.view(np.int16) if array.dtype.name == "bfloat16" else array
        with warnings.catch_warnings():  # read-only memory is only read
            warnings.simplefilter("ignore", UserWarning)
            tensor = torch.from_numpy(bits)
        if array.dtype.name == "bfloat16":
            tensor = tensor.view(torch.bfloat16)  # here: a view there would hold its own memory
        return tensor.to(self.device.kind, copy=True)

    def require_formats(self, key: PageFormat, value: PageFormat) -> None:
        """All formats, keys and values apart."""
        require_formats(key, value)

    def pool(self, shape: PageShape, num_pages: int, open_pages: int = 0) -> CudaPool:
        """Zeroed pages in the device's memory."""
        return CudaPool(self.device, shape, num_pages, open_pages)

    def take_step(
        self,
        tokens: Sequence[int] | Array | Tensor,
        batch: PagedBatch,
        rows: Sequence[int] | Array,
        beside: Sequence[SomeRows] = (),
    ) -> tuple[Any, Any]:
        """int64 [T] and [R] of the host, of which copies are on the device; or what they were."""
        taken = steps.take(tokens, batch, rows, self.device, beside)
        self._take(taken)
        return taken.tokens, rows if taken.rows is None else taken.rows

    def embed(self, table: Tensor, ids: Sequence[int] | Array) -> Tensor:
        """[vocab, hidden], [T] -> [T, hidden]."""
        return table.index_select(0, self.device.integers(ids)).float()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """[T, in], [out, in], [out] -> [T, out]."""
        return self._products(x, weight, bias)

    def rms_norm(self, x: Tensor | Residual, weight: Tensor, eps: float) -> Tensor:
        """[..., n], [n] -> [..., n]."""
        return self._layers.norm(residual(x), weight, eps, torch.float32)

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

    def hadamard(self, x: Tensor) -> Tensor:
        """[T, heads, D] -> [T, heads, D]."""
        return self._layers.hadamard(x)

    def activate(self, x: Tensor, kind: str) -> Tensor:
        """Any shape -> the same."""
        return self._layers.activate(x, kind)

    def multiply(self, x: Tensor, y: Tensor) -> Tensor:
        """Equal shapes -> the same."""
        return x * y

    def add(self, x: Tensor | Residual, y: Tensor) -> Tensor:
        """Equal shapes -> the same."""
        return plain(x) + y

    def heads(self, x: Tensor, num_heads: int) -> Tensor:
        """[T, num_heads * D] -> [T, num_heads, D]."""
        return x.reshape(len(x), num_heads, x.shape[1] // num_heads)

    def append(self, pool: PagePool, slots: Array, key: Tensor, value: Tensor) -> None:
        """Slots int64 [T], key and value [T, G, D], into the pool in its format."""
        assert isinstance(pool, CudaPool)
        if not len(slots) == len(key) == len(value):
            raise BackendError(f"{len(slots)} slots for {len(key)} tokens")
        if self._taken is None or self._taken.whole.reach is None:
            require_slots(slots, pool)
        pool.store(self.device.integers(slots), key.contiguous(), value.contiguous())

    def attend(self, query: Tensor, pool: PagePool, batch: PagedBatch, group: int) -> Tensor:
        """[T, H, D] -> [T, H * D]."""
        assert isinstance(pool, CudaPool)
        step = self._step(batch)
        if len(query) != batch.num_tokens:
            raise BackendError(f"{len(query)} queries for {batch.num_tokens} tokens")
        if step.reach is None:
            require_readable(batch.groups[group], pool)
        return self._attention(query.contiguous(), pool, step, group)

    def attend_pages(self, query: Tensor, pool: PagePool, chosen: ChosenPages) -> Tensor:
        """[S, H, D] -> [S, H * D]."""
        assert isinstance(pool, CudaPool)
        return self._attend_pages(query, pool, chosen)

    def _attend_pages(
        self, query: Tensor, pool: CudaPool, chosen: ChosenPages, dtype: Any = torch.float32
    ) -> Tensor:
        if isinstance(chosen.indices, np.ndarray):
            require_ids(chosen.indices, pool)
        step = None if self._taken is None else self._taken.step_choosing(chosen)
        if step is None:
            step = steps.to_device(chosen.by_head(), self.device)
        ready = steps.reading(step, self.device.integers(chosen.indices))
        return self._attention.chosen(query.contiguous(), pool, ready, dtype)

    def summaries(self, pool: PagePool, policy: str, bits: int) -> CudaSummaries:
        """Zeroed tensors."""
        assert isinstance(pool, CudaPool)
        return CudaSummaries(pool, policy, bits)

    def choose_pages(
        self, query: Tensor, summaries: Summaries, candidates: Candidates
    ) -> ChosenPages:
        """Queries [S, H, D]; nothing of it goes to the host."""
        assert isinstance(summaries, CudaSummaries)
        if self._taken is None or self._taken.whole.reach is None:
            require_ids(candidates.indices, summaries.pool)
        return candidates.choose(choose(query.contiguous(), summaries, candidates))

    def weigh_keys(
        self, query: Tensor, pool: PagePool, pages: Sequence[int] | Array, places: Array
    ) -> Tensor:
        """Queries [T, H, D] -> [G, n]."""
        assert isinstance(pool, CudaPool)
        ids = np.asarray(pages, dtype=np.int64)
        require_ids(ids, pool)
        taken = self.device.to_device(query) if isinstance(query, np.ndarray) else query
        return self._weighing.weights(taken, pool, ids, places)

    def key_norms(self, pool: PagePool, pages: Sequence[int] | Array, count: int) -> Tensor:
        """[G, count]."""
        assert isinstance(pool, CudaPool)
        ids = np.asarray(pages, dtype=np.int64)
        require_ids(ids, pool)
        return self._weighing.norms(pool, ids, count)

    def join_rows(self, parts: Sequence[tuple[Array, Tensor]]) -> Tensor:
        """Of rows [R] and x [R, n] each -> [T, n]."""
        count = sum(len(rows) for rows, _ in parts)
        out = self.device.empty((count, parts[0][1].shape[1]))
        for rows, x in parts:
            out.index_copy_(0, self.device.integers(rows), x)
        return out

    def rows(self, x: Tensor | Residual, indices: Sequence[int] | Array) -> Tensor:
        """[T, n], [R] -> [R, n]."""
        x = plain(x)
        if not len(indices):
            return x[:0]
        if len(indices) == len(x) and list(indices) == list(range(len(x))):
            return x  # a step that only decodes
        return x.index_select(0, self.device.integers(indices))

    def select(self, batch: PagedBatch, rows: Sequence[int] | Array) -> PagedBatch:
        """Rows [R]; the batch that is on the device, of rows that a step was taken with."""
        taken = None if self._taken is None else self._taken.selected(batch, rows)
        return batch.select(np.asarray(rows, dtype=np.int64)) if taken is None else taken

    def block(self, params: AttentionParams | MlpParams) -> Any:
        """Matrices that meet the same numbers become one, of which the parameters are rows."""
        joined = fused(params)
        self.device.give_back()  # what they lay in
        return joined

    def attention_block(
        self, x: Tensor | Residual, block: Any, batch: PagedBatch, pool: PagePool, group: int
    ) -> Residual:
        """[T, hidden] -> [T, hidden], whose last addition the next op makes."""
        return self._attend(residual(x), block, batch, pool, group=group)

    def attention_rows(
        self,
        x: Tensor | Residual,
        block: Any,
        batch: PagedBatch,
        pool: PagePool,
        *,
        group: int,
        rows: Sequence[int] | Array,
    ) -> Residual:
        """[T, hidden] -> [R, hidden]."""
        step, held = self._step(batch), residual(x)
        if isinstance(block, AttentionParams):
            alone = attention_rows(self, held.sum(), block, batch, pool, group=group, rows=rows)
            return Residual(alone)
        require(step, pool, group, held.x.shape[0])
        params, layers = block.params, self._layers
        normed = layers.norm(held, params.norm, params.norm_eps, block.whole.dtype)
        at = self._at(step, pool, group, params.inv_freq)
        layers.keep(normed, block, at)
        some = self.rows(held.x, rows)
        if not len(rows):
            return Residual(some)
        cos, sin = (self.rows(each, rows) for each in at.angles)
        at = replace(at, step=self._step(self.select(batch, rows)), angles=(cos, sin))
        return Residual(some, layers.mix(self.rows(normed, rows), block, at))

    def mlp_block(self, x: Tensor | Residual, block: Any) -> Residual:
        """[T, hidden] -> [T, hidden], whose last addition the next op makes."""
        return self._transform(residual(x), block)

    def layers(
        self,
        x: Tensor | Residual,
        blocks: Sequence[tuple[Any, Any]],
        batch: PagedBatch,
        pools: Sequence[PagePool],
        summaries: Sequence[Summaries | None] = (),
    ) -> Residual:
        """[T, hidden] -> [T, hidden], whose last addition the next op makes."""
        held = residual(x)
        layers = zip(blocks, pools, batch.group_of_layer, strict=False)
        for layer, ((attention, mlp), pool, group) in enumerate(layers):
            known = summaries[layer] if summaries else None
            held = self._attend(held, attention, batch, pool, group=group, known=known)
            held = self._transform(held, mlp)
        return held

    def _attend(
        self,
        held: Residual,
        block: Any,
        batch: PagedBatch,
        pool: PagePool,
        *,
        group: int,
        known: Summaries | None = None,
    ) -> Residual:
        """With ``known``, tokens read what they choose of the batch's candidates."""
        step = self._step(batch)  # before its positions and slots are asked for one by one
        choosing = None
        if known is not None:
            assert isinstance(pool, CudaPool)
            choosing = partial(self._attend_chosen, pool, batch, known)
        if isinstance(block, AttentionParams):
            x = held.sum()
            return Residual(
                attention_block(self, x, block, batch, pool, group=group, attend=choosing)
            )
        require(step, pool, group, held.x.shape[0])
        at = self._at(step, pool, group, block.params.inv_freq, choosing)
        return self._layers.attention(held, block, at)

    def _attend_chosen(
        self,
        pool: CudaPool,
        batch: PagedBatch,
        known: Summaries,
        query: Tensor,
        dtype: Any = torch.float32,
    ) -> Tensor:
        assert batch.candidates is not None
        chosen = self.choose_pages(query, known, batch.candidates)
        return self._attend_pages(query, pool, chosen, dtype)

    def _transform(self, held: Residual, block: Any) -> Residual:
        if isinstance(block, MlpParams):
            return Residual(mlp_block(self, held.sum(), block))
        return self._layers.mlp(held, block)

    def logits(
        self, tokens: Sequence[int], network: Network, batch: PagedBatch, pools: Sequence[PagePool]
    ) -> Logits:
        """[T] -> [T, vocab]."""
        compute = partial(self._hidden, network)
        return self._stepped(network, compute, network.head, tokens, batch, pools)

    def whole_step(
        self,
        compute: Compute,
        head: Tensor,
        tokens: Sequence[int],
        batch: PagedBatch,
        pools: Sequence[PagePool],
    ) -> Logits:
        """[T] -> [T, vocab]."""
        return self._stepped(compute, compute, head, tokens, batch, pools)

    def _stepped(
        self,
        model: Hashable,
        compute: Compute,
        head: Tensor,
        tokens: Sequence[int],
        batch: PagedBatch,
        pools: Sequence[PagePool],
    ) -> Logits:
        """A step that only decodes is replayed, see ``graphs.py``; any other is launched."""
        shape = shape_of(batch)
        if shape is None:
            tokens, _ = self.take_step(tokens, batch, range(batch.num_tokens))
            return self.to_logits(self._products(compute(tokens, batch, pools), head))
        ours = [pool for pool in pools if isinstance(pool, CudaPool)]
        for group, pool in dict(zip(batch.group_of_layer, ours, strict=True)).items():
            require_slots(batch.groups[group].slots, pool)
            require_readable(batch.groups[group], pool)
        if batch.candidates is not None:
            require_ids(batch.candidates.indices, ours[0])
        known, key = ours[0].graphs, (model, shape, self.exact)
        if key not in known:
            known[key] = StepGraph(self, compute, head, ours, shape, batch)
        return known[key].run(tokens, batch)

    def computed(
        self, compute: Compute, tokens: Any, taken: steps.Taken, pools: Sequence[PagePool]
    ) -> Tensor:
        """Of a step that is on the device, tokens too; copies nothing there or back."""
        self._take(taken)
        out = compute(tokens, taken.whole.batch, pools)
        self._taken = self._angles = None  # the same arrays hold other numbers next time
        return out

    def product(self, out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """:meth:`linear` of [T, in] and [out, in], written to ``out`` float32 [T, out]."""
        return self._products.into(out, x, weight)

    def to_logits(self, x: Tensor) -> CudaLogits:
        """[n, vocab] where they are."""
        return CudaLogits(self.device, x)

    def _hidden(
        self, network: Network, tokens: Any, batch: PagedBatch, pools: Sequence[PagePool]
    ) -> Tensor:
        held = self.layers(self.embed(network.embed, tokens), network.blocks, batch, pools)
        kind = network.head.dtype
        return self._layers.norm(held, network.norm, network.norm_eps, kind)

    def to_host(self, x: Tensor | Residual) -> npt.NDArray[np.float32]:
        """A copy in host memory; waits for what it depends on."""
        return self.device.to_host(plain(x)).numpy()

    def _step(self, batch: PagedBatch) -> steps.Step:
        """The batch on the device: as it was taken, or handed over for what reads other rows."""
        taken = None if self._taken is None else self._taken.step_of(batch)
        if taken is not None:
            return taken
        if self._beside is None or self._beside.batch is not batch:
            known = None if self._taken is None else self._taken.whole.held
            self._beside = steps.to_device(batch, self.device, known)
            self.device.hold(self._beside.held)
        return self._beside

    def _take(self, taken: steps.Taken) -> None:
        self._taken, self._beside, self._angles = taken, None, None
        self.device.hold(taken.whole.held)

    def _at(
        self,
        step: steps.Step,
        pool: PagePool,
        group: int,
        inv_freq: Array,
        attend: Callable[[Tensor, Any], Tensor] | None = None,
    ) -> At:
        assert isinstance(pool, CudaPool)
        return At(pool, step, group, self._cos_and_sin(step.batch.positions, inv_freq), attend)

    def _cos_and_sin(self, positions: Array, inv_freq: Array) -> tuple[Tensor, Tensor]:
        """cos and sin float32 [T, D/2] of a step's tokens: of float32 products, in float64."""
        last = self._angles
        if last is None or last[0] is not positions or last[1] is not inv_freq:
            at, empty, size = self.device.integers(positions), self.device.empty, len(inv_freq)
            angles = empty((len(positions), size), torch.float64)
            torch.mul(at[:, None], self._on_device(inv_freq)[None, :], out=angles)
            cos, sin = (each(angles, out=empty(angles.shape)) for each in (torch.cos, torch.sin))
            self._angles = last = positions, inv_freq, cos, sin
        return last[2], last[3]

    def _on_device(self, inv_freq: Array) -> Tensor:
        """Frequencies, which stay the same array from step to step."""
        if self._frequencies is None or self._frequencies[0] is not inv_freq:
            self._frequencies = inv_freq, self.device.to_device(inv_freq)
        return self._frequencies[1]


@functools.cache
def _kernels_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
