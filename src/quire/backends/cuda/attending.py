"""Which attention kernel is launched for what, with which tiles."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from quire.backends.cuda.attention import (
    decode_kernel,
    merge_kernel,
    merge_tiles_kernel,
    prefill_kernel,
)
from quire.backends.cuda.device import Device
from quire.backends.cuda.pool import CudaPool
from quire.backends.cuda.products import KINDS, as_stored
from quire.backends.cuda.steps import EVERY, Step, StepGroup
from quire.backends.cuda.stored import power_of_two
from quire.backends.cuda.tiles import (
    SPLIT,
    Tiles,
    decode_tiles,
    in_columns,
    prefill_tiles,
)
from quire.formats import GROUP
from quire.pages import PageShape

__all__ = ["Attention", "Chosen"]

Tensor = Any

_WAVES = 4  # programs of 4 warps a processor that contexts are split into, if long enough
_MERGED = 16  # rows of a tile that one program merges


@dataclass(frozen=True)
class Chosen:
    """Tiles that are not those of ``tiles.py``, to be compared.

    waves   programs of 4 warps a processor that contexts are split into, if they are long enough
    """

    tiles: Tiles | None = None
    waves: int = _WAVES


@dataclass(frozen=True)
class _Plan:
    """A launch of attention that walks pages, and of what merges its splits, for a step's layers.

    grid           programs of the first; the last of three is splits
    rows           of a tile
    length         places of a split
    unit           what scores are multiplied with: powers are of two
    named, merged  what the two kernels are compiled for
    """

    grid: tuple[int, int, int]
    rows: int
    length: int
    unit: float
    named: dict[str, Any]
    merged: dict[str, Any]


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

    def chosen(
        self, query: Tensor, pool: CudaPool, step: Step, dtype: Any = torch.float32
    ) -> Tensor:
        """query [S, H, D] -> [S, H * value_dim], rounded to ``dtype`` once it is whole.

        Sequence s * G + g of the step is KV head g of token s, which reads pages of its own.
        """
        tokens, heads, dim = query.shape
        groups = pool.shape.num_kv_heads
        out = self._device.empty((tokens * groups, heads // groups * pool.shape.value_dim), dtype)
        by_head = query.reshape(tokens * groups, heads // groups, dim)
        self._decode(out, by_head, pool, step, step.groups[0], kv_heads=1)
        return out.view(tokens, -1)

    def _prefill(
        self, out: Tensor, query: Tensor, pool: CudaPool, step: Step, group: StepGroup
    ) -> None:
        shape, chunks = pool.shape, step.batch.chunks
        share = query.shape[1] // shape.num_kv_heads
        asked = "prefill", shape, share, self.chosen_tiles
        plan = group.plans.get(asked)
        if plan is None:
            plan = group.plans[asked] = self._plan_prefill(shape, share, step, group)
        which = *step.chunks, len(chunks.sequences)
        count, kv_heads, splits = plan.grid
        into = best = total = as_stored(out)
        if splits > 1:
            rows = (*plan.grid, plan.rows)
            into = self._device.empty((*rows, shape.value_dim))
            best, total = self._device.empty(rows), self._device.empty(rows)
        self._device.launch(
            prefill_kernel, plan.grid,
            into, best, total, query, step.places, step.query_indptr, *which, group.indptr,
            group.indices, group.first_page, group.window, *_open_tables(group), pool.num_pages,
            *pool.tensors, plan.unit, plan.length, OUT=KINDS[out.dtype], **plan.named,
        )  # fmt: skip
        if splits > 1:
            self._device.launch(
                merge_tiles_kernel, (count, kv_heads, plan.rows // _MERGED),
                as_stored(out), into, best, total, step.places, step.query_indptr, *which,
                group.first_page, group.window, splits, plan.length, OUT=KINDS[out.dtype],
                **plan.merged,
            )  # fmt: skip

    def _plan_prefill(self, shape: PageShape, share: int, step: Step, group: StepGroup) -> _Plan:
        tiles, kv_heads = self._chunk_tiles(shape, share, group), shape.num_kv_heads
        chunks = step.batch.chunks
        count = chunks.num_tokens // (tiles.rows // share) + len(chunks.sequences)
        length, splits = self._chunk_splits(group, tiles.rows // share, kv_heads)
        named = self._sizes(shape, share) | {
            "G": kv_heads, "BLOCK_M": tiles.rows, "BLOCK_N": tiles.keys,
            "SPLIT": SPLIT if self._exact else 0, "PARTS": splits > 1,
            "num_warps": tiles.warps, "num_stages": tiles.stages,
        }  # fmt: skip
        merged = self._merged(shape, share, kv_heads)
        merged |= {"BLOCK_M": tiles.rows, "ROWS": _MERGED, "num_warps": 4}
        return _Plan((count, kv_heads, splits), tiles.rows, length, _unit(shape), named, merged)

    def _chunk_tiles(self, shape: PageShape, share: int, group: StepGroup) -> Tiles:
        """Large ones where they are enough for all processors, unless exact: see above."""
        if self.chosen_tiles.tiles:
            return self.chosen_tiles.tiles
        shared = self._device.shared_memory
        large = prefill_tiles(shape, share, shared, many=not self._exact)
        programs = self._programs(group, large.rows // share, shape.num_kv_heads)
        enough = programs >= self._device.processors
        return large if enough else prefill_tiles(shape, share, shared)

    def _decode_tiles(self, shape: PageShape, share: int) -> Tiles:
        if self.chosen_tiles.tiles:
            return self.chosen_tiles.tiles
        if self._exact:
            return prefill_tiles(shape, share, self._device.shared_memory)
        return decode_tiles(shape, share)

    @staticmethod
    def _programs(group: StepGroup, tokens: int, kv_heads: int) -> int:
        """Of prefill, with tiles of so many tokens."""
        return int((-(-group.chunks[:, 0] // tokens)).sum()) * kv_heads

    def _chunk_splits(self, group: StepGroup, tokens: int, kv_heads: int) -> tuple[int, int]:
        """Places of a split of prefill, and how many a tile of ``tokens`` has at most.

        One that is longer than any context where tiles are enough for all processors, or where
        bits must not depend on the batch.
        """
        programs = self._programs(group, tokens, kv_heads)
        if self._exact or programs >= self._device.processors:
            return EVERY, 1
        longest = int(group.chunks[:, 1].max())
        length = SPLIT * self._factor(-(-longest // SPLIT), programs)
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
        share = query.shape[1] // kv_heads
        asked = "decode", shape, share, kv_heads, self.chosen_tiles
        plan = group.plans.get(asked)
        if plan is None:
            plan = group.plans[asked] = self._plan_decode(shape, share, kv_heads, step, group)
        sequences, _, splits = plan.grid
        parts = (*plan.grid, share)
        mixed = self._device.empty((*parts, shape.value_dim))
        best, total = self._device.empty(parts), self._device.empty(parts)
        self._device.launch(
            decode_kernel, plan.grid,
            mixed, best, total, query, step.places, step.query_indptr, group.indptr,
            group.indices, group.first_page, group.window, *_open_tables(group), pool.num_pages,
            *pool.tensors, plan.unit, plan.length, **plan.named,
        )  # fmt: skip
        self._device.launch(
            merge_kernel, (sequences, kv_heads),
            as_stored(out), mixed, best, total, step.places, step.query_indptr, group.first_page,
            group.window, splits, plan.length, OUT=KINDS[out.dtype], **plan.merged,
        )  # fmt: skip

    def _plan_decode(
        self, shape: PageShape, share: int, kv_heads: int, step: Step, group: StepGroup
    ) -> _Plan:
        tiles, sequences = self._decode_tiles(shape, share), step.batch.num_sequences
        length, splits = self._splits(step, group, max(1, sequences * kv_heads * tiles.warps // 4))
        named = self._sizes(shape, share) | {
            "G": kv_heads, "HEADS": shape.num_kv_heads, "BLOCK_M": tiles.rows,
            "BLOCK_N": tiles.keys, "COLUMNS": not self._exact and in_columns(shape, share),
            "num_warps": tiles.warps, "num_stages": tiles.stages,
        }  # fmt: skip
        merged = self._merged(shape, share, kv_heads)
        merged |= {"ROWS": power_of_two(share), "num_warps": 2}
        grid = sequences, kv_heads, splits
        return _Plan(grid, tiles.rows, length, _unit(shape), named, merged)

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

    def _sizes(self, shape: PageShape, share: int) -> dict[str, Any]:
        """What kernels that walk pages are compiled for."""
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

    def _merged(self, shape: PageShape, share: int, kv_heads: int) -> dict[str, Any]:
        """What kernels that merge splits are compiled for."""
        return {
            "G": kv_heads,
            "SHARE": share,
            "DV": shape.value_dim,
            "DVP": _padded(shape.value_dim),
            "PAGE": shape.page_size,
            "HARDWARE": self._device.hardware,
        }


def _padded(dim: int, least: int = 16) -> int:
    """The power of two that holds ``dim`` numbers, and as many as a product sums at least."""
    return max(least, power_of_two(dim))


def _unit(shape: PageShape) -> float:
    return math.log2(math.e) / math.sqrt(shape.key_dim)


def _open_tables(group: StepGroup) -> tuple[torch.Tensor, ...]:
    return group.open_indptr, group.open_indices, group.open_first
