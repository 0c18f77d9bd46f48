"""The file of the disk tier, from a reader's side: finding, opening, checking, looking up.

Never open the file but through SQLite: closing another descriptor drops the process's locks on it.
"""

import contextlib
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from quire.cache.disk_format import APPLICATION_ID, FORMAT_VERSION, MAX_PAYLOAD, SCHEMA
from quire.cache.tiers import PageRecord
from quire.errors import TierError

__all__ = [
    "LOCK_SECONDS",
    "PAGE_SIZE",
    "STORE_NAME",
    "Readers",
    "check_store",
    "connect",
    "find_store",
    "find_wanted",
    "journal_of",
    "pragma",
    "present",
    "store_bytes",
    "text_of",
]

STORE_NAME = "quire-pages.sqlite"
PAGE_SIZE = 16384  # bytes of a page of SQLite's; docs/tiers.md compares others
LOCK_SECONDS = 10.0  # a lock is held for milliseconds, unless the machine stands still
_READ_LOCK_SECONDS = 1.0

_KEYS_A_QUERY = 500

_PRAGMAS = (
    "trusted_schema=OFF",
    "cell_size_check=ON",
    "mmap_size=0",  # a damaged or cut file is then an error code, never a signal
    "temp_store=MEMORY",
    "cache_spill=OFF",  # memory is bounded by the batch; readers wait at the commit only
)

_FIND = (
    "SELECT page.id, key, parent, tokens, depth, element, codec, size, checksum, data "
    "FROM page LEFT JOIN payload ON payload.id = page.id "
)


def find_store(directory: Path, *, create: bool = False) -> Path:
    """The path of the store in ``directory``, which is made (for its owner only) if asked for.

    Raises TierError if ``directory`` is not one, or the store is there and no plain file.
    """
    try:
        if create:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = directory / STORE_NAME
        for file in (path, journal_of(path)):
            if file.is_symlink() or (file.exists() and not file.is_file()):
                raise TierError(
                    f"{file} is no plain file (symbolic links are not followed); remove it or "
                    "choose another cache directory"
                )
        if not directory.is_dir():
            raise TierError(f"there is no cache directory at {directory}")
    except OSError as error:
        raise TierError(
            f"{directory} cannot be a cache directory: {error.strerror}; choose another one"
        ) from error
    if not create and not path.exists():
        raise TierError(f"{directory} holds no cache: there is no {STORE_NAME} in it")
    return path


def store_bytes(path: Path) -> int:
    """Bytes of the store's files now, journal included."""
    total = 0
    for file in (path, journal_of(path)):
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


def connect(
    path: Path, mode: Literal["ro", "rw", "rwc"], lock_seconds: float = LOCK_SECONDS
) -> sqlite3.Connection:
    """A connection with safe settings and no implicit transactions; TEXT comes as bytes.

    May be used by one thread at a time. ``rwc`` creates the file.
    """
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    db = sqlite3.connect(
        uri, uri=True, isolation_level=None, timeout=lock_seconds, check_same_thread=False
    )
    db.text_factory = bytes
    db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_PAYLOAD + 4096)
    try:
        for pragma in _PRAGMAS:
            db.execute(f"PRAGMA {pragma}")
    except sqlite3.Error:
        db.close()
        raise
    return db


def check_store(db: sqlite3.Connection, path: Path) -> str | None:
    """What is damaged in the header or the schema; None if nothing is.

    Raises TierError for a database that is not ours or of another format, and sqlite3.Error for
    one that SQLite cannot read.
    """
    made = {
        text_of(name): text_of(sql)
        for name, sql in db.execute("SELECT name, sql FROM sqlite_master WHERE sql NOT NULL")
    }
    application, version = pragma(db, "application_id"), pragma(db, "user_version")
    if made != SCHEMA and application != APPLICATION_ID:
        raise TierError(
            f"{path} is an SQLite database of another program; choose another cache directory"
        )
    if version != FORMAT_VERSION and made != SCHEMA:
        raise TierError(
            f"{path} has format {version} and this version of Quire reads {FORMAT_VERSION}; "
            "choose another cache directory or delete the file"
        )
    expected = (APPLICATION_ID, FORMAT_VERSION, PAGE_SIZE, 2)
    facts = (application, version, pragma(db, "page_size"), pragma(db, "auto_vacuum"))
    return None if made == SCHEMA and facts == expected else "its header or schema is damaged"


def present(db: sqlite3.Connection, identity: int, keys: Sequence[bytes]) -> set[bytes]:
    """Those of ``keys`` that are held for an identity."""
    found: set[bytes] = set()
    for start in range(0, len(keys), _KEYS_A_QUERY):
        some = keys[start : start + _KEYS_A_QUERY]
        marks = ",".join("?" * len(some))
        sql = f"SELECT key FROM page WHERE identity = ? AND key IN ({marks})"
        found.update(key for (key,) in db.execute(sql, (identity, *some)))
    return found


def find_wanted(
    db: sqlite3.Connection, identity: int, record: PageRecord
) -> tuple[Any, ...] | None:
    """The id, then the row (see :func:`disk_format.verified`), with this key, parent and tokens."""
    sql = _FIND + "WHERE identity = ? AND key = ? AND parent = ? AND tokens = ?"
    wanted = (identity, record.key, record.parent, record.tokens)
    row: tuple[Any, ...] | None = db.execute(sql, wanted).fetchone()
    return row


class Readers:
    """Connections for reading; each is used by one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._idle: list[sqlite3.Connection] = []
        self._closed = False

    @contextlib.contextmanager
    def take(self) -> Iterator[sqlite3.Connection]:
        """A connection for the block; one that raised is not used again."""
        with self._lock:
            db = self._idle.pop() if self._idle else None
        if db is None:  # not read-only: the first reader after a crash must undo what was half done
            db = connect(self._path, "rw", _READ_LOCK_SECONDS)
            db.execute("PRAGMA query_only=ON")
        try:
            yield db
        except BaseException:
            db.close()
            raise
        with self._lock:
            if not self._closed:
                self._idle.append(db)
                return
        db.close()

    def close(self) -> None:
        """Close every connection; one that is in use, when it comes back."""
        with self._lock:
            self._closed = True
            for db in self._idle:
                db.close()
            self._idle.clear()


def pragma(db: sqlite3.Connection, name: str) -> int:
    """The value of an integer pragma."""
    return int(db.execute(f"PRAGMA {name}").fetchone()[0])


def text_of(value: object) -> object:
    """What SQLite gave as TEXT, decoded; anything else as it is."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def journal_of(path: Path) -> Path:
    """The rollback journal of a database."""
    return path.with_name(path.name + "-journal")
