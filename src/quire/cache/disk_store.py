"""Changing the file of the disk tier: an SQLite database whose size never passes a budget.

Not knowing of queues or threads: one :class:`StoreWriter` is one connection, used by one thread.
Rollback journal, not WAL: the journal holds only the few index pages that a transaction changes
(freed pages are not journaled, payloads go to free pages), so that its size has a small bound,
while a WAL would hold every payload a second time. docs/tiers.md has the reasons and figures.
"""

import contextlib
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from quire.cache.disk_file import (
    LOCK_SECONDS,
    PAGE_SIZE,
    check_store,
    connect,
    journal_of,
    pragma,
    text_of,
)
from quire.cache.disk_format import (
    APPLICATION_ID,
    FORMAT_VERSION,
    SCHEMA,
    PackedPage,
    identity_digest,
    identity_facts,
)
from quire.cache.tiers import PageRecord
from quire.errors import TierError

__all__ = ["MIN_BUDGET", "StoreWriter", "pages_needed"]

MIN_BUDGET = 8 << 20
SYNCHRONOUS = "FULL"  # also a power cut leaves every commit and an undamaged file

# Journal: one operation changes fewer pages than this (four B-trees, three siblings and a parent
# on each level, freelist, pointer map); after each one it is seen whether another one still fits.
_OPERATION_PAGES = 48
_MIN_RESERVE, _MAX_RESERVE = 3 << 19, 32 << 20
_VICTIMS_A_TRANSACTION = 256
_IDENTITY_PAGES = 16  # more than writing an identity can take

# Errors at opening that the user can do something about; the others are damage or a full disk.
_REFUSED = (
    *(sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM),
    sqlite3.SQLITE_BUSY,
)


class StoreWriter:
    """The connection that changes a store. Used by one thread at a time.

    path       of the database; created if it is not there
    budget     bytes that database and journal together stay under at every moment, if they did
               when it was opened; else :meth:`trim` it to ``max_pages``

    Raises TierError for a file that is not ours or cannot be written. If it is damaged, or the disk
    is full, ``damage`` says so, and nothing may be done but :meth:`close`.
    """

    def __init__(self, path: Path, budget: int) -> None:
        reserve = min(max(budget // 8, _MIN_RESERVE), _MAX_RESERVE)
        self._reserve = reserve
        self.limit(budget)
        self._journal = journal_of(path)
        self._journal_limit = reserve - _OPERATION_PAGES * (PAGE_SIZE + 8)
        try:
            self._db = connect(path, "rwc")
        except sqlite3.Error as error:
            raise TierError(_cannot_open(path, error)) from error
        try:
            self.damage = self._set_up(path)
        except sqlite3.Error as error:
            self.damage = str(error)
            if _code(error) in _REFUSED:
                self._db.close()
                raise TierError(_cannot_open(path, error)) from error
        except TierError:
            self._db.close()
            raise

    def limit(self, budget: int) -> None:
        """From now on keep to ``budget`` bytes, at most what the store was opened with."""
        self.max_pages = max(budget - self._reserve, 0) // PAGE_SIZE

    def _set_up(self, path: Path) -> str | None:
        """Create or check the database and its settings; what is damaged, or None."""
        for new in (f"page_size={PAGE_SIZE}", "auto_vacuum=INCREMENTAL"):
            self._db.execute(f"PRAGMA {new}")
        with self.transaction():
            empty = not list(self._db.execute("SELECT 1 FROM sqlite_master LIMIT 1"))
            if empty and pragma(self._db, "application_id") == 0:
                for sql in SCHEMA.values():
                    self._db.execute(sql)
                self._db.execute(f"PRAGMA application_id={APPLICATION_ID}")
                self._db.execute(f"PRAGMA user_version={FORMAT_VERSION}")
        damage = check_store(self._db, path)
        if damage is not None:
            return damage
        if text_of(self._db.execute("PRAGMA journal_mode=TRUNCATE").fetchone()[0]) != "truncate":
            return "its journal mode cannot be set"
        self._db.execute(f"PRAGMA synchronous={SYNCHRONOUS}")
        # Off, a freed page is neither wiped nor journaled. Some builds of SQLite have it on.
        self._db.execute("PRAGMA secure_delete=OFF")
        self._db.execute(f"PRAGMA max_page_count={max(self.max_pages, 1)}")
        return None

    def close(self) -> None:
        """Close the connection."""
        self._db.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit at the end, roll back on an exception; nobody else writes in between."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise

    def identity_id(self, identity: Mapping[str, str]) -> int:
        """The number that rows of ``identity`` have in this store; written if it is new."""
        digest, facts = identity_digest(identity), identity_facts(identity)
        sql = "SELECT id, facts FROM identity WHERE digest = ?"
        row = self._db.execute(sql, (digest,)).fetchone()
        if row is None or row[1] != facts:
            self.evict(self.max_pages - _IDENTITY_PAGES)
            upsert = (
                "INSERT INTO identity (digest, facts) VALUES (?, ?) "
                "ON CONFLICT (digest) DO UPDATE SET facts = excluded.facts"
            )
            with self.transaction():
                self._db.execute(upsert, (digest, facts))
            row = self._db.execute(sql, (digest,)).fetchone()
        return int(row[0])

    def clashes(self, identity: int, records: Sequence[PageRecord]) -> list[bytes]:
        """Keys of ``records`` under which something else is held."""
        sql = "SELECT parent, tokens FROM page WHERE identity = ? AND key = ?"
        found = []
        for record in records:
            row = self._db.execute(sql, (identity, record.key)).fetchone()
            if row is not None and row != (record.parent, record.tokens):
                found.append(record.key)
        return found

    def insert(self, identity: int, pages: Sequence[PackedPage], now: int) -> tuple[int, int]:
        """Write the first of ``pages`` for which there is room, in one transaction.

        ``now`` is the second in which they are used.

        Returns how many are done with and how many of those are new: what is held already is
        marked as used. (0, 0) asks for :meth:`evict`.
        """
        new = 0
        with self.transaction():
            for done, page in enumerate(pages):
                free = self.max_pages - self._filled_pages()
                if free < pages_needed(page) or (done and self._journal_full()):
                    return done, new
                new += self._insert_one(identity, page, now)
        return len(pages), new

    def _insert_one(self, identity: int, page: PackedPage, now: int) -> bool:
        record = page.record
        made = self._db.execute(
            "INSERT INTO page (identity, key, parent, tokens, depth, element, codec, size, "
            "created, checksum) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            (
                *(identity, record.key, record.parent, record.tokens, record.depth),
                *(record.element, page.codec, page.size, now, page.checksum),
            ),
        )
        if made.rowcount < 1:  # held already
            self._db.execute(
                "UPDATE recency SET used = max(used, ?) WHERE id = "
                "(SELECT id FROM page WHERE identity = ? AND key = ?)",
                (now, identity, record.key),
            )
            return False
        self._db.execute(
            "INSERT OR REPLACE INTO payload VALUES (?, ?)", (made.lastrowid, page.packed)
        )
        self._db.execute(
            "INSERT OR REPLACE INTO recency VALUES (?, ?, ?, 0)",
            (made.lastrowid, now, record.depth),
        )
        return True

    def evict(self, most_pages: int) -> int:
        """Delete records, the least recently used first, until at most so many pages are filled.

        Returns how many were deleted, in one transaction; call it again if they are not enough.
        """
        deleted = 0
        with self.transaction():
            victims = self._db.execute(
                "SELECT id FROM recency ORDER BY used, depth DESC, id LIMIT ?",
                (_VICTIMS_A_TRANSACTION,),
            ).fetchall()
            for (row_id,) in victims:
                if self._filled_pages() <= most_pages or self._journal_full():
                    break
                deleted += self._delete(row_id)
        return deleted

    def remove(self, identity: int, keys: Sequence[bytes]) -> None:
        """Delete what is held under ``keys``."""
        left = list(keys)
        while left:
            with self.transaction():
                while left and not self._journal_full():
                    found = self._db.execute(
                        "SELECT id FROM page WHERE identity = ? AND key = ?", (identity, left.pop())
                    ).fetchone()
                    if found is not None:
                        self._delete(found[0])

    def _delete(self, row_id: int) -> int:
        for table in ("page", "payload"):
            self._db.execute(f"DELETE FROM {table} WHERE id = ?", (row_id,))
        return self._db.execute("DELETE FROM recency WHERE id = ?", (row_id,)).rowcount

    def touch(self, uses: Mapping[int, tuple[int, int]]) -> None:
        """Note for each row id (second of the last use, number of uses)."""
        left = sorted(uses.items(), reverse=True)  # neighbours share pages
        while left:
            with self.transaction():
                while left and not self._journal_full():
                    row_id, (second, count) = left.pop()
                    self._db.execute(
                        "UPDATE recency SET used = max(used, ?), hits = hits + ? WHERE id = ?",
                        (second, count, row_id),
                    )

    def trim(self, most_pages: int) -> int:
        """Evict and shrink the file until it has at most so many pages; returns records deleted."""
        deleted = 0
        while self._filled_pages() > most_pages:
            batch = self.evict(most_pages)
            deleted += batch
            if not batch:
                break
        while self._shrink(most_pages):
            pass
        return deleted

    def _shrink(self, most_pages: int) -> int:
        """Move pages from the end of the file to free ones, in one transaction; returns how many.

        0: it has at most ``most_pages``, or there are no free ones.
        """
        if pragma(self._db, "page_count") <= most_pages:
            return 0
        with self.transaction():
            before = size = pragma(self._db, "page_count")
            while size > most_pages and not self._journal_full():
                self._db.execute("PRAGMA incremental_vacuum(1)")
                now = pragma(self._db, "page_count")
                if now >= size:
                    break
                size = now
        return before - size

    def _filled_pages(self) -> int:
        return pragma(self._db, "page_count") - pragma(self._db, "freelist_count")

    def _journal_full(self) -> bool:
        try:
            return self._journal.stat().st_size >= self._journal_limit
        except FileNotFoundError:
            return False


def pages_needed(page: PackedPage) -> int:
    """SQLite pages that a record takes at most, splits of the indices included."""
    payload = len(page.packed) + len(page.record.tokens)
    return payload // (PAGE_SIZE - 64) + payload // (1000 * PAGE_SIZE) + 16


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


def _cannot_open(path: Path, error: sqlite3.Error) -> str:
    if _code(error) == sqlite3.SQLITE_BUSY:
        return (
            f"{path} has been locked by another process for {LOCK_SECONDS:.0f} s; end that process "
            "or choose another cache directory"
        )
    return f"{path} cannot be written ({error}); give a cache directory that this user may write"
