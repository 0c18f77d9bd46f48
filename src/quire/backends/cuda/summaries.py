"""Choosing the pages that tokens read, on the device: what is known of pages, and the launches."""

from typing import Any

import torch

from quire.backends.cuda.device import Device
from quire.backends.cuda.knowing import bounds_kernel, query_signs_kernel, signs_kernel
from quire.backends.cuda.picking import pick_kernel, score_bounds_kernel, score_signs_kernel
from quire.backends.cuda.pool import CudaPool
from quire.backends.cuda.stored import power_of_two
from quire.backends.selecting import planes, summary_bytes
from quire.batch import Candidates
from quire.errors import BackendError
from quire.formats import GROUP

__all__ = ["CudaSummaries", "choose", "pick"]

Tensor = Any

_ROWS = 16  # keys, or queries, that a program takes at a time
_SCORED = 4096  # numbers of what is known that a program scores at a time
_BLOCK = 4096  # scores that a program looks at at a time


class CudaSummaries:
    """See :class:`quire.backends.base.Summaries`. All memory is taken at once: graphs hold it.

    held   bounds int16 [P, G, 2, D], bits of bfloat16, or signatures int32 [P, G, page_size, W]
    """

    def __init__(self, pool: CudaPool, policy: str, bits: int) -> None:
        self.pool, self.policy, self.bits, device = pool, policy, bits, pool.device
        shape, heads = pool.shape, pool.shape.num_kv_heads
        self.bytes_per_page = summary_bytes(policy, bits, shape)
        try:
            if policy == "quest":
                known = (pool.num_pages, heads, 2, shape.key_dim)
                self.held = device.zeros(known, torch.int16)
                return
            self.normals = device.to_device(planes(bits, shape.key_dim))
            known = (pool.num_pages, heads, shape.page_size, bits // 32)
            self.held = device.zeros(known, torch.int32)
        except (torch.OutOfMemoryError, RuntimeError) as error:  # the latter on a CPU
            raise BackendError(
                f"no memory for what {policy} remembers of {pool.num_pages} pages, "
                f"{self.bytes_per_page} bytes of each in each layer, on {device.name}, of which "
                f"{device.memory()} are free; lower kv_memory"
            ) from error

    def make(self, pages: Tensor) -> None:
        """Of complete ``pages``, int64 [n] on the device, as they are stored; none below 0."""
        pool, shape, key = self.pool, self.pool.shape, self.pool.pages.key
        stored = key.numbers, key.scale, key.least
        grid, dim = (len(pages), shape.num_kv_heads), shape.key_dim
        sizes: dict[str, Any] = {
            "G": shape.num_kv_heads, "D": dim, "DP": max(16, power_of_two(dim)),
            "PAGE": shape.page_size, "KEY": key.format.name, "HARDWARE": pool.device.hardware,
            "PER": 8 // key.format.bits if key.format.kind == "page" else 1, "GROUP": GROUP,
            "ROWS": _ROWS,
        }  # fmt: skip
        if self.policy == "quest":
            pool.device.launch(bounds_kernel, grid, self.held, pages, *stored, **sizes)
        else:
            args = self.held, pages, self.normals, *stored
            pool.device.launch(signs_kernel, grid, *args, **sizes, BITS=self.bits)

    def score(self, query: Tensor, candidates: Candidates) -> Tensor:
        """Of pages between the first and the last, for each KV head: float32 [S, G, longest]."""
        device, shape = self.pool.device, self.pool.shape
        heads, dim = shape.num_kv_heads, shape.key_dim
        tokens, share, longest = len(query), query.shape[1] // heads, candidates.longest
        out = device.empty((tokens, heads, longest))
        tables = _tables(device, candidates)
        if self.policy == "quest":
            width = power_of_two(dim)
            pages = max(1, _SCORED // width)
            device.launch(
                score_bounds_kernel, (tokens, heads, -(-longest // pages)),
                out, query, self.held, *tables, longest, G=heads, SHARE=share,
                SHAREP=power_of_two(share), D=dim, DP=width, PAGES=pages,
            )  # fmt: skip
            return out
        words, size = self.bits // 32, shape.page_size
        width = power_of_two(size) * power_of_two(words)
        pages = max(1, _SCORED // width)
        device.launch(
            score_signs_kernel, (tokens, heads, -(-longest // pages)),
            out, self._signs_of(query), self.held, *tables, longest, G=heads, SHARE=share,
            PAGE=size, PAGEP=power_of_two(size), WORDS=words, WORDSP=power_of_two(words),
            PAGES=pages,
        )  # fmt: skip
        return out

    def _signs_of(self, query: Tensor) -> Tensor:
        """Of queries [S, H, D], int32 [S, H, W]."""
        device, dim, words = self.pool.device, query.shape[2], self.bits // 32
        rows = query.shape[0] * query.shape[1]
        out = device.empty((*query.shape[:2], words), torch.int32)
        device.launch(
            query_signs_kernel, (-(-rows // _ROWS), words),
            out, query, self.normals, rows, D=dim, DP=max(16, power_of_two(dim)), ROWS=_ROWS,
            BITS=self.bits,
        )  # fmt: skip
        return out


def choose(query: Tensor, summaries: CudaSummaries, candidates: Candidates) -> Tensor:
    """Ids of the pages that queries [S, H, D] read, as :func:`pick` gives them.

    The arrays of ``candidates`` are at hand on the device, or are handed over.
    """
    device, heads = summaries.pool.device, summaries.pool.shape.num_kv_heads
    if len(candidates.fresh):
        summaries.make(device.integers(candidates.fresh))
    return pick(device, summaries.score(query, candidates), candidates, heads)


def pick(device: Device, scores: Tensor, candidates: Candidates, heads: int) -> Tensor:
    """Page ids int64, where ``candidates.chosen`` has them, of the highest scores.

    ``scores`` float32 [S, heads, longest]: of each sequence's pages but the first and the last.
    """
    longest = candidates.longest
    picked = device.empty((len(scores) * heads * candidates.most,), torch.int64)
    [table] = candidates.chosen.groups
    device.launch(
        pick_kernel, (len(scores), heads),
        picked, scores, *_tables(device, candidates), device.integers(table.indptr), longest,
        G=heads, BLOCK=min(_BLOCK, power_of_two(longest)), num_warps=8,
    )  # fmt: skip
    return picked


def _tables(device: Device, candidates: Candidates) -> tuple[Tensor, Tensor, Tensor]:
    arrays = candidates.indptr, candidates.indices, candidates.counts
    indptr, indices, counts = map(device.integers, arrays)
    return indptr, indices, counts
