"""Pages between the pool and the tiers below it: what is stored, what is loaded, and whether to.

Pages go down by themselves: to host memory when the pool gives them up, to disk as soon as they
are whole, behind the engine's back. They come up for a waiting sample, in a thread beside the
steps, if loading them is expected to take less time than computing them; both are measured.
"""

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from quire.cache import KVCache, PrefixMatch, PrefixQuery, Reservation
from quire.cache.prefix import NO_PAGE, TOKEN_BYTES, PrefixNode
from quire.cache.tiers import PageRecord, Tier, TierUsage

__all__ = ["Load", "LoadPlan", "Pace", "PrefixTiers"]

PIECE = 8  # pages that are exported at a time, so that no step waits long


# Guesses until something was measured: multiply-adds a second of a thread; of a tier, bytes a
# second, and seconds to begin.
THREAD_RATE = {"native": 50e9, "reference": 5e9}
TIER_RATE = {"host": 2e9, "disk": 5e8}
TIER_START = {"host": 2e-4, "disk": 2e-2}


@dataclass
class Pace:
    """Seconds a unit of something takes: a guess until it was measured, then as measured lately."""

    seconds: float
    measured: bool = False

    def add(self, seconds: float, units: int) -> None:
        """Take a measurement in; the newest counts a third."""
        if units > 0:
            each = seconds / units
            self.seconds = (2 * self.seconds + each) / 3 if self.measured else each
            self.measured = True

    def of(self, units: int) -> float:
        """Expected seconds of ``units``."""
        return self.seconds * units


def compute_pace(backend: str, threads: int, weights: int) -> Pace:
    """A guess at the seconds a token takes to compute, with ``weights`` numbers to multiply by."""
    return Pace(weights / (THREAD_RATE.get(backend, 50e9) * threads))


@dataclass(frozen=True)
class LoadPlan:
    """Whole pages behind a match that tiers hold: ``sources[i]`` is the tier of each.

    decision   what was decided, and from which costs, for people
    """

    match: PrefixMatch
    sources: tuple[str, ...]
    worthwhile: bool
    decision: str


@dataclass(eq=False)
class Load:
    """Pages on their way up, in a thread.

    tokens      ids of all of them, in order
    records     for each group, what to ask a tier for
    pages       for each group, the ids of the pages that they go to
    done        pages that have arrived, in order
    """

    sequence: int
    reservation: Reservation
    tokens: list[int]
    records: list[list[PageRecord]]
    pages: list[list[int]]
    plan: LoadPlan
    done: int = 0
    seconds: float = 0.0
    cancelled: bool = False
    finished: threading.Event = field(default_factory=threading.Event)


class PrefixTiers:
    """The tiers of one cache, fastest first."""

    def __init__(self, cache: KVCache, tiers: Sequence[Tier], compute: Pace) -> None:
        assert cache.prefix is not None
        self.tiers = {tier.name: tier for tier in tiers}
        self.compute_pace = compute  # a token
        layout = cache.layout
        page = sum(layout.page_bytes(group) for group in range(len(layout.groups)))
        self._paces = {name: Pace(page / TIER_RATE[name]) for name in self.tiers}  # a page
        self._cache, self._index = cache, cache.prefix
        self._fresh: deque[tuple[PrefixNode, int]] = deque()
        self._element = cache.layout.element_bytes
        if self.tiers:
            self._index.observer = self

    # -- down --------------------------------------------------------------------------------

    def added(self, node: PrefixNode, group: int) -> None:
        """The index has a new page: it is to go to disk."""
        if "disk" in self.tiers and self._is_whole(node):
            self._fresh.append((node, group))

    def leaving(self, node: PrefixNode, group: int) -> None:
        """The pool is about to give a page up: it goes to host memory."""
        host = self.tiers.get("host")
        if host is not None and self._is_whole(node):
            record = self._record(node, group)
            if not host.contains([record.key])[0]:
                data = self._cache.raw.read(group, [node.pages[group]])
                host.put(record, data[0])

    def store(self) -> None:
        """Hand new pages to the disk's queue, as many as it takes without waiting."""
        disk = self.tiers.get("disk")
        while disk is not None and self._fresh:
            kind = self._kind(*self._fresh[0])
            group, size = kind
            most = min(PIECE, disk.room() // size)
            if most == 0:
                self._shorten(disk)
                return
            batch: list[PrefixNode] = []
            while self._fresh and len(batch) < most and self._kind(*self._fresh[0]) == kind:
                node, _ = self._fresh.popleft()
                if node.pages[group] != NO_PAGE:
                    batch.append(node)
            held = disk.contains([self._key(node.digest, group) for node in batch])
            batch = [node for node, there in zip(batch, held, strict=True) if not there]
            if not batch:
                continue
            data = self._cache.raw.read(group, [node.pages[group] for node in batch])
            for node, payload in zip(batch, data, strict=True):
                disk.put(self._record(node, group), payload)

    def _shorten(self, disk: Tier) -> None:
        """Keep no more of what waits than the pool holds, and nothing for a tier that is done."""
        if not disk.writable:
            self._fresh.clear()
        elif len(self._fresh) > sum(self._cache.num_pages):
            self._fresh = deque((n, g) for n, g in self._fresh if n.pages[g] != NO_PAGE)

    def lender(self, size: int) -> Tier | None:
        """The fastest tier that sets ``size`` bytes of its budget aside; it has done so."""
        return next((tier for tier in self.tiers.values() if tier.lend(size)), None)

    def usage(self) -> tuple[TierUsage, ...]:
        """What each tier holds and did."""
        return tuple(tier.usage() for tier in self.tiers.values())

    def flush(self) -> None:
        """Wait until every new page is stored, or dropped with a reason."""
        while self._fresh:
            before = len(self._fresh)
            self.store()
            for tier in self.tiers.values():
                tier.flush()
            if len(self._fresh) == before:  # the tier takes nothing any more, and says why
                self._fresh.clear()
        for tier in self.tiers.values():
            tier.flush()

    def close(self) -> None:
        """Store what is new, wait for it, and let the tiers go."""
        self.flush()
        self._index.observer = None
        for tier in self.tiers.values():
            tier.close()
        self.tiers.clear()

    # -- up ----------------------------------------------------------------------------------

    def plan(self, query: PrefixQuery, limit: int) -> LoadPlan | None:
        """What tiers hold behind the pool's part of ``query``, of at most ``limit`` tokens."""
        match = self._cache.match(query, limit)
        match = match.whole or match
        size = self._cache.layout.page_size
        start, end = match.tokens // size, limit // size
        sources = self._sources(query, start, end)
        if not sources:
            return None
        load = sum(self._paces[name].of(1) for name in sources)
        load += sum(TIER_START[name] for name in set(sources))
        compute = self.compute_pace.of(len(sources) * size)
        worthwhile = load <= compute
        counts = {name: sources.count(name) * size for name in self.tiers if name in sources}
        held = " and ".join(f"{count} on {name}" for name, count in counts.items())
        verb = "loaded" if worthwhile else "computed"
        decision = (
            f"{len(sources) * size} tokens ({held}) {verb}: loading is expected to take "
            f"{load:.3f} s, computing {compute:.3f} s"
        )
        return LoadPlan(match, tuple(sources), worthwhile, decision)

    def start(self, plan: LoadPlan, query: PrefixQuery) -> Load:
        """Create a sequence behind the plan's match and fill its next pages in a thread.

        Raises CacheFull, with nothing changed, if there are no pages for it.
        """
        size, first = (
            self._cache.layout.page_size,
            plan.match.tokens // self._cache.layout.page_size,
        )
        count = len(plan.sources)
        sequence = self._cache.create(plan.match)
        try:
            reservation = self._cache.reserve_whole(sequence, count)
        except BaseException:
            self._cache.release(sequence)
            raise
        ids = np.frombuffer(query.data, "<u4")[plan.match.tokens : (first + count) * size]
        pages = reservation.new_pages
        load = Load(
            sequence,
            reservation,
            ids.tolist(),
            [self._records(query, first, count, group) for group in range(len(pages))],
            pages,
            plan,
        )
        try:
            threading.Thread(target=self._fill, args=(load,), daemon=True).start()
        except RuntimeError:  # no more threads: then in this one
            self._fill(load)
        return load

    def finish(self, load: Load) -> dict[str, int]:
        """Commit what has arrived; the tokens that came, by tier. Waits for the thread."""
        load.finished.wait()
        size = self._cache.layout.page_size
        self._cache.commit(load.reservation, [load.tokens[: load.done * size]])
        came = load.plan.sources[: load.done]
        for name in set(came):
            seconds = max(0.0, load.seconds - TIER_START[name]) * came.count(name) / len(came)
            self._paces[name].add(seconds, came.count(name))
        return {name: came.count(name) * size for name in self.tiers}

    # -- inside ------------------------------------------------------------------------------

    def _is_whole(self, node: PrefixNode) -> bool:
        return node.num_tokens == self._cache.layout.page_size

    def _key(self, digest: bytes, group: int) -> bytes:
        return digest[: self._index.digest_bytes] + bytes([group])

    def _kind(self, node: PrefixNode, group: int) -> tuple[int, int]:
        """The group of a page, and its bytes: pages of one kind can be read together."""
        return group, self._bytes(group, node.depth)

    def _bytes(self, group: int, number: int) -> int:
        """Bytes of a whole page: the first of a prefix is never packed."""
        layout = self._cache.layout
        return layout.page_bytes(group) if number else layout.open_page_bytes(group)

    def _record(self, node: PrefixNode, group: int) -> PageRecord:
        assert node.parent is not None
        key = self._key(node.digest, group)
        return PageRecord(key, node.parent.digest, node.tokens, node.depth, self._element)

    def _records(self, query: PrefixQuery, first: int, count: int, group: int) -> list[PageRecord]:
        """Records of page numbers ``first`` to ``first + count - 1``."""
        digests, step = self._index.digests(query), self._cache.layout.page_size * TOKEN_BYTES
        return [
            PageRecord(
                self._key(digests[number], group),
                digests[number - 1] if number else self._index.root_digest(query.salt),
                query.data[number * step : (number + 1) * step],
                number,
                self._element,
            )
            for number in range(first, first + count)
        ]

    def _sources(self, query: PrefixQuery, start: int, end: int) -> list[str]:
        """The slowest tier that each page from number ``start`` on comes from, while there is one.

        A page is there if every group's part of it is, also of groups with a window: the pages go
        into the index, where prompts that part earlier may need them.
        """
        digests = self._index.digests(query)[start:end]
        names = list(self.tiers)
        worst = [0] * len(digests)
        for group in range(len(self._cache.layout.groups) if digests else 0):
            keys = [self._key(digest, group) for digest in digests]
            held = [tier.contains(keys) for tier in self.tiers.values()]
            for at, flags in enumerate(zip(*held, strict=True)):
                here = flags.index(True) if True in flags else len(names)
                worst[at] = max(worst[at], here)
        count = worst.index(len(names)) if len(names) in worst else len(worst)
        return [names[at] for at in worst[:count]]

    def _fill(self, load: Load) -> None:
        """Read pages in order of position until one is missing; in a thread of its own."""
        started = time.perf_counter()
        try:
            for at in range(len(load.plan.sources)):
                if load.cancelled or not self._fill_one(load, at):
                    break
                load.done += 1
        finally:
            load.seconds = time.perf_counter() - started
            load.finished.set()

    def _fill_one(self, load: Load, at: int) -> bool:
        for group, records in enumerate(load.records):
            found = (tier.get(records[at]) for tier in self.tiers.values())
            data = next((payload for payload in found if payload is not None), None)
            if data is None or len(data) != self._bytes(group, records[at].depth):
                return False
            row = np.frombuffer(data, np.uint8)[None]
            self._cache.raw.write(group, [load.pages[group][at]], row)
        return True
