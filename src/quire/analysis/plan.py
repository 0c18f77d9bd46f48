"""What ``quire plan`` answers: bytes, what fits, how fast, and ways of keeping the cache.

Nothing is loaded and no framework imported; what is predicted here, :mod:`quire.analysis.verify`
measures.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quire.analysis.catalogue import MODELS, known_model
from quire.analysis.families import read_shape
from quire.analysis.hardware import Hardware
from quire.analysis.memory import (
    SPARE,
    Fragmentation,
    Load,
    MemoryPlan,
    Share,
    fragmentation,
    kv_bytes,
    kv_fixed_bytes,
    kv_growth,
    kv_layout,
    kv_token_bytes,
    most_context,
    most_requests,
    plan_memory,
)
from quire.analysis.parallel import Split, SplitTime, split, split_time
from quire.analysis.replayed import Timing
from quire.analysis.roofline import (
    StepTime,
    Timer,
    cache_read_bytes,
    compute_bound_batch,
    decode_time,
    decoding,
    prefill_time,
)
from quire.analysis.shape import ModelShape
from quire.analysis.steps import Deployment, deploy, weight_bytes
from quire.analysis.strategies import PrefillPeak, Strategy, prefill_peaks, strategies
from quire.errors import CheckpointError, ConfigError, UnsupportedArchitecture, did_you_mean
from quire.format_choice import parse_formats

__all__ = [
    "Asked",
    "FormatRow",
    "Plan",
    "Speed",
    "budget_of",
    "growth_contexts",
    "make_plan",
    "plan_shape",
    "timing_of",
    "waste",
]

BATCHES = (1, 8, 64)


def plan_shape(model: str | None) -> ModelShape:
    """The shape of a directory with a config.json, of a name of the catalogue, or of quill.

    Of a name of the hub that is not in the catalogue config.json is fetched, if it is not in the
    local cache. Raises ConfigError, with the nearest names, for what is none of these.
    """
    from quire.models.source import QUILL, hub_config, is_hub_name, resolve_model

    if model is None or model == QUILL:
        return replace(read_shape(resolve_model(None)), name=QUILL)
    if Path(model).expanduser().is_dir():
        return read_shape(Path(model).expanduser())
    try:
        return known_model(model)
    except ConfigError:
        why = "it is neither a directory with a config.json nor in the catalogue"
    if is_hub_name(model):
        try:
            return replace(read_shape(hub_config(model).parent), name=model)
        except UnsupportedArchitecture:
            raise
        except CheckpointError as error:
            why = f"it is no directory and not in the catalogue, and {error}"
    names = [*MODELS, *(hub for hub, _ in MODELS.values())]
    raise ConfigError(
        f"no model {model!r}: {why}{did_you_mean(model, names)} (in the catalogue are: "
        f"{', '.join(MODELS)})"
    )


@dataclass(frozen=True)
class Asked:
    """What is to be planned.

    formats      page formats to compare; the plan is for the first
    weights      dtype of weights; None as the checkpoint stores them
    budget       bytes that model and cache may take together, on each device
    evict        tokens that evicting strategies keep of a sequence
    tensor, pipeline   devices that share each layer, and stages of layers
    """

    shape: ModelShape
    load: Load
    hardware: Hardware
    budget: int
    formats: tuple[str, ...] = ("auto",)
    page_size: int | str = "auto"
    weights: str | None = None
    evict: int | None = None
    tensor: int = 1
    pipeline: int = 1

    def __post_init__(self) -> None:
        most = self.shape.max_position
        if self.load.context > most:
            raise ConfigError(
                f"a context of {self.load.context:,} tokens is past the {most:,} of "
                f"{self.shape.name}; plan for at most that"
            )
        if self.budget < 1:
            raise ConfigError(f"a budget of {self.budget} bytes holds nothing; give some memory")


@dataclass(frozen=True)
class FormatRow:
    """Keys and values in one page format.

    kv_bytes       of one sequence at the context that was asked for, whole pages
    max_context    with as many requests as were asked for; 0 if not one token fits
    max_requests   at the context that was asked for
    """

    kv_format: str
    kv_bytes_per_token: float
    kv_bytes: int
    max_context: int
    max_requests: int


@dataclass(frozen=True)
class Speed:
    """Seconds of prefill and of decode steps, by batch.

    read_cache_s   of reading all pages of the load once
    compute_bound  sequences from which decoding is limited by computing; None if never
    """

    prefill: StepTime
    decode: dict[int, StepTime]
    read_cache_s: float
    compute_bound: int | None


@dataclass(frozen=True)
class Plan:
    """The answer to :class:`Asked`."""

    asked: Asked
    deployment: Deployment
    memory: MemoryPlan
    rows: tuple[FormatRow, ...]
    growth: tuple[tuple[int, int], ...]
    speed: Speed
    strategies: tuple[Strategy, ...]
    peaks: tuple[PrefillPeak, ...]
    split: Split | None
    split_decode: SplitTime | None

    @property
    def share(self) -> Share:
        """What the fullest device holds."""
        return _share(self.split, self.deployment)

    @property
    def device_bytes(self) -> int:
        """On the fullest device."""
        return self.share.bytes(self.memory)

    @property
    def fits(self) -> bool:
        """Whether the load fits the budget of each device."""
        return self.device_bytes <= self.asked.budget

    @property
    def fragmentation(self) -> Fragmentation:
        """Empty memory if requests are of any length up to the context, each as likely."""
        lengths = range(1, self.asked.load.context + 1)
        longest, size = self.asked.shape.max_position, self.deployment.layout.page_size
        return fragmentation(lengths, longest, size)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; bytes, seconds and tokens."""
        asked, shape, first = self.asked, self.asked.shape, self.rows[0]
        layout, requests = self.deployment.layout, self.asked.load.sequences
        return {
            "model": shape.name,
            "source": shape.source,
            "notes": list(shape.notes),
            "parameters": shape.total_numbers,
            "active_parameters": shape.active_numbers,
            "kv_format": first.kv_format,
            "page_size": layout.page_size,
            "context": asked.load.context,
            "requests": requests,
            "hardware": asked.hardware.as_dict(),
            "budget_bytes": asked.budget,
            "fits": self.fits,
            "weight_bytes": self.memory.weight_bytes,
            "weight_bytes_by_part": dict(self.memory.weights),
            "kv_bytes_per_token": first.kv_bytes_per_token,
            "kv_bytes": self.memory.kv,
            "kv_bytes_per_request": first.kv_bytes,
            "kv_bytes_per_token_by_layer": [page.bytes_per_token for page in layout.shapes],
            "kv_fixed_bytes": kv_fixed_bytes(layout),
            "kv_bytes_per_further_token": float(kv_growth(layout, asked.load.context)),
            "workspace_bytes": self.memory.workspace.total,
            "logits_bytes": self.memory.workspace.logits,
            "total_bytes": self.memory.total,
            "device_bytes": self.device_bytes,
            "max_context": first.max_context,
            "max_requests": first.max_requests,
            "prefill_s": self.speed.prefill.seconds,
            "decode_tokens_per_s": requests / self.speed.decode[requests].seconds,
            "prefill": self.speed.prefill.as_dict(),
            "decode": {str(n): step.as_dict() for n, step in self.speed.decode.items()},
            "read_cache_s": self.speed.read_cache_s,
            "compute_bound_requests": self.speed.compute_bound,
            "formats": [vars(row) for row in self.rows],
            "growth": [{"context": tokens, "kv_bytes": taken} for tokens, taken in self.growth],
            "strategies": [strategy.as_dict() for strategy in self.strategies],
            "waste": {
                "lengths": f"1 to {asked.load.context}, each as likely",
                "contiguous": self.fragmentation.contiguous_waste,
                "paged": self.fragmentation.paged_waste,
            },
            "prefill_score_bytes": {str(peak.name): peak.score_bytes for peak in self.peaks},
            "split": None if self.split is None else self.split.as_dict(),
            "split_decode": None if self.split_decode is None else self.split_decode.as_dict(),
        }


def make_plan(asked: Asked, timer: Timer) -> Plan:
    """Answer; ``timer`` says how long operations take. Raises ConfigError for what cannot be."""
    shape, load, first = asked.shape, asked.load, asked.formats[0]
    deployment = deploy(shape, weights=asked.weights, kv_format=first, page_size=asked.page_size)
    parted = together = None
    if asked.tensor * asked.pipeline > 1:
        parted = split(deployment, asked.tensor, asked.pipeline)
        work = decoding(load.sequences, load.context - 1)
        together = split_time(parted, timer, work, asked.hardware.link_bandwidth)
    evict = load.context // 4 if asked.evict is None else asked.evict
    return Plan(
        asked=asked,
        deployment=deployment,
        memory=plan_memory(shape, deployment.layout, load, asked.weights),
        rows=tuple(
            _row(asked, kv_format, _share(parted, deployment)) for kv_format in asked.formats
        ),
        growth=tuple(
            (tokens, load.sequences * kv_bytes(deployment.layout, tokens, load.chunk))
            for tokens in growth_contexts(shape.max_position, load.context)
        ),
        speed=_speed(asked, deployment, timer),
        strategies=tuple(strategies(shape, load, max(1, evict))),
        peaks=tuple(prefill_peaks(shape, load.context, load.chunk, load.threads)),
        split=parted,
        split_decode=together,
    )


def growth_contexts(longest: int, asked: int) -> Sequence[int]:
    """Powers of two from 128 up to the model's context, that, and what was asked for."""
    powers = {1 << n for n in range(7, 40) if 1 << n < longest}
    return sorted(powers | {longest, asked})


def _share(parted: Split | None, deployment: Deployment) -> Share:
    if parted is None:
        return Share()
    weights = max(stage.weight_bytes for stage in parted.stages)
    kept = max(stage.kv_token_bytes for stage in parted.stages)
    every = float(kv_token_bytes(deployment.layout))
    return Share(weights / weight_bytes(deployment), kept / every)


def _row(asked: Asked, kv_format: str, share: Share) -> FormatRow:
    page_size = "auto" if parse_formats(kv_format).by_page else asked.page_size
    layout = kv_layout(asked.shape, kv_format, page_size)
    load, of = asked.load, (asked.budget, asked.weights)
    a_token = kv_token_bytes(layout)
    return FormatRow(
        kv_format=layout.format_text,
        kv_bytes_per_token=a_token.numerator if a_token.denominator == 1 else float(a_token),
        kv_bytes=kv_bytes(layout, load.context, load.chunk),
        max_context=most_context(asked.shape, layout, load, *of, share=share),
        max_requests=most_requests(asked.shape, layout, load, *of, share=share),
    )


def _speed(asked: Asked, deployment: Deployment, timer: Timer) -> Speed:
    """Decoding is that of the last token of the context."""
    load = asked.load
    batches = sorted({*BATCHES, load.sequences})
    return Speed(
        prefill=prefill_time(deployment, timer, load.context, load.chunk),
        decode={n: decode_time(deployment, timer, n, load.context - 1) for n in batches},
        read_cache_s=cache_read_bytes(deployment, load.sequences, load.context - 1)
        / asked.hardware.bandwidth,
        compute_bound=compute_bound_batch(deployment, asked.hardware),
    )


def timing_of(plan: Plan, timer: Timer) -> Timing:
    """A plan's steps as a replay takes them: weights once, prompts by token, pages by byte."""
    deployment, load = plan.deployment, plan.asked.load
    alone = decode_time(deployment, timer, 1, load.context - 1)
    cache = alone.by_part.get("cache", 0.0)
    step = alone.seconds - cache
    read = cache_read_bytes(deployment, 1, load.context - 1)
    chunk = min(load.chunk, load.context)
    prefill = prefill_time(deployment, timer, load.context, chunk)
    a_token = max(0.0, prefill.seconds - prefill.steps * step) / load.context
    return Timing(step, a_token, cache / read if read else 0.0)


def waste(found: Fragmentation, longest: int, page_size: int) -> str:
    """One line about empty memory, for a person."""
    return (
        f"{found.contiguous_waste:.0%} of a contiguous cache of {longest:,} tokens a sequence, "
        f"{found.paged_waste:.1%} of pages of {page_size}"
    )


def budget_of(memory: int) -> int:
    """What of a memory can be planned for."""
    if memory < 1:
        raise ConfigError(f"a memory of {memory} bytes holds nothing; give some")
    return int(memory * (1 - SPARE))
