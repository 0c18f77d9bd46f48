"""An open session file: bytes that are handed out only after their checksum was found right.

All is read through one descriptor, so another file under the same name changes nothing. Memory is
constant but for what the caller gives to read into.
"""

import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.cache.session_header import (
    DIGEST_BYTES,
    MAX_HEADER_BYTES,
    PIECE_BYTES,
    Header,
    Tensor,
    parse_header,
)
from quire.errors import SessionError

__all__ = ["ROUND_BYTES", "THREADS", "SessionSource", "digest", "opened"]

THREADS = 2  # hashing and reading let go of the GIL
ROUND_BYTES = 16 * PIECE_BYTES  # in work at a time; the first damage in a round is the one named

_DAMAGED = "delete it, or start a new session under another name"
_NOT_OURS = "give a session's path, or start a new session under another name"


def digest(content: bytes | memoryview) -> bytes:
    """SHA-256 (FIPS 180-4), the fastest of hashlib where the processor has instructions for it."""
    return sha256(content).digest()


@contextmanager
def opened(path: Path) -> Iterator["SessionSource"]:
    """The session file at ``path`` with its header verified.

    Raises SessionError if it cannot be read, is a symbolic link, is no regular file, or if its
    header is not an undamaged session header that fits the file's size.
    """
    try:
        # O_NONBLOCK: a FIFO that nobody writes to would block for ever.
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        hint = "; a symbolic link is not followed" if path.is_symlink() else ""
        raise SessionError(
            f"cannot read session {path}: {error.strerror}{hint}; {_NOT_OURS}"
        ) from error
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise SessionError(f"{path} is no regular file and cannot hold a session; {_NOT_OURS}")
        yield _with_header(_OpenFile(path, file, status.st_size))
    finally:
        os.close(file)


@dataclass(frozen=True)
class _OpenFile:
    """The bytes of an open file of ``size`` bytes."""

    path: Path
    descriptor: int
    size: int

    def read(self, offset: int, count: int) -> bytes:
        """``count`` bytes from ``offset`` on; SessionError if they are not there."""
        content = bytearray(count)
        self.read_into(offset, memoryview(content))
        return bytes(content)

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill ``target`` from ``offset`` on; SessionError if the file ends before."""
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self.descriptor, [target[done:]], offset + done)
            except OSError as error:
                raise SessionError(
                    f"cannot read session {self.path} at byte {offset + done}: {error.strerror}; "
                    "try again, or start a new session"
                ) from error
            if count == 0:
                raise SessionError(
                    f"session {self.path} ends at byte {offset + done}: it was cut off while it "
                    "was read; try again when nothing else writes to it"
                )
            done += count


@dataclass(frozen=True)
class SessionSource:
    """An open session file whose header is verified; its data starts at byte ``start``."""

    file: _OpenFile
    start: int
    header: Header

    def verify_table(self) -> None:
        """Raise SessionError unless the checksums are those that the header was written for."""
        table = self.header.tensors[0]
        hasher = sha256()
        for begin in range(DIGEST_BYTES, table.nbytes, PIECE_BYTES):
            count = min(PIECE_BYTES, table.nbytes - begin)
            hasher.update(self.file.read(self.start + begin, count))
        if hasher.hexdigest() != self.header.table_digest:
            raise SessionError(f"session {self.file.path} is damaged in its checksums; {_DAMAGED}")

    def fill(self, tensor: Tensor, target: npt.NDArray[Any]) -> None:
        """Read ``tensor`` into ``target`` (contiguous, of its size) and verify it.

        Raises SessionError at the first damaged piece.
        """
        content = target.reshape(-1).view(np.uint8)
        with ThreadPoolExecutor(THREADS) as workers:
            for begin, end in _rounds(tensor):
                self._read_round(tensor, begin, content[begin:end], workers)

    def verify(self, tensor: Tensor) -> Iterator[int]:
        """Verify ``tensor``; yields after each round how many of its bytes are done.

        Raises SessionError at the first damaged piece.
        """
        buffer = np.empty(min(ROUND_BYTES, tensor.nbytes), np.uint8)
        with ThreadPoolExecutor(THREADS) as workers:
            for begin, end in _rounds(tensor):
                self._read_round(tensor, begin, buffer[: end - begin], workers)
                yield end

    def _read_round(
        self,
        tensor: Tensor,
        begin: int,
        target: npt.NDArray[np.uint8],
        workers: ThreadPoolExecutor,
    ) -> None:
        starts = range(0, len(target), PIECE_BYTES)
        pieces = [target[start : start + PIECE_BYTES].data for start in starts]
        places = [begin + start for start in starts]
        list(workers.map(self._read_piece, [tensor] * len(pieces), places, pieces))

    def _read_piece(self, tensor: Tensor, begin: int, piece: memoryview) -> None:
        """Read and verify the piece of ``tensor`` that starts at its byte ``begin``."""
        row = tensor.first_row + begin // PIECE_BYTES
        wanted = self.file.read(self.start + row * DIGEST_BYTES, DIGEST_BYTES)
        self.file.read_into(self.start + tensor.begin + begin, piece)
        if digest(piece) != wanted:
            raise SessionError(
                f"session {self.file.path} is damaged: bytes {begin} to "
                f"{begin + len(piece) - 1} of {tensor.name} are not what was written; {_DAMAGED}"
            )


def _rounds(tensor: Tensor) -> Iterator[tuple[int, int]]:
    for begin in range(0, tensor.nbytes, ROUND_BYTES):
        yield begin, min(begin + ROUND_BYTES, tensor.nbytes)


def _with_header(source: _OpenFile) -> SessionSource:
    """Raise SessionError unless ``source`` begins with a session's header and has its size."""
    path, least = source.path, 8 + DIGEST_BYTES
    if source.size < least:
        raise SessionError(f"{path} is no session file: it has {source.size} bytes; {_NOT_OURS}")
    start = 8 + int.from_bytes(source.read(0, 8), "little")
    if start > min(8 + MAX_HEADER_BYTES, source.size - DIGEST_BYTES):
        raise SessionError(
            f"{path} is no session file or was cut off: it has {source.size} bytes, its first 8 "
            f"ask for a header of {start - 8} (at most {MAX_HEADER_BYTES}); {_NOT_OURS}"
        )
    head = source.read(0, start)
    if digest(head) != source.read(start, DIGEST_BYTES):
        raise SessionError(f"{path} is no session file, or its header is damaged; {_NOT_OURS}")
    try:
        header = parse_header(head[8:])
    except (SessionError, ValueError) as error:
        raise SessionError(f"{path} is no usable session file: {error}; {_NOT_OURS}") from None
    if start + header.data_bytes != source.size:
        raise SessionError(
            f"session {path} has {source.size} bytes instead of {start + header.data_bytes}: it "
            f"was cut off or something was added; {_DAMAGED}"
        )
    return SessionSource(source, start, header)
