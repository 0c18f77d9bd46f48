"""A model over several devices: what each holds and reads, and what they send each other.

Tensor parallelism as in Megatron-LM (arXiv:1909.08053, section 3): the first matrices of attention
and of the MLP are divided by outputs, the last by inputs, and two all-reduces a layer add up what
the devices have. Experts are divided in the same way, each over all devices. Pipeline parallelism:
consecutive layers a stage, each stage sends on the hidden states.

Only bytes over the link are counted, not the latency of a message: small decode steps, whose
all-reduces take some microseconds each whatever their size, are slower than this says.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from quire.analysis.roofline import StepTime, Timer, time_of
from quire.analysis.shape import LayerShape, Matrix, ModelShape, Part
from quire.analysis.steps import (
    Deployment,
    Op,
    Work,
    embedding_ops,
    head_ops,
    layer_ops,
    weight_bytes,
)
from quire.errors import ConfigError
from quire.layout import lay_out

__all__ = ["Split", "SplitTime", "Stage", "split", "split_time"]


@dataclass(frozen=True)
class Stage:
    """What one device of a pipeline stage has; the stage's other devices have as much.

    share         the deployment of its layers, with its share of each matrix
    is_first      it looks embeddings up
    is_last       it computes logits
    """

    share: Deployment
    is_first: bool
    is_last: bool

    @property
    def weight_bytes(self) -> float:
        """Bytes of weights on each device; a tied head away from the embeddings is a copy."""
        shape, bits = self.share.shape, self.share.weight_bits
        absent: list[Part] = []
        if not (self.is_first or (self.is_last and shape.tied)):
            absent.append("embeddings")
        if not self.is_last:
            absent.append("head")
        others = sum(float(shape.numbers[part] * bits[part] / 8) for part in absent)
        return weight_bytes(self.share) - others

    @property
    def kv_token_bytes(self) -> float:
        """Bytes that a token takes in the cache of each device, packed where pages are."""
        return float(sum(pages.bytes_per_token for pages in self.share.layout.shapes))

    def ops(self, work: Sequence[Work]) -> tuple[Op, ...]:
        """Operations of a step on each device."""
        return (
            *(embedding_ops(self.share, work) if self.is_first else ()),
            *layer_ops(self.share, work),
            *(head_ops(self.share, work) if self.is_last else ()),
        )


@dataclass(frozen=True)
class Split:
    """A deployment over ``tensor`` x ``pipeline`` devices."""

    whole: Deployment
    tensor: int
    pipeline: int
    stages: tuple[Stage, ...]
    notes: tuple[str, ...]

    def sent(self, work: Sequence[Work]) -> dict[str, float]:
        """Bytes that a device sends in a step, by what they are for, summed over the stages.

        A ring's all-reduce of n bytes over t devices sends 2 (t - 1) / t x n from each, an
        all-gather half of that. Two all-reduces of hidden states a layer and one of embeddings,
        whose table is divided by rows; logits are gathered; a stage sends hidden states to the
        next.
        """
        shape, t = self.whole.shape, self.tensor
        width = self.whole.activation_bytes
        hidden = sum(each.new for each in work) * shape.hidden_size * width
        logits = sum(each.logits for each in work) * shape.vocab_size * width
        ring = 2 * (t - 1) / t
        return {
            "layers": 2 * len(shape.layers) * ring * hidden,
            "embeddings": ring * hidden,
            "logits": ring / 2 * logits,
            "stages": (self.pipeline - 1) * hidden,
        }

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "tensor": self.tensor,
            "pipeline": self.pipeline,
            "stages": [
                {
                    "layers": len(stage.share.shape.layers),
                    "weight_bytes_per_device": stage.weight_bytes,
                    "kv_bytes_per_token_per_device": stage.kv_token_bytes,
                }
                for stage in self.stages
            ],
            "sent_bytes_per_token": self.sent([Work(0, 1)]),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class SplitTime:
    """A step over several devices.

    stages          of each stage's device, without what it sends
    sent            bytes that a device sends, as ``Split.sent`` says
    link_seconds    of sending them
    seconds         of the step: all stages, one after the other, and the link
    """

    stages: tuple[StepTime, ...]
    sent: dict[str, float]
    link_seconds: float
    seconds: float

    @property
    def busiest_stage_seconds(self) -> float:
        """Of computing: with as many steps under way as stages, one ends about that often."""
        return max(stage.seconds for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "seconds": self.seconds,
            "link_seconds": self.link_seconds,
            "busiest_stage_seconds": self.busiest_stage_seconds,
            "sent_bytes": dict(self.sent),
            "stages": [stage.as_dict() for stage in self.stages],
        }


def split(deployment: Deployment, tensor: int = 1, pipeline: int = 1) -> Split:
    """Divide a deployment over ``tensor`` devices a layer and ``pipeline`` stages of layers.

    KV heads fewer than devices are held by several; latents of latent attention by all. Raises
    ConfigError, with the numbers, where heads or sizes do not divide, and for more stages than
    layers.
    """
    shape = deployment.shape
    if tensor < 1 or pipeline < 1:
        raise ConfigError(f"{tensor} x {pipeline} devices cannot be: each is 1 or more")
    if pipeline > len(shape.layers):
        raise ConfigError(
            f"{shape.name} has {len(shape.layers)} layers, too few for {pipeline} stages"
        )
    bounds = [len(shape.layers) * stage // pipeline for stage in range(pipeline + 1)]
    stages = tuple(
        Stage(_share(deployment, range(start, end), tensor), start == 0, end == bounds[-1])
        for start, end in itertools.pairwise(bounds)
    )
    return Split(deployment, tensor, pipeline, stages, tuple(_notes(shape, tensor, pipeline)))


def split_time(
    parted: Split, timer: Timer, work: Sequence[Work], link_bandwidth: float | None
) -> SplitTime:
    """The time of a step, ``timer`` being of one device and the link not used beside computing.

    ``link_bandwidth``: bytes a second that a device sends. Raises ConfigError if bytes must be
    sent and there is no link.
    """
    stages = tuple(
        time_of(stage.ops(work), timer, timer.overhead(stage.share.shape, work))
        for stage in parted.stages
    )
    sent = parted.sent(work)
    total = sum(sent.values())
    if total and not link_bandwidth:
        raise ConfigError(
            f"{parted.tensor} x {parted.pipeline} devices send each other {total:.0f} bytes in "
            "this step, and no bandwidth of a link between them is known; name one"
        )
    link = total / link_bandwidth if link_bandwidth else 0.0
    return SplitTime(stages, sent, link, sum(each.seconds for each in stages) + link)


def _share(deployment: Deployment, layers: range, tensor: int) -> Deployment:
    """What one of ``tensor`` devices has of ``layers``."""
    shape, pages = deployment.shape, deployment.layout.shapes
    part = replace(
        shape,
        vocab_size=-(-shape.vocab_size // tensor),
        layers=tuple(_shard(shape.name, shape.layers[i], tensor) for i in layers),
        vectors=shape.vectors if layers.stop == len(shape.layers) else 0,
    )
    formats = [(pages[i].key_format, pages[i].value_format) for i in layers]
    layout = lay_out(part.windows, part.kv, deployment.layout.page_size, formats)
    return replace(deployment, shape=part, layout=layout)


def _shard(name: str, layer: LayerShape, tensor: int) -> LayerShape:
    if tensor == 1:
        return layer
    heads = _divided(layer.num_heads, tensor, f"{name} has {layer.num_heads} query heads")
    kv = (
        layer.kv if layer.prefill_dims else replace(layer.kv, num_kv_heads=_kv(name, layer, tensor))
    )
    attention = [m for m in layer.matrices if m.part == "attention"]
    others = [m for m in layer.matrices if m.part != "attention"]
    attention = (
        _latent_shards(attention, tensor, name)
        if layer.prefill_dims
        else _attention_shards(attention, layer, kv.num_kv_heads, tensor)
    )
    matrices = (*attention, *_feed_forward_shards(others, tensor, name))
    return replace(layer, matrices=matrices, num_heads=heads, kv=kv)


def _kv(name: str, layer: LayerShape, tensor: int) -> int:
    """KV heads of each device: a share of them, or one that others have, too."""
    heads = layer.kv.num_kv_heads
    if heads % tensor == 0:
        return heads // tensor
    if tensor % heads == 0:
        return 1
    raise ConfigError(
        f"{name} has {heads} KV heads, which {tensor} devices can neither divide nor share evenly"
    )


def _divided(count: int, tensor: int, what: str) -> int:
    if count % tensor:
        raise ConfigError(f"{what}, which {tensor} devices cannot divide evenly")
    return count // tensor


def _by_outputs(matrix: Matrix, tensor: int, name: str) -> Matrix:
    what = f"{name} has a matrix of {matrix.outputs} outputs ({matrix.part})"
    return replace(matrix, outputs=_divided(matrix.outputs, tensor, what))


def _by_inputs(matrix: Matrix, tensor: int, name: str) -> Matrix:
    what = f"{name} has a matrix of {matrix.inputs} inputs ({matrix.part})"
    return replace(matrix, inputs=_divided(matrix.inputs, tensor, what))


def _attention_shards(
    matrices: Sequence[Matrix], layer: LayerShape, kv_heads: int, tensor: int
) -> list[Matrix]:
    """Queries, keys, values and output, in this order."""
    queries, keys, values, output = matrices
    return [
        replace(queries, outputs=queries.outputs // tensor),
        replace(keys, outputs=kv_heads * layer.kv.key_dim),
        replace(values, outputs=kv_heads * layer.kv.value_dim),
        replace(output, inputs=output.inputs // tensor),
    ]


def _latent_shards(matrices: Sequence[Matrix], tensor: int, name: str) -> list[Matrix]:
    """Every device compresses; what leads to heads is divided: queries, expansion and output."""
    *queries, compress, expand, output = matrices
    *down, up = queries
    return [
        *down,
        _by_outputs(up, tensor, name),
        compress,
        _by_outputs(expand, tensor, name),
        _by_inputs(output, tensor, name),
    ]


def _feed_forward_shards(matrices: Sequence[Matrix], tensor: int, name: str) -> list[Matrix]:
    """Of an MLP, or of all experts, the last matrix is divided by inputs, those before by outputs.

    Routers and the gate of a shared expert are on every device.
    """
    whole = [m for m in matrices if m.outputs == 1 or (m.part == "experts" and m.copies == 1)]
    divided = [m for m in matrices if m not in whole]
    found = []
    for i, matrix in enumerate(divided):
        after = divided[i + 1] if i + 1 < len(divided) else None
        is_last = after is None or (after.part, after.copies) != (matrix.part, matrix.copies)
        found.append((_by_inputs if is_last else _by_outputs)(matrix, tensor, name))
    return [*whole, *found]


def _notes(shape: ModelShape, tensor: int, pipeline: int) -> list[str]:
    notes = []
    least = min(layer.kv.num_kv_heads for layer in shape.layers)
    if tensor > 1 and any(layer.prefill_dims for layer in shape.layers):
        notes.append("latents are kept whole on every device of a stage")
    elif tensor > least:
        notes.append(f"each of {least} KV heads is kept by {tensor // least} devices")
    if shape.vocab_size % tensor:
        notes.append(f"{shape.vocab_size} rows of embeddings are padded to divide by {tensor}")
    if len(shape.layers) % pipeline:
        notes.append(f"{len(shape.layers)} layers do not divide into {pipeline} equal stages")
    return notes
