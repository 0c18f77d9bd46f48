"""Which pages a token reads when it may not read all, in Triton: scores, and the highest of them.

A token has pages ``indices[indptr[s]:indptr[s + 1]]``; the first and the last are read anyway, and
none is scored where all are read. A page's score is summed in one order, whatever the batch.
"""

import triton
import triton.language as tl

from quire.backends.cuda.codec import scales

__all__ = ["pick_kernel", "score_bounds_kernel", "score_signs_kernel"]


@triton.jit
def _scored(indptr, indices, counts, nth, PAGES: tl.constexpr):
    """Which of its pages between the first and the last a program scores: numbers from 0, ids, and
    whether there are any.
    """
    begin = tl.load(indptr + nth)
    pages = (tl.load(indptr + nth + 1) - begin).to(tl.int32)
    scored = tl.where(tl.load(counts + nth) < pages, pages - 2, 0)
    at = tl.program_id(2) * PAGES + tl.arange(0, PAGES)
    inside = at < scored
    return at, tl.load(indices + begin + 1 + at, mask=inside, other=0), inside


@triton.jit(do_not_specialize=["longest"])
def score_bounds_kernel(
    scores, query, bounds, indptr, indices, counts, longest,
    G: tl.constexpr, SHARE: tl.constexpr, SHAREP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    PAGES: tl.constexpr,
):  # fmt: skip
    """The most that keys of a page can score: scores float32 [S, G, longest].

    query float32 [S, G * SHARE, D], bounds int16 [P, G, 2, D]. Grid (S, G, parts of PAGES pages).
    """
    nth, head = tl.program_id(0), tl.program_id(1)
    at, ids, inside = _scored(indptr, indices, counts, nth, PAGES)
    if tl.max(inside.to(tl.int32), axis=0) > 0:
        dims, heads = tl.arange(0, DP), tl.arange(0, SHAREP)
        row = (nth.to(tl.int64) * G + head) * SHARE + heads
        mask = (heads < SHARE)[:, None] & (dims[None, :] < D)
        q = tl.load(query + row[:, None] * D + dims[None, :], mask=mask, other=0.0)
        below, above = tl.sum(tl.minimum(q, 0.0), axis=0), tl.sum(tl.maximum(q, 0.0), axis=0)
        known = bounds + ((ids * G + head) * (2 * D))[:, None] + dims[None, :]
        mask = inside[:, None] & (dims[None, :] < D)
        least = scales(tl.load(known, mask=mask, other=0))
        greatest = scales(tl.load(known + D, mask=mask, other=0))
        found = tl.sum(below[None, :] * least + above[None, :] * greatest, axis=1)
        found = tl.where(found == found, found, float("inf"))  # nothing can be said of it
        to = scores + (nth.to(tl.int64) * G + head) * longest + at
        tl.store(to, found, mask=inside)


@triton.jit
def _bits_in(x):
    """How many bits of int32 x are set."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit(do_not_specialize=["longest"])
def score_signs_kernel(
    scores, query, signs, indptr, indices, counts, longest,
    G: tl.constexpr, SHARE: tl.constexpr, PAGE: tl.constexpr, PAGEP: tl.constexpr,
    WORDS: tl.constexpr, WORDSP: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    """Bits that the best key of a page has in common with queries: scores as above.

    query int32 [S, G * SHARE, WORDS], signs int32 [P, G, PAGE, WORDS].
    """
    nth, head = tl.program_id(0), tl.program_id(1)
    at, ids, inside = _scored(indptr, indices, counts, nth, PAGES)
    if tl.max(inside.to(tl.int32), axis=0) > 0:
        tokens, words = tl.arange(0, PAGEP), tl.arange(0, WORDSP)
        rows = ((ids * G + head) * PAGE)[:, None] + tokens[None, :]
        there = inside[:, None] & (tokens[None, :] < PAGE)
        mask = there[:, :, None] & (words < WORDS)[None, None, :]
        keys = tl.load(signs + rows[:, :, None] * WORDS + words[None, None, :], mask=mask, other=0)
        first = (nth.to(tl.int64) * G + head) * SHARE
        found = tl.zeros((PAGES,), tl.int32)
        for share in range(SHARE):
            own = query + (first + share) * WORDS + words
            apart = keys ^ tl.load(own, mask=words < WORDS, other=0)[None, None, :]
            count = tl.sum(_bits_in(apart), axis=2)
            count = tl.where(tokens[None, :] < PAGE, count, 32 * WORDS)
            found += 32 * WORDS - tl.min(count, axis=1)
        to = scores + (nth.to(tl.int64) * G + head) * longest + at
        tl.store(to, found.to(tl.float32), mask=inside)


@triton.jit
def _orders(scores, first, scored, BLOCK: tl.constexpr):
    """Int32 numbers as ordered as a block of scores are; behind the last of them the least."""
    at = first + tl.arange(0, BLOCK)
    x = tl.load(scores + at, mask=at < scored, other=0.0)
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0.0 is no less than 0.0
    return tl.where(at < scored, bits ^ ((bits >> 31) & 0x7FFFFFFF), -0x80000000)


@triton.jit
def _least_of(scores, scored, wanted, BLOCK: tl.constexpr):
    """The order of the ``wanted``-th highest score, two bits at a time; how many are higher.

    Three counts of at most 2**21 are parts of one number, which is summed once.
    """
    least = tl.full((), -0x80000000, tl.int64)
    one = tl.full((), 1, tl.int64)
    for nth in range(16):
        part = one << (30 - 2 * nth)
        found = one - 1
        for first in range(0, scored, BLOCK):
            order = _orders(scores, first, scored, BLOCK)
            first_quarter = (order >= (least + part).to(tl.int32)).to(tl.int64)
            half = (order >= (least + 2 * part).to(tl.int32)).to(tl.int64)
            last_quarter = (order >= (least + 3 * part).to(tl.int32)).to(tl.int64)
            found += tl.sum(first_quarter + (half << 21) + (last_quarter << 42), axis=0)
        least += tl.where((found & 0x1FFFFF) >= wanted, part, 0)
        least += tl.where(((found >> 21) & 0x1FFFFF) >= wanted, part, 0)
        least += tl.where((found >> 42) >= wanted, part, 0)
    above = 0
    for first in range(0, scored, BLOCK):
        order = _orders(scores, first, scored, BLOCK)
        above += tl.sum((order > least.to(tl.int32)).to(tl.int32), axis=0)
    return least.to(tl.int32), above


@triton.jit(do_not_specialize=["longest"])
def pick_kernel(
    picked, scores, indptr, indices, counts, chosen_indptr, longest,
    G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Ids of the pages that each head of a token reads, in order of place, from chosen_indptr on.

    scores float32 [S, G, longest]. Grid (S, G).
    """
    nth, head = tl.program_id(0), tl.program_id(1)
    begin = tl.load(indptr + nth)
    pages, count = (tl.load(indptr + nth + 1) - begin).to(tl.int32), tl.load(counts + nth)
    row = nth.to(tl.int64) * G + head
    to, ids = picked + tl.load(chosen_indptr + row), indices + begin
    if count >= pages:
        for first in range(0, pages, BLOCK):
            at = first + tl.arange(0, BLOCK)
            tl.store(to + at, tl.load(ids + at, mask=at < pages, other=0), mask=at < pages)
    else:
        scores += row * longest
        scored, wanted = pages - 2, (count - 2).to(tl.int32)
        least, above = _least_of(scores, scored, wanted, BLOCK)
        room, put = wanted - above, 1  # of equal ones, and where the next id goes
        for first in range(0, scored, BLOCK):
            order = _orders(scores, first, scored, BLOCK)
            equal = (order == least).to(tl.int32)
            taken = (order > least) | ((equal > 0) & (tl.cumsum(equal, axis=0) <= room))
            taken_here = taken.to(tl.int32)
            at = 1 + first + tl.arange(0, BLOCK)
            where = put + tl.cumsum(taken_here, axis=0) - 1
            tl.store(to + where, tl.load(ids + at, mask=taken, other=0), mask=taken)
            room -= tl.sum(equal, axis=0)
            put += tl.sum(taken_here, axis=0)
        tl.store(to, tl.load(ids))
        tl.store(to + count - 1, tl.load(ids + pages - 1))
