"""A session file: one conversation's pages, to go on after a restart without prefill.

The pages are bytes in a backend's own layout; what they belong to is in ``identity``. The file is
written as a whole or not at all, and nothing of it is handed out before it was verified. This
module does not know what a page holds, and it keeps no secrets: see docs/sessions.md.
"""

import os
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from quire.cache.replace import replacing
from quire.cache.session_header import (
    DIGEST_BYTES,
    PIECE_BYTES,
    Header,
    encode_header,
    lay_out,
    parse_header,
)
from quire.cache.session_source import THREADS, SessionSource, digest, opened
from quire.errors import SessionError
from quire.layout import LayerGroup, pages_for

__all__ = [
    "Expected",
    "GroupPages",
    "SessionFile",
    "SessionHeader",
    "read_header",
    "read_session",
    "verify_session",
    "write_session",
]


@dataclass(frozen=True)
class GroupPages:
    """One layer group's pages.

    first_page  the page number of ``data[0]``, counted from position 0; above 0 where a sliding
                window gave pages back
    data        uint8 ``[pages, bytes_per_page]``, in a backend's layout; of open pages also the
                last one, with a gap to the first
    """

    first_page: int
    data: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class SessionFile:
    """What a session file holds.

    identity  what computed the pages (weights digest, architecture, page format and size, ...)
    tokens    ids of the tokens whose keys and values are held, each below 2**32
    groups    one a layer group; two where pages are packed: those, and the open ones
    extra     anything that JSON can hold, for example a chat's messages; at most 1 MiB of JSON
    """

    identity: Mapping[str, str]
    tokens: tuple[int, ...]
    groups: tuple[GroupPages, ...]
    extra: Mapping[str, Any]


@dataclass(frozen=True)
class SessionHeader:
    """What a session file says of itself.

    groups      (first page, pages, bytes a page) of each layer group
    file_bytes  the size of the file
    created     when it was written, in seconds since 1970
    """

    identity: Mapping[str, str]
    extra: Mapping[str, Any]
    num_tokens: int
    groups: tuple[tuple[int, int, int], ...]
    file_bytes: int
    created: int


@dataclass(frozen=True)
class Expected:
    """What a session must be so that this engine can go on with it.

    identity    facts that must be in the file with the same values; others there do not count
    page_size   tokens a page
    groups      (bytes a page, window or None) of each layer group; one that packs its pages stands
                twice, with its packed pages and with its open ones
    max_tokens  the most tokens that can be used; bounds the memory that reading takes
    kinds       for each of ``groups``, which pages are its own: whole ones but for number 0
                ("packed"), the others ("open"), or all of them (None)
    """

    identity: Mapping[str, str]
    page_size: int
    groups: Sequence[tuple[int, int | None]]
    max_tokens: int | None = None
    kinds: Sequence[Literal["packed", "open"] | None] = ()

    def pages(self, index: int, num_tokens: int) -> tuple[int, int]:
        """(first page, pages) that group ``index`` of a file of ``num_tokens`` must hold."""
        size, kind = self.page_size, self.kinds[index] if self.kinds else None
        first = LayerGroup((), self.groups[index][1]).first_needed(num_tokens) // size
        numbers: Sequence[int] = range(first, pages_for(num_tokens, size))
        whole = range(max(1, first), num_tokens // size)
        if kind is not None:
            numbers = whole if kind == "packed" else [n for n in numbers if n not in whole]
        return (numbers[0] if numbers else first), len(numbers)


def write_session(path: Path, session: SessionFile) -> None:
    """Write ``session`` to ``path``, as a whole or not at all; an older file is replaced.

    The file has mode 0600. When this returns, it will survive a power failure. Raises
    SessionError if the session cannot be stored or the file not be written; what was at ``path``
    is then as it was, unless the message says otherwise.
    """
    header, contents = _prepare(path, session)
    try:
        with replacing(path) as file:
            _write(file, header, contents)
    except OSError as error:
        reason = error.strerror or "it could not be written in full"
        raise SessionError(
            f"cannot write session {path} ({header.data_bytes} bytes): {reason}; choose another "
            "place or make room"
        ) from error


def read_header(path: Path) -> SessionHeader:
    """What ``path`` says of itself; its pages are not read, its header is verified.

    Takes constant memory. Raises SessionError if it cannot be read or is no undamaged session.
    """
    with opened(path) as source:
        header = source.header
        return SessionHeader(
            header.identity,
            header.extra,
            header.num_tokens,
            header.groups,
            source.file.size,
            header.created,
        )


def read_session(path: Path, expected: Expected) -> SessionFile:
    """The session in ``path``, every byte verified.

    Raises SessionError, saying which fact differs and both values, if the file cannot be read, is
    damaged, or is not what ``expected`` describes.
    """
    with opened(path) as source:
        _require(source, expected)
        source.verify_table()
        try:
            tokens = np.empty(source.header.num_tokens, "<u4")
            pages = [np.empty(tensor.shape, np.uint8) for tensor in source.header.tensors[2:]]
        except (MemoryError, ValueError):
            raise SessionError(
                f"session {path} holds {source.file.size} bytes, more than memory can take; "
                "free some memory or start a new session"
            ) from None
        for tensor, target in zip(source.header.tensors[1:], (tokens, *pages), strict=True):
            source.fill(tensor, target)
    groups = zip(source.header.first_pages, pages, strict=True)
    return SessionFile(
        source.header.identity,
        tuple(tokens.tolist()),
        tuple(GroupPages(first, data) for first, data in groups),
        source.header.extra,
    )


def verify_session(path: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Compare every byte of ``path`` with its checksums, in constant memory.

    ``progress`` is called with (bytes done, bytes there are). Raises SessionError, naming the
    place, if a byte is not as it was written or if ``path`` is no session.
    """
    with opened(path) as source:
        source.verify_table()
        for tensor in source.header.tensors[1:]:
            for done in source.verify(tensor):
                if progress is not None:
                    progress(tensor.begin + done, source.header.data_bytes)


# -- writing -----------------------------------------------------------------------------------

_ByteArray = npt.NDArray[np.uint8]


def _prepare(path: Path, session: SessionFile) -> tuple[Header, list[_ByteArray]]:
    """The header of ``session`` but for its checksums, and the bytes of each tensor behind them."""
    try:
        tokens = np.array(array("I", session.tokens), "<u4")
        shapes = [_page_shape(index, group) for index, group in enumerate(session.groups)]
        header = Header(
            session.identity,
            session.extra,
            int(time.time()),
            tuple(int(group.first_page) for group in session.groups),
            "0" * 2 * DIGEST_BYTES,
            lay_out(len(tokens), shapes),
        )
        parse_header(encode_header(header)[8:])  # what would not be read is not written
    except (SessionError, ValueError, TypeError, OverflowError) as error:
        raise SessionError(
            f"cannot store this session in {path}: {error}; a session is made of token ids below "
            "2**32, uint8 pages, and an identity and extra that JSON can hold"
        ) from error
    arrays = [tokens, *(group.data for group in session.groups)]
    return header, [np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in arrays]


def _page_shape(index: int, group: GroupPages) -> tuple[int, int]:
    """(pages, bytes a page); SessionError for what is no uint8 array of pages."""
    data = group.data
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] == 0 or group.first_page < 0:
        raise SessionError(
            f"group {index} has {data.dtype} pages of shape {list(data.shape)} from page "
            f"{group.first_page} on; they must be uint8 [pages, bytes_per_page] from 0 or more"
        )
    return data.shape[0], data.shape[1]


def _write(file: int, header: Header, contents: list[_ByteArray]) -> None:
    """Data first, hashed while it is at hand; then the checksums; the header, which covers them."""
    start = len(encode_header(header))
    table = np.zeros(header.tensors[0].shape, np.uint8)

    def store(row: int, piece: memoryview, offset: int) -> None:
        table[row] = np.frombuffer(digest(piece), np.uint8)
        _write_all(file, piece, start + offset)

    with ThreadPoolExecutor(THREADS) as workers:
        for tensor, content in zip(header.tensors[1:], contents, strict=True):
            begins = range(0, tensor.nbytes, PIECE_BYTES)
            rows = range(tensor.first_row, tensor.first_row + tensor.num_pieces)
            pieces = [content[begin : begin + PIECE_BYTES].data for begin in begins]
            list(workers.map(store, rows, pieces, [tensor.begin + begin for begin in begins]))
    head = encode_header(replace(header, table_digest=digest(table[1:].data).hex()))
    table[0] = np.frombuffer(digest(head), np.uint8)
    _write_all(file, memoryview(head + table.tobytes()), 0)


def _write_all(file: int, content: memoryview, offset: int) -> None:
    done = 0
    while done < len(content):
        done += os.pwrite(file, content[done:], offset + done)


# -- what is expected --------------------------------------------------------------------------


def _require(source: SessionSource, expected: Expected) -> None:
    """Raise SessionError, with both values, unless the header is what ``expected`` describes."""
    header, path = source.header, source.file.path
    differing = [
        f"{key} is {header.identity.get(key)!r:.100} in the file and {wanted!r:.100} here"
        for key, wanted in expected.identity.items()
        if header.identity.get(key) != wanted
    ]
    if differing:
        raise SessionError(
            f"session {path} was computed by something else: {'; '.join(differing)}; use it with "
            "the model and settings that wrote it, or start a new session"
        )
    if expected.max_tokens is not None and header.num_tokens > expected.max_tokens:
        raise SessionError(
            f"session {path} holds {header.num_tokens} tokens, {expected.max_tokens} are possible "
            "here; raise the limit (context length or kv_memory) or start a new session"
        )
    if len(header.groups) != len(expected.groups):
        raise SessionError(
            f"session {path} holds {len(header.groups)} layer groups, the model has "
            f"{len(expected.groups)}; use the model that wrote it, or start a new session"
        )
    for index, (page_bytes, window) in enumerate(expected.groups):
        first, pages = expected.pages(index, header.num_tokens)
        if header.groups[index] != (first, pages, page_bytes):
            found = "{1} pages of {2} bytes from page {0} on".format(*header.groups[index])
            raise SessionError(
                f"session {path}: group {index} holds {found}, but {header.num_tokens} tokens in "
                f"pages of {expected.page_size} (window {window}) are {pages} pages of "
                f"{page_bytes} bytes from page {first} on; use the model and settings that wrote "
                "it, or start a new session"
            )
