"""Prefixes that are held for a time, whether anybody uses them or not."""

import math
import time

from quire.cache import KVCache, PrefixQuery
from quire.errors import RequestError

__all__ = ["Pins"]


class Pins:
    """Pinned prefixes of one cache: sequences that hold pages and never run."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._ends: dict[int, float] = {}  # sequence -> time.monotonic() at which it is let go
        self.dropped = 0

    def add(self, query: PrefixQuery, seconds: float) -> int:
        """Hold the cached part of ``query``, whole pages of it; returns its tokens."""
        number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        if not number or not (math.isfinite(seconds) and seconds > 0):
            raise RequestError(f"a pin lasts a positive number of seconds, not {seconds!r}")
        match = self._cache.match(query)
        match = match.whole or match
        if match.tokens:
            self._ends[self._cache.create(match)] = time.monotonic() + seconds
        return match.tokens

    @property
    def count(self) -> int:
        """Pins that hold pages."""
        return len(self._ends)

    def expire(self) -> None:
        """Let those go whose time is over."""
        if self._ends:
            now = time.monotonic()
            for sequence in [s for s, end in self._ends.items() if end <= now]:
                self._release(sequence)

    def drop_one(self) -> bool:
        """Let the one go that ends first; False if there is none."""
        if not self._ends:
            return False
        self._release(min(self._ends, key=lambda sequence: self._ends[sequence]))
        self.dropped += 1
        return True

    def _release(self, sequence: int) -> None:
        del self._ends[sequence]
        self._cache.release(sequence)
