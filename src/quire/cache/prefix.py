"""Which pages hold which prefix, so that no prefix is computed twice.

A tree with one node a page. A node is found by a chain of SHA-256 digests over (the digest of the
page before it, its token ids); the chain of a prefix begins with the identity of what computed it
and a salt. A digest only finds a candidate: its tokens and its parent are compared on every hit,
so that not even a collision could join two prefixes. The idea of a chained page hash is vLLM's
(automatic prefix caching), that of a tree SGLang's (RadixAttention, arXiv:2312.07104).

Ints and bytes only. Knows which pages hold a prefix, not what is in them; pages are kept and given
up by the :class:`~quire.cache.allocator.PageAllocator` of each layer group.
"""

import hashlib
import time
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from quire.cache.allocator import PageAllocator
from quire.cache.prefix_tree import (
    NO_PAGE,
    TOKEN_BYTES,
    Eviction,
    PrefixMatch,
    PrefixNode,
    PrefixObserver,
    PrefixQuery,
    common_tokens,
    tokens_of,
)
from quire.errors import CacheInvariantError
from quire.layout import CacheLayout

__all__ = ["PrefixIndex"]

SHOWN = 8
REMEMBERED = 16_384  # evicted pages whose story is kept, for people who ask why a prefix missed


class PrefixIndex:
    """Cached prefixes of one cache.

    allocators    of each layer group; their ``on_evict`` must call :meth:`evict`
    identity      of what computes the pages: prefixes under another identity are others
    digest_bytes  how much of a digest finds a page; fewer than 32 only to force collisions in tests
    """

    def __init__(
        self,
        layout: CacheLayout,
        allocators: Sequence[PageAllocator],
        identity: bytes = b"",
        digest_bytes: int = 32,
    ) -> None:
        self.layout, self.identity = layout, identity
        self.evicted: OrderedDict[bytes, Eviction] = OrderedDict()
        self.observer: PrefixObserver | None = None
        self._allocators = tuple(allocators)
        self.digest_bytes = digest_bytes
        self._page_bytes = layout.page_size * TOKEN_BYTES
        self._roots: dict[str, PrefixNode] = {}
        self._by_key: dict[bytes, PrefixNode] = {}
        self._of_page: list[list[PrefixNode | None]] = [
            [None] * allocator.num_pages for allocator in allocators
        ]
        self.num_nodes = 0

    # -- looking up --------------------------------------------------------------------------

    def root(self, salt: str) -> PrefixNode:
        """Where prefixes under ``salt`` begin."""
        if salt not in self._roots:
            self._roots[salt] = PrefixNode(self.root_digest(salt), None, salt.encode(), 0)
        return self._roots[salt]

    @property
    def salts(self) -> tuple[str, ...]:
        """Salts under which something may be cached."""
        return tuple(self._roots)

    def digests(self, query: PrefixQuery) -> list[bytes]:
        """The chained digest of every whole page of ``query``; computed once."""
        known = query.digests
        digest = known[-1] if known else self.root_digest(query.salt)
        for at in range(len(known) * self._page_bytes, len(query.data), self._page_bytes):
            if at + self._page_bytes <= len(query.data):
                digest = self._chain(digest, query.data[at : at + self._page_bytes])
                known.append(digest)
        return known

    def match(self, query: PrefixQuery, limit: int | None = None) -> PrefixMatch:
        """The longest cached prefix of ``query``, of at most ``limit`` tokens. Changes nothing."""
        limit = query.num_tokens if limit is None else min(limit, query.num_tokens)
        size = self.layout.page_size
        path = self._walk(query)
        most = whole = min(len(path), limit // size)
        while (missing := self._missing(path, whole, whole * size)) is not None:
            whole = missing  # every longer prefix sees that page, too
        found = self._made(query, path[:whole], None, whole * size)
        parent = path[most - 1] if most else self._roots.get(query.salt)
        rest = query.data[most * self._page_bytes : limit * TOKEN_BYTES]
        partial = None if parent is None else self._nearest(parent, rest)
        extra = 0 if partial is None else common_tokens(partial.tokens, rest)
        if not extra or self._missing(path, most, most * size + extra) is not None:
            return found
        return replace(self._made(query, path[:most], partial, most * size + extra), whole=found)

    def nearest(self, query: PrefixQuery) -> tuple[int, bytes]:
        """How far the cached prompt that shares most with ``query`` goes along with it, and how it
        goes on (:func:`token_bytes`), for :data:`SHOWN` tokens or a page more.

        Of what is remembered: of some of it the pages may be gone (:meth:`match`).
        """
        node, whole, step = self._roots.get(query.salt), 0, self._page_bytes
        if node is None:
            return 0, b""
        for digest in self.digests(query):
            child = self._find(digest, node, query.data[whole * step : (whole + 1) * step])
            if child is None:
                break
            node, whole = child, whole + 1
        rest = query.data[whole * step :]
        at = bisect_left(node.children, rest, key=tokens_of)
        near = node.children[max(0, at - 1) : at + 1]
        if not near:
            return whole * self.layout.page_size, b""
        best = max(near, key=lambda child: common_tokens(child.tokens, rest))
        common = common_tokens(best.tokens, rest)
        goes_on = best.tokens[common * TOKEN_BYTES :]
        while best.children and len(goes_on) < SHOWN * TOKEN_BYTES:
            best = best.children[0]
            goes_on += best.tokens
        return whole * self.layout.page_size + common, goes_on

    def evicted_behind(self, query: PrefixQuery, tokens: int) -> Eviction | None:
        """Why the page of ``query`` that holds position ``tokens`` is gone, if it was there."""
        number, digests = tokens // self.layout.page_size, self.digests(query)
        return self.evicted.get(digests[number]) if number < len(digests) else None

    def holder(self, group: int, page: int) -> PrefixNode | None:
        """The node that ``page`` of ``group`` belongs to, if it is in the index."""
        return self._of_page[group][page]

    def is_read(self, group: int, page: int, offset: int) -> bool:
        """True if the index needs what is in ``page`` of ``group`` from token ``offset`` on."""
        node = self._of_page[group][page]
        return node is not None and node.num_tokens > offset

    def nodes(self) -> Iterator[PrefixNode]:
        """Every page in the index, parents before children."""
        todo = list(self._roots.values())
        while todo:
            node = todo.pop()
            if node.parent is not None:
                yield node
            todo.extend(node.children)

    # -- changing ----------------------------------------------------------------------------

    def insert(self, parent: PrefixNode, tokens: bytes, pages: Sequence[int]) -> PrefixNode:
        """The node of ``tokens`` behind ``parent``, made of ``pages`` if it is not there.

        A node that is there keeps its own pages and takes of ``pages`` only those that it lacks.
        """
        digest = self._chain(parent.digest, tokens)
        node = self._find(digest, parent, tokens)
        if node is None:
            node = PrefixNode(digest, parent, tokens, len(self._allocators))
            key = digest[: self.digest_bytes]
            node.same_key = self._by_key.get(key)
            self._by_key[key] = node
            insort(parent.children, node, key=tokens_of)
            self.num_nodes += 1
            self.evicted.pop(digest, None)
        for group, page in enumerate(pages):
            if node.pages[group] == NO_PAGE and page != NO_PAGE:
                self._give(node, group, page)
        return node

    def insert_end(self, parent: PrefixNode, tokens: bytes, pages: Sequence[int]) -> None:
        """Keep an unfinished page behind ``parent``, unless another begins with the same tokens.

        A packed page, which no match ends in, does not count.
        """
        at = bisect_left(parent.children, tokens, key=tokens_of)
        while at < len(parent.children) and parent.children[at].tokens.startswith(tokens):
            if not self._is_packed(parent.children[at]):
                return
            at += 1
        self.insert(parent, tokens, pages)

    def enter(self, node: PrefixNode) -> None:
        """A sequence stands at ``node`` now: it stays, even without pages."""
        node.users += 1

    def leave(self, node: PrefixNode) -> None:
        """A sequence stands at ``node`` no longer."""
        node.users -= 1
        self._prune(node)

    def evict(self, group: int, pages: Sequence[int]) -> None:
        """``pages`` are about to be taken for something else.

        A page of a group that keeps every token takes the node's pages of the other groups with
        it: without it no prompt can use them.
        """
        held = [self._of_page[group][page] for page in pages]
        nodes = [node for node in held if node is not None]
        keeps_all = self.layout.groups[group].window is None
        groups = range(len(self._allocators)) if keeps_all else (group,)
        if self.observer is not None and nodes:
            leaving = [(n, g) for n in nodes for g in groups if n.pages[g] != NO_PAGE]
            self.observer.leaving(leaving)
        for node in nodes:
            self._note(node, "memory was wanted and it was the least recently used")
            for other in groups:
                self._take(node, other)
            self._prune(node)

    def check(self) -> None:
        """Verify that nodes, pages and keys agree; CacheInvariantError if they do not."""
        count = 0
        for node in self.nodes():
            count += 1
            assert node.parent is not None
            if self._find(node.digest, node.parent, node.tokens) is not node:
                raise CacheInvariantError(f"a page at depth {node.depth} is not found by its key")
            if node not in node.parent.children:
                raise CacheInvariantError(f"a page at depth {node.depth} is not its parent's child")
            for group, page in enumerate(node.pages):
                if page != NO_PAGE and self._of_page[group][page] is not node:
                    raise CacheInvariantError(f"page {page} of group {group} has another node")
                packed = self.layout.packs[group] and self._is_packed(node)
                if (
                    page != NO_PAGE
                    and self.layout.packs[group]
                    and packed == self._allocators[group].is_open(page)
                ):
                    raise CacheInvariantError(f"page {page} of group {group} is of the wrong kind")
        if count != self.num_nodes:
            raise CacheInvariantError(f"{count} pages in the tree, {self.num_nodes} counted")
        for group, allocator in enumerate(self._allocators):
            for page, holder in enumerate(self._of_page[group]):
                if (holder is not None) != allocator.is_kept(page):
                    raise CacheInvariantError(f"page {page} of group {group} is kept for no node")
                if holder is not None and holder.pages[group] != page:
                    raise CacheInvariantError(f"page {page} of group {group} is not its node's")

    # -- inside ------------------------------------------------------------------------------

    def root_digest(self, salt: str) -> bytes:
        """The digest that chains under ``salt`` begin with."""
        start = hashlib.sha256(b"quire prefix 1\0")
        for part in (self.identity, salt.encode()):
            start.update(len(part).to_bytes(8, "little") + part)
        return start.digest()

    def _chain(self, digest: bytes, tokens: bytes) -> bytes:
        return hashlib.sha256(digest + tokens).digest()

    def _find(self, digest: bytes, parent: PrefixNode, tokens: bytes) -> PrefixNode | None:
        node = self._by_key.get(digest[: self.digest_bytes])
        while node is not None and (node.parent is not parent or node.tokens != tokens):
            node = node.same_key
        return node

    def _walk(self, query: PrefixQuery) -> list[PrefixNode]:
        """Nodes of the leading whole pages of ``query`` that groups without a window all hold."""
        node = self._roots.get(query.salt)
        path: list[PrefixNode] = []
        if node is None:
            return path
        step = self._page_bytes
        full = [g for g, group in enumerate(self.layout.groups) if group.window is None]
        for at, digest in enumerate(self.digests(query)):
            node = self._find(digest, node, query.data[at * step : (at + 1) * step])
            if node is None or any(node.pages[g] == NO_PAGE for g in full):
                break
            path.append(node)
        return path

    def _nearest(self, parent: PrefixNode, rest: bytes) -> PrefixNode | None:
        """The page behind ``parent`` that begins with most of ``rest``, of those beside it.

        A packed page cannot be gone on with from its middle; then the next one on either side.
        """
        children = parent.children
        at = bisect_left(children, rest, key=tokens_of)
        below, above = at - 1, at
        if True in self.layout.packs:
            while below >= 0 and self._is_packed(children[below]):
                below -= 1
            while above < len(children) and self._is_packed(children[above]):
                above += 1
        near = [children[i] for i in (below, above) if 0 <= i < len(children)]
        near = [node for node in near if NO_PAGE not in node.pages]
        return max(near, key=lambda node: common_tokens(node.tokens, rest), default=None)

    def _is_packed(self, node: PrefixNode) -> bool:
        """True for a whole page behind the first, where a group packs those."""
        whole = node.num_tokens == self.layout.page_size
        return whole and node.depth > 0 and True in self.layout.packs

    def _missing(self, path: list[PrefixNode], whole: int, length: int) -> int | None:
        """The last page of ``path[:whole]`` that a token at ``length`` sees and that is gone."""
        gone = (
            number
            for g, group in enumerate(self.layout.groups)
            if group.window is not None
            for number in range(group.first_needed(length) // self.layout.page_size, whole)
            if path[number].pages[g] == NO_PAGE
        )
        return max(gone, default=None)

    def _made(
        self, query: PrefixQuery, path: list[PrefixNode], partial: PrefixNode | None, length: int
    ) -> PrefixMatch:
        size, node = self.layout.page_size, path[-1] if path else None
        if partial is not None:
            path = [*path, partial]
        first = tuple(
            min(group.first_needed(length) // size, len(path)) for group in self.layout.groups
        )
        pages = tuple(tuple(n.pages[g] for n in path[first[g] :]) for g in range(len(first)))
        tail = query.data[length // size * self._page_bytes : length * TOKEN_BYTES]
        return PrefixMatch(query.salt, length, node, first, pages, partial, tail)

    def _give(self, node: PrefixNode, group: int, page: int) -> None:
        """Make ``page`` part of ``node``; a shorter page that it held before is forgotten."""
        before = self._of_page[group][page]
        if before is not None:
            before.pages[group] = NO_PAGE
        node.pages[group] = page
        self._of_page[group][page] = node
        self._allocators[group].keep(page)
        if self.observer is not None:
            self.observer.added(node, group)
        if before is not None:
            self._prune(before)

    def _take(self, node: PrefixNode, group: int) -> None:
        page = node.pages[group]
        if page != NO_PAGE:
            node.pages[group] = NO_PAGE
            self._of_page[group][page] = None
            self._allocators[group].forget(page)

    def _note(self, node: PrefixNode, reason: str) -> None:
        self.evicted[node.digest] = Eviction(time.time(), reason)
        if len(self.evicted) > REMEMBERED:
            self.evicted.popitem(last=False)

    def _prune(self, node: PrefixNode) -> None:
        """Remove ``node`` and those above it as far as nothing and nobody needs them."""
        while not node.users and not node.children:
            parent = node.parent
            if parent is None:
                self._roots.pop(node.tokens.decode(), None)
                return
            if any(page != NO_PAGE for page in node.pages):
                return
            self._unlink(node, parent)
            node = parent

    def _unlink(self, node: PrefixNode, parent: PrefixNode) -> None:
        at = bisect_left(parent.children, node.tokens, key=tokens_of)
        while parent.children[at] is not node:
            at += 1
        del parent.children[at]
        key = node.digest[: self.digest_bytes]
        other = self._by_key[key]
        if other is node:
            if node.same_key is None:
                del self._by_key[key]
            else:
                self._by_key[key] = node.same_key
        else:
            while other.same_key is not node:
                assert other.same_key is not None
                other = other.same_key
            other.same_key = node.same_key
        self.num_nodes -= 1
