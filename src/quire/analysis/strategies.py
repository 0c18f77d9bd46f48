"""Ways of keeping a cache side by side: what each takes for the same load, and what it gives up."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from quire.analysis.memory import Load, kv_bytes, kv_layout, score_matrix_bytes
from quire.analysis.shape import ModelShape
from quire.config import format_bytes

__all__ = ["PrefillPeak", "Strategy", "prefill_peaks", "strategies"]

TILE_ROWS = 96  # query rows whose scores the native kernels hold at a time (kernels.hpp: ROW_BLOCK)
TILE_KEYS = 256  # and keys (SPLIT)


@dataclass(frozen=True)
class Strategy:
    """One way, with its bytes for all sequences of a load.

    saving   of the first one's bytes; below 0 if it takes more
    gives    what is given up, for a person
    """

    name: str
    kv_format: str
    kv_bytes: int
    saving: float
    gives: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def strategies(shape: ModelShape, load: Load, budget: int) -> list[Strategy]:
    """Contiguous and paged, smaller numbers, fewer tokens: bytes of ``load`` under each.

    ``budget`` is the tokens that eviction keeps of each sequence. A contiguous cache reserves the
    model's whole context for every sequence, since nobody knows how long it becomes (Kwon et al.,
    2023, arXiv:2309.06180, section 3); evicting is StreamingLLM's (arXiv:2309.17453) and its kin.
    """
    own, size = shape.dtype, kv_layout(shape).page_size
    kept = min(load.context, budget + size)
    rows = [
        ("contiguous", "fp32", "whole", load.context, "memory that is never used"),
        ("contiguous", "fp16", "whole", load.context, "memory that is never used"),
        ("paged", own, "auto", load.context, "nothing"),
        ("paged", "int8", "auto", load.context, "bits of every number"),
        ("paged", "int4", "auto", load.context, "bits of every number"),
        (
            f"window or eviction, {budget:,} tokens",
            own,
            "auto",
            kept,
            "old tokens",
        ),
        (f"eviction, {budget:,} tokens", "int8", "auto", kept, "old tokens and bits"),
    ]
    found: list[Strategy] = []
    for name, kv_format, page_size, context, gives in rows:
        layout = kv_layout(shape, kv_format, page_size)
        taken = load.sequences * kv_bytes(layout, context, load.chunk)
        saving = 1 - taken / found[0].kv_bytes if found else 0.0
        found.append(Strategy(name, kv_format, taken, saving, gives))
    return found


@dataclass(frozen=True)
class PrefillPeak:
    """The most scores of attention that are there at a time in a prefill, in bytes.

    chunk   query rows at a time
    """

    name: str
    chunk: int
    score_bytes: int

    def __str__(self) -> str:
        """One line for a person."""
        return f"{self.name}: {format_bytes(self.score_bytes)}"


def prefill_peaks(
    shape: ModelShape, tokens: int, chunk: int, threads: int
) -> Sequence[PrefillPeak]:
    """A prompt of ``tokens`` at once, in chunks, and in the tiles of a kernel: all heads' scores.

    The last is what Quire's kernels hold, one tile a thread; FlashAttention, arXiv:2205.14135.
    """
    heads = max(layer.num_heads for layer in shape.layers)
    part = min(chunk, tokens)
    tile = min(TILE_ROWS, tokens)
    return (
        PrefillPeak("whole prompt", tokens, heads * score_matrix_bytes(tokens, tokens)),
        PrefillPeak(f"chunks of {part:,}", part, heads * score_matrix_bytes(part, tokens)),
        PrefillPeak(
            f"tiles of {tile} x {TILE_KEYS}",
            tile,
            threads * score_matrix_bytes(tile, min(TILE_KEYS, tokens)),
        ),
    )
