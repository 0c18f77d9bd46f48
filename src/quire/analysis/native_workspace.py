"""What a step of the native backend takes beside weights and pages."""

from quire.analysis.load import FLOAT, Load, Workspace
from quire.analysis.shape import ModelShape
from quire.layout import CacheLayout

__all__ = ["BOOKS", "native_workspace"]

SPLIT = 256  # tokens whose softmax the native kernels compute at a time
ANGLE_ROWS = 1024  # positions by which tables of rotary angles grow
FEW = 32  # rows up to which a linear layer does without panels; gate and up lie apart then
# Of each thread: copies of blocks that are no whole pages, 32 in prefill and 16 in decode, of 16
# tokens of 512 numbers each; two panels of weights (kernels.hpp: MAX_HEAD, BLOCK, CHUNK).
COPIES, COPY_BYTES, PANEL_BYTES = 48, 512 * 16 * FLOAT + 64, 2 * 4800
_WIDE = {"fp16": 4, "fp8": 2, "int8": 2}  # bytes of a number that prefill takes apart once
BOOKS = 192 << 10  # tables, lists and objects of a step: measured, about the same for all models
SPARE_WORDS = 16  # at the end of each row that a linear layer takes


def native_workspace(shape: ModelShape, layout: CacheLayout, load: Load) -> Workspace:
    """What a step of ``load`` needs beside weights and pages."""
    return Workspace(
        activations=BOOKS + FLOAT * _activations(shape, load),
        partials=FLOAT * _partials(shape, load),
        threads=load.threads * _thread_bytes(shape, layout),
        rotary=0 if shape.positions else FLOAT * _angles(shape, load.context),
        logits=FLOAT * load.logit_rows * shape.vocab_size,
    )


def _activations(shape: ModelShape, load: Load) -> int:
    """Numbers: of hidden size between layers, and of the widest of each kind inside one.

    Between layers a layer's input and its output; in the last layer, of which only some rows go on,
    norms, keys, values and turned keys of all rows.
    """
    rows, hidden = load.rows, shape.hidden_size
    kept: int = max(kv.num_kv_heads * (2 * kv.key_dim + kv.value_dim) for kv in shape.kv)
    between = rows * (2 * hidden + kept)
    widths = [
        (layer.num_heads * layer.score_dim, layer.num_heads * layer.mix_dim, layer.kv.numbers)
        for layer in shape.layer_kinds
    ]
    inside: int = sum(max(column) for column in zip(*widths, strict=True))
    inner: int = max(
        (m.active * m.outputs for m, _ in shape.matrices() if m.part in ("mlp", "experts")),
        default=0,
    )
    words: int = max(m.inputs for m, _ in shape.matrices())
    if shape.dtype == "bf16":
        words //= 2  # two to a word
    decoding = load.sequences * hidden + min(FEW, rows) * inner
    return between + decoding + rows * (hidden + inside + inner + words + SPARE_WORDS)


def _thread_bytes(shape: ModelShape, layout: CacheLayout) -> int:
    """Copies of blocks; scores of a split; of coded pages a split of one head as it is read."""
    heads = max(layer.num_heads for layer in shape.layer_kinds)
    wide = max(
        sum(
            _WIDE.get(format.name, 0) * dim
            for format, dim in (
                (page.key_format, page.key_dim),
                (page.value_format, page.value_dim),
            )
        )
        for page in layout.shapes
    )
    return COPIES * COPY_BYTES + SPLIT * (heads * FLOAT + wide) + PANEL_BYTES


def _partials(shape: ModelShape, load: Load) -> int:
    """Numbers: for each split of what a decoded token sees and each head a sum and its values."""
    return max(
        load.sequences
        * -(-layer.seen(load.context) // SPLIT)
        * layer.num_heads
        * (layer.mix_dim + 2)
        for layer in shape.layer_kinds
    )


def _angles(shape: ModelShape, context: int) -> int:
    """Numbers: cosine and sine of half a head, up to a quarter beyond the context."""
    rows = -(-max(ANGLE_ROWS, context + context // 4) // ANGLE_ROWS) * ANGLE_ROWS
    widest: int = max(layer.kv.key_dim for layer in shape.layer_kinds)
    return rows * widest
