"""Records and payloads for tests of tiers, and a tier that is a plain dict."""

import hashlib
import random
from dataclasses import dataclass, field
from functools import lru_cache

from quire.cache.tiers import PageRecord

PAGE_TOKENS = 16
ROOT = bytes(32)


def record(number: int, *, depth: int = 0, parent: bytes = ROOT) -> PageRecord:
    """The record called ``number``; other numbers have other keys and tokens."""
    tokens = number.to_bytes(4, "little") * PAGE_TOKENS
    digest = hashlib.sha256(parent + tokens).digest()
    return PageRecord(digest + b"\0", parent, tokens, depth, 2)


def chain(first: int, length: int) -> list[PageRecord]:
    """Consecutive pages of one sequence."""
    pages: list[PageRecord] = []
    for depth in range(length):
        parent = pages[-1].key[:32] if pages else ROOT
        pages.append(record(first + depth, depth=depth, parent=parent))
    return pages


@lru_cache(maxsize=64)
def payload(number: int, size: int) -> bytes:
    """Bytes that cannot be packed, the same for the same number."""
    return random.Random(number).randbytes(size)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class DictTier:
    """What a tier without a budget does. ``used`` is the second of the last use."""

    held: dict[bytes, tuple[PageRecord, bytes]] = field(default_factory=dict)
    used: dict[bytes, int] = field(default_factory=dict)

    def put(self, page: PageRecord, data: bytes, now: float) -> None:
        there = self.held.get(page.key)
        if there is None or (there[0].parent, there[0].tokens) != (page.parent, page.tokens):
            self.held[page.key] = (page, data)
        self.used[page.key] = int(now)

    def get(self, page: PageRecord, now: float) -> bytes | None:
        there = self.held.get(page.key)
        if there is None or (there[0].parent, there[0].tokens) != (page.parent, page.tokens):
            return None
        self.used[page.key] = int(now)
        return there[1]

    def discard(self, key: bytes) -> None:
        self.held.pop(key, None)

    def order(self, key: bytes) -> tuple[int, int]:
        """Whose is least goes first."""
        return self.used[key], -self.held[key][0].depth
