"""What a step of a model consists of: its operations, and the bytes that each of them moves.

Counted from shapes alone, for any step: a prefill, a chunk of one, a batch of decodes, or all of
them together. Products of matrices and attention are counted, a multiplication and an addition as
two operations; norms, rotations, activations and softmax are taken to be fused into them, and cost
the bytes of their weights only. The accounting is that of Pope et al., "Efficiently scaling
transformer inference", arXiv:2211.05102, section 2.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from quire.analysis.memory import kv_layout, stored_bits
from quire.analysis.shape import DTYPE_BITS, PART_NAMES, LayerShape, Matrix, ModelShape, Part
from quire.errors import ConfigError
from quire.format_choice import describe_formats
from quire.layout import CacheLayout
from quire.pages import PageShape

__all__ = [
    "Deployment",
    "Op",
    "StepPart",
    "Work",
    "deploy",
    "embedding_ops",
    "expands",
    "head_ops",
    "layer_ops",
    "seen_pairs",
    "step_ops",
    "weight_bytes",
]

StepPart = Part | Literal["cache"]  # cache: scores over it, and sums of its values
What = Literal["linear", "attention", "other"]


@dataclass(frozen=True)
class Work:
    """What a step does for one sequence: ``new`` tokens behind ``context`` that the cache holds.

    ``logits``: how many of the new ones want them. Raises ConfigError for what cannot be.
    """

    context: int
    new: int
    logits: int = 1

    def __post_init__(self) -> None:
        if self.context < 0 or self.new < 1 or not 0 <= self.logits <= self.new:
            raise ConfigError(
                f"a step cannot add {self.new} tokens to {self.context} and want {self.logits} "
                "logits: it adds 1 or more, and logits are of those"
            )


@dataclass(frozen=True)
class Deployment:
    """A model as it would run.

    weight_bits   bits a weight of each part, scales included
    layout        how keys and values of each layer are stored
    compute       dtype that linear layers multiply in
    activations   dtype of everything between them, and of attention's arithmetic
    """

    shape: ModelShape
    weight_bits: Mapping[Part, Fraction]
    layout: CacheLayout
    compute: str
    activations: str

    @property
    def activation_bytes(self) -> float:
        """Bytes of a number between layers."""
        return float(DTYPE_BITS[self.activations] / 8)


def deploy(
    shape: ModelShape,
    *,
    weights: str | None = None,
    kv_format: str = "auto",
    page_size: int | str = "auto",
    compute: str | None = None,
) -> Deployment:
    """``shape`` with weights and pages in those formats; multiplied in its own dtype by default.

    With smaller weights that is what kernels do that widen them as they are read; ``compute="fp8"``
    or ``"int8"`` says that activations are quantised, too. Raises ConfigError.
    """
    layout = kv_layout(shape, kv_format, page_size)
    return Deployment(
        shape, stored_bits(shape, weights), layout, compute or shape.dtype, shape.dtype
    )


def weight_bytes(deployment: Deployment) -> float:
    """Bytes of all weights."""
    numbers, bits = deployment.shape.numbers, deployment.weight_bits
    return float(sum(numbers[part] * bits[part] for part in PART_NAMES) / 8)


@dataclass(frozen=True, kw_only=True)
class Op:
    """A kind of operation in a step; ``flops`` and all bytes are of its ``count`` times together.

    what, part         a linear layer, attention over the cache, or a lookup; which part it is of
    count              how many of them a step has: equal matrices of all layers, or layers
    dtype              that it multiplies in
    rows               tokens that go through it
    flops              operations: a multiplication and an addition are two
    weight_bytes       weights read, each once
    kv_bytes           keys and values read: what each sequence sees, once for all heads and tokens
    activation_bytes   numbers in and out, and of attention the keys and values that are written
    inputs, outputs    of a linear layer [outputs, inputs]
    copies, active     matrices of which a token uses ``active``; ``copies`` are expected to be read
    query_heads, kv_heads, score_dim, mix_dim   of attention, as it is computed
    context, new, sequences   tokens before, tokens added to each, and how many sequences do so
    window             most recent tokens that a query sees; None for all
    kv_format          what keys and values are stored as
    """

    what: What
    part: StepPart
    count: int
    dtype: str
    rows: int
    flops: float
    weight_bytes: float = 0.0
    kv_bytes: float = 0.0
    activation_bytes: float = 0.0
    inputs: int = 0
    outputs: int = 0
    copies: float = 1.0
    active: int = 1
    query_heads: int = 0
    kv_heads: int = 0
    score_dim: int = 0
    mix_dim: int = 0
    context: int = 0
    new: int = 0
    sequences: int = 0
    window: int | None = None
    kv_format: str = ""

    @property
    def bytes(self) -> float:
        """All that is read and written."""
        return self.weight_bytes + self.kv_bytes + self.activation_bytes


def step_ops(deployment: Deployment, work: Sequence[Work]) -> tuple[Op, ...]:
    """All operations of a step that does ``work``."""
    return (
        *embedding_ops(deployment, work),
        *layer_ops(deployment, work),
        *head_ops(deployment, work),
    )


def embedding_ops(deployment: Deployment, work: Sequence[Work]) -> Iterator[Op]:
    """Looking up a row for each token, and one of its position where the model learns those."""
    shape, rows = deployment.shape, sum(each.new for each in work)
    numbers = rows * shape.hidden_size
    tables = 2 if shape.positions else 1
    yield Op(
        what="other",
        part="embeddings",
        count=1,
        dtype=deployment.activations,
        rows=rows,
        flops=0,
        weight_bytes=float(tables * numbers * deployment.weight_bits["embeddings"] / 8),
        activation_bytes=numbers * deployment.activation_bytes,
    )


def head_ops(deployment: Deployment, work: Sequence[Work]) -> Iterator[Op]:
    """Logits of the tokens that want them; nothing if none does."""
    rows = sum(each.logits for each in work)
    if rows:
        part: Part = "embeddings" if deployment.shape.tied else "head"
        yield _linear(deployment, deployment.shape.head, 1, rows, part)


def layer_ops(deployment: Deployment, work: Sequence[Work]) -> Iterator[Op]:
    """Linear layers, attention and norms of all decoder layers.

    A mixture of experts reads the experts that its tokens are expected to choose, each evenly.
    """
    shape, groups = deployment.shape, Counter((each.context, each.new) for each in work)
    tokens = sum(each.new for each in work)
    matrices: Counter[tuple[Matrix, int]] = Counter()
    for layer, count in shape.layer_kinds.items():
        expansion, extra = _expansion(layer), _expanded_context(layer, groups)
        for matrix in layer.matrices:
            matrices[matrix, tokens + (extra if matrix is expansion else 0)] += count
    for (matrix, rows), count in matrices.items():
        yield _linear(deployment, matrix, count, rows, matrix.part)
    stored = zip(shape.layers, deployment.layout.shapes, strict=True)
    for (layer, pages), count in Counter(stored).items():
        for (context, new), sequences in groups.items():
            yield _attention(deployment, (layer, pages), count, (context, new, sequences))
    yield Op(
        what="other",
        part="norms",
        count=len(shape.layers),
        dtype=deployment.activations,
        rows=tokens,
        flops=0,
        weight_bytes=float(shape.numbers["norms"] * deployment.weight_bits["norms"] / 8),
    )


def _linear(deployment: Deployment, matrix: Matrix, count: int, rows: int, stored: Part) -> Op:
    """``count`` matrices of one kind, whose weights have the bits of part ``stored``."""
    copies = matrix.expected_copies(rows)
    weights = copies * matrix.numbers / matrix.copies * float(deployment.weight_bits[stored] / 8)
    moved = rows * matrix.active * (matrix.inputs + matrix.outputs) * deployment.activation_bytes
    return Op(
        what="linear",
        part=matrix.part,
        count=count,
        dtype=deployment.compute,
        rows=rows,
        flops=count * rows * matrix.flops,
        weight_bytes=count * weights,
        activation_bytes=count * moved,
        inputs=matrix.inputs,
        outputs=matrix.outputs,
        copies=copies,
        active=matrix.active,
    )


def _attention(
    deployment: Deployment,
    layer_and_pages: tuple[LayerShape, PageShape],
    count: int,
    of: tuple[int, int, int],
) -> Op:
    """Attention of ``of`` = (context, new, sequences) in ``count`` layers of one kind.

    Each key and value is read once for all query heads and new tokens, as kernels with large
    caches come near to; a kernel that reads them for each tile of queries reads more.
    """
    layer, pages = layer_and_pages
    context, new, sequences = of
    expanded = expands(layer, context, new)
    score, mix = (
        layer.prefill_dims if expanded and layer.prefill_dims else (layer.score_dim, layer.mix_dim)
    )
    times = count * sequences
    numbers = new * layer.num_heads * (score + mix)
    if expanded:
        numbers += (context + new) * layer.num_heads * (score + mix)
    written = new * Fraction(pages.open_shape.bytes_per_page, pages.page_size)
    flops = 2 * layer.num_heads * (score + mix) * seen_pairs(layer.window, context, new)
    return Op(
        what="attention",
        part="cache",
        count=count,
        dtype=deployment.activations,
        rows=new * sequences,
        flops=times * flops,
        kv_bytes=float(times * _read_bytes(layer, pages, context, new)),
        activation_bytes=times * (numbers * deployment.activation_bytes + float(written)),
        query_heads=layer.num_heads,
        kv_heads=layer.num_heads if expanded else layer.kv.num_kv_heads,
        score_dim=score,
        mix_dim=mix,
        context=context,
        new=new,
        sequences=sequences,
        window=layer.window,
        kv_format=describe_formats([(pages.key_format, pages.value_format)]),
    )


def seen_pairs(window: int | None, context: int, new: int) -> int:
    """Keys that ``new`` queries behind ``context`` tokens see, summed over the queries.

    A query at position p sees p + 1 tokens, or ``window`` if that is less.
    """
    growing = new if window is None else min(max(window - 1 - context, 0), new)
    pairs = growing * context + growing * (growing + 1) // 2
    return pairs if window is None else pairs + (new - growing) * window


def _read_bytes(layer: LayerShape, pages: PageShape, context: int, new: int) -> Fraction:
    """Bytes of the keys and values that the new tokens of a sequence see, their own included.

    Where whole pages are packed, the first page and the last are open: ``CacheLayout.seen_bytes``.
    """
    size, end = pages.page_size, context + new
    first = 0 if layer.window is None else max(0, context + 1 - layer.window)
    opened = end - max(first, (end - 1) // size * size)
    if end > size:
        opened += max(0, size - first)
    packed = end - first - opened
    total = opened * pages.open_shape.bytes_per_page + packed * pages.bytes_per_page
    return Fraction(total, size)


def expands(layer: LayerShape, context: int, new: int) -> bool:
    """Whether latent attention expands keys and values for these tokens, or works on latents.

    DeepSeek-V2 (arXiv:2405.04434, section 2.1) expands them for a prefill, and for decoding moves
    the matrices that would do so to queries and outputs. Here: whichever takes fewer operations,
    since a late chunk of a prefill would expand the whole context anew.
    """
    matrix = _expansion(layer)
    if matrix is None or layer.prefill_dims is None:
        return False
    pairs = seen_pairs(layer.window, context, new)
    saved = 2 * layer.num_heads * pairs
    saved *= layer.score_dim + layer.mix_dim - sum(layer.prefill_dims)
    return saved > context * matrix.flops


def _expansion(layer: LayerShape) -> Matrix | None:
    """The matrix [heads x (plain key + value), latent] of latent attention; None without."""
    if layer.prefill_dims is None:
        return None
    score, value = layer.prefill_dims
    plain = score - (layer.score_dim - layer.mix_dim)
    wanted = layer.mix_dim, layer.num_heads * (plain + value)
    found = [m for m in layer.matrices if (m.inputs, m.outputs) == wanted]
    return found[-1]  # the one before it makes queries, and may be of the same size


def _expanded_context(layer: LayerShape, groups: Mapping[tuple[int, int], int]) -> int:
    """Tokens before the new ones whose latents are expanded."""
    cases: Iterable[tuple[tuple[int, int], int]] = groups.items()
    return sum(n * context for (context, new), n in cases if expands(layer, context, new))
