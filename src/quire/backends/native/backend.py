"""NativeBackend: the Backend protocol over the compiled kernels."""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.backends.base import Compute, Logits, SomeRows, Summaries
from quire.backends.blocks import (
    AttentionParams,
    MlpParams,
    Network,
    Projection,
    attention_rows,
    choosing_layers,
    logits,
)
from quire.backends.native import _native
from quire.backends.native.pool import DTYPES, NativePool, require_formats
from quire.backends.selecting import HostSummaries, choose_pages, split_query
from quire.backends.weighing import WeighsOnHost
from quire.batch import Candidates, ChosenPages, OpenPages, PagedBatch
from quire.errors import BackendError
from quire.machine import this_machine
from quire.pages import PageFormat, PagePool, PageShape
from quire.sampler import HostLogits

__all__ = ["NativeBackend"]

Array = npt.NDArray[Any]

MOST_THREADS = 1024
ANGLE_ROWS = 1024  # positions whose angles are computed at a time

_ACTIVATIONS = {"silu": 0, "gelu_new": 1, "gelu_pytorch_tanh": 1, "gelu": 2, "relu": 3}


@functools.cache
def _extension_digest() -> str:
    return hashlib.sha256(Path(_native.__file__).read_bytes()).hexdigest()[:16]


class NativeBackend(WeighsOnHost):
    """See :class:`quire.backends.base.Backend` for what each op does, with shapes and sources.

    variant   one of ``variants()``; None is the fastest
    threads   None is what the machine's affinity and quota allow

    Raises BackendError for a variant that is not available or threads outside 1 to 1024.
    """

    name = "native"
    replays = False

    def __init__(self, variant: str | None = None, threads: int | None = None) -> None:
        threads = this_machine().threads if threads is None else threads
        if not 1 <= threads <= MOST_THREADS:
            raise BackendError(f"threads must be 1 to {MOST_THREADS}, not {threads}")
        variants = self.variants()
        if variant is not None and variant not in variants:
            raise BackendError(
                f"variant {variant!r} is unknown or needs another processor (available: "
                f"{', '.join(variants)})"
            )
        self._native = _native.Native(variant or variants[0], threads)
        self._nothing_open = _native.OpenTables(*[np.empty(0, np.int64)] * 5)
        self._last: tuple[PagedBatch, list[_native.Tables], int] | None = None
        self._angles: tuple[Array, Array, Array] | None = None
        self._stack: tuple[Any, Any, _native.Layers] | None = None

    @staticmethod
    def variants() -> list[str]:
        """Variants that this processor can run, the fastest first."""
        return _native.variants()

    @property
    def threads(self) -> int:
        """Threads that kernels are spread over."""
        return self._native.threads

    @property
    def variant(self) -> str:
        """The variant in use."""
        return self._native.variant

    @property
    def identity(self) -> str:
        """The variant, and a digest of the compiled kernels: a rebuild computes other pages."""
        return f"native {self.variant} {_extension_digest()}"

    @property
    def own_memory(self) -> int | None:
        """None: it is the machine's."""
        return None

    def weight(self, array: Array) -> Any:
        """A matrix stays where it is, in its dtype; a vector becomes float32."""
        if array.ndim == 1:
            return np.ascontiguousarray(array, dtype=np.float32)
        array = np.require(array, requirements=["C", "ALIGNED"])
        data = array.reshape(-1).view(np.uint8)
        return _native.Weight(data, DTYPES[array.dtype.name], *array.shape)

    def require_formats(self, key: PageFormat, value: PageFormat) -> None:
        """All formats, keys and values apart."""
        require_formats(key, value)

    def pool(self, shape: PageShape, num_pages: int, open_pages: int = 0) -> NativePool:
        """Zeroed pages; untouched ones take no memory on systems that allocate lazily."""
        return NativePool(self._native, shape, num_pages, open_pages)

    def take_step(
        self,
        tokens: Sequence[int] | Array,
        batch: PagedBatch,
        rows: Sequence[int] | Array,
        beside: Sequence[SomeRows] = (),
    ) -> tuple[Any, Any]:
        """Both as they are."""
        return tokens, rows

    def embed(self, table: Any, ids: Sequence[int] | Array) -> Array:
        """[vocab, hidden], [T] -> [T, hidden]."""
        out = np.empty((len(ids), table.columns), np.float32)
        self._native.embed(table, np.asarray(ids, dtype=np.int64), out)
        return out

    def linear(self, x: Array, weight: Any, bias: Array | None = None) -> Array:
        """[T, in], [out, in], [out] -> [T, out]."""
        out = np.empty((len(x), weight.rows), np.float32)
        self._native.linear(x, weight, bias, out)
        return out

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """[..., n], [n] -> [..., n]."""
        out = np.empty_like(x)
        self._native.rms_norm(x, weight, eps, out)
        return out

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        """[..., n], [n], [n] -> [..., n]."""
        out = np.empty_like(x)
        self._native.layer_norm(x, weight, bias, eps, out)
        return out

    def rope(self, x: Array, positions: Array, inv_freq: Array) -> Array:
        """[T, heads, D], int64 [T], float32 [D/2] -> [T, heads, D]."""
        cos, sin = self._table(inv_freq, _last_of(positions))
        out = np.empty_like(x)
        self._native.rope(x, positions, cos, sin, out)
        return out

    def hadamard(self, x: Array) -> Array:
        """[T, heads, D] -> [T, heads, D]."""
        out = np.empty_like(x)
        self._native.hadamard(x, x.shape[-1], out)
        return out

    def activate(self, x: Array, kind: str) -> Array:
        """Any shape -> the same."""
        out = np.empty_like(x)
        self._native.activate(x, _ACTIVATIONS[kind], out)
        return out

    def multiply(self, x: Array, y: Array) -> Array:
        """Equal shapes -> the same."""
        out = np.empty_like(x)
        self._native.multiply(x, y, out)
        return out

    def add(self, x: Array, y: Array) -> Array:
        """Equal shapes -> the same."""
        out = np.empty_like(x)
        self._native.add(x, y, out)
        return out

    def heads(self, x: Array, num_heads: int) -> Array:
        """[T, num_heads * D] -> [T, num_heads, D]."""
        return x.reshape(len(x), num_heads, x.shape[1] // num_heads)

    def append(self, pool: PagePool, slots: Array, key: Array, value: Array) -> None:
        """Slots int64 [T], key and value [T, G, D], into the pool in its format."""
        assert isinstance(pool, NativePool)
        self._native.append(pool.handle, slots, key, value)

    def attend(self, query: Array, pool: PagePool, batch: PagedBatch, group: int) -> Array:
        """[T, H, D] -> [T, H * D]."""
        assert isinstance(pool, NativePool)
        out = np.empty((len(query), query.shape[1] * pool.shape.value_dim), np.float32)
        self._native.attend(query, pool.handle, self._tables(batch)[0][group], out)
        return out

    def attend_pages(self, query: Array, pool: PagePool, chosen: ChosenPages) -> Array:
        """[S, H, D] -> [S, H * D].

        Heads of a page lie one behind the other, so each is a page of one head, and each KV head
        of a sequence a sequence of its own.
        """
        assert isinstance(pool, NativePool)
        sequences, heads, dim = len(query), pool.shape.num_kv_heads, query.shape[2]
        counts = np.diff(chosen.indptr)
        owner = np.repeat(np.tile(np.arange(heads), sequences), counts)
        places, last = chosen.places, chosen.places % chosen.page_size + 1
        ids = chosen.indices * heads + owner
        opened = self._nothing_open
        if pool.open_pages:  # the page that each query stands in is the last
            ends, none = chosen.indptr[1:] - 1, np.empty(0, np.int64)
            opened = _native.OpenTables(np.arange(len(ends) + 1), ids[ends], counts - 1, none, none)
        tables = _native.Tables(
            places,
            places,
            np.arange(len(counts) + 1),
            chosen.indptr,
            ids,
            last,
            np.zeros(len(counts), np.int64),
            chosen.page_size,
            0,
            opened,
        )
        by_head = np.ascontiguousarray(query).reshape(sequences * heads, -1, dim)
        out = np.empty((len(by_head), by_head.shape[1] * pool.shape.value_dim), np.float32)
        self._native.attend(by_head, pool.by_head, tables, out)
        return out.reshape(sequences, -1)

    def summaries(self, pool: PagePool, policy: str, bits: int) -> HostSummaries:
        """Arrays of zeros, of which untouched parts take no memory."""
        return HostSummaries(pool, policy, bits)

    def choose_pages(
        self, query: Array, summaries: Summaries, candidates: Candidates
    ) -> ChosenPages:
        """Queries [S, H, D]; pages of one sequence are scored in one call."""
        assert isinstance(summaries, HostSummaries)
        return choose_pages(query, summaries, candidates, self._score)

    def _score(self, query: Array, summaries: HostSummaries, pages: Array) -> Array:
        """[H, D], [n] -> [G, n]."""
        held = summaries.held
        out = np.empty((held.shape[1], len(pages)), np.float32)
        if summaries.policy == "quest":
            parts = split_query(query, held.shape[1])
            self._native.score_bounds(parts, held.view(np.uint16), pages, out)
        else:
            signs = summaries.signatures(query)
            self._native.score_signatures(signs, held, pages, out)
        return out

    def join_rows(self, parts: Sequence[tuple[Array, Array]]) -> Array:
        """Of rows [R] and x [R, n] each -> [T, n]."""
        if len(parts) == 1:
            return parts[0][1]
        out = np.empty((sum(len(rows) for rows, _ in parts), parts[0][1].shape[1]), np.float32)
        for rows, x in parts:
            out[rows] = x
        return out

    def block(self, params: AttentionParams | MlpParams) -> Any:
        """The weights as the kernels take them."""
        if isinstance(params, MlpParams):
            gate, up, down = map(_layer, (params.gate, params.up, params.down))
            kind = _ACTIVATIONS[params.activation]
            return _native.MlpWeights(params.norm, params.norm_eps, gate, up, down, kind)
        q, k, v, o = map(_layer, (params.q, params.k, params.v, params.o))
        weights = _native.AttentionWeights(
            params.norm, params.norm_eps, q, k, v, o, params.q_norm, params.k_norm
        )
        return weights, params

    def attention_block(
        self, x: Array, block: Any, batch: PagedBatch, pool: PagePool, group: int
    ) -> Array:
        """[T, hidden] -> [T, hidden]."""
        assert isinstance(pool, NativePool)
        weights, params = block
        tables, last = self._tables(batch)
        cos, sin = self._table(params.inv_freq, last)
        out = np.empty_like(x)
        slots = batch.groups[group].slots
        self._native.attention_block(x, weights, cos, sin, pool.handle, slots, tables[group], out)
        return out

    def attention_rows(
        self,
        x: Array,
        block: Any,
        batch: PagedBatch,
        pool: PagePool,
        *,
        group: int,
        rows: Sequence[int] | Array,
    ) -> Array:
        """[T, hidden] -> [R, hidden], op by op."""
        _, params = block
        return attention_rows(self, x, params, batch, pool, group=group, rows=rows)

    def mlp_block(self, x: Array, block: Any) -> Array:
        """[T, hidden] -> [T, hidden]."""
        out = np.empty_like(x)
        self._native.mlp_block(x, block, out)
        return out

    def layers(
        self,
        x: Array,
        blocks: Sequence[tuple[Any, Any]],
        batch: PagedBatch,
        pools: Sequence[PagePool],
        summaries: Sequence[Summaries | None] = (),
    ) -> Array:
        """[T, hidden] -> [T, hidden], in one call; op by op where pages are chosen."""
        if not blocks:
            return x
        if summaries:
            halves = [(params, mlp) for (_, params), mlp in blocks]
            return choosing_layers(self, x, halves, batch, pools, summaries=summaries)
        if self._stack is None or self._stack[0] is not blocks or self._stack[1] is not pools:
            self._stack = blocks, pools, _stack(blocks, pools, batch.group_of_layer)
        _, params = blocks[0][0]
        tables, last = self._tables(batch)
        cos, sin = self._table(params.inv_freq, last)
        out = np.empty_like(x)
        slots = [group.slots for group in batch.groups]
        self._native.layers(x, self._stack[2], cos, sin, slots, tables, out)
        return out

    def logits(
        self, tokens: Sequence[int], network: Network, batch: PagedBatch, pools: Sequence[PagePool]
    ) -> Logits:
        """[T] -> [T, vocab], all layers in one call."""
        return logits(self, tokens, network, batch, pools)

    def whole_step(
        self,
        compute: Compute,
        head: Array,
        tokens: Sequence[int],
        batch: PagedBatch,
        pools: Sequence[PagePool],
    ) -> Logits:
        """[T] -> [T, vocab], computed anew."""
        return self.to_logits(self.linear(compute(tokens, batch, pools), head))

    def rows(self, x: Array, indices: Sequence[int] | Array) -> Array:
        """[T, n], [R] -> [R, n]."""
        if len(indices) == len(x) and list(indices) == list(range(len(x))):
            return x  # a step that only decodes
        return x[np.asarray(indices, dtype=np.int64)]

    def select(self, batch: PagedBatch, rows: Sequence[int] | Array) -> PagedBatch:
        """Rows [R]."""
        return batch.select(np.asarray(rows, dtype=np.int64))

    def to_logits(self, x: Array) -> HostLogits:
        """The array itself."""
        return HostLogits(x)

    def to_host(self, x: Array) -> npt.NDArray[np.float32]:
        """The array itself."""
        return x

    def probe_read(self, buffer: Array) -> None:
        """Read every byte of uint8 ``buffer`` [a multiple of 1 MiB]; time it for bytes a second."""
        self._native.probe_read(buffer)

    def probe_multiply(self, steps: int) -> float:
        """Multiply-adds of bf16 pairs in registers; returns how many floating-point operations."""
        return self._native.probe_multiply(steps)

    def _tables(self, batch: PagedBatch) -> tuple[list[_native.Tables], int]:
        """The batch's page tables, checked and handed over once a step, and its last position."""
        if self._last is None or self._last[0] is not batch:
            tables = [
                _native.Tables(
                    batch.places,
                    batch.positions,
                    batch.query_indptr,
                    group.indptr,
                    group.indices,
                    group.last_page_len,
                    group.first_page,
                    group.page_size,
                    group.window or 0,
                    self._open_tables(group.open),
                )
                for group in batch.groups
            ]
            self._last = batch, tables, _last_of(batch.positions)
        return self._last[1:]

    def _open_tables(self, pages: OpenPages) -> _native.OpenTables:
        if not pages.are_used:
            return self._nothing_open
        return _native.OpenTables(
            pages.indptr, pages.indices, pages.first, pages.seal_from, pages.seal_to
        )

    def _table(self, inv_freq: Array, last: int) -> tuple[Array, Array]:
        """cos and sin float32 [beyond position ``last``, D/2]; grows by a quarter more."""
        known = None
        if self._angles is not None and self._angles[0] is inv_freq:
            known = self._angles[1:]
            if last < len(known[0]):
                return known
        rows = -(-max(1024, last + 1 + last // 4) // ANGLE_ROWS) * ANGLE_ROWS
        cos, sin = np.empty((2, rows, len(inv_freq)), np.float32)
        done = 0 if known is None else len(known[0])
        if known is not None:
            cos[:done], sin[:done] = known
        for first in range(done, rows, ANGLE_ROWS):  # in float64, which never takes much room
            part = slice(first, first + ANGLE_ROWS)
            positions = np.arange(part.start, part.stop, dtype=np.float32)
            angles = (positions[:, None] * inv_freq).astype(np.float64)
            np.cos(angles, out=cos[part], casting="same_kind")
            np.sin(angles, out=sin[part], casting="same_kind")
        self._angles = inv_freq, cos, sin
        return cos, sin


def _last_of(positions: Array) -> int:
    return int(positions[positions.argmax()]) if len(positions) else 0


def _layer(projection: Projection) -> _native.Layer:
    return _native.Layer(projection.weight, projection.bias)


def _stack(
    blocks: Sequence[tuple[Any, Any]], pools: Sequence[PagePool], groups: Sequence[int]
) -> _native.Layers:
    layers = _native.Layers()
    for (attention, mlp), pool, group in zip(blocks, pools, groups, strict=False):
        assert isinstance(pool, NativePool)
        layers.add(attention[0], mlp, pool.handle, group)
    return layers
