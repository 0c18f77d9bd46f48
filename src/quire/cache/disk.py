"""The disk tier: pages in one database that several processes share, written behind their backs.

``put`` copies into a bounded queue; one thread packs and writes. ``get`` runs in the caller's
thread. What waits in the queue is found already. How the file keeps its promises is in
``disk_store.py``, what a record looks like in ``disk_format.py``.
"""

import itertools
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quire.cache.disk_contents import prune_store
from quire.cache.disk_file import (
    LOCK_SECONDS,
    Readers,
    find_store,
    find_wanted,
    present,
    store_bytes,
)
from quire.cache.disk_format import MAX_PAYLOAD, identity_digest, pack_page, verified
from quire.cache.disk_store import MIN_BUDGET, StoreWriter, pages_needed
from quire.cache.tiers import PageRecord, Payload, Tally, TierUsage, payload_size
from quire.config import format_bytes, parse_bytes
from quire.errors import TierError

__all__ = ["DiskTier"]

_MAX_QUEUE = 64 << 20
_BATCH_BYTES = 4 << 20  # raw bytes of one transaction: readers wait while it is committed
_BATCH_RECORDS = 256
_BUSY = f"another process kept the disk store locked for {LOCK_SECONDS:.0f} s"
_BUSY_PAUSE_SECONDS = 5.0
_USES_SECONDS = 2.0  # how often recency is written while nothing else is


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    """Something to be written; without a payload, the key is to be forgotten.

    ``anew``: what the file holds under the key goes first, because it was discarded.
    """

    record: PageRecord
    payload: bytes | None
    anew: bool


class DiskTier:
    """Pages in a database under a directory, shared with other processes.

    directory      made if it is not there; holds nothing else
    budget_bytes   most bytes of the files at any moment, journal included; at least 8 MiB. Give
                   every process the same: the smallest rules
    identity       what computed the pages; pages of another identity are never returned. Its entry
                   ``model``, a directory or name for people, does not count
    clock          seconds; only tests give another

    The queue takes at most min(64 MiB, a quarter of the budget) of memory beside the budget; one
    payload at most a quarter of the budget and 128 MiB.

    Raises TierError for a directory or file that cannot be used, or is not ours, and for too
    small a budget. A damaged file is not raised and never deleted: the tier is ``off``, with the
    reason and what to do. Not to be used on both sides of a fork.
    """

    name = "disk"

    def __init__(
        self,
        directory: Path,
        budget_bytes: int,
        identity: Mapping[str, str],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._budget = parse_bytes(budget_bytes)
        if self._budget < MIN_BUDGET:
            raise TierError(
                f"a disk budget of {format_bytes(self._budget)} is too small; the least is "
                f"{format_bytes(MIN_BUDGET)}"
            )
        self._path = find_store(Path(directory), create=True)
        self._digest = identity_digest(identity)
        self._clock = clock
        self._changed = threading.Condition()
        self._waiting: dict[bytes, _Waiting] = {}  # oldest first; kept until it is committed
        self._queued = self._lent = 0
        self._uses: dict[int, tuple[int, int]] = {}
        self._flushes_asked = self._flushes_done = 0
        self._uses_written = time.monotonic()
        self._busy_until = 0.0  # by the monotonic clock
        self._closing = False
        self._tally = Tally()
        self._off: str | None = None
        self._no_writes: str | None = None
        self._readers = Readers(self._path)
        self._thread = threading.Thread(target=self._run, name="quire-disk-tier", daemon=True)
        self._store = StoreWriter(self._path, self._budget)
        damage: object = self._store.damage
        if damage is None:
            try:
                self._identity = self._store.identity_id(identity)
            except sqlite3.Error as error:
                damage = error
        if damage is None:
            self._thread.start()
        else:
            self._store.close()
            self._off = self._damaged(damage)

    @property
    def off(self) -> str | None:
        """Why the tier does nothing any more, or None."""
        return self._off

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """See :meth:`Tier.contains`."""
        with self._changed:
            waiting = {key: self._waiting[key] for key in keys if key in self._waiting}
        stored: set[bytes] = set()
        if self._readable():
            try:
                with self._readers.take() as db:
                    stored = present(db, self._identity, keys)
            except sqlite3.Error as error:
                self._read_failed(error)
        return [
            waiting[key].payload is not None if key in waiting else key in stored for key in keys
        ]

    def put(self, record: PageRecord, payload: Payload) -> bool:
        """See :meth:`Tier.put`."""
        size = payload_size(payload)
        with self._changed:
            older = self._waiting.get(record.key)
            if older is not None and older.payload is not None and _same(older.record, record):
                return True
            refusal = self._refusal(size)
            if refusal is not None:
                self._tally.drop(refusal)
                return False
            anew = older is not None  # a page with other tokens, or a discard
            self._enqueue(_Waiting(record, bytes(payload), anew))
        return True

    @property
    def writable(self) -> bool:
        """See :meth:`Tier.writable`."""
        return self._off is None and self._no_writes is None and not self._closing

    def lend(self, size: int) -> bool:
        """See :meth:`Tier.lend`. Other processes that share the store do not know of it."""
        left = self._budget - self._lent - size
        if not self.writable or left < MIN_BUDGET:
            return False
        self.flush()
        self._store.limit(left)
        try:
            prune_store(self._path.parent, left)
        except (TierError, sqlite3.Error):
            self._store.limit(self._budget - self._lent)
            return False
        self._lent += size
        return True

    def take_back(self, size: int) -> None:
        """See :meth:`Tier.take_back`."""
        self._lent -= size
        if self._off is None:
            self._store.limit(self._budget - self._lent)

    def room(self) -> int:
        """See :meth:`Tier.room`."""
        with self._changed:
            if self._off is not None or self._no_writes is not None or self._closing:
                return 0
            return min(_MAX_QUEUE, self._budget // 4) - self._queued

    def get(self, record: PageRecord) -> bytes | None:
        """See :meth:`Tier.get`. Waits for a commit that is under way, some milliseconds.

        If that takes longer than a second, everything is a miss for the next five.
        """
        with self._changed:
            waiting = self._waiting.get(record.key)
        if waiting is not None:
            payload = waiting.payload if _same(waiting.record, record) else None
        else:
            payload = self._load(record) if self._readable() else None
        self._tally.add("misses" if payload is None else "hits")
        return payload

    def discard(self, keys: Sequence[bytes]) -> None:
        """See :meth:`Tier.discard`."""
        with self._changed:
            for key in keys if self._off is None else ():
                self._enqueue(_Waiting(PageRecord(key, b"", b"", 0, 1), None, anew=True))

    def flush(self) -> None:
        """See :meth:`Tier.flush`; recency is written, too."""
        with self._changed:
            if self._off is not None:
                return
            awaited = list(self._waiting.values())
            self._flushes_asked += 1
            ticket = self._flushes_asked
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: (
                    self._off is not None
                    or (self._flushes_done >= ticket and not any(map(self._is_waiting, awaited)))
                )
            )

    def close(self) -> None:
        """See :meth:`Tier.close`."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self._readers.close()

    def usage(self) -> TierUsage:
        """See :meth:`Tier.usage`. ``pages`` counts the pages of every identity."""
        pages = 0
        if self._off is None:
            try:
                with self._readers.take() as db:
                    pages = int(db.execute("SELECT count(*) FROM recency").fetchone()[0])
            except sqlite3.Error as error:
                self._read_failed(error)
        with self._changed:
            pages += sum(item.payload is not None for item in self._waiting.values())
            queued = self._queued
        used = store_bytes(self._path) + self._lent
        counts = self._tally.as_dict()
        return TierUsage(
            *(self.name, self._budget, used, queued, pages),
            **counts,
            off=self._off,
            no_writes=self._no_writes,
        )

    # -- in the caller's thread

    def _refusal(self, size: int) -> str | None:
        if self._off is not None or self._no_writes is not None:
            return self._off or self._no_writes
        if self._closing:
            return "the disk tier was closed"
        most = min(self._budget // 4, MAX_PAYLOAD)
        if size > most:
            return f"a page of {format_bytes(size)}; the disk tier takes {format_bytes(most)}"
        room = min(_MAX_QUEUE, self._budget // 4)
        if self._queued + size > room:
            return f"the queue to the disk is full ({format_bytes(room)}): the disk is too slow"
        return None

    def _enqueue(self, item: _Waiting) -> None:
        self._forget(self._waiting.get(item.record.key))
        self._waiting[item.record.key] = item
        self._queued += len(item.payload or b"")
        self._changed.notify_all()

    def _is_waiting(self, item: _Waiting) -> bool:
        return self._waiting.get(item.record.key) is item

    def _forget(self, item: _Waiting | None) -> None:
        if item is not None and self._is_waiting(item):
            del self._waiting[item.record.key]
            self._queued -= len(item.payload or b"")

    def _load(self, record: PageRecord) -> bytes | None:
        try:
            with self._readers.take() as db:
                row = find_wanted(db, self._identity, record)
            if row is None:
                return None
            _, payload = verified(self._digest, row[1:])
        except sqlite3.DataError as error:  # a blob above the limit of the connection
            self._drop_damaged(record, f"a field is too large ({error})")
            return None
        except sqlite3.Error as error:
            self._read_failed(error)
            return None
        except TierError as error:
            self._drop_damaged(record, str(error))
            return None
        with self._changed:
            _, count = self._uses.get(row[0], (0, 0))
            self._uses[row[0]] = (int(self._clock()), count + 1)
        return payload

    def _drop_damaged(self, record: PageRecord, why: str) -> None:
        self._tally.damage(f"page {record.depth}, key {record.key.hex()[:16]}: {why}")
        self.discard([record.key])

    def _readable(self) -> bool:
        return self._off is None and time.monotonic() >= self._busy_until

    def _read_failed(self, error: sqlite3.Error) -> None:
        if _code(error) == sqlite3.SQLITE_BUSY:  # somebody stands still: misses are quicker
            self._busy_until = time.monotonic() + _BUSY_PAUSE_SECONDS
        else:
            self._turn_off(self._damaged(error))

    def _damaged(self, error: object) -> str:
        return (
            f"the disk tier is off: {self._path} cannot be used ({error}). Nothing was deleted; "
            "if it is damaged, move it away or delete it, and a new one is begun"
        )

    def _turn_off(self, why: str) -> None:
        with self._changed:
            self._off = self._off or why
            lost = sum(item.payload is not None for item in self._waiting.values())
            self._waiting.clear()
            self._queued = 0
            self._changed.notify_all()
        if lost:
            self._tally.drop(why, lost)

    # -- in the writer's thread

    def _run(self) -> None:
        batch: list[_Waiting] | None = []
        try:
            while batch is not None and self._off is None:
                self._write(batch)
                batch = self._next_batch()
        except Exception as error:  # else flush() would wait for ever
            self._turn_off(f"the disk tier is off after an error in Quire: {error!r}")
        finally:
            self._store.close()
            with self._changed:
                self._off = self._off or "the disk tier was closed"
                self._changed.notify_all()

    def _next_batch(self) -> list[_Waiting] | None:
        """What to write next, oldest first; may be empty; None at the end."""
        with self._changed:
            while not (self._waiting or self._flush_is_due() or self._off is not None):
                if self._closing and not self._uses:
                    return None
                if self._closing or (not self._changed.wait(_USES_SECONDS) and self._uses):
                    break
            batch: list[_Waiting] = []
            size = 0
            for item in itertools.islice(self._waiting.values(), _BATCH_RECORDS):
                size += len(item.payload or b"")
                if batch and size > _BATCH_BYTES:
                    break
                batch.append(item)
            return batch

    def _flush_is_due(self) -> bool:
        return self._flushes_asked > self._flushes_done

    def _write(self, batch: Sequence[_Waiting]) -> None:
        puts = deque(item for item in batch if item.payload is not None)
        ticket, failure = self._flushes_asked, None
        try:
            if self._no_writes is None:
                self._write_all(batch, puts)
        except sqlite3.Error as error:
            failure = error
        off = None if failure is None else self._write_failed(failure)
        with self._changed:
            for item in batch:
                self._forget(item)
            if self._no_writes is not None:
                self._uses.clear()
            self._flushes_done = ticket
            self._changed.notify_all()
        if puts:
            self._tally.drop(off or self._no_writes or _BUSY, len(puts))
        if off is not None:
            self._turn_off(off)

    def _write_all(self, batch: Sequence[_Waiting], puts: deque[_Waiting]) -> None:
        """Write ``batch``; what is left in ``puts`` after an exception was not stored."""
        self._tally.add("evicted", self._store.trim(self._store.max_pages))
        late = time.monotonic() - self._uses_written >= _USES_SECONDS
        if late or self._closing or self._flush_is_due():
            self._store.touch(self._take_uses())
        records = [item.record for item in puts]
        forget = [item.record.key for item in batch if item.anew]
        self._store.remove(self._identity, forget + self._store.clashes(self._identity, records))
        pages = deque(pack_page(self._digest, item.record, item.payload or b"") for item in puts)
        while pages:
            done, new = self._store.insert(self._identity, tuple(pages), int(self._clock()))
            self._tally.add("stored", new)
            if not done and not self._make_room(pages_needed(pages[0])):
                self._tally.drop("there is no room, though nothing is left to evict")
                done = 1
            for _ in range(done):
                pages.popleft()
                puts.popleft()

    def _make_room(self, pages: int) -> bool:
        self._store.touch(self._take_uses())  # who goes depends on it
        evicted = self._store.evict(self._store.max_pages * 63 // 64 - pages)
        self._tally.add("evicted", evicted)
        return evicted > 0

    def _take_uses(self) -> dict[int, tuple[int, int]]:
        with self._changed:
            uses, self._uses = self._uses, {}
        self._uses_written = time.monotonic()
        return uses

    def _write_failed(self, error: sqlite3.Error) -> str | None:
        """Draw the consequence of an error: why the tier must be off, or None if it need not."""
        code, extended = _code(error), getattr(error, "sqlite_errorcode", 0)
        if code == sqlite3.SQLITE_BUSY:
            return None
        failing = code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY)
        if not failing or extended == sqlite3.SQLITE_IOERR_SHORT_READ:
            return self._damaged(error)
        self._no_writes = (
            f"the disk tier stores nothing any more: writing {self._path} failed ({error}; is the "
            "disk full, or is there a limit on file sizes?). What it holds is still read"
        )
        return None


def _same(one: PageRecord, other: PageRecord) -> bool:
    return one.parent == other.parent and one.tokens == other.tokens


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
