"""The plan of a cache in bytes and pages, before any of it exists.

Which layers keep the same tokens (layer groups), what a page of each group costs, how many pages a
sequence needs at most, and how many pages fit in a budget. Pure arithmetic on ints; the engine
sizes its pools with it and planners predict with it.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from quire.config import ModelConfig, format_bytes
from quire.errors import ConfigError
from quire.format_choice import Formats, describe_formats
from quire.pages import PageShape, whole

__all__ = [
    "Area",
    "CacheLayout",
    "LayerGroup",
    "cache_layout",
    "fit_pages",
    "packed_pages",
    "pages_for",
    "with_open_pages",
]


LEAST_OPEN = 3  # with which a sequence can go on alone: first, unfinished, and a copy of that


def pages_for(tokens: int, page_size: int) -> int:
    """Pages that hold ``tokens`` tokens from the start of a page."""
    return -(-tokens // page_size)


def packed_pages(tokens: int, page_size: int) -> int:
    """Pages of ``tokens`` that are packed where pages are: the whole ones, but for the first.

    The first page holds the tokens that everything attends to (attention sinks, arXiv:2309.17453).
    """
    return max(0, tokens // page_size - 1)


@dataclass(frozen=True)
class LayerGroup:
    """Layers that keep the same tokens: all of them, or those inside a sliding window.

    A token at position p in a window of W sees positions p - W + 1 to p (Mistral 7B,
    arXiv:2310.06825; the convention of transformers).
    """

    layers: tuple[int, ...]
    window: int | None

    def first_needed(self, length: int) -> int:
        """The first position that a token at position ``length`` sees."""
        return 0 if self.window is None else max(0, length - self.window + 1)

    def most_pages(self, tokens: int, chunk: int, page_size: int) -> int:
        """The most pages a sequence holds at once while it grows to ``tokens`` by ``chunk``s."""
        whole = pages_for(tokens, page_size)
        if self.window is None:
            return whole
        return min(whole, (self.window + chunk - 3) // page_size + 2)

    def name(self) -> str:
        """For messages: ``"full attention"`` or ``"sliding window 4096"``."""
        return "full attention" if self.window is None else f"sliding window {self.window}"


@dataclass(frozen=True)
class Area:
    """Pages of one kind in one group; page counts of a cache are tuples over its areas.

    Each group has an area, and one whose format packs whole pages a second one behind it, of open
    pages: those that still take tokens, and the first of each sequence.
    """

    group: int
    is_open: bool = False


@dataclass(frozen=True)
class CacheLayout:
    """Groups of layers and the shape of a page in each layer (``shapes[layer]``)."""

    page_size: int
    groups: tuple[LayerGroup, ...]
    shapes: tuple[PageShape, ...]

    @property
    def group_of_layer(self) -> tuple[int, ...]:
        """For each layer, the index of its group."""
        index = {layer: g for g, group in enumerate(self.groups) for layer in group.layers}
        return tuple(index[layer] for layer in range(len(self.shapes)))

    @cached_property
    def packs(self) -> tuple[bool, ...]:
        """For each group, whether the format of one of its layers packs whole pages."""
        return tuple(
            any(self.shapes[layer].by_page for layer in group.layers) for group in self.groups
        )

    @cached_property
    def areas(self) -> tuple[Area, ...]:
        """Each group's pages, and behind them its open ones where it has such."""
        return tuple(
            Area(g, is_open)
            for g, packs in enumerate(self.packs)
            for is_open in ((False, True) if packs else (False,))
        )

    @cached_property
    def area_bytes(self) -> tuple[int, ...]:
        """Bytes of one page of each area, over all layers of its group."""
        return tuple(
            self.open_page_bytes(area.group) if area.is_open else self.page_bytes(area.group)
            for area in self.areas
        )

    def page_bytes(self, group: int) -> int:
        """Bytes of one page of a group, over all of its layers; a packed one where pages are."""
        return sum(self.shapes[layer].bytes_per_page for layer in self.groups[group].layers)

    def open_page_bytes(self, group: int) -> int:
        """Bytes of a page that still takes tokens, over all layers of a group."""
        shapes = (self.shapes[layer].open_shape for layer in self.groups[group].layers)
        return sum(shape.bytes_per_page for shape in shapes)

    def pages_between(self, group: int, start: int, end: int) -> tuple[int, ...]:
        """Pages, in each area of a group, that growing from ``start`` to ``end`` tokens takes.

        In one step: every page that it touches anew is open at first.
        """
        size = self.page_size
        new = pages_for(end, size) - pages_for(start, size)
        return (
            (packed_pages(end, size) - packed_pages(start, size), new)
            if self.packs[group]
            else (new,)
        )

    def most_pages(self, group: int, tokens: int, chunk: int) -> tuple[int, ...]:
        """The most pages, in each area of a group, that a sequence holds at once while it grows to
        ``tokens`` by ``chunk``s; of open ones, while it grows token by token.
        """
        most = self.groups[group].most_pages(tokens, chunk, self.page_size)
        if not self.packs[group]:
            return (most,)
        return min(most, packed_pages(tokens, self.page_size)), min(most, 2)

    def held_pages(self, group: int, tokens: int) -> tuple[list[int], ...]:
        """Numbers of the pages that a sequence of ``tokens`` holds in each area of a group."""
        size = self.page_size
        numbers = range(self.groups[group].first_needed(tokens) // size, pages_for(tokens, size))
        if not self.packs[group]:
            return (list(numbers),)
        packed = [n for n in numbers if 0 < n < tokens // size]
        return packed, [n for n in numbers if n not in packed]

    def seen_bytes(self, place: int) -> int:
        """Bytes of the keys and values that a token at ``place`` sees, its own included."""
        size, total = self.page_size, 0
        for index, group in enumerate(self.groups):
            first = max(0, place + 1 - (group.window or place + 1))
            opened = place + 1 - max(first, place // size * size)
            if place >= size:
                opened += max(0, size - first)
            seen, packs = place + 1 - first, self.packs[index]
            total += (seen - opened if packs else seen) * self.page_bytes(index)
            total += opened * self.open_page_bytes(index) if packs else 0
        return total // size

    def token_bytes(self, group: int) -> float:
        """Bytes of one token in a group, over all of its layers: exactly, an int if whole."""
        return whole(Fraction(self.page_bytes(group), self.page_size))

    @property
    def format_text(self) -> str:
        """Names of the formats of all layers, as ``kv_format`` takes them."""
        return describe_formats([(shape.key_format, shape.value_format) for shape in self.shapes])

    @property
    def element_bytes(self) -> int:
        """Bytes of a number, if all pages hold plain numbers of one width and nothing else; or 1.

        Packing gains by splitting such numbers into planes of bytes.
        """
        formats = [f for shape in self.shapes for f in (shape.key_format, shape.value_format)]
        widths = {f.dtype.itemsize if f.kind == "plain" else 1 for f in formats}
        return widths.pop() if len(widths) == 1 else 1


def cache_layout(model: ModelConfig, page_size: int, formats: Sequence[Formats]) -> CacheLayout:
    """The layout of ``model``'s cache: one group for each distinct window.

    ``formats`` are those of each layer. Raises ConfigError for a page size that one of them cannot
    do with.
    """
    windows = list(dict.fromkeys(model.windows))
    groups = tuple(
        LayerGroup(tuple(i for i, w in enumerate(model.windows) if w == window), window)
        for window in windows
    )
    heads, dim = model.num_kv_heads, model.head_dim
    shapes = tuple(PageShape(page_size, heads, dim, dim, key, value) for key, value in formats)
    return CacheLayout(page_size, groups, shapes)


def _most_in_window(window: int | None, page_size: int, sequences: int, tokens: int) -> int | None:
    """The most pages that ``sequences`` hold in a window while a step adds ``tokens`` to them.

    A sequence that adds c tokens touches at most (window + c - 3) // page_size + 2 pages; tokens
    are best spent on sequences that they take across one more page boundary each.
    """
    if window is None:
        return None
    whole, left = divmod(window - 3, page_size)
    step = page_size - left
    crossing = min(sequences, tokens // step)
    return sequences * (whole + 2) + crossing + (tokens - crossing * step) // page_size


def with_open_pages(
    layout: CacheLayout, pages: Sequence[int], max_sequences: int, max_batch_tokens: int
) -> tuple[int, ...]:
    """Pages of each area, where each group has ``pages``.

    A sequence holds its first page, its unfinished one and at times a copy of it; a step that
    prefills fills more; and one in 32 is for first and last pages of cached prefixes. In a small
    pool they are less, so that there is room for packed ones: half as many, or, where a window
    keeps few pages of a sequence, as many.
    """
    counts: list[int] = []
    for area in layout.areas:
        count = pages[area.group]
        if area.is_open:
            wanted = max_batch_tokens // layout.page_size + 3 * max_sequences + count // 32
            share = count // 2 if layout.groups[area.group].window is None else count
            count = min(wanted, share + LEAST_OPEN)
        counts.append(count)
    return tuple(counts)


def fit_pages(
    layout: CacheLayout, budget: int, max_sequences: int, max_batch_tokens: int
) -> tuple[int, ...]:
    """Pages of each area whose pools together take at most ``budget`` bytes.

    Windowed groups get no more than ``max_sequences`` sequences can hold, so that what they do not
    need goes to the groups that keep everything. Raises ConfigError, with the numbers, when not
    even one page of each group, with the open ones that it needs, fits.
    """
    caps = [
        _most_in_window(group.window, layout.page_size, max_sequences, max_batch_tokens)
        for group in layout.groups
    ]
    if None not in caps:
        caps = [None] * len(caps)  # nothing else could use the rest

    def pages(full: int) -> tuple[int, ...]:
        counts = [full if cap is None else min(full, cap) for cap in caps]
        return with_open_pages(layout, counts, max_sequences, max_batch_tokens)

    def cost(full: int) -> int:
        return sum(map(operator.mul, pages(full), layout.area_bytes))

    if budget < cost(1):
        opened = "" if True not in layout.packs else f" and {LEAST_OPEN} that are still open"
        raise ConfigError(
            f"a KV budget of {format_bytes(budget)} ({budget} bytes) is below one page{opened}: "
            f"{layout.page_size} tokens in {len(layout.shapes)} layers take "
            f"{format_bytes(cost(1))} ({cost(1)} bytes); raise kv_memory or lower page_size"
        )
    low, high = 1, budget // min(layout.page_bytes(g) for g in range(len(layout.groups)))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle - 1)
    return pages(low)
