"""Session files for tests: made by Quire, and forged by hand from what docs/sessions.md says."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quire.cache.session import Expected, GroupPages, SessionFile

IDENTITY = {
    "weights": "blake2b:00ff",
    "architecture": "LlamaForCausalLM",
    "kv_format": "bf16",
    "page_size": "16",
    "rope": "default theta 10000",
    "backend": "native avx2",
}
Groups = Sequence[tuple[int, int | None]]


def pages_of(tokens: int, page_size: int, window: int | None) -> list[int]:
    """Page numbers of tokens that the next one sees, one by one, and of a page it will share."""
    seen = [p for p in range(tokens) if window is None or tokens - p < window]
    shared = {tokens // page_size} if tokens % page_size else set()
    return sorted({position // page_size for position in seen} | shared)


def session_of(tokens: int, page_size: int, groups: Groups, seed: int = 0) -> SessionFile:
    """A session of random bytes for groups of (bytes a page, window)."""
    rng = np.random.default_rng(seed)
    made = []
    for page_bytes, window in groups:
        pages = pages_of(tokens, page_size, window)
        first = pages[0] if pages else tokens // page_size
        made.append(GroupPages(first, rng.integers(0, 256, (len(pages), page_bytes), np.uint8)))
    ids = rng.integers(0, 2**32, tokens).tolist()
    return SessionFile(IDENTITY, tuple(ids), tuple(made), {"messages": [f"seed {seed}"]})


def expected(groups: Groups, page_size: int = 16, **changed: Any) -> Expected:
    """What :func:`session_of` makes."""
    return Expected(changed.get("identity", IDENTITY), page_size, groups, changed.get("max_tokens"))


def assert_same(found: SessionFile, wanted: SessionFile) -> None:
    assert dict(found.identity) == dict(wanted.identity)
    assert found.tokens == wanted.tokens
    assert dict(found.extra) == dict(wanted.extra)
    assert len(found.groups) == len(wanted.groups)
    for one, other in zip(found.groups, wanted.groups, strict=True):
        assert one.first_page == other.first_page
        assert (one.data.dtype, one.data.shape) == (np.dtype(np.uint8), other.data.shape)
        assert one.data.tobytes() == other.data.tobytes()


@contextmanager
def without_sync() -> Iterator[None]:
    """Files are not synced: it takes most of the time, and only a power failure would tell."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda file: None)
        yield


def digest(content: bytes) -> bytes:
    return sha256(content).digest()


def facts(**changed: Any) -> dict[str, Any]:
    """The facts of a session of 16 tokens with one page of 100 bytes (see :func:`tensors`)."""
    body = forged_body()
    made = {
        "version": 1,
        "created": 1,
        "identity": IDENTITY,
        "first_pages": [0],
        "checksums": digest(digest(body[:64]) + digest(body[64:])).hex(),
        "extra": {},
    }
    return {**made, **changed}


def tensors(**changed: Any) -> dict[str, Any]:
    made = {
        "checksums": {"dtype": "U8", "shape": [3, 32], "data_offsets": [0, 96]},
        "tokens": {"dtype": "U32", "shape": [16], "data_offsets": [96, 160]},
        "group.0": {"dtype": "U8", "shape": [1, 100], "data_offsets": [160, 260]},
    }
    return {**made, **changed}


def forged_body() -> bytes:
    """Sixteen tokens and a page."""
    return np.arange(16, dtype="<u4").tobytes() + bytes(range(100))


def forge_text(path: Path, text: str | bytes) -> None:
    """A file with the header ``text`` whose checksums are all right, as an attacker would."""
    raw = text.encode() if isinstance(text, str) else text
    head = len(raw).to_bytes(8, "little") + raw
    body = forged_body()
    path.write_bytes(head + digest(head) + digest(body[:64]) + digest(body[64:]) + body)


def forge(path: Path, ours: Any, entries: dict[str, Any] | None = None) -> None:
    """A file with these facts (text as it is, else as JSON) and these tensors."""
    text = ours if isinstance(ours, str) else json.dumps(ours)
    header = {"__metadata__": {"quire.session": text}, **(entries or tensors())}
    forge_text(path, json.dumps(header))
