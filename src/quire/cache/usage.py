"""What a cache, or one sequence in it, takes in bytes."""

from dataclasses import dataclass

__all__ = ["CacheUsage"]


@dataclass(frozen=True)
class CacheUsage:
    """Bytes of keys and values. Pages shared by forks count once in the total.

    pool_bytes       all pages that exist, free ones included
    allocated_bytes  pages of the sequences; those of an open reservation are not yet theirs
    used_bytes       slots of those pages that hold a token
    waste_bytes      ``allocated_bytes - used_bytes``: the empty slots of unfinished pages
    tokens           tokens of the sequences, each sequence counted on its own
    bytes_per_token  of one token in all layers, before any window gives pages back; a whole number
                     but where tokens of a page share scales
    cached_bytes     pages of no sequence that are kept for prompts that begin as theirs did; they
                     are given up when memory is wanted; 0 in the account of one sequence
    """

    pool_bytes: int
    allocated_bytes: int
    used_bytes: int
    tokens: int
    bytes_per_token: float
    cached_bytes: int = 0

    @property
    def waste_bytes(self) -> int:
        """Bytes of allocated slots that hold no token."""
        return self.allocated_bytes - self.used_bytes
