"""Which setting to take: the front of memory against loss, and the smallest under a budget."""

from collections.abc import Sequence
from dataclasses import dataclass

from quire.analysis.quality import Measurement

__all__ = ["FEW_TOKENS", "Recommendation", "front", "recommend"]

FEW_TOKENS = 8192  # of targets; below, the estimate alone is not trusted


def front(measured: Sequence[Measurement]) -> list[Measurement]:
    """Those that no other beats in bytes and in loss, by bytes; of equal ones the first."""
    found: list[Measurement] = []
    for each in sorted(measured, key=_bytes_then_loss):
        loss = each.summary.perplexity_change
        if not found or loss < found[-1].summary.perplexity_change:
            found.append(each)
    return found


@dataclass(frozen=True)
class Recommendation:
    """The smallest setting whose loss is under ``budget``; None if none is.

    judged_by   which figure was held against the budget
    """

    chosen: Measurement | None
    budget: float
    judged_by: str

    def describe(self) -> str:
        """One sentence for a person."""
        if self.chosen is None:
            return (
                f"No setting stays under {self.budget:.3g} % perplexity ({self.judged_by}); keep "
                "the exact cache, or measure others."
            )
        name, change = self.chosen.setting.name, self.chosen.summary.perplexity_change
        if self.chosen.compression <= 1:
            return (
                f"Keep the exact cache: of what stays under {self.budget:.3g} % perplexity "
                f"({self.judged_by}) the smallest is {name}, which saves nothing."
            )
        return (
            f"Take {name}: {change:+.3%} perplexity, {self.chosen.compression:.2f} times as much "
            f"context in the same memory. It is the smallest under {self.budget:.3g} % "
            f"({self.judged_by})."
        )


def recommend(measured: Sequence[Measurement], budget: float) -> Recommendation:
    """The smallest of ``measured`` that loses less than ``budget`` percent of perplexity.

    Below 8,192 judged tokens the upper end of the interval must be under it, not the estimate.
    """
    few = any(each.summary.tokens < FEW_TOKENS for each in measured)
    judged_by = "upper end of the 95 % interval, since tokens are few" if few else "the estimate"

    def loss(each: Measurement) -> float:
        summary = each.summary
        return summary.perplexity_change_interval[1] if few else summary.perplexity_change

    under = [each for each in measured if 100 * loss(each) < budget]
    chosen = min(under, key=_bytes_then_loss, default=None)
    return Recommendation(chosen, budget, judged_by)


def _bytes_then_loss(each: Measurement) -> tuple[float, float]:
    return each.bytes_per_token, each.summary.perplexity_change
