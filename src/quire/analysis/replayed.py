"""What a replay of a trace is told of a step's time, and what it gives back."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from quire.analysis.timeline import Moment
from quire.errors import ConfigError

__all__ = ["Replayed", "Times", "Timing"]


@dataclass(frozen=True)
class Timing:
    """What a step takes: the sum of its parts, in seconds.

    step_seconds     of any step: weights are read once
    prefill_seconds  for each token of a chunk of a prompt, or of what is computed again
    byte_seconds     for each byte of keys and values that the newest token of a sequence in the
                     step sees (:meth:`CacheLayout.seen_bytes`): they are read once a step

    A decoded token costs its step and its bytes. Attention of a long prompt to itself is not more
    than that: ``prefill_seconds`` is that of prompts of the length that was measured. ConfigError
    for a number that is negative or not finite, or a step that takes no time.
    """

    step_seconds: float
    prefill_seconds: float = 0.0
    byte_seconds: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 <= value < float("inf"):
                raise ConfigError(f"Timing: {name} must be seconds, 0 or more, not {value!r}")
        if self.step_seconds == 0:
            raise ConfigError("Timing: step_seconds must be above 0: a step that only decodes")


@dataclass(frozen=True)
class Times:
    """Seconds that half of the requests, 90 % and 99 % of them did not exceed (nearest rank)."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Times | None":
        """Of at least one; None of none."""
        ranked = sorted(seconds)
        if not ranked:
            return None
        return cls(*(ranked[-(-len(ranked) * share // 100) - 1] for share in (50, 90, 99)))


@dataclass(frozen=True)
class Replayed:
    """What came of a trace on one pool. Seconds are those of the trace's clock.

    num_pages        of each area of the layout, ``pool_bytes`` together
    requests         that were served
    refused          that could never be: too long for the pool, or for ``longest``; ``refusals``
                     are the first reasons, with numbers
    prompt_tokens    of those served; ``hit_tokens`` of them were cached when their request began
    reply_tokens     at least one a request
    computed_tokens  that went through the model; what preemption costs is in here
    preemptions      times that a request lost its pages to an older one
    evicted_pages    that left the prefix index, in all layer groups
    peak_bytes       most that sequences held, within a step: pages that it fills are there, and
                     those that they take the place of still are
    mean_waste       share of held bytes that held no token, over time
    peak_waste       the greatest share after any one step; of a single short sequence it is large
    waiting_s        from arrival to the step that first runs the request
    first_token_s    from arrival to the end of the step that computes the last of its prompt
    completion_s     from arrival to the end of the step that computes the last of its reply
    seconds          from the first arrival to the last completion
    tokens_per_s     of replies, over ``seconds``
    busy             share of ``seconds`` in which a step ran
    utilisation      mean share of the pool that sequences held, over ``seconds``
    steps            forward passes
    points           the pool and the queues over time (:class:`Timeline`)
    """

    pool_bytes: int
    num_pages: tuple[int, ...]
    requests: int
    refused: int
    refusals: tuple[str, ...]
    prompt_tokens: int
    hit_tokens: int
    reply_tokens: int
    computed_tokens: int
    preemptions: int
    evicted_pages: int
    peak_bytes: int
    mean_waste: float
    peak_waste: float
    waiting_s: Times | None
    first_token_s: Times | None
    completion_s: Times | None
    seconds: float
    tokens_per_s: float
    busy: float
    utilisation: float
    steps: int
    points: tuple[Moment, ...]

    @property
    def hit_rate(self) -> float:
        """Share of the prompt tokens."""
        return self.hit_tokens / max(1, self.prompt_tokens)

    def as_dict(self) -> dict[str, Any]:
        """All of it and ``hit_rate``, of dicts, lists, strings and numbers: for JSON."""
        given = asdict(self) | {"hit_rate": self.hit_rate}
        for name in ("num_pages", "refusals", "points"):
            given[name] = list(given[name])
        return given
