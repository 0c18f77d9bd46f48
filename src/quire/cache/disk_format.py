"""What one record of the disk tier looks like, and what is checked before it is believed.

Nothing here opens a file. A row comes from a file that may be damaged or made by an enemy, so that
every field is checked for its type and size, then the checksum, and only then is it unpacked.
"""

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quire.cache.payload import pack, unpack
from quire.cache.tiers import PageRecord
from quire.errors import TierError

__all__ = [
    "APPLICATION_ID",
    "FORMAT_VERSION",
    "MAX_PAYLOAD",
    "SCHEMA",
    "PackedPage",
    "identity_digest",
    "identity_facts",
    "pack_page",
    "read_facts",
    "verified",
]

APPLICATION_ID = 0x51756952  # "QuiR", in bytes 68 to 71 of the file
FORMAT_VERSION = 1  # SQLite's user_version

MAX_PAYLOAD = 128 << 20  # bytes of one page; rows that claim more are damaged

# The payload is apart from what describes it, and what changes with every use is apart from both:
# a use rewrites a few bytes, and a list of what is held reads no payloads. hits, used: see recency.
SCHEMA = {
    "identity": "CREATE TABLE identity (id INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, "
    "facts BLOB NOT NULL)",
    "page": "CREATE TABLE page (id INTEGER PRIMARY KEY, identity INTEGER NOT NULL, "
    "key BLOB NOT NULL, parent BLOB NOT NULL, tokens BLOB NOT NULL, depth INTEGER NOT NULL, "
    "element INTEGER NOT NULL, codec INTEGER NOT NULL, size INTEGER NOT NULL, "
    "created INTEGER NOT NULL, checksum BLOB NOT NULL)",
    "page_key": "CREATE UNIQUE INDEX page_key ON page (identity, key)",
    "payload": "CREATE TABLE payload (id INTEGER PRIMARY KEY, data BLOB NOT NULL)",
    "recency": "CREATE TABLE recency (id INTEGER PRIMARY KEY, used INTEGER NOT NULL, "
    "depth INTEGER NOT NULL, hits INTEGER NOT NULL)",
}

_NUMBERS = struct.Struct("<5q")


@dataclass(frozen=True, slots=True)
class PackedPage:
    """A record as it is stored: ``packed`` are the bytes on disk, ``size`` those it unpacks to."""

    record: PageRecord
    codec: int
    size: int
    packed: bytes
    checksum: bytes


def identity_facts(identity: Mapping[str, str]) -> bytes:
    """``identity`` as canonical JSON."""
    return json.dumps(dict(identity), sort_keys=True, ensure_ascii=False).encode()


def read_facts(facts: object) -> dict[str, str]:
    """An identity from a row; empty if it is not a JSON object of texts."""
    try:
        found = json.loads(facts if isinstance(facts, bytes) else b"")
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, str)}


def identity_digest(identity: Mapping[str, str]) -> bytes:
    """32 bytes that name what computed the pages; ``model``, a name for people, is left out."""
    facts = {key: value for key, value in identity.items() if key != "model"}
    return hashlib.sha256(identity_facts(facts)).digest()


def pack_page(identity: bytes, record: PageRecord, payload: bytes) -> PackedPage:
    """``payload`` packed, with a checksum that also covers the record and the identity."""
    codec, packed = pack(payload, record.element)
    check = _checksum(identity, record, codec, len(payload), packed)
    return PackedPage(record, codec, len(payload), packed, check)


def verified(identity: bytes, row: Sequence[Any]) -> tuple[PageRecord, bytes]:
    """The record and the payload of ``row``: key, parent, tokens, depth, element, codec, size,
    checksum, packed payload.

    Raises TierError, saying what is wrong, unless every field is possible and the checksum is
    right. Allocates no more than the packed and the unpacked payload, each below MAX_PAYLOAD.
    """
    key, parent, tokens, depth, element, codec, size, checksum, packed = row
    blobs, numbers = (key, parent, tokens, checksum, packed), (depth, element, codec, size)
    if not all(isinstance(blob, bytes) for blob in blobs):
        raise TierError("a field of the record is not bytes")
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise TierError("a number of the record is negative or none")
    if size > MAX_PAYLOAD:
        raise TierError(f"the record claims a payload of {size} bytes; the most is {MAX_PAYLOAD}")
    record = PageRecord(key, parent, tokens, depth, element)
    if _checksum(identity, record, codec, size, packed) != checksum:
        raise TierError("the record's checksum is wrong")
    return record, unpack(codec, packed, size)


def _checksum(identity: bytes, record: PageRecord, codec: int, size: int, packed: bytes) -> bytes:
    """16 bytes of SHA-256, which processors have instructions for."""
    digest = hashlib.sha256()
    for blob in (identity, record.key, record.parent, record.tokens):
        digest.update(len(blob).to_bytes(8, "little"))
        digest.update(blob)
    digest.update(_NUMBERS.pack(record.depth, record.element, codec, size, len(packed)))
    digest.update(packed)
    return digest.digest()[:16]
