"""NativeBackend: the Backend protocol over the compiled kernels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.backends.native import _native
from quire.backends.native.pool import DTYPES, NativePool
from quire.batch import PagedBatch
from quire.errors import BackendError
from quire.machine import this_machine
from quire.pages import PagePool, PageShape

__all__ = ["NativeBackend"]

Array = npt.NDArray[Any]

MOST_THREADS = 1024

_ACTIVATIONS = {"silu": 0, "gelu_new": 1, "gelu_pytorch_tanh": 1, "gelu": 2, "relu": 3}


class NativeBackend:
    """See :class:`quire.backends.base.Backend` for what each op does, with shapes and sources.

    variant   one of ``variants()``; None is the fastest
    threads   None is what the machine's affinity and quota allow

    Raises BackendError for a variant that is not available or threads outside 1 to 1024.
    """

    name = "native"

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
        self._last: tuple[PagedBatch, list[_native.Tables]] | None = None
        self._angles: dict[bytes, tuple[Array, Array]] = {}

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

    def weight(self, array: Array) -> Any:
        """A matrix stays where it is, in its dtype; a vector becomes float32."""
        if array.ndim == 1:
            return np.ascontiguousarray(array, dtype=np.float32)
        array = np.ascontiguousarray(array)
        data = array.reshape(-1).view(np.uint8)
        return _native.Weight(data, DTYPES[array.dtype.name], *array.shape)

    def pool(self, shape: PageShape, num_pages: int) -> NativePool:
        """Zeroed pages; untouched ones take no memory on systems that allocate lazily."""
        return NativePool(shape, num_pages)

    def embed(self, table: Any, ids: Sequence[int]) -> Array:
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
        cos, sin = self._table(inv_freq, int(positions.max(initial=-1)) + 1)
        out = np.empty_like(x)
        self._native.rope(x, cos[positions], sin[positions], out)
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
        self._native.attend(query, pool.handle, self._tables(batch)[group], out)
        return out

    def rows(self, x: Array, indices: Sequence[int]) -> Array:
        """[T, n], [R] -> [R, n]."""
        return x[np.asarray(indices, dtype=np.int64)]

    def to_host(self, x: Array) -> npt.NDArray[np.float32]:
        """The array itself."""
        return x

    def probe_read(self, buffer: Array) -> None:
        """Read every byte of uint8 ``buffer`` [a multiple of 1 MiB]; time it for bytes a second."""
        self._native.probe_read(buffer)

    def probe_multiply(self, steps: int) -> float:
        """Multiply-adds of bf16 pairs in registers; returns how many floating-point operations."""
        return self._native.probe_multiply(steps)

    def _tables(self, batch: PagedBatch) -> list[_native.Tables]:
        """The batch's page tables, checked and handed over once a step."""
        if self._last is None or self._last[0] is not batch:
            tables = [
                _native.Tables(
                    batch.positions,
                    batch.query_indptr,
                    group.indptr,
                    group.indices,
                    group.last_page_len,
                    group.first_page,
                    group.page_size,
                    group.window or 0,
                )
                for group in batch.groups
            ]
            self._last = batch, tables
        return self._last[1]

    def _table(self, inv_freq: Array, length: int) -> tuple[Array, Array]:
        """cos and sin float32 [at least length, D/2] of float32 angles; grows by doubling."""
        key = inv_freq.tobytes()
        found = self._angles.get(key)
        if found is None or len(found[0]) < length:
            positions = np.arange(max(1024, 2 * length), dtype=np.float32)
            angles = (positions[:, None] * inv_freq).astype(np.float64)
            found = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
            self._angles[key] = found
        return found
