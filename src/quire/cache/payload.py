"""Page bytes, packed without loss: byte shuffle, then zstd (RFC 8878); raw where that does not pay.

The bytes of numbers of 2, 4 or 8 bytes are split into planes first (the shuffle filter of HDF5 and
Blosc): sign and exponent of neighbouring keys and values are alike, mantissas are noise.
docs/tiers.md has what it gains.
"""

import threading

import numpy as np
import zstandard

from quire.errors import TierError

__all__ = ["RAW", "pack", "unpack"]

RAW = 0  # codec of bytes as they are; any other codec is the element width that was shuffled
_WIDTHS = (1, 2, 4, 8)
_LEVEL = 1  # 3 is half as fast and gains under 1 % (docs/tiers.md)
_MOST_PERCENT = 90  # a packed payload above this share of the raw one is not worth unpacking


class _Contexts(threading.local):
    """zstd's working memory, one for each thread: contexts cannot be shared."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True)
        self.decompressor = zstandard.ZstdDecompressor()


_contexts = _Contexts()


def pack(payload: bytes, element: int) -> tuple[int, bytes]:
    """(codec, packed bytes) of ``payload``, whose numbers take ``element`` bytes each.

    A width that is not 1, 2, 4 or 8, or that does not divide the payload, is not shuffled.
    """
    width = element if element in _WIDTHS and len(payload) % element == 0 else 1
    planes = payload if width == 1 else _shuffle(payload, width)
    packed = _contexts.compressor.compress(planes)
    if len(packed) * 100 > len(payload) * _MOST_PERCENT:
        return RAW, payload
    return width, packed


def unpack(codec: int, packed: bytes, size: int) -> bytes:
    """The payload of ``size`` bytes that :func:`pack` was given.

    Raises TierError for an unknown codec and for bytes that do not give exactly ``size`` bytes;
    never allocates more than a small multiple of ``size``, whatever ``packed`` claims.
    """
    if codec == RAW:
        if len(packed) != size:
            raise TierError(f"a raw payload has {len(packed)} bytes and should have {size}")
        return packed
    if codec not in _WIDTHS or size % codec:
        raise TierError(f"no payload of {size} bytes is packed with codec {codec}")
    planes = _inflate(packed, size)
    return planes if codec == 1 else _unshuffle(planes, codec)


def _inflate(packed: bytes, size: int) -> bytes:
    try:
        # zstandard allocates what the frame's header says; look at that before it does.
        claimed = zstandard.frame_content_size(packed)
        if claimed != size:
            raise TierError(f"a zstd frame says it has {claimed} bytes and should have {size}")
        planes = _contexts.decompressor.decompress(packed, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise TierError(f"zstd cannot unpack {len(packed)} bytes: {error}") from error
    if len(planes) != size:
        raise TierError(f"a zstd frame gave {len(planes)} bytes and should have given {size}")
    return planes


def _shuffle(payload: bytes, width: int) -> bytes:
    """All first bytes of the numbers, then all second bytes, and so on."""
    return np.frombuffer(payload, np.uint8).reshape(-1, width).T.tobytes()


def _unshuffle(planes: bytes, width: int) -> bytes:
    numbers = np.empty((len(planes) // width, width), np.uint8)
    for i, plane in enumerate(np.frombuffer(planes, np.uint8).reshape(width, -1)):
        numbers[:, i] = plane  # five times as fast as copying the transpose
    return numbers.tobytes()
