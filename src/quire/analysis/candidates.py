"""Settings that the meter compares, and the tracks it runs them on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from quire.config import CacheConfig, EngineConfig
from quire.engine import Engine
from quire.engine.forced import ForcedText
from quire.engine.reading import remembered_bytes
from quire.errors import QuireError
from quire.evict_choice import NO_EVICTION, parse_eviction
from quire.layout import pages_for

__all__ = ["NO_EVICTION", "Setting", "Track", "base_config", "open_tracks", "with_candidate"]

PAGE_SIZE = 32  # what formats that quantise whole pages need; the others do not depend on it


@dataclass(frozen=True)
class Setting:
    """One lossy setting: a page format and an eviction policy, as the command line names them."""

    kv_format: str
    evict: str = NO_EVICTION

    @property
    def name(self) -> str:
        """For labels: the format, and the policy if there is one."""
        return self.kv_format if self.evict == NO_EVICTION else f"{self.kv_format} + {self.evict}"


def with_candidate(config: EngineConfig, kv_format: str, evict: str) -> EngineConfig:
    """``config`` with a candidate's page format and eviction policy.

    Raises ConfigError for a format or a policy that there is not.
    """
    return replace(config, cache=replace(config.cache, kv_format=kv_format, evict=evict))


def base_config(
    *, backend: str = "auto", threads: int | None = None, page_size: int = PAGE_SIZE
) -> EngineConfig:
    """What exact cache and candidates have in common; pages are counted out by open_tracks."""
    cache = CacheConfig(page_size=page_size, num_pages=1, prefix_cache=False)
    return EngineConfig(backend=backend, threads=threads, cache=cache)


class Track:
    """One setting's engine, what it has held so far, and why it was stopped if it was.

    used_bytes, allocated_bytes   of every passage at its end, summed, with what a policy that
                                  chooses pages remembers of them
    tokens                        of those passages, dropped ones included
    stored_bytes, stored_tokens   pages of one passage as the pool gave them out, and its tokens
    """

    def __init__(self, setting: Setting, engine: Engine | None, error: str | None = None) -> None:
        self.setting, self._engine, self.error = setting, engine, error
        self.used_bytes = self.allocated_bytes = self.tokens = 0
        self.stored_bytes = self.stored_tokens = 0

    @property
    def engine(self) -> Engine:
        """The engine of a track that was not refused."""
        if self._engine is None:
            raise QuireError(f"{self.setting.name} has no engine: {self.error}")
        return self._engine

    def stop(self, error: QuireError) -> None:
        """Give up this setting, and its memory."""
        self.error, self._engine = str(error), None

    def note(self, text: ForcedText) -> None:
        """Add what a passage holds at its end."""
        usage, beside = text.usage, _beside(text, self.setting.evict)
        self.used_bytes += usage.used_bytes + beside
        self.allocated_bytes += usage.allocated_bytes + beside
        self.tokens += text.tokens
        if text.tokens > self.stored_tokens:
            self.stored_tokens, self.stored_bytes = text.tokens, _stored(text) + beside

    @property
    def bytes_per_token(self) -> float:
        """Keys and values held at the end of a passage, over the tokens it read."""
        return self.used_bytes / self.tokens


def _beside(text: ForcedText, evict: str) -> int:
    """Bytes of what a policy that chooses pages remembers of a text's."""
    choice = parse_eviction(evict)
    if choice is None or choice.drops:
        return 0
    layout, tokens = text.cache.layout, text.tokens
    between = pages_for(tokens, layout.page_size) - 2  # neither the first nor the newest
    return max(0, between) * remembered_bytes(layout, choice)


def _stored(text: ForcedText) -> int:
    """Bytes of a text's pages, counted on what the pools give out of them."""
    raw, tables = text.cache.raw, text.cache.page_tables(text.sequence)
    kinds = (
        (group, [page for page in pages if raw.is_open(group, page) == is_open])
        for group, (_, pages) in enumerate(tables)
        for is_open in (False, True)
    )
    return sum(raw.read(group, pages).nbytes for group, pages in kinds)


def open_tracks(
    model: Engine, settings: Sequence[Setting], tokens: int, lanes: int
) -> tuple[Track, list[Track]]:
    """The exact cache and the candidates, each with pages for ``lanes`` texts of ``tokens``.

    All compute with ``model``'s weights. A setting that the engine refuses gives a track with the
    reason as its error. Raises QuireError if there is no room for the exact cache.
    """
    size = model.cache.layout.page_size
    pages = lanes * pages_for(tokens, size)
    cache = replace(model.config.cache, kv_format="auto", num_pages=pages, evict=NO_EVICTION)
    base = replace(model.config, cache=cache)
    exact = model.twin(base)
    format = exact.cache.layout.shapes[0].key_format.name
    tracks = []
    for setting in settings:
        try:
            candidate = with_candidate(base, setting.kv_format, setting.evict)
            tracks.append(Track(setting, model.twin(candidate)))
        except QuireError as error:
            tracks.append(Track(setting, None, str(error)))
    return Track(Setting(format), exact), tracks
