"""Which attention kernel is launched for what, with which tiles."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from quire.backends.cuda.attention import (
    decode_kernel,
    merge_kernel,
    merge_tiles_kernel,
    prefill_kernel,
)
from quire.backends.cuda.columns import parts_of
from quire.backends.cuda.device import Device
from quire.backends.cuda.pool import CudaPool
from quire.backends.cuda.products import KINDS, as_stored
from quire.backends.cuda.steps import EVERY, Step, StepGroup
from quire.backends.cuda.stored import Side, power_of_two
from quire.formats import GROUP
from quire.pages import PageShape

__all__ = ["SPLIT", "Attention", "Chosen", "Tiles", "decode_tiles", "in_columns", "prefill_tiles"]

Tensor = Any

SPLIT = 256  # places; a multiple of every block of keys
_WAVES = 4  # programs of 4 warps a processor that contexts are split into, if long enough
_MERGED = 16  # rows of a tile that one program merges
_ROOMY = 160 << 10  # bytes of shared memory that cards for data centres have


@dataclass(frozen=True)
class Tiles:
    """Rows (or columns) of queries and keys of a block; warps; blocks in flight."""

    rows: int
    keys: int
    warps: int
    stages: int


def in_columns(shape: PageShape, share: int) -> bool:
    """True where decode has the ``share`` heads of a KV head for columns: see ``columns.py``."""
    key, value = shape.key_format, shape.value_format
    whole = shape.value_dim % parts_of(value.name) == 0
    fours = key.kind != "page" or shape.key_dim % 4 == 0
    return share <= 16 and whole and fours and "fp32" not in (key.name, value.name)


def decode_tiles(shape: PageShape, share: int) -> Tiles:
    """For the ``share`` heads of one token: few rows; bytes on their way are what counts.

    In columns, of which products have eight: a warp is a program, so that warps wait for nothing
    of each other's, and what each of them does for all dims at once, it does once a block.
    """
    wide = max(shape.key_dim, shape.value_dim) > 128
    if in_columns(shape, share):
        plain = 16 in (shape.key_format.bits, shape.value_format.bits)
        tiles = Tiles(8, 32, 2 if wide or share > 8 else 1, 3 if plain else 4)
    elif "fp32" in (shape.key_format.name, shape.value_format.name):
        tiles = Tiles(16, 32, 8, 1)
    else:
        tiles = Tiles(16, 32, 4, 2) if wide else Tiles(16, 32, 2, 4)
    return replace(tiles, rows=max(tiles.rows, power_of_two(share)))


def prefill_tiles(shape: PageShape, share: int, shared: int) -> Tiles:
    """For several tokens' heads: as many rows as registers and ``shared`` bytes of memory hold.

    tests/cuda_compile.py checks that against what the compiler takes.
    """
    wide = max(shape.key_dim, shape.value_dim) > 128
    if "fp32" in (shape.key_format.name, shape.value_format.name):
        tiles = Tiles(16, 32, 8, 1) if wide else Tiles(32, 32, 8, 1)
    else:
        # Products take 16-bit numbers from where copies put them, which is a block more in memory.
        plain = 16 in (shape.key_format.bits, shape.value_format.bits)
        narrow = Tiles(64, 64, 4, 3 if shared >= _ROOMY and not plain else 2)
        tiles = Tiles(64, 32, 8, 2) if wide else narrow
    if shape.key_format.kind == "page":
        # Keys that share minima and steps; queries stay at hand in float32, to be scaled.
        tiles = replace(tiles, keys=GROUP, rows=32 if wide else tiles.rows)
    return replace(tiles, rows=max(tiles.rows, power_of_two(share)))


@dataclass(frozen=True)
class Chosen:
    """Tiles that are not those of :func:`decode_tiles` and :func:`prefill_tiles`, to be compared.

    waves   programs of 4 warps a processor that contexts are split into, if they are long enough
    """

    tiles: Tiles | None = None
    waves: int = _WAVES


class Attention:
    """Attention over a pool's pages; ``exact`` as CudaBackend has it.

    Sequences with one new token go through the decode kernels, the others of the same batch
    through the prefill kernel. Not exact: a decode program has few rows, a prefill program many,
    and splits are as long as keeps all processors busy. Exact: both have the same tiles and splits.
    """

    def __init__(self, device: Device, exact: bool) -> None:
        self._device, self._exact = device, exact
        self.chosen_tiles = Chosen()

    def __call__(
        self, query: Tensor, pool: CudaPool, step: Step, group: int, dtype: Any = torch.float32
    ) -> Tensor:
        """query [T, H, D] -> [T, H * value_dim], rounded to ``dtype`` once it is whole."""
        tokens, heads, _ = query.shape
        out = self._device.empty((tokens, heads * pool.shape.value_dim), dtype)
        if step.several:
            self._prefill(out, query, pool, step, step.groups[group])
        if step.single:
            self._decode(out, query, pool, step, step.groups[group])
        return out

    def chosen(self, query: Tensor, pool: CudaPool, step: Step) -> Tensor:
        """query [S * G, heads that share a KV head, D] -> [S * G, heads * value_dim].

        Row s * G + g is a sequence of its own, which reads pages of KV head g.
        """
        out = self._device.empty((len(query), query.shape[1] * pool.shape.value_dim))
        self._decode(out, query, pool, step, step.groups[0], kv_heads=1)
        return out

    def _prefill(
        self, out: Tensor, query: Tensor, pool: CudaPool, step: Step, group: StepGroup
    ) -> None:
        shape, sequences = pool.shape, step.batch.num_sequences
        kv_heads, share = shape.num_kv_heads, query.shape[1] // shape.num_kv_heads
        tiles = self._prefill_tiles(shape, share)
        count = len(query) // (tiles.rows // share) + sequences
        length, splits = self._chunk_splits(group, tiles.rows // share, kv_heads)
        into = best = total = as_stored(out)
        if splits > 1:
            rows = (count, kv_heads, splits, tiles.rows)
            into = self._device.empty((*rows, shape.value_dim))
            best, total = self._device.empty(rows), self._device.empty(rows)
        self._device.launch(
            prefill_kernel, (count, kv_heads, splits),
            into, best, total, query, step.places, step.query_indptr, group.indptr, group.indices,
            group.first_page, sequences, group.window, *_open_tables(group), pool.num_pages,
            *_stored(pool), _unit(pool), length, **self._sizes(pool, share), G=kv_heads,
            BLOCK_M=tiles.rows, BLOCK_N=tiles.keys, SPLIT=SPLIT if self._exact else 0,
            PARTS=splits > 1, OUT=KINDS[out.dtype], num_warps=tiles.warps,
            num_stages=tiles.stages,
        )  # fmt: skip
        if splits > 1:
            self._device.launch(
                merge_tiles_kernel, (count, kv_heads, tiles.rows // _MERGED),
                as_stored(out), into, best, total, step.places, step.query_indptr, group.first_page,
                sequences, group.window, splits, length, G=kv_heads, SHARE=share,
                DV=shape.value_dim, DVP=_padded(shape.value_dim), PAGE=shape.page_size,
                BLOCK_M=tiles.rows, ROWS=_MERGED, OUT=KINDS[out.dtype],
                HARDWARE=self._device.hardware, num_warps=4,
            )  # fmt: skip

    def _prefill_tiles(self, shape: PageShape, share: int) -> Tiles:
        chosen = self.chosen_tiles.tiles
        return chosen or prefill_tiles(shape, share, self._device.shared_memory)

    def _decode_tiles(self, shape: PageShape, share: int) -> Tiles:
        if self._exact:
            return self._prefill_tiles(shape, share)
        return self.chosen_tiles.tiles or decode_tiles(shape, share)

    def _chunk_splits(self, group: StepGroup, tokens: int, kv_heads: int) -> tuple[int, int]:
        """Places of a split of prefill, and how many a tile of ``tokens`` has at most.

        One that is longer than any context where tiles are enough for all processors, or where
        bits must not depend on the batch.
        """
        tiles = int((-(-group.chunks[:, 0] // tokens)).sum())
        if self._exact or tiles * kv_heads >= self._device.processors:
            return EVERY, 1
        longest = int(group.chunks[:, 1].max())
        length = SPLIT * self._factor(-(-longest // SPLIT), tiles * kv_heads)
        splits = -(-longest // length)
        return (EVERY, 1) if splits == 1 else (length, splits + 1)  # the first may be cut

    def _decode(
        self,
        out: Tensor,
        query: Tensor,
        pool: CudaPool,
        step: Step,
        group: StepGroup,
        kv_heads: int | None = None,
    ) -> None:
        shape = pool.shape
        kv_heads = shape.num_kv_heads if kv_heads is None else kv_heads
        share, sequences = query.shape[1] // kv_heads, step.batch.num_sequences
        tiles = self._decode_tiles(shape, share)
        split, splits = self._splits(step, group, max(1, sequences * kv_heads * tiles.warps // 4))
        parts = (sequences, kv_heads, splits, share)
        mixed = self._device.empty((*parts, shape.value_dim))
        best, total = self._device.empty(parts), self._device.empty(parts)
        self._device.launch(
            decode_kernel, (sequences, kv_heads, splits),
            mixed, best, total, query, step.places, step.query_indptr, group.indptr,
            group.indices, group.first_page, group.window, *_open_tables(group), pool.num_pages,
            *_stored(pool), _unit(pool), split, **self._sizes(pool, share), G=kv_heads,
            HEADS=shape.num_kv_heads, BLOCK_M=tiles.rows, BLOCK_N=tiles.keys,
            COLUMNS=not self._exact and in_columns(shape, share),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        self._device.launch(
            merge_kernel, (sequences, kv_heads),
            as_stored(out), mixed, best, total, step.places, step.query_indptr, group.first_page,
            group.window, splits, split, G=kv_heads, SHARE=share, DV=shape.value_dim,
            DVP=_padded(shape.value_dim), PAGE=shape.page_size, ROWS=power_of_two(share),
            OUT=KINDS[out.dtype], HARDWARE=self._device.hardware, num_warps=2,
        )  # fmt: skip

    def _splits(self, step: Step, group: StepGroup, programs: int) -> tuple[int, int]:
        """Places of a split, and how many there are at most.

        Places are SPLIT where bits must not depend on the batch, else a multiple of it, so that
        there are no more programs than keep all processors busy; ``programs`` are of 4 warps.
        """
        if step.reach is None:
            length = SPLIT if self._exact else SPLIT * self._factor(group.splits(SPLIT), programs)
            return length, group.splits(length)
        reach = min(step.reach, group.window // SPLIT + 1)
        factor = 1 if self._exact else self._factor(reach, programs)
        begun = int(reach < step.reach)  # a window may begin in the middle of a split
        return SPLIT * factor, -(-reach // factor) + begun

    def _factor(self, splits: int, programs: int) -> int:
        wanted = max(1, self.chosen_tiles.waves * self._device.processors // programs)
        return max(1, -(-splits // wanted))

    def _sizes(self, pool: CudaPool, share: int) -> dict[str, Any]:
        """What kernels are compiled for."""
        shape = pool.shape
        return {
            "SHARE": share,
            "DK": shape.key_dim,
            "DV": shape.value_dim,
            "DKP": _padded(shape.key_dim, 32 if shape.key_format.name == "int8" else 16),
            "DVP": _padded(shape.value_dim, GROUP if shape.value_format.kind == "page" else 16),
            "PAGE": shape.page_size,
            "GROUP": GROUP,
            "KEY": shape.key_format.name,
            "VALUE": shape.value_format.name,
            "PACKED": shape.by_page,
            "OPEN_KEY": shape.open_shape.key_format.name,
            "OPEN_VALUE": shape.open_shape.value_format.name,
            "HARDWARE": self._device.hardware,
        }


def _padded(dim: int, least: int = 16) -> int:
    """The power of two that holds ``dim`` numbers, and as many as a product sums at least."""
    return max(least, power_of_two(dim))


def _unit(pool: CudaPool) -> float:
    return math.log2(math.e) / math.sqrt(pool.shape.key_dim)


def _stored(pool: CudaPool) -> tuple[torch.Tensor, ...]:
    """Arrays of the packed pages, or of all, and of the open ones."""

    def of(side: Side) -> tuple[torch.Tensor, torch.Tensor]:
        return side.numbers, side.scale

    key, value = pool.pages.key, pool.pages.value
    packed = *of(key), key.least, *of(value), value.least
    return *packed, *of(pool.open.key), *of(pool.open.value)


def _open_tables(group: StepGroup) -> tuple[torch.Tensor, ...]:
    return group.open_indptr, group.open_indices, group.open_first
