"""What runs at a time, where, and the bytes that it takes beside weights and pages."""

from dataclasses import astuple, dataclass

from quire.errors import ConfigError

__all__ = ["FLOAT", "Card", "Load", "Workspace"]

FLOAT = 4  # bytes of a number that is computed with


@dataclass(frozen=True)
class Card:
    """A GPU that the ``cuda`` backend computes on.

    exact        True of ``cuda-exact``
    processors   streaming multiprocessors, or more: 192 are more than any card of the catalogue has
    moves        True if pages move to tiers and back
    """

    exact: bool = False
    processors: int = 192
    moves: bool = False


@dataclass(frozen=True)
class Load:
    """What runs at a time: ``sequences`` of ``context`` tokens each, ``chunk`` tokens a step.

    ``logits`` are rows of logits in one step; as a rule one a sequence. Each thread of the native
    backend has scratch memory of its own. ``card`` is the GPU that computes, None for none.
    """

    context: int
    sequences: int = 1
    chunk: int = 512
    logits: int | None = None
    threads: int = 1
    card: Card | None = None

    def __post_init__(self) -> None:
        for name in ("context", "sequences", "chunk", "threads"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"a plan needs at least 1 {name}, not {value}")

    @property
    def rows(self) -> int:
        """Tokens of the largest step: a chunk of prompts, or a token of each sequence."""
        longest = min(self.chunk, self.context * self.sequences)
        return max(longest, self.sequences)

    @property
    def logit_rows(self) -> int:
        """Rows of logits in a step."""
        return self.sequences if self.logits is None else self.logits


@dataclass(frozen=True)
class Workspace:
    """Bytes beside weights and pages, as the native backend or a card has them.

    activations   arrays between layers, and the kernels' own of one layer
    partials      what splits of a context give, before they are merged
    threads       each thread's own: blocks of pages that are not whole, taken apart or copied
    rotary        tables of angles; they grow by a quarter at a time
    logits        float32, of the rows that are asked for
    sampling      on a card: what tokens that are not greedy are drawn from
    moving        on a card: what pages pass through on their way to tiers and back
    libraries     on a card: what its libraries take for themselves
    """

    activations: int
    partials: int
    threads: int
    rotary: int
    logits: int
    sampling: int = 0
    moving: int = 0
    libraries: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(astuple(self))
