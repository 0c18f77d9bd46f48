"""Attention over pages, in Triton: decode in two kernels, prefill of ragged batches in one.

Keys are walked in blocks of ``BLOCK_N`` places, aligned to absolute places, with the online softmax
(Milakov & Gimelshein, 2018, arXiv:1805.02867; in tiles: Dao, 2023, arXiv:2307.08691). A tile of
``BLOCK_M`` rows holds the query heads of one KV head, for one token or several, so that a page is
read once for all of them. Decode is split along the context (flash-decoding: Dao et al., 2023) at
multiples of ``SPLIT`` places; the parts are merged in order of place.

What a row adds up, and in which order, follows from the places that it sees: a block, or split,
that only its neighbours see adds exact zeros. With the same tile sizes and the same ``SPLIT`` a
token therefore gets the same bits from both kernels, in any company (``exact=True``).

Names in the kernels: G KV heads, SHARE query heads for each, DK and DV numbers of a key and of a
value, DKP and DVP the powers of two that hold them; ``unit`` is log2(e) / sqrt(DK).
"""

import triton
import triton.language as tl

from quire.backends.cuda.codec import narrow, operand, scales

__all__ = ["decode_kernel", "merge_kernel", "prefill_kernel"]


@triton.jit
def _load(pointers, there, inside, EDGE: tl.constexpr, PADDED: tl.constexpr):
    """Numbers of a block; 0 where no token or no number is."""
    if EDGE and PADDED:
        out = tl.load(pointers, mask=there & inside, other=0)
    elif EDGE:
        out = tl.load(pointers, mask=there, other=0)
    elif PADDED:
        out = tl.load(pointers, mask=inside, other=0)
    else:
        out = tl.load(pointers)
    return out


@triton.jit
def _walk(
    best, total, mixed, q, at, first, end, low, high, window, pages, head,
    key, key_scale, value, value_scale, unit,
    G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DKP: tl.constexpr, DVP: tl.constexpr,
    PAGE: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, HARDWARE: tl.constexpr,
    BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Blocks of keys from place ``low`` up to ``high``, added to what rows have seen.

    q [M, DKP] at places ``at`` [M]; best, total [M]; mixed [M, DVP]. Without EDGE all rows see all
    keys of these blocks; with it, keys outside ``[first, end)`` are not read.
    """
    dims_k, dims_v = tl.arange(0, DKP), tl.arange(0, DVP)
    for block in range(low, high, BLOCK_N):
        places = block + tl.arange(0, BLOCK_N)
        there = (places >= first) & (places < end)
        page = _load(pages + places // PAGE, there, there, EDGE, False)
        rows = (page * G + head) * PAGE + places % PAGE  # int64 [BLOCK_N]
        raw = _load(
            key + rows[None, :] * DK + dims_k[:, None],
            there[None, :], dims_k[:, None] < DK, EDGE, DKP > DK,
        )  # fmt: skip
        keys = operand(raw, KEY, HARDWARE)
        scores = tl.dot(q, keys, input_precision="ieee") * unit
        if KEY == "int8" or KEY == "fp8":
            scores *= scales(_load(key_scale + rows, there, there, EDGE, False))[None, :]
        if EDGE:
            seen = (places[None, :] <= at[:, None]) & (places[None, :] > at[:, None] - window)
            seen = seen & there[None, :]
            scores = tl.where(seen, scores, float("-inf"))
        peak = tl.maximum(best, tl.max(scores, axis=1))
        shrink = tl.exp2(best - peak)
        weights = tl.exp2(scores - peak[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        raw = _load(
            value + rows[:, None] * DV + dims_v[None, :],
            there[:, None], dims_v[None, :] < DV, EDGE, DVP > DV,
        )  # fmt: skip
        values = operand(raw, VALUE, HARDWARE)
        if VALUE == "int8" or VALUE == "fp8":
            weights *= scales(_load(value_scale + rows, there, there, EDGE, False))[None, :]
            if EDGE:  # a token's scale may be NaN
                weights = tl.where(seen, weights, 0.0)
        elif EDGE:  # values may overflow a narrow format, and 0 * inf must not reach other rows
            wild = values.to(tl.float32) * 0.0 != 0.0
            values = tl.where(wild, 0.0, values.to(tl.float32)).to(values.dtype)
        weights = narrow(weights, VALUE, HARDWARE)
        mixed = tl.dot(weights, values, mixed * shrink[:, None], input_precision="ieee")
        if EDGE and (VALUE == "fp32" or VALUE == "fp16" or VALUE == "bf16"):
            if tl.max(tl.max(wild.to(tl.int32), axis=1), axis=0) > 0:
                hits = tl.dot(seen.to(tl.float16), wild.to(tl.float16))
                mixed = tl.where(hits > 0.0, float("nan"), mixed)
        best = peak
    return best, total, mixed


@triton.jit
def _span(
    q, at, at_min, at_max, stored, low, high, window, pages, head,
    key, key_scale, value, value_scale, unit,
    G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DKP: tl.constexpr, DVP: tl.constexpr,
    PAGE: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, HARDWARE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What rows at ``at_min`` to ``at_max`` see of places ``[low, high)``: best, total, mixed.

    ``low`` and ``high`` are multiples of BLOCK_N; pages start with place ``stored``.
    """
    first = tl.maximum(stored, at_min - window + 1)
    end = tl.minimum(at_max + 1, high)
    begin = tl.maximum(low, first // BLOCK_N * BLOCK_N)
    # Blocks in [inner, outer) are seen whole by every row.
    inner = tl.maximum(stored, tl.maximum(at_max - window + 1, 0))
    inner = tl.maximum(begin, (inner + BLOCK_N - 1) // BLOCK_N * BLOCK_N)
    outer = tl.minimum(high, (at_min + 1) // BLOCK_N * BLOCK_N)
    some = inner < outer
    inner = tl.where(some, inner, end)
    outer = tl.where(some, outer, end)
    best = tl.full((BLOCK_M,), -3.0e38, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, DVP), tl.float32)
    best, total, mixed = _walk(
        best, total, mixed, q, at, first, end, begin, inner, window, pages, head,
        key, key_scale, value, value_scale, unit,
        G, DK, DV, DKP, DVP, PAGE, KEY, VALUE, HARDWARE, BLOCK_N, True,
    )  # fmt: skip
    best, total, mixed = _walk(
        best, total, mixed, q, at, first, end, inner, outer, window, pages, head,
        key, key_scale, value, value_scale, unit,
        G, DK, DV, DKP, DVP, PAGE, KEY, VALUE, HARDWARE, BLOCK_N, False,
    )  # fmt: skip
    best, total, mixed = _walk(
        best, total, mixed, q, at, first, end, outer, end, window, pages, head,
        key, key_scale, value, value_scale, unit,
        G, DK, DV, DKP, DVP, PAGE, KEY, VALUE, HARDWARE, BLOCK_N, True,
    )  # fmt: skip
    return best, total, mixed


@triton.jit
def _merge(best, total, mixed, part_best, part_total, part_mixed):
    """One more split. Each sum is written as a fused multiply-add: one rounding, in any kernel."""
    peak = tl.maximum(best, part_best)
    old, new = tl.exp2(best - peak), tl.exp2(part_best - peak)
    total = tl.fma(part_total, new, total * old)
    mixed = tl.fma(part_mixed, tl.broadcast_to(new[:, None], mixed.shape), mixed * old[:, None])
    return peak, total, mixed


@triton.jit
def _queries(
    query, token, head, rows, there,
    G: tl.constexpr, SHARE: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr,
    KEY: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Rows of query [T, G * SHARE, DK] -> operands [M, DKP]; 0 where no row or number is."""
    dims = tl.arange(0, DKP)
    at = (token * (G * SHARE) + head * SHARE + rows % SHARE).to(tl.int64) * DK
    mask = there[:, None] & (dims[None, :] < DK)
    x = tl.load(query + at[:, None] + dims[None, :], mask=mask, other=0.0)
    return narrow(x, KEY, HARDWARE)


@triton.jit
def _sequence_of(tile, query_indptr, num_sequences, TOKENS: tl.constexpr):
    """The sequence that ``tile`` belongs to.

    Those of sequence s begin with number ``query_indptr[s] // TOKENS + s``, so that each has
    enough and nothing must be counted.
    """
    low = 0
    high = num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        begin = tl.load(query_indptr + middle) // TOKENS + middle
        low = tl.where(begin <= tile, middle, low)
        high = tl.where(begin <= tile, high, middle)
    return low


@triton.jit(do_not_specialize=["num_sequences", "window"])
def prefill_kernel(
    out, query, places, query_indptr, indptr, indices, first_page, num_sequences, window,
    key, key_scale, value, value_scale, unit,
    G: tl.constexpr, SHARE: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    DKP: tl.constexpr, DVP: tl.constexpr, PAGE: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, HARDWARE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Attention of all sequences with two new tokens or more; grid (tiles, G).

    out [T, G * SHARE, DV], query [T, G * SHARE, DK], places [T]; page tables as in GroupBatch.
    SPLIT 0 walks the whole context in one go; else splits are merged as decode merges them.
    Tiles are started from the last, which sees the longest context.
    """
    TOKENS: tl.constexpr = BLOCK_M // SHARE
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    sequence = _sequence_of(tile, query_indptr, num_sequences, TOKENS)
    start = tl.load(query_indptr + sequence)
    stop = tl.load(query_indptr + sequence + 1)
    first_token = start + (tile - start // TOKENS - sequence) * TOKENS
    if (first_token < stop) & (stop - start > 1):
        last_token = tl.minimum(first_token + TOKENS, stop) - 1
        rows = tl.arange(0, BLOCK_M)
        token = first_token + rows // SHARE
        there = token <= last_token
        token = tl.minimum(token, last_token)
        at = tl.load(places + token).to(tl.int32)
        at_min = tl.load(places + first_token).to(tl.int32)
        at_max = tl.load(places + last_token).to(tl.int32)
        gone = tl.load(first_page + sequence)
        pages = indices + tl.load(indptr + sequence) - gone
        stored = (gone * PAGE).to(tl.int32)
        q = _queries(query, token, head, rows, there, G, SHARE, DK, DKP, KEY, HARDWARE)
        if SPLIT == 0:
            high = (at_max // BLOCK_N + 1) * BLOCK_N
            best, total, mixed = _span(
                q, at, at_min, at_max, stored, 0, high, window, pages, head,
                key, key_scale, value, value_scale, unit,
                G, DK, DV, DKP, DVP, PAGE, KEY, VALUE, HARDWARE, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        else:
            best = tl.full((BLOCK_M,), -3.0e38, tl.float32)
            total = tl.zeros((BLOCK_M,), tl.float32)
            mixed = tl.zeros((BLOCK_M, DVP), tl.float32)
            first = tl.maximum(stored, tl.maximum(at_min - window + 1, 0))
            for split in range(first // SPLIT, at_max // SPLIT + 1):
                part_best, part_total, part_mixed = _span(
                    q, at, at_min, at_max, stored, split * SPLIT, (split + 1) * SPLIT,
                    window, pages, head, key, key_scale, value, value_scale, unit,
                    G, DK, DV, DKP, DVP, PAGE, KEY, VALUE, HARDWARE, BLOCK_M, BLOCK_N,
                )  # fmt: skip
                best, total, mixed = _merge(best, total, mixed, part_best, part_total, part_mixed)
        dims = tl.arange(0, DVP)
        to = (token * (G * SHARE) + head * SHARE + rows % SHARE).to(tl.int64) * DV
        mask = there[:, None] & (dims[None, :] < DV)
        result = tl.div_rn(mixed, tl.broadcast_to(total[:, None], mixed.shape))
        tl.store(out + to[:, None] + dims[None, :], result, mask=mask)


@triton.jit(do_not_specialize=["window"])
def decode_kernel(
    part_mixed, part_best, part_total, query, places, query_indptr, indptr, indices, first_page,
    window, key, key_scale, value, value_scale, unit, SPLIT,
    G: tl.constexpr, SHARE: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    DKP: tl.constexpr, DVP: tl.constexpr, PAGE: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, HARDWARE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One split of each sequence with one new token; grid (S, G, splits).

    part_mixed [S, G, splits, SHARE, DV], part_best and part_total [S, G, splits, SHARE]. A program
    whose split lies beyond the context, or was given back, writes nothing.
    """
    sequence, head, nth = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(query_indptr + sequence)
    alone = tl.load(query_indptr + sequence + 1) - start == 1
    place = tl.load(places + start, mask=alone, other=0).to(tl.int32)
    gone = tl.load(first_page + sequence)
    stored = (gone * PAGE).to(tl.int32)
    split = tl.maximum(stored, tl.maximum(place - window + 1, 0)) // SPLIT + nth
    if alone & (split * SPLIT <= place):
        rows = tl.arange(0, BLOCK_M)
        there = rows < SHARE
        at = tl.full((BLOCK_M,), 0, tl.int32) + place
        pages = indices + tl.load(indptr + sequence) - gone
        q = _queries(query, start, head, rows, there, G, SHARE, DK, DKP, KEY, HARDWARE)
        best, total, mixed = _span(
            q, at, place, place, stored, split * SPLIT, (split + 1) * SPLIT, window, pages, head,
            key, key_scale, value, value_scale, unit,
            G, DK, DV, DKP, DVP, PAGE, KEY, VALUE, HARDWARE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        dims = tl.arange(0, DVP)
        part = ((sequence * G + head).to(tl.int64) * tl.num_programs(2) + nth) * SHARE + rows
        tl.store(part_best + part, best, mask=there)
        tl.store(part_total + part, total, mask=there)
        mask = there[:, None] & (dims[None, :] < DV)
        tl.store(part_mixed + part[:, None] * DV + dims[None, :], mixed, mask=mask)


@triton.jit(do_not_specialize=["window", "splits"])
def merge_kernel(
    out, part_mixed, part_best, part_total, places, query_indptr, first_page, window, splits, SPLIT,
    G: tl.constexpr, SHARE: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The splits of :func:`decode_kernel`, merged in order of place; grid (S, G)."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    start = tl.load(query_indptr + sequence)
    if tl.load(query_indptr + sequence + 1) - start == 1:
        place = tl.load(places + start).to(tl.int32)
        stored = (tl.load(first_page + sequence) * PAGE).to(tl.int32)
        first = tl.maximum(stored, tl.maximum(place - window + 1, 0))
        rows, dims = tl.arange(0, ROWS), tl.arange(0, DVP)
        there = rows < SHARE
        mask = there[:, None] & (dims[None, :] < DV)
        best = tl.full((ROWS,), -3.0e38, tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        mixed = tl.zeros((ROWS, DVP), tl.float32)
        for nth in range(0, place // SPLIT - first // SPLIT + 1):
            part = ((sequence * G + head).to(tl.int64) * splits + nth) * SHARE + rows
            part_m = tl.load(part_best + part, mask=there, other=-3.0e38)
            part_l = tl.load(part_total + part, mask=there, other=0.0)
            part_x = tl.load(part_mixed + part[:, None] * DV + dims[None, :], mask=mask, other=0.0)
            best, total, mixed = _merge(best, total, mixed, part_m, part_l, part_x)
        to = (start * (G * SHARE) + head * SHARE + rows).to(tl.int64) * DV
        total = tl.where(there, total, 1.0)
        result = tl.div_rn(mixed, tl.broadcast_to(total[:, None], mixed.shape))
        tl.store(out + to[:, None] + dims[None, :], result, mask=mask)
