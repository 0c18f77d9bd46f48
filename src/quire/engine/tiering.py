"""Pages between the pool and the tiers below it: what is stored, what is loaded, and whether to.

Pages go down by themselves: to host memory when the pool gives them up, to disk as soon as they
are whole, behind the engine's back. They come up for a waiting sample, in a thread beside the
steps, if loading them is expected to take less time than computing them; both are measured.

Where pools are not in host memory, pages on their way down are in neither: a tier takes them when
they have arrived, after a step, or at once if somebody asks for them.
"""

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from quire.cache import KVCache, PrefixMatch, PrefixQuery, Reservation
from quire.cache.prefix_tree import NO_PAGE, TOKEN_BYTES, PrefixNode
from quire.cache.tiers import PageRecord, Tier, TierUsage
from quire.pages import Incoming, Pending

__all__ = ["Load", "LoadPlan", "Pace", "PrefixTiers"]


# Guesses until something was measured: multiply-adds a second of a thread, or of a card; of a tier,
# bytes a second, and seconds to begin.
THREAD_RATE = {"native": 50e9, "reference": 5e9}
CARD_RATE = 50e12
TIER_RATE = {"host": 2e9, "disk": 5e8}
TIER_START = {"host": 2e-4, "disk": 2e-2}


@dataclass
class Pace:
    """Seconds a unit of something takes: a guess until it was measured, then as measured lately.

    A measurement counts by its units: what few of them take is mostly what it takes to begin.
    """

    seconds: float
    _spent: float = 0.0
    _units: float = 0.0

    def add(self, seconds: float, units: int) -> None:
        """Take a measurement in for as many older units, but for no more than a third of them."""
        if units > 0:
            kept = 1 - min(1 / 3, units / self._units) if self._units else 0.0
            self._spent = self._spent * kept + seconds
            self._units = self._units * kept + units
            self.seconds = self._spent / self._units

    def of(self, units: int) -> float:
        """Expected seconds of ``units``."""
        return self.seconds * units


def compute_pace(backend: str, threads: int, weights: int) -> Pace:
    """A guess at the seconds a token takes to compute, with ``weights`` numbers to multiply by."""
    on_card = backend not in THREAD_RATE
    return Pace(weights / (CARD_RATE if on_card else THREAD_RATE[backend] * threads))


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
    incoming    what puts them there
    done        pages that were put, in order
    """

    sequence: int
    reservation: Reservation
    tokens: list[int]
    records: list[list[PageRecord]]
    pages: list[list[int]]
    plan: LoadPlan
    incoming: Incoming
    done: int = 0
    seconds: float = 0.0
    cancelled: bool = False
    finished: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, eq=False)
class _Sent:
    """Pages of ``size`` bytes on their way to a tier; ``records`` name them."""

    tier: str
    records: list[PageRecord]
    size: int
    pending: Pending


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
        self._sent: deque[_Sent] = deque()
        if self.tiers:
            cache.raw.open()
            self._index.observer = self

    # -- down --------------------------------------------------------------------------------

    def added(self, node: PrefixNode, group: int) -> None:
        """The index has a new page: it is to go to disk."""
        if "disk" in self.tiers and self._is_whole(node):
            self._fresh.append((node, group))

    def leaving(self, pages: Sequence[tuple[PrefixNode, int]]) -> None:
        """The pool is about to give pages up: they go to host memory."""
        host = self.tiers.get("host")
        if host is None:
            return
        kinds: dict[tuple[int, int], list[PrefixNode]] = {}
        for node, group in pages:
            if self._is_whole(node):
                kinds.setdefault(self._kind(node, group), []).append(node)
        for (group, _), nodes in kinds.items():
            piece = self._cache.raw.piece(group, nodes[0].pages[group])
            for start in range(0, len(nodes), piece):
                self._send(host, group, nodes[start : start + piece])

    def store(self) -> None:
        """Take in what has arrived; send new pages to disk, as many as its queue takes now."""
        self.take_in()
        disk = self.tiers.get("disk")
        while disk is not None and self._fresh:
            kind = self._kind(*self._fresh[0])
            group, size = kind
            room = (disk.room() - self._bytes_sent(disk.name)) // size
            batch: list[PrefixNode] = []
            while self._fresh and len(batch) < room and self._kind(*self._fresh[0]) == kind:
                node, _ = self._fresh.popleft()
                page = node.pages[group]
                if page == NO_PAGE:
                    continue
                batch.append(node)
                if len(batch) == self._cache.raw.piece(group, page):
                    break
            if batch:
                self._send(disk, group, batch)
            elif room <= 0:
                self._shorten(disk)
                return

    def take_in(self) -> None:
        """Put into their tiers what has arrived there."""
        while self._sent and self._sent[0].pending.ready:
            self._land()

    def settle(self) -> None:
        """Wait until nothing is on its way to a tier."""
        while self._sent:
            self._land()

    def _send(self, tier: Tier, group: int, nodes: Sequence[PrefixNode]) -> None:
        """Begin to copy pages of one kind, at most a piece, to where ``tier`` gets them from."""
        records = [self._record(node, group) for node in nodes]
        held = tier.contains([record.key for record in records])
        coming = self._coming(tier.name)
        new = [
            (record, node.pages[group])
            for record, node, there in zip(records, nodes, held, strict=True)
            if not there and record.key not in coming
        ]
        if not new:
            return
        raw = self._cache.raw
        while len(self._sent) >= raw.depth:
            self._land()
        pending = raw.begin_read(group, [page for _, page in new])
        size = self._bytes(group, new[0][0].depth)
        self._sent.append(_Sent(tier.name, [record for record, _ in new], size, pending))
        self.take_in()

    def _land(self) -> None:
        """Put what was sent first into its tier; waits for it."""
        sent = self._sent.popleft()
        for record, payload in zip(sent.records, sent.pending.take(), strict=True):
            self.tiers[sent.tier].put(record, payload)

    def _coming(self, name: str) -> set[bytes]:
        """Keys on their way to a tier."""
        sent = (each.records for each in self._sent if each.tier == name)
        return {record.key for records in sent for record in records}

    def _bytes_sent(self, name: str) -> int:
        """Bytes on their way to a tier."""
        return sum(sent.size * len(sent.records) for sent in self._sent if sent.tier == name)

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
        """What each tier holds and did; what is on its way there is queued."""
        return tuple(
            replace(
                usage,
                queued=usage.queued + self._bytes_sent(usage.name),
                pages=usage.pages + len(self._coming(usage.name)),
            )
            for usage in (tier.usage() for tier in self.tiers.values())
        )

    def flush(self) -> None:
        """Wait until every new page is stored, or dropped with a reason."""
        self.settle()
        while self._fresh:
            before = len(self._fresh)
            self.store()
            self.settle()
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
        self._cache.raw.close()

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
        try:
            incoming = self._cache.raw.begin_write()
        except BaseException:
            self._cache.rollback(reservation)
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
            incoming,
        )
        try:
            threading.Thread(target=self._fill, args=(load,), daemon=True).start()
        except RuntimeError:  # no more threads: then in this one
            self._fill(load)
        return load

    def finish(self, load: Load) -> dict[str, int]:
        """Commit what has arrived; the tokens that came, by tier. Waits for the thread.

        Not for the copies that it began: whoever uses the pages from now on comes after them.
        """
        load.finished.wait()
        load.incoming.end()
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
            while any(not self._coming(name).isdisjoint(keys) for name in names):
                self._land()
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
            while load.done < len(load.plan.sources) and self._fill_piece(load):
                pass
        finally:
            load.seconds = time.perf_counter() - started
            load.finished.set()

    def _fill_piece(self, load: Load) -> bool:
        """Read and put some pages more; False if one is missing, or the load was cancelled."""
        start, most = load.done, self._piece(load)
        count = most
        for group, records in enumerate(load.records):
            data: list[npt.NDArray[np.uint8]] = []
            for record in records[start : start + count]:
                payload = None if load.cancelled else self._get(record)
                if payload is None or len(payload) != self._bytes(group, record.depth):
                    break
                data.append(np.frombuffer(payload, np.uint8))
            count = len(data)
            load.incoming.put(group, load.pages[group][start : start + count], data)
        load.done += count
        return count == most

    def _piece(self, load: Load) -> int:
        """Pages that are put together: those of one kind that all groups move at once."""
        left = len(load.plan.sources) - load.done
        if load.records[0][load.done].depth == 0:
            left = 1  # it is open where the next ones are packed
        raw = self._cache.raw
        pieces = (raw.piece(group, pages[load.done]) for group, pages in enumerate(load.pages))
        return min(left, *pieces)

    def _get(self, record: PageRecord) -> bytes | None:
        found = (tier.get(record) for tier in self.tiers.values())
        return next((payload for payload in found if payload is not None), None)
