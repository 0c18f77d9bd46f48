"""How long a step takes at least: its operations and bytes against what a device can do.

The roofline model (Williams, Waterman and Patterson, "Roofline: an insightful visual performance
model", CACM 52(4), 2009), operation by operation: each takes the longer of moving its bytes and
computing, and they run one after the other. Real kernels take longer; :class:`Roof` is a bound. Any
other :class:`Timer`, of measured operations say, gives its own times for the same steps.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from quire.analysis.hardware import Hardware
from quire.analysis.shape import ModelShape
from quire.analysis.steps import Deployment, Op, Work, step_ops
from quire.errors import ConfigError

__all__ = [
    "LIMITS",
    "Limit",
    "Roof",
    "StepTime",
    "Timer",
    "cache_read_bytes",
    "compute_bound_batch",
    "decode_time",
    "decoding",
    "prefill_time",
    "step_time",
    "time_of",
]

Limit = Literal["memory bandwidth", "compute", "overhead"]
LIMITS: tuple[Limit, ...] = ("memory bandwidth", "compute", "overhead")
MOST_SEQUENCES = 2**20


class Timer(Protocol):
    """How long operations take."""

    def seconds(self, op: Op) -> float:
        """Of an operation, all ``op.count`` times together."""

    def limit(self, op: Op) -> Limit:
        """What an operation's time is decided by."""

    def overhead(self, shape: ModelShape, work: Sequence[Work]) -> float:
        """Seconds that a step takes besides its operations."""


@dataclass(frozen=True)
class Roof:
    """The bound that a device's figures give; nothing is added for launching or waiting."""

    hardware: Hardware

    def seconds(self, op: Op) -> float:
        """The longer of moving its bytes and computing."""
        return max(self.memory_seconds(op), self.compute_seconds(op))

    def limit(self, op: Op) -> Limit:
        """Which of the two is longer."""
        moving = self.memory_seconds(op) >= self.compute_seconds(op)
        return "memory bandwidth" if moving else "compute"

    def overhead(self, shape: ModelShape, work: Sequence[Work]) -> float:
        """None."""
        return 0.0

    def memory_seconds(self, op: Op) -> float:
        """Of reading and writing its bytes."""
        return op.bytes / self.hardware.bandwidth

    def compute_seconds(self, op: Op) -> float:
        """Of its operations, in the dtype that the device computes them in."""
        return op.flops / self.hardware.rate(op.dtype)


@dataclass(frozen=True)
class StepTime:
    """The time of one step, or of several in a row.

    by_part    seconds of each part of the model, and of ``overhead``
    by_limit   seconds of operations that each limit decides
    flops, bytes   operations, and all bytes that are moved between memory and units
    """

    steps: int
    seconds: float
    by_part: dict[str, float]
    by_limit: dict[Limit, float]
    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """Operations a byte: where on the roofline the step lies."""
        return self.flops / self.bytes

    @property
    def limit(self) -> Limit:
        """What most of the time is decided by."""
        return max(LIMITS, key=lambda limit: self.by_limit[limit])

    @property
    def shares(self) -> dict[Limit, float]:
        """Of the time, the part that each limit decides; they add up to 1."""
        return {limit: self.by_limit[limit] / self.seconds for limit in LIMITS}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "steps": self.steps,
            "seconds": self.seconds,
            "by_part": dict(self.by_part),
            "flops": self.flops,
            "bytes": self.bytes,
            "flops_per_byte": self.intensity,
            "limit": self.limit,
            "shares": dict(self.shares),
        }


def time_of(ops: Iterable[Op], timer: Timer, overhead: float = 0.0) -> StepTime:
    """The time of the operations of one step, one after the other."""
    by_part: dict[str, float] = {}
    by_limit = dict.fromkeys(LIMITS, 0.0)
    flops = moved = 0.0
    for op in ops:
        seconds = timer.seconds(op)
        by_part[op.part] = by_part.get(op.part, 0.0) + seconds
        by_limit[timer.limit(op)] += seconds
        flops, moved = flops + op.flops, moved + op.bytes
    if overhead:
        by_part["overhead"] = overhead
        by_limit["overhead"] += overhead
    return StepTime(1, sum(by_part.values()), by_part, by_limit, flops, moved)


def step_time(deployment: Deployment, timer: Timer, work: Sequence[Work]) -> StepTime:
    """The time of one step that does ``work``."""
    overhead = timer.overhead(deployment.shape, work)
    return time_of(step_ops(deployment, work), timer, overhead)


def decoding(sequences: int, context: int) -> tuple[Work, ...]:
    """A step in which each of ``sequences`` adds one token to ``context``."""
    if sequences < 1:
        raise ConfigError(f"a step decodes 1 sequence or more, not {sequences}")
    return (Work(context, 1),) * sequences


def decode_time(deployment: Deployment, timer: Timer, sequences: int, context: int) -> StepTime:
    """The time in which each of ``sequences`` with ``context`` tokens gets one more."""
    return step_time(deployment, timer, decoding(sequences, context))


def prefill_time(
    deployment: Deployment, timer: Timer, tokens: int, chunk: int | None = None, cached: int = 0
) -> StepTime:
    """The time until the first new token of a prompt of ``tokens``, alone on the device.

    In chunks of ``chunk`` tokens (None: all at once), behind ``cached`` ones that are in the cache
    already. Only the last token's logits are wanted. Raises ConfigError for a prompt without
    tokens that are not cached, or chunks without any.
    """
    size = tokens - cached if chunk is None else chunk
    if cached < 0 or tokens <= cached or size < 1:
        raise ConfigError(
            f"a prefill of {tokens} tokens, {cached} of them cached, in chunks of {size} cannot "
            "be: there must be a token to compute, and chunks of at least 1"
        )
    starts = range(cached, tokens, size)
    works = [Work(at, min(size, tokens - at), int(at == starts[-1])) for at in starts]
    return _in_a_row([step_time(deployment, timer, [work]) for work in works])


def _in_a_row(times: Sequence[StepTime]) -> StepTime:
    parts = dict.fromkeys(part for each in times for part in each.by_part)
    return StepTime(
        sum(each.steps for each in times),
        sum(each.seconds for each in times),
        {part: sum(each.by_part.get(part, 0.0) for each in times) for part in parts},
        {limit: sum(each.by_limit[limit] for each in times) for limit in LIMITS},
        sum(each.flops for each in times),
        sum(each.bytes for each in times),
    )


def cache_read_bytes(deployment: Deployment, sequences: int, context: int) -> float:
    """Bytes of the cache that one decode step reads: all that its ``sequences`` see.

    Divided by a bandwidth, the time of reading them once.
    """
    return sum(op.kv_bytes for op in step_ops(deployment, decoding(sequences, context)))


def compute_bound_batch(deployment: Deployment, hardware: Hardware) -> int | None:
    """The fewest sequences with which a decode step's linear layers are limited by computing.

    Weights are read once for all sequences, so their intensity grows with the batch up to where
    activations outweigh them. None if ``MOST_SEQUENCES`` do not get there. Attention is left out:
    every sequence brings keys and values of its own, so it does not leave the memory's roof however
    large the batch (Pope et al., arXiv:2211.05102, section 2.1). A chunk of a prefill with that
    many tokens is limited by computing from there on, too.
    """
    roof = Roof(hardware)

    def bound(sequences: int) -> bool:
        ops = [op for op in _one_row_each(deployment, sequences) if op.what == "linear"]
        return sum(map(roof.compute_seconds, ops)) >= sum(map(roof.memory_seconds, ops))

    if not bound(MOST_SEQUENCES):
        return None
    low, high = 1, MOST_SEQUENCES
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if bound(middle) else (middle + 1, high)
    return low


def _one_row_each(deployment: Deployment, sequences: int) -> tuple[Op, ...]:
    """Linear layers of a step that decodes ``sequences``, without a list as long as that.

    One sequence that adds as many tokens with as many logits has the same ones; latent attention
    works on latents or expands them, which multiplies the new tokens with the same matrices.
    """
    return step_ops(deployment, [Work(0, sequences, sequences)])
