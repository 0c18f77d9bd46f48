"""Blocks of keys and values added to what a tile of queries has seen, in Triton.

Keys are walked in blocks of ``BLOCK_N`` places, aligned to absolute places, with the online softmax
(Milakov & Gimelshein, 2018, arXiv:1805.02867; in tiles: Dao, 2023, arXiv:2307.08691). What a row
adds up, and in which order, follows from the places that it sees: a block that only its neighbours
see adds exact zeros. That is for tiles of rows; the query heads of one token alone can be columns
of products, in the second half.

Names: G KV heads, DK and DV numbers of a key and of a value, DKP and DVP the powers of two that
hold them; ``unit`` is log2(e) / sqrt(DK). A row sees the places ``since`` to ``until`` [M].
"""

import triton
import triton.language as tl

from quire.backends.cuda.codec import (
    bits_operand,
    codes_operand,
    decoded_operand,
    narrow,
    operand,
    pairs_in_words,
    scaled_pairs,
    scales,
    split_pairs,
    unit_bytes,
    unit_decoded,
    unit_operand,
)

__all__ = [
    "parts_of",
    "walk_columns",
    "walk_pages",
    "walk_three_parts",
    "walk_three_parts_of_columns",
]


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
def _side_by_side(one, other):
    """Two tensors [m, n] -> [m, 2 * n], the first's columns in front."""
    both = tl.permute(tl.join(one, other), (0, 2, 1))
    return tl.reshape(both, (one.shape[0], 2 * one.shape[1]))


@triton.jit
def _apart(x, PER: tl.constexpr):
    """Columns of x [m, n] in the order in which packed numbers come: by c % PER, then c // PER."""
    by_byte = tl.reshape(x, (x.shape[0], x.shape[1] // PER, PER))
    return tl.reshape(tl.permute(by_byte, (0, 2, 1)), x.shape)


@triton.jit
def _together(x, PER: tl.constexpr):
    """What :func:`_apart` was given."""
    by_part = tl.reshape(x, (x.shape[0], PER, x.shape[1] // PER))
    return tl.reshape(tl.permute(by_part, (0, 2, 1)), x.shape)


@triton.jit
def _of_channels(pointer, DK: tl.constexpr, DKP: tl.constexpr, HARDWARE: tl.constexpr):
    """DK scales as float32 [DKP]; two at a time, since asynchronous copies are of four bytes."""
    if HARDWARE and DK % 2 == 0:
        pairs = tl.arange(0, DKP // 2)
        words = pointer.to(tl.pointer_type(tl.int32), bitcast=True) + pairs
        raw = _load(words, pairs < DK // 2, pairs < DK // 2, False, DKP > DK)
        low = (raw << 16).to(tl.float32, bitcast=True)
        out = tl.interleave(low, (raw & -65536).to(tl.float32, bitcast=True))
    else:
        dims = tl.arange(0, DKP)
        out = scales(_load(pointer + dims, dims < DK, dims < DK, False, DKP > DK))
    return out


@triton.jit
def _packed_scores(
    wide, page, block, head, key, key_step, key_least,
    G: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, PAGE: tl.constexpr,
    KEY: tl.constexpr, HARDWARE: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Products of queries ``wide`` float32 [M, DKP] with a block of packed keys, [M, BLOCK_N].

    The block is one group of tokens: channel d of key t is ``least[d] + step[d] * code[t, d]``.
    Queries times steps are rounded once, codes and minima are exact. Blocks here are whole pages'.
    """
    PER: tl.constexpr = 2 if KEY == "int4" else 4
    dims = tl.arange(0, DKP)
    row = page.to(tl.int64) * G + head
    at = (row * (PAGE // GROUP) + block % PAGE // GROUP) * DK
    step = _of_channels(key_step + at, DK, DKP, HARDWARE)
    least = _of_channels(key_least + at, DK, DKP, HARDWARE)
    rows = row * (PAGE // PER) + block % PAGE // PER + tl.arange(0, BLOCK_N // PER)
    inside = dims[:, None] < DK
    raw = _load(key + rows[None, :] * DK + dims[:, None], inside, inside, False, DKP > DK)
    # All columns alike: a product sums in the same order wherever a kernel keeps its rows.
    minima = narrow(tl.broadcast_to(least[:, None], (DKP, 16)), KEY, HARDWARE)
    low = tl.max(tl.dot(narrow(wide, KEY, HARDWARE), minima, input_precision="ieee"), axis=1)
    scaled = narrow(wide * step[None, :], KEY, HARDWARE)
    out = _side_by_side(
        tl.dot(scaled, codes_operand(raw, 0, KEY, HARDWARE), input_precision="ieee"),
        tl.dot(scaled, codes_operand(raw, 1, KEY, HARDWARE), input_precision="ieee"),
    )
    if PER == 4:
        rest = _side_by_side(
            tl.dot(scaled, codes_operand(raw, 2, KEY, HARDWARE), input_precision="ieee"),
            tl.dot(scaled, codes_operand(raw, 3, KEY, HARDWARE), input_precision="ieee"),
        )
        out = _side_by_side(out, rest)
    return out + low[:, None]


@triton.jit
def _packed_values(
    rows, there, value, value_step, value_least,
    DV: tl.constexpr, DVP: tl.constexpr, VALUE: tl.constexpr, HARDWARE: tl.constexpr,
    BLOCK_N: tl.constexpr, EDGE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Packed values of tokens ``rows`` [BLOCK_N] as operands [BLOCK_N, DVP], rounded to them.

    Columns are in the order of :func:`_apart`.
    """
    PER: tl.constexpr = 2 if VALUE == "int4" else 4
    WIDTH: tl.constexpr = (DV + PER - 1) // PER
    GROUPS: tl.constexpr = (DV + GROUP - 1) // GROUP
    WP: tl.constexpr = DVP // PER
    GP: tl.constexpr = DVP // GROUP
    at, groups = tl.arange(0, WP), tl.arange(0, GP)
    raw = _load(
        value + rows[:, None] * WIDTH + at[None, :],
        there[:, None], at[None, :] < WIDTH, EDGE, WP > WIDTH,
    )  # fmt: skip
    where, inside = rows[:, None] * GROUPS + groups[None, :], groups[None, :] < GROUPS
    step = _load(value_step + where, there[:, None], inside, EDGE, GP > GROUPS)
    least = _load(value_least + where, there[:, None], inside, EDGE, GP > GROUPS)
    step = _widened(step, BLOCK_N, GP, GROUP // PER)
    least = _widened(least, BLOCK_N, GP, GROUP // PER)
    out = _side_by_side(
        decoded_operand(raw, step, least, 0, VALUE, HARDWARE),
        decoded_operand(raw, step, least, 1, VALUE, HARDWARE),
    )
    if PER == 4:
        rest = _side_by_side(
            decoded_operand(raw, step, least, 2, VALUE, HARDWARE),
            decoded_operand(raw, step, least, 3, VALUE, HARDWARE),
        )
        out = _side_by_side(out, rest)
    return out


@triton.jit
def _widened(x, ROWS: tl.constexpr, GROUPS: tl.constexpr, EACH: tl.constexpr):
    """[ROWS, GROUPS] -> [ROWS, GROUPS * EACH], each number EACH times."""
    return tl.reshape(tl.broadcast_to(x[:, :, None], (ROWS, GROUPS, EACH)), (ROWS, GROUPS * EACH))


@triton.jit
def _scores(
    q, wide, page, rows, there, block, head, key, key_scale, key_least,
    G: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, PAGE: tl.constexpr,
    KEY: tl.constexpr, HARDWARE: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUP: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Products of queries with a block of keys, those of tokens ``rows``, [M, BLOCK_N]."""
    dims = tl.arange(0, DKP)
    if KEY == "int4" or KEY == "int2":
        out = _packed_scores(
            wide, page, block, head, key, key_scale, key_least,
            G, DK, DKP, PAGE, KEY, HARDWARE, BLOCK_N, GROUP,
        )  # fmt: skip
    else:
        at = key + rows[None, :] * DK + dims[:, None]
        raw = _load(at, there[None, :], dims[:, None] < DK, EDGE, DKP > DK)
        out = tl.dot(q, operand(raw, KEY, HARDWARE, True), input_precision="ieee")
    return out


@triton.jit
def _values(
    rows, there, value, value_scale, value_least,
    DV: tl.constexpr, DVP: tl.constexpr, VALUE: tl.constexpr, HARDWARE: tl.constexpr,
    BLOCK_N: tl.constexpr, EDGE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Values of tokens ``rows`` as operands [BLOCK_N, DVP]; 0 where no token is."""
    dims = tl.arange(0, DVP)
    if VALUE == "int4" or VALUE == "int2":
        out = _packed_values(
            rows, there, value, value_scale, value_least,
            DV, DVP, VALUE, HARDWARE, BLOCK_N, EDGE, GROUP,
        )  # fmt: skip
    else:
        at = value + rows[:, None] * DV + dims[None, :]
        raw = _load(at, there[:, None], dims[None, :] < DV, EDGE, DVP > DV)
        out = operand(raw, VALUE, HARDWARE, False)
    return out


@triton.jit
def _mix(mixed, weights, values, seen, VALUE: tl.constexpr, HARDWARE: tl.constexpr,
         EDGE: tl.constexpr):  # fmt: skip
    """``mixed`` plus weights [M, N] times values [N, DVP], which may be infinite or NaN.

    They may overflow a narrow format, and 0 * inf must not reach rows that do not see them.
    """
    weights = narrow(weights, VALUE, HARDWARE)
    if EDGE and VALUE != "int8" and VALUE != "fp8":
        wild = values.to(tl.float32) * 0.0 != 0.0
        values = tl.where(wild, 0.0, values.to(tl.float32)).to(values.dtype)
        mixed = tl.dot(weights, values, mixed, input_precision="ieee")
        if tl.max(tl.max(wild.to(tl.int32), axis=1), axis=0) > 0:
            hits = tl.dot(seen.to(tl.float16), wild.to(tl.float16))
            mixed = tl.where(hits > 0.0, float("nan"), mixed)
    else:
        mixed = tl.dot(weights, values, mixed, input_precision="ieee")
    return mixed


@triton.jit
def _order(KEY: tl.constexpr, BLOCK_N: tl.constexpr):
    """The order in which the keys of a block are multiplied: packed ones as in :func:`_apart`."""
    order = tl.arange(0, BLOCK_N)
    if KEY == "int4" or KEY == "int2":
        PER: tl.constexpr = 2 if KEY == "int4" else 4
        EACH: tl.constexpr = BLOCK_N // PER
        order = order % EACH * PER + order // EACH
    return order


@triton.jit
def _pages_of(
    pages, block, first, end,
    KEY: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """The id of the page that a block lies in, or of each place's [BLOCK_N]; 0 past ``end``."""
    if PAGE % BLOCK_N == 0:
        out = tl.load(pages + block // PAGE, mask=block < end, other=0).to(tl.int32)
    else:
        places = block + _order(KEY, BLOCK_N)
        there = places < end
        if EDGE:
            there = there & (places >= first)
        out = tl.load(pages + places // PAGE, mask=there, other=0).to(tl.int32)
    return out


@triton.jit
def _rows_of(
    page, block, head,
    G: tl.constexpr, KEY: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Where the tokens of a block lie in arrays of one row a token, int64 [BLOCK_N]."""
    order = _order(KEY, BLOCK_N)
    if BLOCK_N % PAGE == 0:
        offset = order % PAGE
    elif PAGE % BLOCK_N == 0:
        offset = block % PAGE + order
    else:
        offset = (block + order) % PAGE
    return page.to(tl.int64) * (G * PAGE) + (head * PAGE + offset)


@triton.jit
def _walk(
    best, total, mixed, q, wide, since, until, first, end, low, high, pages, shift, head,
    key, key_scale, key_least, value, value_scale, value_least, unit,
    G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DKP: tl.constexpr, DVP: tl.constexpr,
    PAGE: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, HARDWARE: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUP: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Blocks of keys from place ``low`` up to ``high``, added to what rows have seen.

    q [M, DKP] operands, and ``wide`` the same in float32; best, total [M]; mixed [M, DVP].
    ``pages`` holds ids of pages by their number; ids less ``shift`` are rows of the arrays.
    Without EDGE all rows see all keys of these blocks; with it, keys outside ``[first, end)`` are
    not read.
    """
    page = _pages_of(pages, low, first, end, KEY, PAGE, BLOCK_N, EDGE)
    for block in range(low, high, BLOCK_N):
        # Ids are read a block ahead: what waits for no other read can be read blocks ahead.
        following = _pages_of(pages, block + BLOCK_N, first, end, KEY, PAGE, BLOCK_N, EDGE)
        places = block + _order(KEY, BLOCK_N)
        there = (places >= first) & (places < end)
        rows = _rows_of(page - shift, block, head, G, KEY, PAGE, BLOCK_N)
        scores = unit * _scores(
            q, wide, page - shift, rows, there, block, head, key, key_scale, key_least,
            G, DK, DKP, PAGE, KEY, HARDWARE, BLOCK_N, GROUP, EDGE,
        )  # fmt: skip
        if KEY == "int8" or KEY == "fp8":
            scores *= scales(_load(key_scale + rows, there, there, EDGE, False))[None, :]
        seen = (places[None, :] >= since[:, None]) & (places[None, :] <= until[:, None])
        seen = seen & there[None, :]
        if EDGE:
            scores = tl.where(seen, scores, float("-inf"))
        peak = tl.maximum(best, tl.max(scores, axis=1))
        shrink = tl.exp2(best - peak)
        weights = tl.exp2(scores - peak[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        values = _values(
            rows, there, value, value_scale, value_least,
            DV, DVP, VALUE, HARDWARE, BLOCK_N, EDGE, GROUP,
        )  # fmt: skip
        if VALUE == "int8" or VALUE == "fp8":
            weights *= scales(_load(value_scale + rows, there, there, EDGE, False))[None, :]
            if EDGE:  # a token's scale may be NaN
                weights = tl.where(seen, weights, 0.0)
        mixed = _mix(mixed * shrink[:, None], weights, values, seen, VALUE, HARDWARE, EDGE)
        best = peak
        page = following
    return best, total, mixed


@triton.jit
def _walk_range(
    best, total, mixed, q, wide, since, until, first, end, inner, outer, low, pages, shift, head,
    key, key_scale, key_least, value, value_scale, value_least, unit,
    G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DKP: tl.constexpr, DVP: tl.constexpr,
    PAGE: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, HARDWARE: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Places ``[first, end)``, of which every row sees ``[inner, outer)``; those from ``low`` on.

    ``low`` is a multiple of BLOCK_N. Blocks that all rows see whole need no masks.
    """
    begin = tl.maximum(low, first // BLOCK_N * BLOCK_N)
    inner = tl.maximum(begin, (inner + BLOCK_N - 1) // BLOCK_N * BLOCK_N)
    outer = outer // BLOCK_N * BLOCK_N
    some = inner < outer
    inner = tl.where(some, inner, end)
    outer = tl.where(some, outer, end)
    best, total, mixed = _walk(
        best, total, mixed, q, wide, since, until, first, end, begin, inner, pages, shift, head,
        key, key_scale, key_least, value, value_scale, value_least, unit,
        G, DK, DV, DKP, DVP, PAGE, KEY, VALUE, HARDWARE, BLOCK_N, GROUP, True,
    )  # fmt: skip
    best, total, mixed = _walk(
        best, total, mixed, q, wide, since, until, first, end, inner, outer, pages, shift, head,
        key, key_scale, key_least, value, value_scale, value_least, unit,
        G, DK, DV, DKP, DVP, PAGE, KEY, VALUE, HARDWARE, BLOCK_N, GROUP, False,
    )  # fmt: skip
    return _walk(
        best, total, mixed, q, wide, since, until, first, end, outer, end, pages, shift, head,
        key, key_scale, key_least, value, value_scale, value_least, unit,
        G, DK, DV, DKP, DVP, PAGE, KEY, VALUE, HARDWARE, BLOCK_N, GROUP, True,
    )  # fmt: skip


@triton.jit
def walk_pages(
    q, wide, at, at_min, at_max, stored, low, high, window, pages, head,
    key, key_scale, key_least, value, value_scale, value_least, unit,
    G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DKP: tl.constexpr, DVP: tl.constexpr,
    PAGE: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, HARDWARE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """What rows at ``at_min`` to ``at_max`` see of places ``[low, high)``: best, total, mixed.

    ``low`` and ``high`` are multiples of BLOCK_N; pages start with place ``stored``.
    """
    first = tl.maximum(stored, at_min - window + 1)
    inner = tl.maximum(stored, tl.maximum(at_max - window + 1, 0))
    best = tl.full((BLOCK_M,), -3.0e38, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, DVP), tl.float32)
    return _walk_range(
        best, total, mixed, q, wide, at - window + 1, at, first, tl.minimum(at_max + 1, high),
        inner, tl.minimum(high, at_min + 1), low, pages, 0, head,
        key, key_scale, key_least, value, value_scale, value_least, unit,
        G, DK, DV, DKP, DVP, PAGE, KEY, VALUE, HARDWARE, BLOCK_N, GROUP,
    )  # fmt: skip


@triton.jit
def walk_three_parts(
    q, wide, at, at_min, at_max, stored, low, high, window, pages, own_pages, num_pages, head,
    key, key_scale, key_least, value, value_scale, value_least,
    open_key, open_key_scale, open_value, open_value_scale, unit,
    G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DKP: tl.constexpr, DVP: tl.constexpr,
    PAGE: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, OPEN_KEY: tl.constexpr,
    OPEN_VALUE: tl.constexpr, HARDWARE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """As :func:`walk_pages` where whole pages are packed: a row's own page and page 0 are open.

    Page 0, then the packed pages, then the row's own, always in this order. Ids from ``num_pages``
    on are open ones; ``own_pages`` has those that rows stand in, by number. A first page with a
    lower id (of pages that were chosen) is packed as others are.
    """
    sink = tl.where((stored == 0) & (tl.load(pages + stored // PAGE) < num_pages), 0, PAGE)
    since, first = at - window + 1, tl.maximum(stored, at_min - window + 1)
    own, own_min, own_max = at // PAGE * PAGE, at_min // PAGE * PAGE, at_max // PAGE * PAGE
    best = tl.full((BLOCK_M,), -3.0e38, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, DVP), tl.float32)
    end = tl.minimum(high, tl.minimum(at_max + 1, sink))
    best, total, mixed = _walk(
        best, total, mixed, q, wide, since, tl.minimum(at, sink - 1), first, end,
        tl.maximum(low, first // BLOCK_N * BLOCK_N), end, pages, num_pages, head,
        open_key, open_key_scale, open_key, open_value, open_value_scale, open_value, unit,
        G, DK, DV, DKP, DVP, PAGE, OPEN_KEY, OPEN_VALUE, HARDWARE, BLOCK_N, GROUP, True,
    )  # fmt: skip
    PER: tl.constexpr = 2 if VALUE == "int4" else (4 if VALUE == "int2" else 1)
    if PER > 1:
        mixed = _apart(mixed, PER)
    inner = tl.maximum(tl.maximum(stored, sink), tl.maximum(at_max - window + 1, 0))
    best, total, mixed = _walk_range(
        best, total, mixed, q, wide, tl.maximum(since, sink), own - 1,
        tl.maximum(first, sink), tl.minimum(high, own_max), inner, tl.minimum(high, own_min),
        low, pages, 0, head, key, key_scale, key_least, value, value_scale, value_least, unit,
        G, DK, DV, DKP, DVP, PAGE, KEY, VALUE, HARDWARE, BLOCK_N, GROUP,
    )  # fmt: skip
    if PER > 1:
        mixed = _together(mixed, PER)
    first = tl.maximum(first, tl.maximum(own_min, sink))
    end = tl.minimum(high, at_max + 1)
    return _walk(
        best, total, mixed, q, wide, tl.maximum(since, tl.maximum(own, sink)), at, first, end,
        tl.maximum(low, first // BLOCK_N * BLOCK_N), end, own_pages, num_pages, head,
        open_key, open_key_scale, open_key, open_value, open_value_scale, open_value, unit,
        G, DK, DV, DKP, DVP, PAGE, OPEN_KEY, OPEN_VALUE, HARDWARE, BLOCK_N, GROUP, True,
    )  # fmt: skip


# -- the query heads of one token, as columns ----------------------------------------------------
#
# All of them see the same places, and they are few: as the columns C of products, of which eight
# are multiplied at a time, SHARE of them real, keys and dims being the rows; as rows, sixteen would
# be. Sums are in another order than above, so this is not for a backend that promises bits.
#
# Values, and packed keys, are read as units of 16 bits, which the instructions that read operands
# take as they lie; a unit holds PARTS numbers, which become operands one from each unit at a time.


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
        rows = _order(KEY, BLOCK_N)
    else:
        start = tl.zeros((), tl.int64)
        rows = _rows_of(page, block, head, G, KEY, PAGE, BLOCK_N)
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
    page = _pages_of(pages, low, first, end, KEY, PAGE, BLOCK_N, EDGE)
    for block in tl.range(low, high, BLOCK_N, num_stages=2 if EDGE else None):
        # Ids are read a block ahead: what waits for no other read can be read blocks ahead.
        following = _pages_of(pages, block + BLOCK_N, first, end, KEY, PAGE, BLOCK_N, EDGE)
        places = block + _order(KEY, BLOCK_N)
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
