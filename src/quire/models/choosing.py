"""A step in which layers choose what they read, as :meth:`Backend.whole_step` takes it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from quire.backends import Summaries
from quire.batch import PagedBatch
from quire.pages import PagePool

__all__ = ["ChoosingStep", "OfLayers"]

OfLayers: TypeAlias = Sequence[Summaries | None]


@dataclass(frozen=True)
class ChoosingStep:
    """Equal for all steps of a model that choose by the same summaries.

    compute   a model's own method: tokens [T], batch, pools, summaries of layers -> [T, hidden]
    """

    compute: Callable[[Sequence[int], PagedBatch, Sequence[PagePool], OfLayers], Any]
    summaries: tuple[Summaries | None, ...]

    def __call__(self, tokens: Sequence[int], batch: PagedBatch, pools: Sequence[PagePool]) -> Any:
        """[T, hidden], the backend's own."""
        return self.compute(tokens, batch, pools, self.summaries)
