"""What names a checkpoint's weights: a digest of everything in its safetensors files."""

import contextlib
import hashlib
import json
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from quire.errors import CheckpointError

__all__ = ["weights_digest"]

PIECE = 64 * 2**20
READ = 2**20
REMEMBERED = 256  # files whose digests are kept in ``memo``


def weights_digest(files: Sequence[Path], memo: Path | None = None) -> str:
    """SHA-256, in hex, over the digests of ``files``, in order.

    ``memo`` is a file that remembers them, so that weights are read once and not at every start:
    under device, inode, size, and the times of the last change of content and of inode, which is
    what tells a file that was changed. Raises CheckpointError for a file that cannot be read.
    """
    known = {} if memo is None else _recall(memo)
    names = [_name(path) for path in files]
    digests = [
        known.get(name) or _file_digest(path) for name, path in zip(names, files, strict=True)
    ]
    if memo is not None and any(name not in known for name in names):
        _remember(memo, known | dict(zip(names, digests, strict=True)))
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _name(path: Path) -> str:
    try:
        found = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    facts = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return ":".join(map(str, facts))


def _recall(memo: Path) -> dict[str, str]:
    try:
        known = json.loads(memo.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {k: v for k, v in known.items() if isinstance(v, str) and len(v) == 64}


def _remember(memo: Path, known: dict[str, str]) -> None:
    """Replace ``memo`` as a whole; where that is not possible, nothing is remembered."""
    kept = dict(list(known.items())[-REMEMBERED:])
    temporary = memo.with_name(f"{memo.name}.{secrets.token_hex(8)}.tmp")
    with contextlib.suppress(OSError):
        memo.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            temporary.write_text(json.dumps(kept), encoding="utf-8")
            temporary.replace(memo)
        finally:
            temporary.unlink(missing_ok=True)


def _file_digest(path: Path) -> str:
    """SHA-256 over the SHA-256 of every 64 MiB, so that every core takes part."""
    try:
        size = path.stat().st_size
        with ThreadPoolExecutor() as pool:
            starts = range(0, max(size, 1), PIECE)
            digests = list(pool.map(lambda start: _piece_digest(path, start), starts))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _piece_digest(path: Path, start: int) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        left = PIECE
        while left and (read := file.read(min(READ, left))):
            digest.update(read)
            left -= len(read)
    return digest.digest()
