"""What lies between a layer's products, in Triton: one kernel for each gap.

Each does the roundings of the ops that it stands for, in their order, and those ops are launches of
the same functions: a token has the same bits whether a layer runs fused or op by op. Sums of a row
are taken over tiles of at most :data:`CHUNK` numbers, four a thread (:func:`warps_of`), because the
order of a sum follows from that, and may not from what else a kernel reads or writes.

KIND is what a result is rounded to: the dtype of the weights that it is multiplied with.
"""

import triton
import triton.language as tl

from quire.backends.cuda.codec import encode_plain, encode_token

__all__ = [
    "CHUNK",
    "activate_kernel",
    "gated_kernel",
    "hadamard_kernel",
    "norm_kernel",
    "place_kernel",
    "warps_of",
]

CHUNK = 4096  # numbers of a row that a program sums at a time


def warps_of(width: int) -> int:
    """Warps of a program with a tile of ``width`` numbers, a power of two: four a thread."""
    return max(1, min(width, CHUNK) // 128)


@triton.jit
def _sum_of(x, delta, at, inside, ADD: tl.constexpr):
    """Numbers of a row of x, and what is to be added to it."""
    numbers = tl.load(x + at, mask=inside, other=0.0)
    if ADD:
        numbers += tl.load(delta + at, mask=inside, other=0.0)
    return numbers


@triton.jit
def norm_kernel(
    out, total, x, delta, weight, eps, n: tl.constexpr,
    ADD: tl.constexpr, KIND: tl.constexpr, HARDWARE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """x [rows, n] / sqrt(mean(x²) + eps) * weight, rounded to KIND; one program a row.

    Where ADD, x is x plus delta [rows, n], which goes into ``total``; that may be either of them.
    TILE is the least power of two from n on, or CHUNK.
    """
    row = tl.program_id(0).to(tl.int64) * n
    squares = tl.zeros((TILE,), tl.float32)
    for first in tl.static_range(0, n, TILE):
        dims = first + tl.arange(0, TILE)
        numbers = _sum_of(x, delta, row + dims, dims < n, ADD)
        squares += numbers * numbers
    root = tl.sqrt_rn(tl.div_rn(tl.sum(squares, axis=0), n * 1.0) + eps)
    for first in tl.static_range(0, n, TILE):
        dims = first + tl.arange(0, TILE)
        if n > TILE:  # else they are at hand
            numbers = _sum_of(x, delta, row + dims, dims < n, ADD)
        if ADD:
            tl.store(total + row + dims, numbers, mask=dims < n)
        scaled = tl.div_rn(numbers, root) * tl.load(weight + dims, mask=dims < n, other=0.0)
        tl.store(out + row + dims, encode_plain(scaled, KIND, HARDWARE), mask=dims < n)


@triton.jit
def _turned(x, dims, APART: tl.constexpr):
    """Numbers that lie APART -> their sum and their difference."""
    other = tl.gather(x, dims ^ APART, 0)
    return tl.where((dims & APART) == 0, x + other, other - x)


@triton.jit
def _rotated(x, dims, factors, D: tl.constexpr, DP: tl.constexpr):
    """x [DP], of which D numbers count, as :func:`quire.rotation.rotate` turns it.

    ``factors`` float32 [D] is what the numbers of each block are multiplied with in the end.
    """
    for nth in tl.static_range(0, 8):
        if D >> (nth + 1) > 0:  # blocks that are longer lie in front
            x = tl.where(dims < (D >> (nth + 1) << (nth + 1)), _turned(x, dims, 1 << nth), x)
    return x * tl.load(factors + dims, mask=dims < D, other=0.0)


@triton.jit
def hadamard_kernel(out, x, factors, D: tl.constexpr, DP: tl.constexpr):
    """Each vector of x [rows, D], turned; one program a row."""
    row = tl.program_id(0).to(tl.int64) * D
    dims = tl.arange(0, DP)
    numbers = tl.load(x + row + dims, mask=dims < D, other=0.0)
    tl.store(out + row + dims, _rotated(numbers, dims, factors, D, DP), mask=dims < D)


@triton.jit
def _in_place(
    row, bias, norms, eps, cos, sin, factors,
    D: tl.constexpr, DP: tl.constexpr,
    BIAS: tl.constexpr, NORM: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """A head's query or key, D numbers at ``row`` -> [DP]: normed, at its position, turned."""
    HALF: tl.constexpr = D // 2
    dims = tl.arange(0, DP)
    inside, low = dims < D, dims < HALF
    other, angle = tl.where(low, dims + HALF, dims - HALF), tl.where(low, dims, dims - HALF)
    x = tl.load(row + dims, mask=inside, other=0.0)
    y = tl.load(row + other, mask=inside, other=0.0)
    if BIAS:
        x += tl.load(bias + dims, mask=inside, other=0.0)
        y += tl.load(bias + other, mask=inside, other=0.0)
    if NORM:
        squares = tl.where(inside, x * x, 0.0)
        root = tl.sqrt_rn(tl.div_rn(tl.sum(squares, axis=0), D * 1.0) + eps)
        x = tl.div_rn(x, root) * tl.load(norms + dims, mask=inside, other=0.0)
        y = tl.div_rn(y, root) * tl.load(norms + other, mask=inside, other=0.0)
    turn = x * tl.load(cos + angle, mask=inside, other=0.0)
    side = y * tl.load(sin + angle, mask=inside, other=0.0)
    x = tl.where(low, turn - side, turn + side)
    if ROTATED:
        x = _rotated(x, dims, factors, D, DP)
    return tl.where(inside, x, 0.0)


@triton.jit
def _keep(
    x, dims, slot, head, stored, stored_scale,
    G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    KIND: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """One head's key, or value, x [DP] into its slot; see ``storing.append_kernel``."""
    at = (slot // PAGE * G + head) * PAGE + slot % PAGE
    if KIND == "int8" or KIND == "fp8":
        row, scale = encode_token(x[None, :], KIND)
        to = stored_scale + at + tl.zeros((1,), tl.int64)
        tl.store(to, scale)
    else:
        row = encode_plain(x[None, :], KIND, HARDWARE)
    tl.store(stored + at * D + dims[None, :], row, mask=dims[None, :] < D)


@triton.jit(do_not_specialize=["first"])
def place_kernel(
    query, numbers, bias, norms, eps, cos, sin, factors, slots, first,
    key, key_scale, value, value_scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr,
    BIAS: tl.constexpr, NORM: tl.constexpr, ROTATED: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """From the product of q, k and v to queries and stored keys and values; grid (T, H + 2 * G).

    numbers  float32 [T, (H + 2 * G) * D], and bias [(H + 2 * G) * D] that is yet to be added
    norms    float32 [2, D]: weights of the RMS norms of queries and of keys, where NORM
    cos, sin float32 [T, D / 2]; factors as :func:`_rotated` has them
    query    float32 [T, H, D], written; keys and values go where ``append_kernel`` puts them

    H or G may be 0. A token whose slot is below ``first`` is stored nowhere.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, own = numbers + (token * (H + 2 * G) + head) * D, bias + head * D
    dims = tl.arange(0, DP)
    slot = (tl.load(slots + token) - first) if G > 0 else tl.full((), -1, tl.int64)
    turn, side = cos + token * (D // 2), sin + token * (D // 2)
    if head < H:
        x = _in_place(row, own, norms, eps, turn, side, factors, D, DP, BIAS, NORM, ROTATED)
        tl.store(query + (token * H + head) * D + dims, x, mask=dims < D)
    elif slot >= 0:
        if head < H + G:
            x = _in_place(row, own, norms + D, eps, turn, side, factors, D, DP, BIAS, NORM, ROTATED)
            _keep(x, dims, slot, head - H, key, key_scale, G, D, PAGE, KEY, HARDWARE)
        else:
            x = tl.load(row + dims, mask=dims < D, other=0.0)
            if BIAS:
                x += tl.load(own + dims, mask=dims < D, other=0.0)
            _keep(x, dims, slot, head - H - G, value, value_scale, G, D, PAGE, VALUE, HARDWARE)


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    """Silu, gelu with erf, gelu's form with tanh, or relu.

    ``0.5 * (1 + tanh(y))`` is written as ``1 / (1 + exp(-2 * y))``, which cancels nothing.
    """
    if ACTIVATION == "relu":
        out = tl.where(x <= 0.0, 0.0, x)  # NaN stays
    elif ACTIVATION == "silu":
        out = tl.div_rn(x, 1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        out = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        out = tl.div_rn(x, 1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * (x * x * x))))
    return out


@triton.jit(do_not_specialize=["count"])
def activate_kernel(out, x, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """All ``count`` numbers of x; grid (parts of BLOCK)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    numbers = tl.load(x + at, mask=at < count, other=0.0)
    tl.store(out + at, _activated(numbers, ACTIVATION), mask=at < count)


@triton.jit
def gated_kernel(
    out, both, n: tl.constexpr,
    ACTIVATION: tl.constexpr, KIND: tl.constexpr, HARDWARE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """activation(gate) * up, rounded to KIND; both float32 [rows, 2 * n], gate in front.

    Grid (rows, parts of a row).
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(both + row * (2 * n) + at, mask=at < n, other=0.0)
    up = tl.load(both + row * (2 * n) + n + at, mask=at < n, other=0.0)
    result = encode_plain(_activated(gate, ACTIVATION) * up, KIND, HARDWARE)
    tl.store(out + row * n + at, result, mask=at < n)
