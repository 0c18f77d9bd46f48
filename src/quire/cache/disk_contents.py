"""What a disk store holds, for people: prefixes, checks, pruning. Reading changes nothing.

Pages form chains by digests; a prefix is listed for each page that no other page continues.
"""

import contextlib
import sqlite3
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.cache.disk_file import PAGE_SIZE, check_store, connect, find_store, store_bytes
from quire.cache.disk_format import MAX_PAYLOAD, read_facts, verified
from quire.cache.disk_store import MIN_BUDGET, StoreWriter
from quire.errors import TierError

__all__ = ["Damage", "HeldIdentity", "HeldPrefix", "StoreContents", "open_contents", "prune_store"]

_DIGEST_BYTES = 32


@dataclass(frozen=True)
class HeldPrefix:
    """One chain of pages, from the first that is held to one that no other continues.

    tokens      token ids of the pages that are held, in order
    start       position of the first of them; above 0 if the pages before it are gone
    pages       records of the chain, all layer groups; chains share their common pages
    bytes       their payloads on disk
    raw_bytes   their payloads unpacked
    created     when the newest was written, seconds since 1970
    used        when one was last used
    hits        the most that any one was read back
    """

    tokens: tuple[int, ...]
    start: int
    pages: int
    bytes: int
    raw_bytes: int
    created: int
    used: int
    hits: int


@dataclass(frozen=True)
class HeldIdentity:
    """What one identity has in the store; ``prefixes`` most recently used first."""

    facts: dict[str, str]
    pages: int
    bytes: int
    raw_bytes: int
    prefixes: tuple[HeldPrefix, ...]


@dataclass(frozen=True)
class Damage:
    """A record that does not verify, or a part of the file that cannot be read."""

    what: str
    why: str


@dataclass(slots=True)
class _Node:
    """The records of one page: one in each layer group."""

    parent: bytes
    tokens: bytes
    depth: int
    pages: int = 0
    bytes: int = 0
    raw_bytes: int = 0
    created: int = 0
    used: int = 0
    hits: int = 0


@contextlib.contextmanager
def open_contents(directory: Path) -> "Iterator[StoreContents]":
    """The store in ``directory``, for reading; other processes may go on using it.

    Raises TierError if there is none, it is not ours, or it is too damaged to be read.
    """
    path = find_store(directory)
    try:
        db = _open(path)
        with contextlib.closing(db):
            damage = check_store(db, path)
            if damage is not None:
                raise TierError(_unusable(path, damage))
            yield StoreContents(db, path)
    except sqlite3.Error as error:
        raise TierError(_unusable(path, error)) from error


def _unusable(path: Path, why: object) -> str:
    return f"{path} cannot be used ({why}); if it is damaged, move it away or delete it"


def _open(path: Path) -> sqlite3.Connection:
    """Read-only, unless a killed writer left a half-done write that must be undone first."""
    db = connect(path, "ro")
    try:
        db.execute("SELECT 1 FROM sqlite_master").fetchall()
        return db
    except sqlite3.Error as error:
        db.close()
        if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
            raise
    db = connect(path, "rw")
    db.execute("PRAGMA query_only=ON")
    return db


class StoreContents:
    """A store that is being read; see :func:`open_contents`."""

    def __init__(self, db: sqlite3.Connection, path: Path) -> None:
        self._db = db
        self.path = path

    @property
    def file_bytes(self) -> int:
        """Bytes of the store's files."""
        return store_bytes(self.path)

    def count(self) -> int:
        """Records held."""
        return int(self._db.execute("SELECT count(*) FROM page").fetchone()[0])

    def identities(self) -> list[HeldIdentity]:
        """Every identity that holds something."""
        rows = self._db.execute("SELECT id, facts FROM identity ORDER BY id").fetchall()
        found = [self._identity(row_id, read_facts(facts)) for row_id, facts in rows]
        return [identity for identity in found if identity.pages]

    def _identity(self, row_id: int, facts: dict[str, str]) -> HeldIdentity:
        nodes = self._nodes(row_id)
        continued = {node.parent for node in nodes.values()}
        prefixes = [_prefix(nodes, digest) for digest in nodes if digest not in continued]
        prefixes.sort(key=lambda prefix: (-prefix.used, prefix.tokens))
        return HeldIdentity(
            facts,
            sum(node.pages for node in nodes.values()),
            sum(node.bytes for node in nodes.values()),
            sum(node.raw_bytes for node in nodes.values()),
            tuple(prefixes),
        )

    def _nodes(self, identity: int) -> dict[bytes, _Node]:
        """The pages of an identity by digest. Rows of impossible types are left to verify()."""
        nodes: dict[bytes, _Node] = {}
        rows = self._db.execute(
            "SELECT key, parent, tokens, page.depth, length(data), size, created, used, hits "
            "FROM page JOIN payload ON payload.id = page.id JOIN recency ON recency.id = page.id "
            "WHERE identity = ?",
            (identity,),
        )
        for row in rows:
            key, parent, tokens, depth, *numbers = row
            possible = all(isinstance(blob, bytes) for blob in (key, parent, tokens))
            if not possible or not all(isinstance(n, int) and n >= 0 for n in (depth, *numbers)):
                continue
            node = nodes.setdefault(key[:_DIGEST_BYTES], _Node(parent, tokens, depth))
            packed, size, created, used, hits = numbers
            node.pages += 1
            node.bytes += packed
            node.raw_bytes += min(size, MAX_PAYLOAD)
            node.created, node.used = max(node.created, created), max(node.used, used)
            node.hits = max(node.hits, hits)
        return nodes

    def verify(self) -> Iterator[Damage | None]:
        """Check every record: one item for each, None if it is as it was stored.

        What the file itself cannot give back is one more item, the last.
        """
        try:
            digests = dict(self._db.execute("SELECT id, digest FROM identity"))
            last = -(2**63)
            while (row := self._next_row(last)) is not None:
                last = row[0]
                yield self._check(row, digests)
        except sqlite3.Error as error:
            yield Damage(str(self.path), f"the database is damaged: {error}")

    def _next_row(self, last: int) -> tuple[Any, ...] | None:
        row: tuple[Any, ...] | None = self._db.execute(
            "SELECT id, identity, key, parent, tokens, depth, element, codec, size, checksum "
            "FROM page WHERE id > ? ORDER BY id LIMIT 1",
            (last,),
        ).fetchone()
        return row

    def _check(self, row: tuple[Any, ...], digests: dict[int, bytes]) -> Damage | None:
        row_id, identity, key, *fields = row
        name = f"record {row_id}, depth {row[5]}"
        try:
            data = self._db.execute("SELECT data FROM payload WHERE id = ?", (row_id,)).fetchone()
            verified(digests.get(identity, b""), (key, *fields, *(data or (None,))))
        except sqlite3.DataError as error:
            return Damage(name, str(error))
        except TierError as error:
            return Damage(name, str(error))
        by_key = "SELECT id FROM page INDEXED BY page_key WHERE identity = ? AND key = ?"
        if self._db.execute(by_key, (identity, key)).fetchone() != (row_id,):
            return Damage(name, "the index of keys does not lead to it")
        return None


def _prefix(nodes: dict[bytes, _Node], leaf: bytes) -> HeldPrefix:
    chain = [nodes[leaf]]
    seen = {leaf}
    while (parent := chain[-1].parent) in nodes and parent not in seen:  # a damaged one may loop
        seen.add(parent)
        chain.append(nodes[parent])
    chain.reverse()
    tokens = tuple(token for node in chain for token in _ids(node.tokens))
    return HeldPrefix(
        tokens,
        chain[0].depth * len(_ids(chain[0].tokens)),
        sum(node.pages for node in chain),
        sum(node.bytes for node in chain),
        sum(node.raw_bytes for node in chain),
        max(node.created for node in chain),
        max(node.used for node in chain),
        max(node.hits for node in chain),
    )


def _ids(tokens: bytes) -> tuple[int, ...]:
    count = len(tokens) // 4
    return struct.unpack(f"<{count}I", tokens[: 4 * count])


def prune_store(directory: Path, most_bytes: int) -> int:
    """Delete the least recently used until the file is at most ``most_bytes``; 0 deletes all.

    The file shrinks. Returns the records deleted. An empty store still takes some 150 KB.
    Raises TierError if there is no store, or it cannot be written.
    """
    path = find_store(directory)
    store = StoreWriter(path, max(store_bytes(path), MIN_BUDGET))  # bounds the journal, too
    try:
        if store.damage is not None:
            raise TierError(_unusable(path, store.damage))
        return store.trim(most_bytes // PAGE_SIZE)
    except sqlite3.Error as error:
        raise TierError(_unusable(path, error)) from error
    finally:
        store.close()
