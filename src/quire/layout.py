"""The plan of a cache in bytes and pages, before any of it exists.

Which layers keep the same tokens (layer groups), what a page of each group costs, how many pages a
sequence needs at most, and how many pages fit in a budget. Pure arithmetic on ints; the engine
sizes its pools with it and planners predict with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from quire.config import ModelConfig, format_bytes
from quire.errors import ConfigError
from quire.format_choice import Formats, describe_formats
from quire.pages import PageShape, whole

__all__ = ["CacheLayout", "LayerGroup", "cache_layout", "fit_pages", "pages_for"]


def pages_for(tokens: int, page_size: int) -> int:
    """Pages that hold ``tokens`` tokens from the start of a page."""
    return -(-tokens // page_size)


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

    def page_bytes(self, group: int) -> int:
        """Bytes of one page of a group, over all of its layers."""
        return sum(self.shapes[layer].bytes_per_page for layer in self.groups[group].layers)

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


def fit_pages(
    layout: CacheLayout, budget: int, max_sequences: int, max_batch_tokens: int
) -> tuple[int, ...]:
    """Pages of each group whose pools together take at most ``budget`` bytes.

    Windowed groups get no more than ``max_sequences`` sequences can hold, so that what they do not
    need goes to the groups that keep everything. Raises ConfigError, with the numbers, when not
    even one page of each group fits.
    """
    one_each = sum(layout.page_bytes(g) for g in range(len(layout.groups)))
    if budget < one_each:
        raise ConfigError(
            f"a KV budget of {format_bytes(budget)} ({budget} bytes) is below one page: "
            f"{layout.page_size} tokens in {len(layout.shapes)} layers take "
            f"{format_bytes(one_each)} ({one_each} bytes); raise kv_memory or lower page_size"
        )
    if all(group.window is not None for group in layout.groups):
        return (budget // one_each,) * len(layout.groups)  # nothing else could use the rest
    caps = [
        _most_in_window(group.window, layout.page_size, max_sequences, max_batch_tokens)
        for group in layout.groups
    ]

    def pages(full: int) -> tuple[int, ...]:
        return tuple(full if cap is None else min(full, cap) for cap in caps)

    def cost(full: int) -> int:
        return sum(n * layout.page_bytes(g) for g, n in enumerate(pages(full)))

    low, high = 1, budget // min(layout.page_bytes(g) for g in range(len(layout.groups)))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle - 1)
    return pages(low)
