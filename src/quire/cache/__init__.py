"""The cache's bookkeeping: pages, tables, sequences. Ints only; numbers live in backend pools."""

from quire.cache.export import KVArrays, LayerKV
from quire.cache.kvcache import KVCache
from quire.cache.prefix_tree import PrefixMatch, PrefixQuery
from quire.cache.sequence import Reservation
from quire.cache.usage import CacheUsage

__all__ = [
    "CacheUsage",
    "KVArrays",
    "KVCache",
    "LayerKV",
    "PrefixMatch",
    "PrefixQuery",
    "Reservation",
]
