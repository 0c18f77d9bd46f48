"""What a cache knows of one sequence, and what a reservation sets aside for it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from quire.batch import PagedBatch
from quire.cache.prefix import TOKEN_BYTES, PrefixIndex, PrefixNode
from quire.cache.table import PageTable

__all__ = ["Growth", "Growths", "PrefixChain", "Reservation", "SequenceState", "grown"]


@dataclass
class Growth:
    """What a reservation holds for one sequence in one group.

    ``copy_to`` is a private copy of the unfinished last page, when others need that page as it is.
    """

    new_pages: list[int] = field(default_factory=list)
    copy_to: int | None = None


# Of one sequence: a Growth for each group, or nothing at all if it takes no pages.
Growths = Sequence[Growth]


@dataclass(eq=False)
class Reservation:
    """Pages set aside for one step. ``batch`` is what the step's kernels read."""

    chunks: tuple[tuple[int, int], ...]
    batch: PagedBatch
    _states: "Sequence[SequenceState]"
    _growth: Sequence[Growths]
    _open: bool = True

    @property
    def grows(self) -> list[bool]:
        """For each chunk, whether pages are set aside for it; if not, those it has are enough."""
        return [bool(growths) for growths in self._growth]


def grown(table: PageTable, growth: Growth) -> PageTable:
    """The table as it is after the commit of ``growth``."""
    after = table.copy()
    if growth.copy_to is not None:
        after.pages[-1] = growth.copy_to
    after.pages.extend(growth.new_pages)
    return after


@dataclass
class PrefixChain:
    """Where a sequence stands in the prefix index.

    node  its last whole page, or the root
    tail  tokens behind that page (:func:`~quire.cache.prefix.token_bytes`); less than a page
    """

    node: PrefixNode
    tail: bytes = b""

    @property
    def root(self) -> PrefixNode:
        """Where the chain begins."""
        node = self.node
        while node.parent is not None:
            node = node.parent
        return node

    def move(self, index: PrefixIndex, node: PrefixNode) -> None:
        """Stand at ``node``."""
        index.enter(node)
        index.leave(self.node)
        self.node = node

    def back_to(self, index: PrefixIndex, length: int) -> None:
        """Forget the tokens from position ``length`` on."""
        size = index.layout.page_size
        tokens, node, whole = self.tail, self.node, self.whole
        while whole > length // size:
            assert node.parent is not None
            tokens, node, whole = node.tokens, node.parent, whole - 1
        self.tail = tokens[: length % size * TOKEN_BYTES]
        self.move(index, node)

    @property
    def whole(self) -> int:
        """Whole pages of the sequence."""
        return 0 if self.node.parent is None else self.node.depth + 1


@dataclass
class SequenceState:
    """A sequence: a table in each group, committed tokens, an open reservation, its prefix.

    ``chain`` is None for a sequence whose token ids are not known. ``length`` counts the tokens
    that it keeps, ``dropped`` those that it kept before: a token's position is its place + dropped.
    """

    tables: list[PageTable]
    length: int = 0
    growth: Growths | None = None
    chain: PrefixChain | None = None
    dropped: int = 0
