"""Every exception Quire raises on purpose.

::

    QuireError
    ├── ConfigError (ValueError)          a setting or a config key that cannot be used
    ├── CheckpointError                   a model directory that is missing, broken or damaged
    │   └── UnsupportedArchitecture       a model Quire has no code for
    ├── RequestError (ValueError)         a prompt or sampling parameter that cannot be served
    ├── BackendError                      a backend that is unknown or not available here
    └── CacheError                        a misuse of the KV cache
        ├── CacheFull                     too few free pages; nothing was changed
        ├── SessionError                  a session file that cannot be written or used
        ├── TierError                     a tier, or a store of one, that cannot be used
        └── CacheInvariantError           the cache's books do not balance: a bug in Quire

Each message says what happened, with which numbers, and what to do about it.
"""

import difflib
from collections.abc import Iterable

__all__ = [
    "BackendError",
    "CacheError",
    "CacheFull",
    "CacheInvariantError",
    "CheckpointError",
    "ConfigError",
    "QuireError",
    "RequestError",
    "SessionError",
    "TierError",
    "UnsupportedArchitecture",
    "did_you_mean",
]


class QuireError(Exception):
    """Base of every exception that Quire raises on purpose."""


class ConfigError(QuireError, ValueError):
    """A setting, option or config key is unknown or has a value that cannot be used."""


class CheckpointError(QuireError):
    """A model directory is missing, incomplete, truncated or contradicts itself."""


class UnsupportedArchitecture(CheckpointError):
    """The checkpoint is of an architecture, or uses a feature, that Quire does not implement."""


class RequestError(QuireError, ValueError):
    """A prompt or a sampling parameter cannot be served by this engine."""


class BackendError(QuireError):
    """A backend is unknown, or known and not available on this machine."""


class CacheError(QuireError):
    """The KV cache was asked for something that its state does not allow."""


class CacheFull(CacheError):
    """There are too few free pages. The cache is as it was before the call."""


class SessionError(CacheError):
    """A session file cannot be written, or cannot be used: damaged, or of something else."""


class TierError(CacheError):
    """A tier below the pool cannot be used: its directory, its file or its budget."""


class CacheInvariantError(CacheError):
    """The cache's books do not balance. This is a bug in Quire; please report it."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A clause that names the known word nearest to ``name``, or an empty string."""
    by_folded = {word.casefold(): word for word in known}
    near = difflib.get_close_matches(name.casefold(), list(by_folded), n=1, cutoff=0.5)
    return f"; did you mean {by_folded[near[0]]!r}?" if near else ""
