"""Dense work op by op, in Triton: layer norms, rotary embedding, products of one order."""

import triton
import triton.language as tl

from quire.backends.cuda.codec import narrow, operand

__all__ = ["add_spans_kernel", "layer_norm_kernel", "linear_kernel", "rope_kernel"]


@triton.jit
def layer_norm_kernel(out, x, weight, bias, eps, n: tl.constexpr, BLOCK: tl.constexpr):
    """(x - mean) / sqrt(var + eps) * weight + bias of x [rows, n]; one program a row."""
    row = tl.program_id(0).to(tl.int64) * n
    dims = tl.arange(0, BLOCK)
    numbers = tl.load(x + row + dims, mask=dims < n, other=0.0)
    mean = tl.div_rn(tl.sum(numbers, axis=0), n * 1.0)
    centred = tl.where(dims < n, numbers - mean, 0.0)
    variance = tl.div_rn(tl.sum(centred * centred, axis=0), n * 1.0)
    scaled = tl.div_rn(centred, tl.sqrt_rn(variance + eps))
    scaled *= tl.load(weight + dims, mask=dims < n, other=0.0)
    scaled += tl.load(bias + dims, mask=dims < n, other=0.0)
    tl.store(out + row + dims, scaled, mask=dims < n)


@triton.jit(do_not_specialize=["heads"])
def rope_kernel(out, x, cos, sin, heads, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Pairs (i, i + HALF) of x [T, heads, 2 * HALF], turned by cos, sin [T, HALF].

    Grid (T * heads).
    """
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK)
    inside = dims < HALF
    low = tl.load(x + row * (2 * HALF) + dims, mask=inside)
    high = tl.load(x + row * (2 * HALF) + HALF + dims, mask=inside)
    turn = tl.load(cos + row // heads * HALF + dims, mask=inside)
    side = tl.load(sin + row // heads * HALF + dims, mask=inside)
    tl.store(out + row * (2 * HALF) + dims, low * turn - high * side, mask=inside)
    tl.store(out + row * (2 * HALF) + HALF + dims, high * turn + low * side, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    out, x, weight, bias, rows, columns, inner,
    KIND: tl.constexpr, ROUNDED: tl.constexpr, BIAS: tl.constexpr, HARDWARE: tl.constexpr,
    PARTS: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x [rows, inner] times weight [columns, inner] transposed, plus bias [columns].

    x is float32, or stored as the weights are where ROUNDED.

    Every number is summed over ``inner`` in spans of SPAN, each from the front in blocks of
    BLOCK_K, and the spans are added up from the front, in tiles of one size: its bits do not depend
    on ``rows``. PARTS: a program has one span, and out is [spans, rows, columns], for
    :func:`add_spans_kernel`. Grid (tiles of columns, of rows, spans or 1).
    """
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    low, high = 0, inner
    if PARTS:
        low = tl.program_id(2) * SPAN
        high = tl.minimum(low + SPAN, inner)
        out += tl.program_id(2).to(tl.int64) * rows * columns
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for span in range(low, high, SPAN):
        part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first in range(span, tl.minimum(span + SPAN, inner), BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            mask = (m[:, None] < rows) & (k[None, :] < inner)
            a = tl.load(x + m[:, None].to(tl.int64) * inner + k[None, :], mask=mask, other=0)
            mask = (k[:, None] < inner) & (n[None, :] < columns)
            raw = tl.load(weight + n[None, :].to(tl.int64) * inner + k[:, None], mask=mask, other=0)
            if ROUNDED:
                a = operand(a, KIND, HARDWARE)
            else:
                a = narrow(a, KIND, HARDWARE)
            part = tl.dot(a, operand(raw, KIND, HARDWARE), part, input_precision="ieee")
        total += part
    if BIAS:
        total += tl.load(bias + n, mask=n < columns, other=0.0)[None, :]
    to = m[:, None].to(tl.int64) * columns + n[None, :]
    tl.store(out + to, total, mask=(m[:, None] < rows) & (n[None, :] < columns))


@triton.jit(do_not_specialize=["numbers", "spans"])
def add_spans_kernel(
    out, parts, bias, numbers, columns, spans, BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """What :func:`linear_kernel` left of ``numbers`` sums, [spans, numbers], added in its order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for nth in range(0, spans):
        there = parts + nth * numbers.to(tl.int64) + at
        total += tl.load(there, mask=at < numbers, other=0.0)
    if BIAS:
        total += tl.load(bias + at % columns, mask=at < numbers, other=0.0)
    tl.store(out + at, total, mask=at < numbers)
