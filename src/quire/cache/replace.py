"""Replace a file as a whole: whoever opens it sees the old content or the new, never a part.

A crash at any moment leaves one of the two. What a killed process had begun to write is removed by
the next one that replaces a file in the same directory.
"""

import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from quire.errors import SessionError

__all__ = ["replacing"]

_UNFINISHED = re.compile(r"\.quire-[0-9a-f]{16}\.tmp")


@contextmanager
def replacing(path: Path) -> Iterator[int]:
    """A descriptor of a new file that takes the place of ``path`` when the block ends.

    The new file can be read and written by its owner only (mode 0600). It is synced, renamed, and
    its directory is synced. If anything raises before the rename, it is removed and ``path`` is
    as it was. Raises OSError; SessionError if ``path`` is there and is not a regular file.
    """
    _require_replaceable(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _remove_abandoned(directory)
        name, file = _create(directory)
        try:
            yield file
            os.fsync(file)
            os.rename(name, path.name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            with suppress(OSError):
                os.unlink(name, dir_fd=directory)
            raise
        finally:
            os.close(file)
        _sync_directory(directory)
    finally:
        os.close(directory)


def _require_replaceable(path: Path) -> None:
    with suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a symbolic link" if stat.S_ISLNK(mode) else "no regular file"
            raise SessionError(f"cannot replace {path}: it is {kind}; choose another place")


def _sync_directory(directory: int) -> None:
    try:
        os.fsync(directory)
    except OSError as error:
        raise SessionError(
            f"the new file is there, but may be lost with power ({error.strerror}); save it again"
        ) from error


def _create(directory: int) -> tuple[str, int]:
    """A new, locked file: the lock tells others that its writer lives."""
    while True:
        name = f".quire-{secrets.token_hex(8)}.tmp"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        file = os.open(name, flags, 0o600, dir_fd=directory)
        with suppress(OSError):  # where files cannot be locked, none is ever taken for abandoned
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file).st_nlink:
            return name, file
        os.close(file)  # taken for abandoned between its creation and its lock


def _remove_abandoned(directory: int) -> None:
    for name in os.listdir(directory):
        if _UNFINISHED.fullmatch(name):
            with suppress(OSError):  # another's, or gone, or its writer lives
                _remove_unless_locked(name, directory)


def _remove_unless_locked(name: str, directory: int) -> None:
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = os.open(name, flags, dir_fd=directory)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(name, dir_fd=directory)
    finally:
        os.close(file)
