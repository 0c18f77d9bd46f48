"""How many bytes a model takes: weights, pages, activations, logits; and what fits into a budget.

Pure arithmetic on a :class:`ModelShape`: no weights, no arrays. Pages are those of
:mod:`quire.layout`, with which the engine sizes its pools.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from quire.analysis.card_workspace import card_workspace
from quire.analysis.load import FLOAT, Load, Workspace
from quire.analysis.native_workspace import native_workspace
from quire.analysis.shape import DTYPE_BITS, PART_NAMES, ModelShape, Part
from quire.config import format_bytes
from quire.errors import ConfigError, did_you_mean
from quire.format_choice import parse_formats
from quire.formats import GROUP
from quire.layout import CacheLayout, lay_out, with_open_pages

__all__ = [
    "SPARE",
    "Fragmentation",
    "Load",
    "MemoryPlan",
    "Share",
    "Workspace",
    "fragmentation",
    "kv_bytes",
    "kv_fixed_bytes",
    "kv_growth",
    "kv_layout",
    "kv_token_bytes",
    "most_context",
    "most_requests",
    "plan_memory",
    "pool_bytes",
    "pool_pages",
    "score_matrix_bytes",
    "stored_bits",
    "weight_bytes",
    "workspace",
]

SPARE = 0.05  # of a memory, for what is not planned: drivers, other programs, fragments


# -- weights ---------------------------------------------------------------------------------------


def stored_bits(shape: ModelShape, weights: str | None = None) -> dict[Part, Fraction]:
    """Bits a weight by part: as the checkpoint stores it, or with ``weights`` as dtype of matrices.

    Embeddings, norms and the head stay in the model's own dtype, as quantised checkpoints keep
    them, unless ``weights`` is a float of 16 or 32 bits. Raises ConfigError for an unknown dtype.
    """
    if weights is not None and weights not in DTYPE_BITS:
        raise ConfigError(
            f"unknown dtype of weights {weights!r}{did_you_mean(weights, DTYPE_BITS)} "
            f"(known: {', '.join(DTYPE_BITS)})"
        )
    if weights is None:
        dtypes = dict(shape.stored)
        return {part: DTYPE_BITS[dtypes.get(part, shape.dtype)] for part in PART_NAMES}
    outside = weights if DTYPE_BITS[weights] >= 16 else shape.dtype
    inside = ("attention", "mlp", "experts")
    return {part: DTYPE_BITS[weights if part in inside else outside] for part in PART_NAMES}


def weight_bytes(shape: ModelShape, dtype: str | None = None) -> dict[Part, int]:
    """Bytes of all weights by part; see :func:`stored_bits`."""
    bits = stored_bits(shape, dtype)
    return {part: int(shape.numbers[part] * bits[part] / 8) for part in PART_NAMES}


# -- keys and values -------------------------------------------------------------------------------


def kv_layout(
    shape: ModelShape, kv_format: str = "auto", page_size: int | str = "auto"
) -> CacheLayout:
    """The layout of the model's cache; ``auto`` is the checkpoint's dtype, and 16 tokens a page.

    ``"whole"`` makes one page of the model's context. Raises ConfigError for a format or page size
    that cannot be, and for values of their own format where a model keeps one vector for both.
    """
    choice = parse_formats(kv_format)
    formats = choice.of_layers(len(shape.layers), shape.dtype)
    if page_size == "auto":
        page_size = GROUP if choice.by_page else 16
    size = shape.max_position if page_size == "whole" else page_size
    if isinstance(size, str) or size < 1:
        raise ConfigError(f"page_size must be a number of tokens or 'whole', not {page_size!r}")
    for kv, (key, value) in zip(shape.kv, formats, strict=True):
        if not kv.value_dim and key.name != value.name:
            raise ConfigError(
                f"{shape.name} keeps one vector for keys and values, and kv_format "
                f"{kv_format!r} names two formats; name one"
            )
    return lay_out(shape.windows, shape.kv, size, formats)


def kv_token_bytes(layout: CacheLayout) -> Fraction:
    """Bytes of K and V of a token in all layers, each counted once; of a finished page."""
    pages = sum(layout.page_bytes(group) for group in range(len(layout.groups)))
    return Fraction(pages, layout.page_size)


def kv_growth(layout: CacheLayout, context: int) -> Fraction:
    """Bytes that one more token costs a sequence of ``context``, pages aside.

    Layers whose window is full no longer grow.
    """
    grows = [
        layout.page_bytes(g)
        for g, group in enumerate(layout.groups)
        if group.window is None or context < group.window
    ]
    return Fraction(sum(grows), layout.page_size)


def kv_fixed_bytes(layout: CacheLayout) -> int:
    """Bytes that layers with a window come to hold of a sequence, whatever its length."""
    return int(
        sum(
            Fraction(group.window * layout.page_bytes(g), layout.page_size)
            for g, group in enumerate(layout.groups)
            if group.window is not None
        )
    )


def kv_bytes(layout: CacheLayout, tokens: int, chunk: int = 1) -> int:
    """The most bytes of pages that a sequence holds while it grows to ``tokens`` by ``chunk``s."""
    counts = [
        count
        for group in range(len(layout.groups))
        for count in layout.most_pages(group, tokens, chunk)
    ]
    return _product(counts, layout)


def _product(counts: Sequence[int], layout: CacheLayout) -> int:
    return sum(count * size for count, size in zip(counts, layout.area_bytes, strict=True))


def pool_pages(layout: CacheLayout, load: Load) -> tuple[int, ...]:
    """Pages of each area of a pool that ``load`` fills: what its sequences hold at their longest.

    Where whole pages are packed, with the open ones that the engine keeps for a step.
    """
    counts = [
        max(1, load.sequences * layout.most_pages(group, load.context, load.chunk)[0])
        for group in range(len(layout.groups))
    ]
    return with_open_pages(layout, counts, load.sequences, load.chunk)


def pool_bytes(layout: CacheLayout, load: Load) -> int:
    """Bytes of :func:`pool_pages`."""
    return _product(pool_pages(layout, load), layout)


# -- what is computed with -------------------------------------------------------------------------


def workspace(shape: ModelShape, layout: CacheLayout, load: Load) -> Workspace:
    """What a step of ``load`` needs beside weights and pages."""
    of = native_workspace if load.card is None else card_workspace
    return of(shape, layout, load)


def score_matrix_bytes(queries: int, keys: int, number_bytes: int = FLOAT) -> int:
    """Bytes of the scores of one head, if they are all there at a time: queries x keys numbers."""
    return queries * keys * number_bytes


# -- together --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a model under a load.

    summaries   of pages, by which a policy chooses those that are read
    """

    weights: dict[Part, int]
    kv: int
    workspace: Workspace
    summaries: int = 0

    @property
    def weight_bytes(self) -> int:
        """Of all parts."""
        return sum(self.weights.values())

    @property
    def total(self) -> int:
        """All of it; the process itself and its libraries come on top."""
        return self.weight_bytes + self.kv + self.summaries + self.workspace.total

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "weights": dict(self.weights),
            "weight_bytes": self.weight_bytes,
            "kv_bytes": self.kv,
            "summary_bytes": self.summaries,
            "workspace": {**asdict(self.workspace), "total": self.workspace.total},
            "total_bytes": self.total,
        }

    def __str__(self) -> str:
        summaries = f"summaries {format_bytes(self.summaries)}, " if self.summaries else ""
        return (
            f"weights {format_bytes(self.weight_bytes)}, KV {format_bytes(self.kv)}, {summaries}"
            f"workspace {format_bytes(self.workspace.total)}: {format_bytes(self.total)}"
        )


@dataclass(frozen=True)
class Share:
    """Of all weights and all pages, what the fullest of several devices holds."""

    weights: float = 1.0
    kv: float = 1.0

    def bytes(self, memory: MemoryPlan) -> int:
        """On that device; it has a workspace of its own."""
        held = self.weights * memory.weight_bytes + self.kv * (memory.kv + memory.summaries)
        return int(held) + memory.workspace.total


ALL = Share()


def plan_memory(
    shape: ModelShape, layout: CacheLayout, load: Load, weights: str | None = None
) -> MemoryPlan:
    """Bytes of ``load``; ``weights`` is their dtype, None as the checkpoint has them."""
    kept = pool_bytes(layout, load)
    return MemoryPlan(weight_bytes(shape, weights), kept, workspace(shape, layout, load))


def _greatest(fits: Callable[[int], bool], most: int) -> int:
    """The greatest n from 1 to ``most`` that fits, if what fits is an unbroken run; 0 if none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def most_context(
    shape: ModelShape,
    layout: CacheLayout,
    load: Load,
    budget: int,
    weights: str | None = None,
    *,
    share: Share = ALL,
) -> int:
    """The longest context, up to the model's, at which ``load`` takes at most ``budget`` bytes.

    Of each device, if ``share`` is what the fullest of several holds. 0 if not even one token fits.
    """

    def fits(context: int) -> bool:
        one = replace(load, context=context)
        return share.bytes(plan_memory(shape, layout, one, weights)) <= budget

    return _greatest(fits, shape.max_position)


def most_requests(
    shape: ModelShape,
    layout: CacheLayout,
    load: Load,
    budget: int,
    weights: str | None = None,
    *,
    share: Share = ALL,
) -> int:
    """The most sequences of ``load.context`` tokens that take at most ``budget`` bytes; or 0.

    Of each device, as in :func:`most_context`.
    """

    def fits(sequences: int) -> bool:
        some = replace(load, sequences=sequences)
        return share.bytes(plan_memory(shape, layout, some, weights)) <= budget

    each = share.kv * kv_bytes(layout, load.context, load.chunk)
    return _greatest(fits, int(budget / each) + 1)


# -- waste -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fragmentation:
    """Tokens' worth of memory that sequences of some lengths hold, and how much of it is empty.

    contiguous   a preallocated row of ``longest`` tokens for each (Kwon et al., 2023,
                 arXiv:2309.06180, section 3)
    paged        whole pages for each
    """

    used: int
    contiguous: int
    paged: int

    @property
    def contiguous_waste(self) -> float:
        """Empty share of preallocated rows."""
        return 1 - self.used / self.contiguous

    @property
    def paged_waste(self) -> float:
        """Empty share of pages."""
        return 1 - self.used / self.paged


def fragmentation(lengths: Iterable[int], longest: int, page_size: int) -> Fragmentation:
    """Waste of sequences of ``lengths`` tokens; ConfigError for one that is above ``longest``."""
    known: Sequence[int] = list(lengths)
    if not known or min(known) < 1 or max(known) > longest:
        raise ConfigError(
            f"lengths must be 1 to {longest} tokens, not "
            f"{f'{min(known)} to {max(known)}' if known else 'none'}"
        )
    pages = sum(-(-length // page_size) for length in known)
    return Fragmentation(sum(known), longest * len(known), pages * page_size)
