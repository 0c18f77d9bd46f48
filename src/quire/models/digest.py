"""What names a checkpoint's weights: a digest of everything in its safetensors files."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from quire.errors import CheckpointError

__all__ = ["weights_digest"]

PIECE = 64 * 2**20
READ = 2**20


def weights_digest(files: Sequence[Path]) -> str:
    """SHA-256, in hex, over the SHA-256 of every 64 MiB of ``files``, in order.

    In pieces, so that every core takes part; reading it also brings the weights into the page
    cache. Raises CheckpointError for a file that cannot be read.
    """
    pieces = []
    for path in files:
        try:
            size = path.stat().st_size
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        pieces += [(path, start) for start in range(0, max(size, 1), PIECE)]
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(_digest, pieces))
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _digest(piece: tuple[Path, int]) -> bytes:
    path, start = piece
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            left = PIECE
            while left and (read := file.read(min(READ, left))):
                digest.update(read)
                left -= len(read)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return digest.digest()
