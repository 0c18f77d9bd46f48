"""The engine: requests in, tokens out."""

from quire.engine.engine import Engine
from quire.engine.request import Completion, Request, StepOutput
from quire.engine.shadow import ShadowUsage
from quire.engine.status import EngineStatus
from quire.sampling import SamplingParams, TokenLogprob

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
