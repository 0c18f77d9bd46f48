"""The engine: requests in, tokens out."""

from quire.engine.engine import Engine, EngineStatus
from quire.engine.request import (
    Completion,
    Request,
    SamplingParams,
    StepOutput,
    TokenLogprob,
)

__all__ = [
    "Completion",
    "Engine",
    "EngineStatus",
    "Request",
    "SamplingParams",
    "StepOutput",
    "TokenLogprob",
]
