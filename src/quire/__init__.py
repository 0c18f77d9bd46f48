"""Quire: a paged KV cache for transformer inference, with an engine around it.

>>> import quire
>>> engine = quire.Engine()                        # quill, the small model that ships with Quire
>>> print(engine.generate("def add(a, b):")[0].text)

Names are imported when they are first used, so ``import quire`` itself takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quire.cache import KVCache
    from quire.config import CacheConfig, EngineConfig, ModelConfig
    from quire.engine import Completion, Engine, Request, StepOutput
    from quire.errors import QuireError
    from quire.pages import PageFormat
    from quire.sampling import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "CacheConfig",
    "Completion",
    "Engine",
    "EngineConfig",
    "KVCache",
    "ModelConfig",
    "PageFormat",
    "QuireError",
    "Request",
    "SamplingParams",
    "StepOutput",
]

_HOME = {
    "CacheConfig": "config",
    "Completion": "engine",
    "Engine": "engine",
    "EngineConfig": "config",
    "KVCache": "cache",
    "ModelConfig": "config",
    "PageFormat": "pages",
    "QuireError": "errors",
    "Request": "engine",
    "SamplingParams": "sampling",
    "StepOutput": "engine",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'quire' has no attribute {name!r}")
    return getattr(import_module(f"quire.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
