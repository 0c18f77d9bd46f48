"""A conversation's pages to a file and back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quire.cache import KVCache, PrefixQuery
from quire.cache.session import (
    Expected,
    GroupPages,
    read_header,
    read_session,
)
from quire.config import ModelConfig
from quire.engine.request import Request
from quire.errors import CacheFull, SessionError
from quire.layout import CacheLayout

__all__ = ["Session", "load_session", "no_pages", "pages_of", "pages_to_save"]


@dataclass(frozen=True)
class Session:
    """What :meth:`Engine.load_session` found.

    tokens   those whose pages are in the cache now: a prompt that begins with them is not computed
             again; empty for a miss
    extra    what was saved beside the pages; also of a miss, if the file's header is sound
    reason   why it is a miss, or None
    """

    tokens: tuple[int, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None


def no_pages(layout: CacheLayout) -> tuple[GroupPages, ...]:
    """The pages of no tokens."""
    return tuple(GroupPages(0, np.empty((0, size), np.uint8)) for size in layout.area_bytes)


def pages_to_save(
    cache: KVCache, request: Request, prefill: Callable[[int, Sequence[int]], None]
) -> tuple[tuple[int, ...], tuple[GroupPages, ...]]:
    """The tokens of a request's first sample that a session keeps, and their pages in each area.

    All but the last token; none of a context larger than the pool. Pages that are gone are computed
    again: ``prefill(sequence, tokens)`` does what a sequence lacks of tokens. Raises SessionError
    if there is nothing that could be saved, CacheFull if running requests leave too few pages.
    """
    first = request.samples[0]
    tokens = first.tokens[:-1]
    if first.evicted_tokens:
        raise SessionError(
            f"eviction dropped {first.evicted_tokens} tokens of this request, and "
            "a session keeps all of them; use evict='none' for what is to be saved"
        )
    if first.stream is not None:
        return (), no_pages(cache.layout)
    if not tokens:
        raise SessionError("a session needs at least two tokens, and this request has one")
    sequence = cache.create(cache.match(PrefixQuery(tokens, request.salt)))
    try:
        prefill(sequence, tokens)
        return tuple(tokens), pages_of(cache, sequence)
    finally:
        cache.release(sequence)


def pages_of(cache: KVCache, sequence: int) -> tuple[GroupPages, ...]:
    """The pages of ``sequence`` in each area; slots that hold none of its tokens are zero."""
    layout, length = cache.layout, cache.length(sequence)
    tables = cache.page_tables(sequence)
    areas: list[GroupPages] = []
    for group, (first, pages) in enumerate(tables):
        for numbers in layout.held_pages(group, length):
            data = np.empty((0, layout.area_bytes[len(areas)]), np.uint8)
            if numbers:
                data = cache.raw.read(group, [pages[number - first] for number in numbers])
            areas.append(GroupPages(numbers[0] if numbers else first, data))
        if length % layout.page_size:  # others' numbers may be behind the last token
            cache.raw.blank(group, areas[-1].data[-1:], length % layout.page_size)
    return tuple(areas)


def load_session(
    cache: KVCache,
    path: Path,
    salt: str,
    identity: Mapping[str, str],
    model: ModelConfig,
) -> Session:
    """Bring a file's pages into the prefix index; a miss, with the reason, changes nothing."""
    layout = cache.layout
    expected = Expected(
        identity={name: value for name, value in identity.items() if name != "model"},
        page_size=layout.page_size,
        groups=[
            (size, layout.groups[area.group].window)
            for area, size in zip(layout.areas, layout.area_bytes, strict=True)
        ],
        kinds=[
            None if not layout.packs[area.group] else "open" if area.is_open else "packed"
            for area in layout.areas
        ],
        max_tokens=model.max_position,
    )
    extra: Mapping[str, Any] = {}
    try:
        if cache.prefix is None:
            raise SessionError("the prefix cache is off, so nothing can be taken from a session")
        extra = read_header(path).extra
        session = read_session(path, expected)
        if not session.tokens:
            raise SessionError(f"session {path} holds no pages")
        if max(session.tokens) >= model.vocab_size:
            raise SessionError(
                f"session {path} has token id {max(session.tokens)}; ids of this model are 0 to "
                f"{model.vocab_size - 1}; start a new session"
            )
        query = PrefixQuery(session.tokens, salt)
        cache.release(cache.restore(query, [group.data for group in session.groups]))
    except (SessionError, CacheFull) as error:
        return Session(extra=extra, reason=str(error))
    return Session(session.tokens, extra)
