"""Tiers: where KV pages live when they are not in the pool. The protocol, and host memory.

A tier holds opaque bytes, one payload a page, under the digest of the whole prefix that the page
ends. It knows nothing of models, layouts or sequences. Compare the tiers of LMCache and the
"KV cache offloading" of vLLM and SGLang (HiCache); here every hit is compared with the token ids.
"""

import heapq
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from quire.config import format_bytes, parse_bytes

__all__ = ["HostTier", "PageRecord", "Payload", "Tally", "Tier", "TierUsage", "payload_size"]

Payload = bytes | memoryview | npt.NDArray[np.uint8]

# Memory of one entry of HostTier beside its bytes: objects, a dict slot, heap entries.
_ENTRY_BYTES = 1024


@dataclass(frozen=True, slots=True)
class PageRecord:
    """What names one page of one layer group, and what is compared when it is asked for.

    key       digest of the chain up to and with this page, then one byte of group index; normally
              33 bytes, shorter only in tests that want collisions
    parent    the full 32-byte digest of the prefix before this page
    tokens    token ids of this page, uint32, little-endian
    depth     page number, counted from position 0
    element   bytes of one stored number (2 for bf16), for byte shuffle; 1 is none
    """

    key: bytes
    parent: bytes
    tokens: bytes
    depth: int
    element: int


@dataclass(frozen=True)
class TierUsage:
    """What a tier holds and what it did since it was opened; sizes in bytes.

    bytes_used   memory or files, transients (a journal) included; at most ``budget``
    queued       memory of what waits to be written, on its way from a device included; beside the
                 budget
    pages        records held, those that wait included
    stored       records written; each of them survives a kill
    evicted      records given up to make room
    dropped      records that ``put`` was offered and that were not stored
    last_drop    why the newest of those was not, or None
    damaged      records that did not verify and were deleted
    last_damage  what was wrong with the newest of those, or None
    off          why the tier does nothing any more, or None
    no_writes    why the tier reads but stores nothing any more, or None
    """

    name: str
    budget: int
    bytes_used: int
    queued: int
    pages: int
    hits: int
    misses: int
    stored: int
    evicted: int
    dropped: int
    last_drop: str | None
    damaged: int
    last_damage: str | None
    off: str | None = None
    no_writes: str | None = None


class Tier(Protocol):
    """A bounded store of page payloads below the pool. Every method is thread-safe.

    Who is evicted first: the least recently used, in whole seconds, and of equals the one with the
    greater depth, so that a chain loses its tail before its head.
    None of the methods raises because of what is stored, damaged or full.
    """

    @property
    def name(self) -> str:
        """``"host"`` or ``"disk"``."""

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """For each key, whether something is held under it; changes nothing.

        A key that is held can still miss in :meth:`get`: other tokens, or damage.
        """

    def put(self, record: PageRecord, payload: Payload) -> bool:
        """Take a copy of ``payload``; True if it was taken. Never waits for a disk.

        What is held under the same key stays if it has the same parent and tokens (its payload is
        then the same, too), else it is replaced. False, with the reason counted in the usage: too
        large, queue full, tier off.
        """

    def room(self) -> int:
        """Bytes of payloads that :meth:`put` would take now."""

    @property
    def writable(self) -> bool:
        """False once nothing will be stored any more."""

    def lend(self, size: int) -> bool:
        """Set ``size`` bytes of the budget aside for another use; False if that is too much.

        Pages used longest ago make way.
        """

    def take_back(self, size: int) -> None:
        """What :meth:`lend` gave is free for pages again."""

    def get(self, record: PageRecord) -> bytes | None:
        """The payload that was put under ``record``, or None; a hit makes it recently used.

        None: nothing under the key, another parent or other tokens, or damage (then the record is
        deleted and counted).
        """

    def discard(self, keys: Sequence[bytes]) -> None:
        """Forget what is held under ``keys``; unknown keys are ignored."""

    def flush(self) -> None:
        """Wait until all that was taken is stored, surviving a kill, or dropped with a reason."""

    def close(self) -> None:
        """Flush and let go of everything; afterwards the tier holds nothing. May be repeated."""

    def usage(self) -> TierUsage:
        """Sizes and counters, now."""


def payload_size(payload: Payload) -> int:
    """Bytes of ``payload``."""
    return len(payload) if isinstance(payload, bytes) else payload.nbytes


class Tally:
    """Counters of a tier, safe to add to from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._reasons: dict[str, str | None] = {"last_drop": None, "last_damage": None}

    def add(self, what: str, count: int = 1) -> None:
        """Add to ``hits``, ``misses``, ``stored`` or ``evicted``."""
        with self._lock:
            self._counts[what] += count

    def drop(self, why: str, count: int = 1) -> None:
        """Count records that were not stored, with the reason."""
        with self._lock:
            self._counts["dropped"] += count
            self._reasons["last_drop"] = why

    def damage(self, what: str) -> None:
        """Count a record that did not verify, with what was wrong."""
        with self._lock:
            self._counts["damaged"] += 1
            self._reasons["last_damage"] = what

    def as_dict(self) -> dict[str, Any]:
        """The counters and reasons of :class:`TierUsage`."""
        names = ("hits", "misses", "stored", "evicted", "dropped", "damaged")
        with self._lock:
            return {name: self._counts[name] for name in names} | self._reasons


@dataclass(slots=True)
class _Held:
    record: PageRecord
    payload: bytes
    order: tuple[int, int, int]  # second of the last use, -depth, number: the least goes first


class HostTier:
    """Pages in plain memory.

    budget_bytes   most memory held at any moment: payloads, token ids, and 1 KiB a page for the
                   books. What a caller of ``get`` keeps is the caller's.
    clock          seconds; only tests give another

    Raises ConfigError for a budget that is not a positive size.
    """

    name = "host"

    def __init__(self, budget_bytes: int, *, clock: Callable[[], float] = time.time) -> None:
        self._budget = parse_bytes(budget_bytes)
        self._clock = clock
        self._lock = threading.Lock()
        self._held: dict[bytes, _Held] = {}
        self._queue: list[tuple[int, int, int, bytes]] = []  # a heap of orders; may be outdated
        self._number = 0
        self._bytes = self._lent = 0
        self._tally = Tally()
        self._off: str | None = None

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """See :meth:`Tier.contains`."""
        with self._lock:
            return [key in self._held for key in keys]

    def put(self, record: PageRecord, payload: Payload) -> bool:
        """See :meth:`Tier.put`."""
        size = payload_size(payload)
        need = _cost(record, size)
        with self._lock:
            refusal = self._refusal(need)
            if refusal is not None:
                self._tally.drop(refusal)
                return False
            held = self._held.get(record.key)
            if held is not None and _same(held.record, record):
                self._use(held)
                return True
            if held is not None:
                self._remove(record.key)
            self._make_room(need)  # before the copy: the budget holds in between, too
            self._number += 1
            order = (int(self._clock()), -record.depth, self._number)
            self._held[record.key] = _Held(record, bytes(payload), order)
            self._bytes += need
            self._enqueue(record.key, order)
        self._tally.add("stored")
        return True

    def room(self) -> int:
        """See :meth:`Tier.room`: all of it, since older pages make way."""
        return self._budget if self._off is None else 0

    def get(self, record: PageRecord) -> bytes | None:
        """See :meth:`Tier.get`; the bytes are not copied."""
        with self._lock:
            held = self._held.get(record.key)
            found = held if held is not None and _same(held.record, record) else None
            if found is not None:
                self._use(found)
        self._tally.add("misses" if found is None else "hits")
        return None if found is None else found.payload

    def discard(self, keys: Sequence[bytes]) -> None:
        """See :meth:`Tier.discard`."""
        with self._lock:
            for key in keys:
                if key in self._held:
                    self._remove(key)

    @property
    def writable(self) -> bool:
        """See :meth:`Tier.writable`."""
        return self._off is None

    def lend(self, size: int) -> bool:
        """See :meth:`Tier.lend`."""
        with self._lock:
            if self._off is not None or size + self._lent > self._budget:
                return False
            self._make_room(size)
            self._lent += size
            return True

    def take_back(self, size: int) -> None:
        """See :meth:`Tier.take_back`."""
        with self._lock:
            self._lent -= size

    def flush(self) -> None:
        """Nothing waits; memory does not survive the process."""

    def close(self) -> None:
        """See :meth:`Tier.close`."""
        with self._lock:
            self._off = "the host tier was closed"
            self._held.clear()
            self._queue.clear()
            self._bytes = 0

    def usage(self) -> TierUsage:
        """See :meth:`Tier.usage`."""
        with self._lock:
            used, pages, off = self._bytes + self._lent, len(self._held), self._off
        counts = self._tally.as_dict()
        return TierUsage(self.name, self._budget, used, 0, pages, **counts, off=off)

    def _refusal(self, need: int) -> str | None:
        if self._off is not None:
            return self._off
        if need > self._budget - self._lent:
            lent = f", of which {format_bytes(self._lent)} are lent" if self._lent else ""
            return (
                f"a page of {format_bytes(need)} is larger than the host tier's budget of "
                f"{format_bytes(self._budget)}{lent}; raise the budget"
            )
        return None

    def _make_room(self, need: int) -> None:
        while self._bytes + self._lent + need > self._budget:
            *order, key = heapq.heappop(self._queue)
            held = self._held.get(key)
            if held is not None and held.order == tuple(order):
                self._remove(key)
                self._tally.add("evicted")

    def _remove(self, key: bytes) -> None:
        held = self._held.pop(key)
        self._bytes -= _cost(held.record, len(held.payload))

    def _use(self, held: _Held) -> None:
        second, *rest = held.order
        now = int(self._clock())
        if now > second:
            held.order = (now, rest[0], rest[1])
            self._enqueue(held.record.key, held.order)

    def _enqueue(self, key: bytes, order: tuple[int, int, int]) -> None:
        heapq.heappush(self._queue, (*order, key))
        if len(self._queue) > 64 + 2 * len(self._held):  # most are outdated: make it anew
            self._queue = [(*held.order, key) for key, held in self._held.items()]
            heapq.heapify(self._queue)


def _cost(record: PageRecord, size: int) -> int:
    return size + len(record.key) + len(record.parent) + len(record.tokens) + _ENTRY_BYTES


def _same(one: PageRecord, other: PageRecord) -> bool:
    return one.parent == other.parent and one.tokens == other.tokens
