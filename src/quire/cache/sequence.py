"""What a cache knows of one sequence, and what a reservation sets aside for it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from quire.batch import PagedBatch
from quire.cache.prefix import PrefixIndex
from quire.cache.prefix_tree import TOKEN_BYTES, PrefixNode
from quire.cache.table import PageTable

__all__ = [
    "Growth",
    "Growths",
    "PrefixChain",
    "Reservation",
    "SequenceState",
    "extended",
    "grown",
    "sealed",
]


@dataclass
class Growth:
    """What a reservation holds for one sequence in one group.

    new_pages     behind those of the table; open ones where pages are packed
    copy_to       a private copy of the unfinished last page, when others need that page as it is
    packed        where pages are packed: what the pages that become whole are packed into
    first_packed  the number of the first of those
    """

    new_pages: list[int] = field(default_factory=list)
    copy_to: int | None = None
    packed: list[int] = field(default_factory=list)
    first_packed: int = 0

    @property
    def pages(self) -> list[int]:
        """All of them."""
        return [*self.new_pages, *self.packed, *(() if self.copy_to is None else (self.copy_to,))]


# Of one sequence: a Growth for each group, or nothing at all if it takes no pages.
Growths = Sequence[Growth]


@dataclass(eq=False)
class Reservation:
    """Pages set aside for one step. ``batch`` is what the step's kernels read.

    A batch without tokens is that of pages that are filled with what was stored before.
    """

    chunks: tuple[tuple[int, int], ...]
    batch: PagedBatch
    _states: "Sequence[SequenceState]"
    _growth: Sequence[Growths]
    _open: bool = True

    @property
    def grows(self) -> list[bool]:
        """For each chunk, whether pages are set aside for it; if not, those it has are enough."""
        return [bool(growths) for growths in self._growth]

    @property
    def new_pages(self) -> list[list[int]]:
        """Of the only chunk: the pages that it adds in each group."""
        [growths] = self._growth
        return [growth.new_pages for growth in growths]


def extended(table: PageTable, growth: Growth) -> PageTable:
    """The table as new tokens go through it: no page of ``growth`` is packed yet."""
    after = table.copy()
    if growth.copy_to is not None:
        after.pages[-1] = growth.copy_to
    after.pages.extend(growth.new_pages)
    return after


def sealed(table: PageTable, growth: Growth) -> PageTable:
    """What :func:`extended` gave as it is after the commit, with packed pages in their places."""
    after = table.copy()
    start = growth.first_packed - table.first_page
    for at, page in enumerate(growth.packed, start):
        after.pages[at] = page
    return after


def grown(table: PageTable, growth: Growth) -> PageTable:
    """The table as it is after the commit of ``growth``."""
    after = extended(table, growth)
    return sealed(after, growth) if growth.packed else after


@dataclass
class PrefixChain:
    """Where a sequence stands in the prefix index.

    node  its last whole page, or the root
    tail  tokens behind that page (:func:`~quire.cache.prefix_tree.token_bytes`); less than a page
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
