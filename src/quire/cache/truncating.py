"""To which lengths a sequence can go back, and why not to others."""

from quire.cache.sequence import SequenceState
from quire.errors import CacheError
from quire.layout import CacheLayout

__all__ = ["require_truncatable", "shortest"]


def require_truncatable(
    layout: CacheLayout, sequence: int, state: SequenceState, length: int
) -> None:
    """Raise CacheError, with the reason, if a sequence cannot be cut to ``length`` tokens."""
    if not 0 <= length <= state.length:
        raise CacheError(
            f"cannot truncate sequence {sequence} to {length} tokens: it has {state.length}"
        )
    if state.dropped and length < state.length:
        raise CacheError(
            f"cannot truncate sequence {sequence}: it dropped {state.dropped} tokens, and "
            "heads keep different ones; release it and compute it anew instead"
        )
    least = shortest(layout, state)
    if length < least:
        raise CacheError(
            f"cannot truncate sequence {sequence} to {length} tokens: pages that the next "
            "token would see fell out of a sliding window and were given back; the shortest "
            f"possible length is {least}; release it and compute it anew instead"
        )
    size = layout.page_size
    if True in layout.packs and size < length < state.length // size * size and length % size:
        before = length // size * size
        raise CacheError(
            f"cannot truncate sequence {sequence} to {length} tokens: they end inside a page "
            f"of {size} tokens that is packed; possible are {before} and {before + size}"
        )


def shortest(layout: CacheLayout, state: SequenceState) -> int:
    """The least length at which no token that the next one sees was given back."""
    size = layout.page_size
    return max(
        (table.first_page * size + group.window - 1 if group.window and table.first_page else 0)
        for group, table in zip(layout.groups, state.tables, strict=True)
    )
