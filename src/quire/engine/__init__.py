"""The engine: requests in, tokens out."""

from quire.engine.engine import Engine
from quire.engine.request import (
    Completion,
    Request,
    SamplingParams,
    StepOutput,
    TokenLogprob,
)
from quire.engine.shadow import ShadowUsage
from quire.engine.status import EngineStatus

__all__ = [
    "Completion",
    "Engine",
    "EngineStatus",
    "Request",
    "SamplingParams",
    "ShadowUsage",
    "StepOutput",
    "TokenLogprob",
]
