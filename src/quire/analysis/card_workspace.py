"""What a step of the ``cuda`` backend takes beside weights and pages.

Tensors of torch as they live at a time: of a step that is launched kernel by kernel, of one that is
captured, which has memory of its own, and of tokens that are drawn. What a step leaves is there for
the next one, so the largest counts. Tests hold it against a card in software that hands memory out
(``tests/test_card_workspace.py``). Not in it is memory of the driver, of compiled kernels and of
graphs, what torch's allocator cannot use of a block, scores of policies, and logits of a whole
prompt (``Engine.logits``): a tenth of a card is left for those.
"""

from collections.abc import Callable
from typing import TypeAlias

from quire.analysis.load import FLOAT, Card, Load, Workspace
from quire.analysis.shape import LayerShape, ModelShape
from quire.layout import CacheLayout, pages_for

__all__ = ["card_workspace"]

Partials: TypeAlias = Callable[[LayerShape], int]

INT, DOUBLE = 8, 8
SPLIT = 256  # places of a split
BUCKET = 256  # sequences of the largest step that is captured
SHAPES = 4  # captured steps with tables of the largest size, counted as so many
WAVES, WARPS = 4, 4  # programs a processor that contexts are split into, of so many warps
TILE = 64  # rows of a tile of prefill that is split
PRODUCT = 64 * 64  # numbers of a tile of a product in ``cuda-exact``, which is split by SPAN
SPAN = 1024
HALF = 1024  # rows of gate and up at a time, or half of a step's if that is more
# Numbers that tokens are drawn from at a time; of each a value, a copy, its order and whose it is,
# and as much as the last two again while they are sorted.
DRAWN, DRAWN_BYTES = 1 << 23, 6 * DOUBLE
SLOT, SLOTS = 8 << 20, 2 * 4  # staging memory each way; a page that is larger has slots as large
# NVIDIA's reference of cublasSetWorkspace recommends 32 MiB for cards of 9.0, less for others; here
# once for steps that are launched and once for captured ones.
LIBRARIES = 2 * (32 << 20)


def card_workspace(shape: ModelShape, layout: CacheLayout, load: Load) -> Workspace:
    """Bytes of the largest step of each kind; ``load.card`` says on what.

    Captured steps share memory, but a larger one finds that of smaller ones too small: as sizes
    double, all of them have less than two of the largest.
    """
    card = load.card
    assert card is not None
    bucket = min(BUCKET, _power_of_two(load.sequences))
    launched, replayed = (_live(shape, rows, lambda _: 0) for rows in (load.rows, bucket))
    most = _live(shape, load.rows, _launched_partials(load, card))
    captured = _live(shape, bucket, _captured_partials(load, card, bucket))
    spans = _spans(shape, card)
    drawn = min(load.logit_rows * shape.vocab_size, max(DRAWN, shape.vocab_size))
    widest = max(layer.kv.key_dim for layer in shape.layer_kinds)
    return Workspace(
        activations=launched + 2 * replayed + 2 * spans + _tables(shape, layout, load),
        partials=most - launched + 2 * (captured - replayed),
        threads=0,
        rotary=0 if shape.positions else FLOAT * (load.rows + bucket) * widest,
        logits=FLOAT * (load.logit_rows + 2 * bucket) * shape.vocab_size,
        sampling=DRAWN_BYTES * drawn,
        moving=SLOTS * max(SLOT, *layout.area_bytes) if card.moves else 0,
        libraries=LIBRARIES,
    )


def _live(shape: ModelShape, rows: int, partials: Partials) -> int:
    """The most bytes of a step's tensors at a time, of ``rows`` new tokens."""
    between = FLOAT * rows * shape.hidden_size
    halves = [_attention(shape, layer, rows, partials(layer)) for layer in shape.layer_kinds]
    # What is added to a layer's input, in place, beside what is normed; op by op, beside the sum.
    added = between + (between if shape.positions else rows * shape.hidden_size * _number(shape))
    return between + max(*halves, _mlp(shape, rows), added)


def _attention(shape: ModelShape, layer: LayerShape, rows: int, partials: int) -> int:
    """Beside a layer's input: normed, projected, placed, mixed, projected again."""
    heads, kv = layer.num_heads, layer.kv.num_kv_heads
    queries = FLOAT * rows * heads * layer.score_dim
    stored = FLOAT * rows * kv * (layer.kv.key_dim + layer.mix_dim)
    out = FLOAT * rows * shape.hidden_size
    if shape.positions:  # op by op, each product beside what its bias is added to
        mixed = FLOAT * rows * heads * layer.mix_dim
        return max(out + 2 * (queries + stored), queries + mixed + partials, mixed + 2 * out)
    normed = rows * shape.hidden_size * _number(shape)
    mixed = rows * heads * layer.mix_dim * _number(shape)
    projected = queries + stored
    return max(normed + projected, projected + queries, queries + mixed + max(partials, out))


def _mlp(shape: ModelShape, rows: int) -> int:
    """Beside a layer's input: normed, gate and up, what they make, projected again."""
    inner: int = max(
        (m.active * m.outputs for m, _ in shape.matrices() if m.part in ("mlp", "experts")),
        default=0,
    )
    out = FLOAT * rows * shape.hidden_size
    if shape.positions:  # op by op, what attention began with and went through still there
        return 5 * out + 2 * FLOAT * rows * inner
    normed, made = (rows * width * _number(shape) for width in (shape.hidden_size, inner))
    both = 2 * FLOAT * min(rows, max(HALF, -(-rows // 2))) * inner
    return made + max(normed + both, out)


def _number(shape: ModelShape) -> int:
    """Bytes of a number that is multiplied with weights."""
    return FLOAT if shape.dtype == "fp32" else 2


def _tables(shape: ModelShape, layout: CacheLayout, load: Load) -> int:
    """Integers of a step: of each token and each page, and of captured steps."""
    pages = len(layout.groups) * load.sequences * pages_for(load.context, layout.page_size)
    return INT * (8 * load.rows + pages + SHAPES * _power_of_two(pages))


def _spans(shape: ModelShape, card: Card) -> int:
    """Of ``cuda-exact``: products with too few tiles for the card, split along what is summed."""
    if not card.exact:
        return 0
    spans = max(-(-matrix.inputs // SPAN) for matrix, _ in shape.matrices())
    return FLOAT * spans * card.processors * PRODUCT if spans > 1 else 0


# -- splits of a context ---------------------------------------------------------------------------


def _launched_partials(load: Load, card: Card) -> Partials:
    def partials(layer: LayerShape) -> int:
        splits = _splits_seen(layer, load.context)
        decoding = _decoding(layer, card, load.sequences, splits)
        return FLOAT * (layer.mix_dim + 2) * max(decoding, _prefilling(layer, load, card))

    return partials


def _captured_partials(load: Load, card: Card, bucket: int) -> Partials:
    def partials(layer: LayerShape) -> int:
        splits = _power_of_two(-(-load.context // SPLIT))
        if layer.window is not None:
            splits = min(splits, layer.window // SPLIT + 2)
        return FLOAT * (layer.mix_dim + 2) * _decoding(layer, card, bucket, splits)

    return partials


def _decoding(layer: LayerShape, card: Card, sequences: int, splits: int) -> int:
    """Rows of the parts of one decoded token of each of so many sequences, or of fewer.

    Not exact: n programs of a warp have at most ``wanted // (n // WARPS)`` splits and one that a
    window may begin in, or ``wanted`` if they are fewer than WARPS; the most are of 2 WARPS - 1.
    """
    kv_heads = layer.kv.num_kv_heads
    programs = sequences * kv_heads * splits
    if not card.exact:
        wanted = WAVES * card.processors
        programs = min(programs, (2 * WARPS - 1) * wanted + sequences * kv_heads)
    return programs * (layer.num_heads // kv_heads)


def _prefilling(layer: LayerShape, load: Load, card: Card) -> int:
    """Rows of the parts of tiles that are too few for the card, each and one beside it."""
    if card.exact:
        return 0
    share = layer.num_heads // layer.kv.num_kv_heads
    rows = max(TILE, _power_of_two(share))
    tiles = -(-load.rows // (rows // share)) * layer.kv.num_kv_heads
    few = min(tiles, card.processors - 1)
    wanted = (WAVES + 1) * card.processors
    splits = _splits_seen(layer, load.context)
    return 2 * min(few * (splits + 1), wanted + few) * rows


def _splits_seen(layer: LayerShape, context: int) -> int:
    seen = context if layer.window is None else min(context, layer.window + SPLIT)
    return -(-seen // SPLIT)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
