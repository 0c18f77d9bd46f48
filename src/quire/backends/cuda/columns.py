"""Blocks of keys and values added to what the query heads of one token have seen, in Triton.

They see the same places and are few: so they are the columns C of products, of which eight are
multiplied at a time, SHARE of them real, keys and dims being the rows; as rows (``walking.py``)
sixteen would be. Sums are in another order than there, so this is not for a backend that promises
bits.

Values, and packed keys, are read as units of 16 bits (``units.py``); a unit holds PARTS numbers,
which become operands one from each unit at a time. Other names are those of ``walking.py``.
"""

import triton
import triton.language as tl

from quire.backends.cuda.codec import narrow, operand, scales
from quire.backends.cuda.units import (
    bits_operand,
    pairs_in_words,
    scaled_pairs,
    split_pairs,
    unit_bytes,
    unit_decoded,
    unit_operand,
)
from quire.backends.cuda.walking import order_of, pages_of, rows_of

__all__ = ["parts_of", "walk_columns", "walk_three_parts_of_columns"]


@triton.constexpr_function
def parts_of(kind):
    """Numbers of a format that a unit of 16 bits holds; fp32 takes two units."""
    return {"int8": 2, "fp8": 2, "int4": 4, "int2": 8}.get(kind, 1)


@triton.jit
def _load_where(pointers, mask, MASKED: tl.constexpr):
    """Numbers of a block; 0 where ``mask`` is not, if it may be so anywhere."""
    if MASKED:
        out = tl.load(pointers, mask=mask, other=0)
    else:
        out = tl.load(pointers)
    return out


@triton.jit
def _words(pointer, KIND: tl.constexpr):
    return pointer.to(tl.pointer_type(KIND), bitcast=True)


@triton.jit
def _place(
    page, block, head,
    G: tl.constexpr, KEY: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Where tokens of a block lie in arrays of one row a token: a row, and theirs from there on.

    Of a block in one page, what differs from turn to turn is one number, not one for each token.
    """
    if PAGE % BLOCK_N == 0:
        start = page.to(tl.int64) * (G * PAGE) + (head * PAGE + block % PAGE)
        rows = order_of(KEY, BLOCK_N)
    else:
        start = tl.zeros((), tl.int64)
        rows = rows_of(page, block, head, G, KEY, PAGE, BLOCK_N)
    return start, rows


@triton.jit
def _query_columns(
    query, PART: tl.constexpr, PARTS: tl.constexpr,
    SHARE: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Dims PART, PART + PARTS, ... of queries as columns, float32 [DKP / PARTS, C].

    Read so that a warp's threads hold what products want of them: column by column, each of four
    threads a row of every four. The compiler then moves nothing between threads.
    """
    ROWS: tl.constexpr = DKP // PARTS
    each = tl.arange(0, ROWS * C)
    dims = (each // (4 * C) * 4 + each % 4) * PARTS + PART
    columns = each // 4 % C
    mask = (dims < DK) & (columns < SHARE)
    x = tl.load(query + columns * DK + dims, mask=mask, other=0.0)
    return tl.reshape(tl.permute(tl.reshape(x, (ROWS // 4, C, 4)), (0, 2, 1)), (ROWS, C))


@triton.jit
def _interleaved(one, other):
    """Two tensors [m, n] -> [2 * m, n], a row of each at a time."""
    both = tl.permute(tl.join(one, other), (0, 2, 1))
    return tl.reshape(both, (2 * one.shape[0], one.shape[1]))


@triton.jit
def _in_bytes(x, unit):
    """Queries [DKP, C] as int8 [DKP, 2 * C], high and low of 16 bits, and what they are times."""
    x = tl.trans(x)  # rows of memory along the sums
    largest = tl.max(tl.abs(x), axis=1)
    usable = (largest > 1e-30) & (largest < float("inf"))
    factor = tl.where(usable, 32512.0 / largest, 0.0)
    whole = ((x * factor[:, None] + 12582912.0) - 12582912.0).to(tl.int32)
    high = (whole + 128) >> 8
    both = tl.permute(tl.join(high, whole - (high << 8)).to(tl.int8), (0, 2, 1))
    wild = tl.sum(x * 0.0, axis=1)  # NaN where a query is not finite
    both = tl.trans(tl.reshape(both, (2 * x.shape[0], x.shape[1])))
    return both, unit * largest / 32512.0 + wild


@triton.jit
def _columns_of(
    query, unit,
    SHARE: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, C: tl.constexpr,
    KEY: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Of queries float32 [SHARE, DK], times ``unit``, what is multiplied with keys of KEY."""
    if KEY == "int4" or KEY == "int2":
        first = _query_columns(query, 0, 4, SHARE, DK, DKP, C)
        third = _query_columns(query, 2, 4, SHARE, DK, DKP, C)
        even_high, even_low = split_pairs(first, third, HARDWARE)
        second = _query_columns(query, 1, 4, SHARE, DK, DKP, C)
        fourth = _query_columns(query, 3, 4, SHARE, DK, DKP, C)
        odd_high, odd_low = split_pairs(second, fourth, HARDWARE)
        out = even_high, even_low, odd_high, odd_low, unit
    elif KEY == "int8":
        out = _in_bytes(_query_columns(query, 0, 1, SHARE, DK, DKP, C), unit)
    else:
        out = narrow(_query_columns(query, 0, 1, SHARE, DK, DKP, C), KEY, HARDWARE), unit  # type: ignore[assignment]
    return out


@triton.jit
def _packed_scores_of_columns(
    queries, page, block, head, key, key_step, key_least,
    G: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, PAGE: tl.constexpr,
    KEY: tl.constexpr, HARDWARE: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Products of a block of packed keys, which is one group of tokens, with queries [BLOCK_N, C].

    A unit holds PER tokens of an even channel, and as many of the odd one behind it. Codes come
    with 128 added: that times the sum of what they are multiplied with is taken away.
    """
    PER: tl.constexpr = 2 if KEY == "int4" else 4
    BITS: tl.constexpr = 8 // PER
    EACH: tl.constexpr = BLOCK_N // PER
    even_high, even_low, odd_high, odd_low, unit = queries
    at, fours = tl.arange(0, DKP // 2), tl.arange(0, DKP // 4)
    row = page.to(tl.int64) * G + head
    line = row * (PAGE // GROUP) + block % PAGE // GROUP
    to = _words(key_step, tl.int64) + line * (DK // 4)
    steps = _load_where(to + fours, fours < DK // 4, DKP > DK)
    to = _words(key_least, tl.int32) + line * (DK // 2)
    least = _load_where(to + at, at < DK // 2, DKP > DK)
    to = _words(key, tl.int16) + (row * (PAGE // PER) + block % PAGE // PER) * (DK // 2)
    to += tl.arange(0, EACH)[:, None] * (DK // 2) + at[None, :]
    raw = _load_where(to, (at < DK // 2)[None, :], DKP > DK)
    steps = tl.broadcast_to(steps[:, None], even_high.shape)
    both = scaled_pairs(even_high, even_low, steps, 0, HARDWARE)
    even = _interleaved(both[0], both[1])
    both = scaled_pairs(odd_high, odd_low, steps, 1, HARDWARE)
    odd = _interleaved(both[0], both[1])
    even_plain = _interleaved(
        bits_operand(even_high, HARDWARE), bits_operand(even_high >> 16, HARDWARE)
    )
    odd_plain = _interleaved(
        bits_operand(odd_high, HARDWARE), bits_operand(odd_high >> 16, HARDWARE)
    )
    shape: tl.constexpr = (EACH, DKP // 2)
    bias = narrow(tl.full(shape, -128.0, tl.float32), KEY, HARDWARE)
    low = tl.dot(bias, even)
    low = tl.dot(bias, odd, low)
    some = tl.broadcast_to(bits_operand(least, HARDWARE)[None, :], shape)
    low = tl.dot(some, even_plain, low)
    some = tl.broadcast_to(bits_operand(least >> 16, HARDWARE)[None, :], shape)
    low = tl.dot(some, odd_plain, low)
    out = ()
    for part in tl.static_range(PER):
        codes = unit_operand(raw, BITS * part, KEY, HARDWARE)
        each = tl.dot(codes, even, low)
        codes = unit_operand(raw, 8 + BITS * part, KEY, HARDWARE)
        out = out + (tl.dot(codes, odd, each),)  # type: ignore[assignment]  # noqa: RUF005
    return unit * _stacked(out, PER)


@triton.jit
def _stacked(x, COUNT: tl.constexpr):
    """Tensors [m, n] -> [COUNT * m, n], one below the other."""
    if COUNT == 2:
        both = tl.permute(tl.join(x[0], x[1]), (2, 0, 1))
        out = tl.reshape(both, (2 * x[0].shape[0], x[0].shape[1]))
    else:
        out = _stacked((_stacked((x[0], x[1]), 2), _stacked((x[2], x[3]), 2)), 2)
    return out


@triton.jit
def _scales_of(
    pointer, start, rows, there,
    KEY: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Scales of a block's tokens, float32 [BLOCK_N]; 0 where no token is.

    Two at a time where they lie side by side, since asynchronous copies are of four bytes.
    """
    if EDGE or PAGE % BLOCK_N > 0 or parts_of(KEY) > 2:
        out = scales(_load_where(pointer + start + rows, there, EDGE))
    else:
        words = tl.load(_words(pointer + start, tl.int32) + tl.arange(0, BLOCK_N // 2))
        low = (words << 16).to(tl.float32, bitcast=True)
        out = tl.interleave(low, (words & -65536).to(tl.float32, bitcast=True))
    return out


@triton.jit
def _scores_of_columns(
    queries, page, start, rows, there, block, head, key, key_scale, key_least,
    G: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, PAGE: tl.constexpr, C: tl.constexpr,
    KEY: tl.constexpr, HARDWARE: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUP: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Products of a block of keys, those of tokens ``rows``, with queries [BLOCK_N, C]."""
    if KEY == "int4" or KEY == "int2":
        out = _packed_scores_of_columns(
            queries, page, block, head, key, key_scale, key_least,
            G, DK, DKP, PAGE, KEY, HARDWARE, BLOCK_N, GROUP,
        )  # fmt: skip
    else:
        dims = tl.arange(0, DKP)
        raw = _load_where(
            (key + start * DK) + rows[:, None] * DK + dims[None, :],
            there[:, None] & (dims < DK)[None, :], EDGE or DKP > DK,
        )  # fmt: skip
        if KEY == "int8":
            both = tl.dot(raw.to(tl.int8, bitcast=True), queries[0], out_dtype=tl.int32)
            high, low = tl.split(tl.reshape(both, (BLOCK_N, C, 2)))
            if DK <= 512:
                out = (high * 256 + low).to(tl.float32)
            else:  # what int32 may not hold
                out = high.to(tl.float32) * 256.0 + low.to(tl.float32)
            out *= queries[1][None, :]
        else:
            out = tl.dot(operand(raw, KEY, HARDWARE, True), queries[0], input_precision="ieee")
            out *= queries[1]
        if KEY == "int8" or KEY == "fp8":
            scale = _scales_of(key_scale, start, rows, there, KEY, PAGE, BLOCK_N, EDGE)
            out *= scale[:, None]
    return out


@triton.jit
def _mix_columns(
    mixed, shrink, weights, start, rows, there, value, value_step, value_least,
    DV: tl.constexpr, DVP: tl.constexpr, VALUE: tl.constexpr, PARTS: tl.constexpr,
    HARDWARE: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``mixed`` times ``shrink`` [C], plus values of tokens ``rows`` times weights [BLOCK_N, C].

    ``mixed`` are PARTS tensors [DVP / PARTS, C]: dims part, part + PARTS, ... Values are 0 where
    no token is.
    """
    W: tl.constexpr = DV // PARTS
    WP: tl.constexpr = DVP // PARTS
    at = tl.arange(0, WP)
    MASKED: tl.constexpr = EDGE or WP > W
    mask = there[None, :] & (at < W)[:, None]
    out = ()
    if parts_of(VALUE) == PARTS and PARTS > 1:
        to = (_words(value, tl.int16) + start * W) + rows[None, :] * W + at[:, None]
        raw = _load_where(to, mask, MASKED)
    if PARTS > 2 and parts_of(VALUE) == PARTS:
        GROUPS: tl.constexpr = (DV + GROUP - 1) // GROUP
        GP: tl.constexpr = DVP // GROUP
        groups = tl.arange(0, GP)
        where, held = rows[None, :] * GROUPS + groups[:, None], (groups < GROUPS)[:, None]
        held = there[None, :] & held
        step = _load_where((value_step + start * GROUPS) + where, held, EDGE or GP > GROUPS)
        least = _load_where((value_least + start * GROUPS) + where, held, EDGE or GP > GROUPS)
        step = _widened_rows(pairs_in_words(step, HARDWARE), GP, GROUP // PARTS, BLOCK_N)
        least = _widened_rows(pairs_in_words(least, HARDWARE), GP, GROUP // PARTS, BLOCK_N)
    weights = narrow(weights, VALUE, HARDWARE)
    if PARTS > 1 and parts_of(VALUE) == PARTS:
        if PARTS == 2:
            values = unit_bytes(raw, VALUE, HARDWARE)
        else:
            values = unit_decoded(raw, step, least, VALUE, HARDWARE)
    for part in tl.static_range(PARTS):
        each = mixed[part] * shrink[None, :]
        if PARTS > 1 and parts_of(VALUE) == PARTS:
            each = tl.dot(values[part], weights, each, input_precision="ieee")
        else:
            to = (value + start * DV) + rows[None, :] * DV + (at * PARTS + part)[:, None]
            some = operand(_load_where(to, mask, MASKED), VALUE, HARDWARE)
            each = tl.dot(some, weights, each, input_precision="ieee")
        out = out + (each,)  # type: ignore[assignment]  # noqa: RUF005
    return out


@triton.jit
def _widened_rows(x, GROUPS: tl.constexpr, EACH: tl.constexpr, N: tl.constexpr):
    """[GROUPS, N] -> [GROUPS * EACH, N], each row EACH times."""
    return tl.reshape(tl.broadcast_to(x[:, None, :], (GROUPS, EACH, N)), (GROUPS * EACH, N))


@triton.jit
def _walk_blocks_of_columns(
    best, total, mixed, queries, first, end, low, high, pages, shift, head,
    key, key_scale, key_least, value, value_scale, value_least,
    G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    DKP: tl.constexpr, DVP: tl.constexpr, PAGE: tl.constexpr, KEY: tl.constexpr,
    VALUE: tl.constexpr, PARTS: tl.constexpr, HARDWARE: tl.constexpr,
    C: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Blocks of keys from place ``low`` up to ``high``, added to what queries have seen.

    best [C]; total [BLOCK_N, C], to be added up; mixed as in :func:`_mix_columns`. ``pages`` holds
    ids of pages by their number; ids less ``shift`` are rows of the arrays. Without EDGE queries
    see all keys of these blocks; with it, those of ``[first, end)``: few blocks, one read ahead.
    """
    page = pages_of(pages, low, first, end, KEY, PAGE, BLOCK_N, EDGE)
    for block in tl.range(low, high, BLOCK_N, num_stages=2 if EDGE else None):
        # Ids are read a block ahead: what waits for no other read can be read blocks ahead.
        following = pages_of(pages, block + BLOCK_N, first, end, KEY, PAGE, BLOCK_N, EDGE)
        places = block + order_of(KEY, BLOCK_N)
        there = (places >= first) & (places < end)
        start, rows = _place(page - shift, block, head, G, KEY, PAGE, BLOCK_N)
        scores = _scores_of_columns(
            queries, page - shift, start, rows, there, block, head, key, key_scale, key_least,
            G, DK, DKP, PAGE, C, KEY, HARDWARE, BLOCK_N, GROUP, EDGE,
        )  # fmt: skip
        if EDGE:
            scores = tl.where(there[:, None], scores, float("-inf"))
        peak = tl.maximum(best, tl.max(scores, axis=0))
        shrink = tl.exp2(best - peak)
        weights = tl.exp2(scores - peak[None, :])
        total = tl.fma(total, tl.broadcast_to(shrink[None, :], total.shape), weights)
        if VALUE == "int8" or VALUE == "fp8":
            scale = _scales_of(value_scale, start, rows, there, KEY, PAGE, BLOCK_N, EDGE)
            weights *= scale[:, None]
        mixed = _mix_columns(
            mixed, shrink, weights, start, rows, there, value, value_scale, value_least,
            DV, DVP, VALUE, PARTS, HARDWARE, BLOCK_N, EDGE, GROUP,
        )  # fmt: skip
        best = peak
        page = following
    return best, total, mixed


@triton.jit
def _walk_range_of_columns(
    best, total, mixed, query, first, end, pages, shift, head,
    key, key_scale, key_least, value, value_scale, value_least, unit,
    G: tl.constexpr, SHARE: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    DKP: tl.constexpr, DVP: tl.constexpr, PAGE: tl.constexpr, KEY: tl.constexpr,
    VALUE: tl.constexpr, PARTS: tl.constexpr, HARDWARE: tl.constexpr,
    C: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Places ``[first, end)``, whose whole blocks need no masks."""
    queries = _columns_of(query, unit, SHARE, DK, DKP, C, KEY, HARDWARE)
    begin = first // BLOCK_N * BLOCK_N
    inner, outer = (first + BLOCK_N - 1) // BLOCK_N * BLOCK_N, end // BLOCK_N * BLOCK_N
    some = inner < outer
    inner = tl.where(some, inner, end)
    outer = tl.where(some, outer, end)
    best, total, mixed = _walk_blocks_of_columns(
        best, total, mixed, queries, first, end, begin, inner, pages, shift, head,
        key, key_scale, key_least, value, value_scale, value_least,
        G, DK, DV, DKP, DVP, PAGE, KEY, VALUE, PARTS, HARDWARE, C, BLOCK_N, GROUP, True,
    )  # fmt: skip
    best, total, mixed = _walk_blocks_of_columns(
        best, total, mixed, queries, first, end, inner, outer, pages, shift, head,
        key, key_scale, key_least, value, value_scale, value_least,
        G, DK, DV, DKP, DVP, PAGE, KEY, VALUE, PARTS, HARDWARE, C, BLOCK_N, GROUP, False,
    )  # fmt: skip
    return _walk_blocks_of_columns(
        best, total, mixed, queries, first, end, outer, end, pages, shift, head,
        key, key_scale, key_least, value, value_scale, value_least,
        G, DK, DV, DKP, DVP, PAGE, KEY, VALUE, PARTS, HARDWARE, C, BLOCK_N, GROUP, True,
    )  # fmt: skip


@triton.jit
def _nothing(DVP: tl.constexpr, PARTS: tl.constexpr, C: tl.constexpr, BLOCK_N: tl.constexpr):
    """best, total, mixed of queries that have seen nothing."""
    mixed = ()
    for _ in tl.static_range(PARTS):
        mixed = mixed + (tl.zeros((DVP // PARTS, C), tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    best = tl.full((C,), -3.0e38, tl.float32)
    return best, tl.zeros((BLOCK_N, C), tl.float32), mixed


@triton.jit
def walk_columns(
    query, first, end, pages, head,
    key, key_scale, key_least, value, value_scale, value_least, unit,
    G: tl.constexpr, SHARE: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    DKP: tl.constexpr, DVP: tl.constexpr, PAGE: tl.constexpr, KEY: tl.constexpr,
    VALUE: tl.constexpr, HARDWARE: tl.constexpr,
    C: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """What queries float32 [SHARE, DK] see of places ``[first, end)``: best, total [C], mixed."""
    PARTS: tl.constexpr = parts_of(VALUE)
    best, total, mixed = _nothing(DVP, PARTS, C, BLOCK_N)
    best, total, mixed = _walk_range_of_columns(
        best, total, mixed, query, first, end, pages, 0, head,
        key, key_scale, key_least, value, value_scale, value_least, unit,
        G, SHARE, DK, DV, DKP, DVP, PAGE, KEY, VALUE, PARTS, HARDWARE, C, BLOCK_N, GROUP,
    )  # fmt: skip
    return best, tl.sum(total, axis=0), mixed


@triton.jit
def walk_three_parts_of_columns(
    query, first, end, place, stored, pages, own_pages, num_pages, head,
    key, key_scale, key_least, value, value_scale, value_least,
    open_key, open_key_scale, open_value, open_value_scale, unit,
    G: tl.constexpr, SHARE: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    DKP: tl.constexpr, DVP: tl.constexpr, PAGE: tl.constexpr, KEY: tl.constexpr,
    VALUE: tl.constexpr, OPEN_KEY: tl.constexpr, OPEN_VALUE: tl.constexpr, HARDWARE: tl.constexpr,
    C: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """As :func:`walk_columns` where whole pages are packed; see :func:`walk_three_parts`."""
    PARTS: tl.constexpr = parts_of(VALUE)
    sink = tl.where((stored == 0) & (tl.load(pages + stored // PAGE) < num_pages), 0, PAGE)
    own = place // PAGE * PAGE
    best, total, mixed = _nothing(DVP, PARTS, C, BLOCK_N)
    queries = _columns_of(query, unit, SHARE, DK, DKP, C, OPEN_KEY, HARDWARE)
    until = tl.minimum(end, sink)
    best, total, mixed = _walk_blocks_of_columns(
        best, total, mixed, queries, first, until, first // BLOCK_N * BLOCK_N, until,
        pages, num_pages, head,
        open_key, open_key_scale, open_key, open_value, open_value_scale, open_value,
        G, DK, DV, DKP, DVP, PAGE, OPEN_KEY, OPEN_VALUE, PARTS, HARDWARE,
        C, BLOCK_N, GROUP, True,
    )  # fmt: skip
    first = tl.maximum(first, sink)
    best, total, mixed = _walk_range_of_columns(
        best, total, mixed, query, first, tl.minimum(end, own), pages, 0, head,
        key, key_scale, key_least, value, value_scale, value_least, unit,
        G, SHARE, DK, DV, DKP, DVP, PAGE, KEY, VALUE, PARTS, HARDWARE, C, BLOCK_N, GROUP,
    )  # fmt: skip
    first = tl.maximum(first, own)
    best, total, mixed = _walk_blocks_of_columns(
        best, total, mixed, queries, first, end, first // BLOCK_N * BLOCK_N, end,
        own_pages, num_pages, head,
        open_key, open_key_scale, open_key, open_value, open_value_scale, open_value,
        G, DK, DV, DKP, DVP, PAGE, OPEN_KEY, OPEN_VALUE, PARTS, HARDWARE,
        C, BLOCK_N, GROUP, True,
    )  # fmt: skip
    return best, tl.sum(total, axis=0), mixed
