"""Settings: what the model is, how its cache is kept, how the engine runs.

All are frozen, take keyword arguments only, refuse unknown names (naming the nearest) and check
their values when they are made. How ``config.json`` becomes a :class:`ModelConfig` is in
``architectures.py``.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, TypeVar, dataclass_transform

from quire.errors import ConfigError, did_you_mean
from quire.evict_choice import NO_EVICTION, parse_eviction
from quire.format_choice import parse_formats
from quire.formats import GROUP

__all__ = [
    "CacheConfig",
    "EngineConfig",
    "ModelConfig",
    "RopeConfig",
    "format_bytes",
    "parse_bytes",
    "refuse_unknown",
    "settings",
]

_T = TypeVar("_T")

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def parse_bytes(value: int | str) -> int:
    """Bytes from an int or from text such as ``"2GiB"``, ``"512 MB"`` or ``"4096"``.

    Raises ConfigError for anything else, and for zero or less.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ConfigError(f"a size in bytes must be an int or text such as '2GiB', not {value!r}")
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", value)
        unit = match.group(2).lower() if match else ""
        if match is None or unit not in _UNITS:
            raise ConfigError(
                f"{value!r} is not a size in bytes; write a number with one of the units "
                "B, KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024)"
            )
        value = int(Fraction(match.group(1)) * _UNITS[unit])
    if value <= 0:
        raise ConfigError(f"a size in bytes must be positive, not {value}")
    return value


def format_bytes(count: float) -> str:
    """``count`` bytes for a person: ``"640 B"``, ``"1.5 MiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1023.95:  # what would be printed as 1024 is 1 of the next unit
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def refuse_unknown(what: str, given: dict[str, Any], known: list[str]) -> None:
    """Raise ConfigError for the first name in ``given`` that is not in ``known``."""
    for name in given:
        if name not in known:
            raise ConfigError(
                f"{what} has no option {name!r}{did_you_mean(name, known)} "
                f"(options: {', '.join(known)})"
            )


@dataclass_transform(frozen_default=True, kw_only_default=True)
def settings(cls: type[_T]) -> type[_T]:
    """A frozen keyword-only dataclass whose unknown arguments raise ConfigError."""
    made = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    known = [field.name for field in dataclasses.fields(made)]  # type: ignore[arg-type]
    make: Callable[..., None] = made.__init__

    @functools.wraps(make)
    def init(self: Any, **given: Any) -> None:
        refuse_unknown(cls.__name__, given, known)
        make(self, **given)

    made.__init__ = init  # type: ignore[method-assign]
    return made


def _require_int(owner: str, name: str, value: object, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{owner}: {name} must be an int of at least {least}, not {value!r}")


def _require_positive(owner: str, name: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (math.isfinite(value) and value > 0):  # type: ignore[arg-type, operator]
        raise ConfigError(f"{owner}: {name} must be a positive, finite number, not {value!r}")


@settings
class RopeConfig:
    """Rotary position embedding (Su et al., 2021, arXiv:2104.09864) and how it is stretched.

    ``linear`` divides every frequency by ``factor`` (Chen et al., 2023, arXiv:2306.15595);
    ``llama3`` divides only the low ones (Llama 3.1, arXiv:2407.21783).
    """

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("default", "linear", "llama3"):
            raise ConfigError(
                f"RopeConfig: kind must be default, linear or llama3, not {self.kind!r}"
            )
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor"):
            _require_positive("RopeConfig", name, getattr(self, name))
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ConfigError(
                f"RopeConfig: low_freq_factor {self.low_freq_factor} must be below "
                f"high_freq_factor {self.high_freq_factor}"
            )
        _require_int("RopeConfig", "original_max_position", self.original_max_position)


@settings
class ModelConfig:
    """The facts of a checkpoint's ``config.json`` that decide what is computed.

    ``windows`` has one entry a layer: the number of most recent tokens a query sees, itself
    included, or None for all. ``ignored_keys`` are keys of ``config.json`` that Quire does not
    know and did not use.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    windows: tuple[int | None, ...]
    norm_eps: float
    activation: str
    rope: RopeConfig | None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    ignored_keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position",
        ):
            _require_int(self.architecture, name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.architecture}: {self.num_heads} query heads cannot be shared evenly by "
                f"{self.num_kv_heads} KV heads"
            )
        if self.rope is not None and self.head_dim % 2:
            raise ConfigError(
                f"{self.architecture}: rotary embedding needs an even head_dim, not {self.head_dim}"
            )
        if len(self.windows) != self.num_layers:
            raise ConfigError(
                f"{self.architecture}: {len(self.windows)} layer types for {self.num_layers} layers"
            )
        for window in self.windows:
            if window is not None:
                _require_int(self.architecture, "sliding_window", window)
        _require_positive(self.architecture, "norm_eps", self.norm_eps)


@settings
class CacheConfig:
    """How keys and values are kept.

    page_size   tokens a page; ``"whole"`` makes one page as long as the model's context, which is
                a contiguous, preallocated cache; ``"auto"`` is 16, or 32 for int4 and int2. It
                reads as the number of tokens afterwards.
    kv_format   page format: ``"int8"``, of keys and values apart: ``"k=int8,v=fp8"``, of chosen
                layers: ``"int4+int8@first,last"``, with keys turned first: ``"int4:rotated"`` (see
                :mod:`quire.format_choice`); ``"auto"`` is the checkpoint's own dtype.
    kv_memory   bytes for all pages of all layers, as an int or as text such as ``"2GiB"``;
                ``"auto"`` is 2 GiB, or what the machine has left beside the model if that is less;
                on a GPU all that is left but for a tenth of it.
    num_pages   pages of every layer group, instead of ``kv_memory``.
    prefix_cache   keep pages of finished requests while there is room, and share equal prefixes.
    host_cache  bytes of host memory for pages that the pool gives up; None has no such tier.
    cache_dir   directory where whole pages are kept for later processes; None has no such tier.
    disk_cache  most bytes of the files in ``cache_dir``, at any moment; 20 GiB if not given.
    evict       what requests drop, or do not read, when they outgrow a budget of tokens, unless
                they say otherwise: ``"none"``, or a policy such as ``"window:budget=512,sink=4"``
                or ``"quest:budget=1024"`` (see :mod:`quire.evict_choice`).
    """

    page_size: int | Literal["whole", "auto"] = "auto"
    kv_format: str = "auto"
    kv_memory: int | str = "auto"
    num_pages: int | None = None
    prefix_cache: bool = True
    host_cache: int | str | None = None
    cache_dir: str | Path | None = None
    disk_cache: int | str | None = None
    evict: str = NO_EVICTION

    def __post_init__(self) -> None:
        if self.num_pages is not None:
            _require_int("CacheConfig", "num_pages", self.num_pages)
        if not isinstance(self.prefix_cache, bool):
            raise ConfigError(
                f"CacheConfig: prefix_cache must be True or False, not {self.prefix_cache!r}"
            )
        if not isinstance(self.kv_format, str):
            raise ConfigError(f"CacheConfig: kv_format must be text, not {self.kv_format!r}")
        self._check_page_size(parse_formats(self.kv_format).by_page)
        if self.kv_memory != "auto":
            object.__setattr__(self, "kv_memory", parse_bytes(self.kv_memory))
        parse_eviction(self.evict)
        self._check_tiers()

    def _check_page_size(self, by_page: bool) -> None:
        """``by_page`` is True if a format stores whole pages at once, in groups of tokens."""
        if self.page_size == "auto":
            object.__setattr__(self, "page_size", GROUP if by_page else 16)
        if self.page_size != "whole":
            _require_int("CacheConfig", "page_size", self.page_size)
        if by_page and (isinstance(self.page_size, str) or self.page_size % GROUP):
            raise ConfigError(
                f"CacheConfig: kv_format {self.kv_format!r} stores whole pages, in groups of "
                f"{GROUP} tokens; page_size must be a multiple of {GROUP}, not {self.page_size!r}"
            )

    def _check_tiers(self) -> None:
        if self.disk_cache is not None and self.cache_dir is None:
            raise ConfigError("CacheConfig: disk_cache needs a cache_dir to keep pages in")
        if self.cache_dir is not None:
            if not isinstance(self.cache_dir, str | Path):
                raise ConfigError(f"CacheConfig: cache_dir must be a path, not {self.cache_dir!r}")
            disk = "20GiB" if self.disk_cache is None else self.disk_cache
            object.__setattr__(self, "disk_cache", parse_bytes(disk))
        if self.host_cache is not None:
            object.__setattr__(self, "host_cache", parse_bytes(self.host_cache))
        for name in ("host_cache", "cache_dir"):
            if getattr(self, name) is not None and not self.prefix_cache:
                raise ConfigError(f"CacheConfig: {name} needs prefix_cache, which is off")
            if getattr(self, name) is not None and self.page_size == "whole":
                raise ConfigError(
                    f"CacheConfig: {name} keeps whole pages, and a page of page_size 'whole' is "
                    "never whole; give a page_size in tokens"
                )


@settings
class EngineConfig:
    """How the engine runs.

    backend            ``"auto"`` or the name of a backend (``quire doctor`` lists them).
    threads            threads of the native backend; None is what the machine allows.
    cache              a :class:`CacheConfig`.
    max_batch_tokens   tokens computed in one step, over all sequences; longer prompts are
                       prefilled in chunks.
    max_sequences      sequences that run at a time; each takes at least one token of a step.
    shadow             share of finished requests, 0 to 1, that are read again with the exact cache
                       to count where it would have answered otherwise.
    """

    backend: str = "auto"
    threads: int | None = None
    cache: CacheConfig = dataclasses.field(default_factory=CacheConfig)
    max_batch_tokens: int = 512
    max_sequences: int = 64
    shadow: float = 0.0

    def __post_init__(self) -> None:
        number = isinstance(self.shadow, int | float) and not isinstance(self.shadow, bool)
        if not number or not 0 <= self.shadow <= 1:
            raise ConfigError(
                "EngineConfig: shadow must be a share of requests from 0 to 1, such as 0.01, not "
                f"{self.shadow!r}"
            )
        _require_int("EngineConfig", "max_batch_tokens", self.max_batch_tokens)
        _require_int("EngineConfig", "max_sequences", self.max_sequences)
        if self.threads is not None:
            _require_int("EngineConfig", "threads", self.threads)
        if not isinstance(self.cache, CacheConfig):
            raise ConfigError(f"EngineConfig: cache must be a CacheConfig, not {self.cache!r}")
        if not isinstance(self.backend, str):
            raise ConfigError(f"EngineConfig: backend must be text, not {self.backend!r}")
