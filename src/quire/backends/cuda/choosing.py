"""Choosing tokens from rows of logits, in Triton: what is added up is added up here.

A row is cut into parts of BLOCK words; a part's sum is one program's, the parts are added up by one
program a row. So the order of every sum depends on the vocabulary alone, never on how many rows
there are. What is sorted or compared has no order to keep, and is torch's (``sampling.py``).
"""

import triton
import triton.language as tl

__all__ = [
    "best_kernel",
    "cut_kernel",
    "draw_kernel",
    "keys_kernel",
    "mass_kernel",
    "spread_kernel",
    "token_kernel",
    "weigh_kernel",
]


@triton.jit
def key_of(x, at):
    """Of float32 numbers at places ``at``, below 2**31: int64, as ordered as they are.

    The largest of keys is that of the largest number and, of equal ones, of the first: ties go to
    the lowest token id. ``sampling.py`` takes keys apart.
    """
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0.0 is no less than 0.0
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - at).to(tl.int64)


@triton.jit
def best_kernel(best, logits, vocab, parts, BLOCK: tl.constexpr):
    """The largest key of each part of logits float32 [n, vocab]: best int64 [n, parts].

    Where a number is NaN or infinite, the largest int64. Grid (parts, n).
    """
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * vocab + at, mask=at < vocab, other=0.0)
    key = tl.where(at < vocab, key_of(x, at), -0x7FFFFFFFFFFFFFFF)
    bad = (x.to(tl.int32, bitcast=True) & 0x7F800000) == 0x7F800000
    key = tl.where(bad, 0x7FFFFFFFFFFFFFFF, key)
    tl.store(best + row * parts + part, tl.max(key, axis=0))


@triton.jit
def token_kernel(out, best, parts, PARTS: tl.constexpr):
    """Of what ``best_kernel`` gives the largest key of each row, and its token: out int64 [n, 2].

    Grid (n).
    """
    row, part = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS)
    keys = tl.load(best + row * parts + part, mask=part < parts, other=-0x7FFFFFFFFFFFFFFF)
    key = tl.max(keys, axis=0)
    tl.store(out + 2 * row, key)
    tl.store(out + 2 * row + 1, 0x7FFFFFFF - (key & 0x7FFFFFFF))


@triton.jit
def keys_kernel(keys, logits, rows, vocab, BLOCK: tl.constexpr):
    """The keys of rows ``rows`` [r] of logits float32 [n, vocab]: keys int64 [r, vocab].

    Grid (parts, r).
    """
    part, nth = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + tl.load(rows + nth) * vocab + at, mask=at < vocab, other=0.0)
    tl.store(keys + nth * vocab + at, key_of(x, at), mask=at < vocab)


@triton.jit
def spread_kernel(sums, logits, rows, peaks, vocab, parts, BLOCK: tl.constexpr):
    """Sums of exp(x - peak) over the parts of rows ``rows`` [r] of logits: sums float64 [r, parts].

    Grid (parts, r).
    """
    part, nth = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, peak = tl.load(rows + nth), tl.load(peaks + nth)
    at = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * vocab + at, mask=at < vocab, other=0.0).to(tl.float64)
    weights = tl.where(at < vocab, tl.exp(x - peak), 0.0)
    tl.store(sums + nth * parts + part, tl.sum(weights, axis=0))


@triton.jit
def weigh_kernel(
    sums, values, logits, rows, best, peaks, temperatures, vocab, parts,
    BENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(x - peak) / temperature: values float64 [r, vocab], the largest being 0. Grid (parts, r).

    Of rows ``rows`` [r] of logits float32 [n, vocab], whose largest ``best`` [n, 2] knows; where
    BENT, of what penalties made of them, which are ``values`` before, and ``peaks`` [r].
    And the sums of their exp over each part: sums float64 [r, parts].
    """
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = part * BLOCK + tl.arange(0, BLOCK)
    if BENT:
        peak = tl.load(peaks + row)
        x = tl.load(values + row * vocab + at, mask=at < vocab, other=0.0)
    else:
        own = tl.load(rows + row)
        logits += own * vocab
        peak = tl.load(logits + tl.load(best + 2 * own + 1)).to(tl.float64)
        x = tl.load(logits + at, mask=at < vocab, other=0.0).to(tl.float64)
    x = (x - peak) / tl.load(temperatures + row)
    tl.store(values + row * vocab + at, x, mask=at < vocab)
    weights = tl.where(at < vocab, tl.exp(x), 0.0)
    tl.store(sums + row * parts + part, tl.sum(weights, axis=0))


@triton.jit
def cut_kernel(
    cut_values, cut_tokens, enough, sums, ordered, tokens, rows, top_ks, top_ps,
    vocab, parts, count, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What top-k and top-p leave of a row: tokens before or at (cut_values, cut_tokens) [r].

    ordered, tokens   the ``count`` largest values [s, count] of rows ``rows`` [s], the largest
                      first, ties in order of token id, and whose they are
    sums              of all weights over parts [r, parts]
    enough            [r]: 1, or 0 if more of the vocabulary has to be ordered
    Grid (s,).
    """
    nth = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + nth)
    top_k, top_p = tl.load(top_ks + row), tl.load(top_ps + row)
    ordered += nth * count
    tokens += nth * count
    block, part = tl.arange(0, BLOCK), tl.arange(0, PARTS)
    last = tl.load(ordered + count - 1)
    kth = tl.load(ordered + tl.minimum(tl.maximum(top_k, 1), count) - 1)
    kth = tl.where(top_k > 0, kth, float("-inf"))

    kept = tl.full((), 0.0, tl.float64)  # the weight of those that top-k leaves
    for first in range(0, count, BLOCK):
        at = first + block
        x = tl.load(ordered + at, mask=at < count, other=float("-inf"))
        kept += tl.sum(tl.where(x >= kth, tl.exp(x), 0.0), axis=0)
    every = tl.load(sums + row * parts + part, mask=part < parts, other=0.0)
    total = tl.where(top_k > 0, kept, tl.sum(every, axis=0))

    bound = tl.where(top_p < 1, top_p, float("inf"))
    before = tl.full((), 0.0, tl.float64)
    crossing = tl.full((), count, tl.int32)
    for first in range(0, count, BLOCK):
        at = first + block
        x = tl.load(ordered + at, mask=at < count, other=float("-inf"))
        weights = tl.where(x >= kth, tl.exp(x), 0.0)
        share = (before + tl.cumsum(weights, axis=0)) / total
        crosses = (share >= bound) & (at < count)
        crossing = tl.minimum(crossing, tl.min(tl.where(crosses, at, count), axis=0))
        before += tl.sum(weights, axis=0)

    crossed = crossing < count
    at = tl.minimum(crossing, count - 1)
    value = tl.load(ordered + at)
    tl.store(cut_values + row, tl.where(crossed, value, kth))
    tl.store(cut_tokens + row, tl.where(crossed, tl.load(tokens + at), vocab))
    # Of values that tie with the last one others may be missing, of smaller ones all are.
    for_k = (top_k == 0) | ((top_k <= count) & ((top_p == 1) | (kth > last)))
    for_p = (top_p == 1) | (crossed & (value > last))
    tl.store(enough + row, ((count == vocab) | (for_k & for_p)).to(tl.int64))


@triton.jit
def stays(x, at, floor, cut_value, cut_token):
    """Whether values x of tokens ``at`` are neither below the floor nor behind the cut."""
    return (x >= floor) & ((x > cut_value) | ((x == cut_value) & (at <= cut_token)))


@triton.jit
def cut_of(cut_values, cut_tokens, row, vocab, CUT: tl.constexpr):
    """What ``cut_kernel`` found of a row; where nothing is cut off, what all tokens are before."""
    if CUT:
        return tl.load(cut_values + row), tl.load(cut_tokens + row)
    return tl.full((), float("-inf"), tl.float64), tl.full((), 0, tl.int64) + vocab


@triton.jit
def mass_kernel(
    sums, values, floors, cut_values, cut_tokens, vocab, parts,
    CUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``sums`` of what is left of the rows of which something is removed. Grid (parts, r)."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    floor = tl.load(floors + row)
    cut_value, cut_token = cut_of(cut_values, cut_tokens, row, vocab, CUT)
    if (floor > float("-inf")) | (cut_value > float("-inf")):
        at = part * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(values + row * vocab + at, mask=at < vocab, other=float("-inf"))
        weights = tl.where(stays(x, at, floor, cut_value, cut_token), tl.exp(x), 0.0)
        tl.store(sums + row * parts + part, tl.sum(weights, axis=0))


@triton.jit
def draw_kernel(
    chosen, sums, values, draws, floors, cut_values, cut_tokens, vocab, parts,
    CUT: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The token whose share of what is left holds the draw, in order of token id. Grid (r,).

    The part that holds it, then the token of that part; both have weight, whatever sums round to.
    """
    row = tl.program_id(0).to(tl.int64)
    floor = tl.load(floors + row)
    cut_value, cut_token = cut_of(cut_values, cut_tokens, row, vocab, CUT)
    part = tl.arange(0, PARTS)
    masses = tl.load(sums + row * parts + part, mask=part < parts, other=0.0)
    ends = tl.cumsum(masses, axis=0)
    target = tl.load(draws + row) * tl.sum(tl.where(part == parts - 1, ends, 0.0), axis=0)
    holds = tl.min(tl.where((ends > target) & (masses > 0.0), part, PARTS), axis=0)
    last = tl.max(tl.where(masses > 0.0, part, 0), axis=0)
    holds = tl.where(holds < PARTS, holds, last)
    before = tl.sum(tl.where(part == holds - 1, ends, 0.0), axis=0)

    at = holds * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(values + row * vocab + at, mask=at < vocab, other=float("-inf"))
    left = stays(x, at, floor, cut_value, cut_token)
    weights = tl.where(left, tl.exp(x), 0.0)
    ends = before + tl.cumsum(weights, axis=0)
    token = tl.min(tl.where((ends > target) & (weights > 0.0), at, vocab), axis=0)
    last = tl.max(tl.where(weights > 0.0, at, 0), axis=0)
    tl.store(chosen + row, tl.where(token < vocab, token, last).to(tl.int64))
