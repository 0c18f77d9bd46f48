"""What the prefix index is made of: the tree of pages, what is looked up in it, what is found.

Ints and bytes only.
"""

import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

__all__ = [
    "NO_PAGE",
    "TOKEN_BYTES",
    "Eviction",
    "PrefixMatch",
    "PrefixNode",
    "PrefixObserver",
    "PrefixQuery",
    "common_tokens",
    "token_bytes",
    "tokens_of",
]

NO_PAGE = -1
TOKEN_BYTES = 4


def token_bytes(tokens: Sequence[int]) -> bytes:
    """Token ids as uint32, little-endian: what is hashed and compared."""
    data = array("I", tokens)
    if sys.byteorder == "big":
        data.byteswap()
    return data.tobytes()


def common_tokens(a: bytes, b: bytes) -> int:
    """How many leading tokens ``a`` and ``b`` share (see :func:`token_bytes`)."""
    low, high = 0, min(len(a), len(b)) // TOKEN_BYTES
    if a[: high * TOKEN_BYTES] == b[: high * TOKEN_BYTES]:
        return high
    while high - low > 1:  # the first ``low`` are equal, the first ``high`` are not
        middle = (low + high) // 2
        same = (
            a[low * TOKEN_BYTES : middle * TOKEN_BYTES]
            == (b[low * TOKEN_BYTES : middle * TOKEN_BYTES])
        )
        low, high = (middle, high) if same else (low, middle)
    return low


def tokens_of(node: "PrefixNode") -> bytes:
    """By which children are ordered."""
    return node.tokens


class PrefixNode:
    """A page of a prefix.

    tokens    its token ids; fewer than a page for the unfinished end of a prefix; a root's salt
    pages     its page id in each layer group, or NO_PAGE where it was given up
    depth     pages before it
    children  pages that follow it, in the order of their token bytes
    users     sequences that stand here
    """

    __slots__ = ("children", "depth", "digest", "pages", "parent", "same_key", "tokens", "users")

    def __init__(
        self, digest: bytes, parent: "PrefixNode | None", tokens: bytes, groups: int
    ) -> None:
        self.digest, self.parent, self.tokens = digest, parent, tokens
        self.pages = array("q", [NO_PAGE]) * groups  # which the garbage collector need not visit
        self.depth: int = 0 if parent is None or parent.parent is None else parent.depth + 1
        self.children: list[PrefixNode] = []
        self.users = 0
        self.same_key: PrefixNode | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens in this page."""
        return len(self.tokens) // TOKEN_BYTES


class PrefixQuery:
    """A prompt to look up, and the digests of its pages once they were computed."""

    def __init__(self, tokens: Sequence[int], salt: str = "") -> None:
        self.data, self.salt = token_bytes(tokens), salt
        self.num_tokens = len(tokens)
        self.digests: list[bytes] = []


@dataclass(frozen=True)
class PrefixMatch:
    """The longest cached part of a prompt. Valid until the cache is changed.

    tokens      how many of the prompt's tokens it covers
    node        its last whole page; None if there is none
    first_page  number of the first page in each group, counted from position 0
    pages       page ids in each group, from page number ``first_page[g]`` on
    partial     the node of the last page, if the match ends inside it
    tail        the tokens of the match in that page
    takes       the sequence takes that page away from the index instead of copying it
    whole       the same match without that page; itself if there is none
    """

    salt: str
    tokens: int
    node: PrefixNode | None
    first_page: tuple[int, ...]
    pages: tuple[tuple[int, ...], ...]
    partial: PrefixNode | None = None
    tail: bytes = b""
    takes: bool = False
    whole: "PrefixMatch | None" = None

    def choices(self) -> "tuple[PrefixMatch, ...]":
        """This match, then those that need fewer pages, at the cost of what is cached."""
        if self.partial is None or self.whole is None:
            return (self,)
        return (self, replace(self, takes=True), self.whole)


@dataclass(frozen=True)
class Eviction:
    """Why a page is no longer cached. ``at`` is in seconds of :func:`time.time`."""

    at: float
    reason: str


class PrefixObserver(Protocol):
    """Somebody who is told when pages come into the index and before they leave it."""

    def added(self, node: PrefixNode, group: int) -> None:
        """``node`` has a page of ``group`` now, all of whose tokens are committed."""

    def leaving(self, pages: Sequence[tuple[PrefixNode, int]]) -> None:
        """Nodes are about to lose their pages of a group each, which still hold their numbers.

        When this returns they may be written to.
        """
