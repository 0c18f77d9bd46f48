"""Blocks of keys and values added to what a tile of queries has seen, in Triton.

Keys are walked in blocks of ``BLOCK_N`` places, aligned to absolute places, with the online softmax
(Milakov & Gimelshein, 2018, arXiv:1805.02867; in tiles: Dao, 2023, arXiv:2307.08691). What a row
adds up, and in which order, follows from the places that it sees: a block that only its neighbours
see adds exact zeros. That is for tiles of rows; the query heads of one token alone can be columns
of products, see ``columns.py``.

Names: G KV heads, DK and DV numbers of a key and of a value, DKP and DVP the powers of two that
hold them; ``unit`` is log2(e) / sqrt(DK). A row sees the places ``since`` to ``until`` [M].
"""

import triton
import triton.language as tl

from quire.backends.cuda.codec import (
    codes_operand,
    decoded_operand,
    narrow,
    numbers_at,
    operand,
    scales,
)

__all__ = ["order_of", "pages_of", "rows_of", "walk_pages", "walk_three_parts"]


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
        at = numbers_at(key, KEY, HARDWARE) + rows[None, :] * DK + dims[:, None]
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
        at = numbers_at(value, VALUE, HARDWARE) + rows[:, None] * DV + dims[None, :]
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
def order_of(KEY: tl.constexpr, BLOCK_N: tl.constexpr):
    """The order in which the keys of a block are multiplied: packed ones as in :func:`_apart`."""
    order = tl.arange(0, BLOCK_N)
    if KEY == "int4" or KEY == "int2":
        PER: tl.constexpr = 2 if KEY == "int4" else 4
        EACH: tl.constexpr = BLOCK_N // PER
        order = order % EACH * PER + order // EACH
    return order


@triton.jit
def pages_of(
    pages, block, first, end,
    KEY: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """The id of the page that a block lies in, or of each place's [BLOCK_N]; 0 past ``end``."""
    if PAGE % BLOCK_N == 0:
        out = tl.load(pages + block // PAGE, mask=block < end, other=0).to(tl.int32)
    else:
        places = block + order_of(KEY, BLOCK_N)
        there = places < end
        if EDGE:
            there = there & (places >= first)
        out = tl.load(pages + places // PAGE, mask=there, other=0).to(tl.int32)
    return out


@triton.jit
def rows_of(
    page, block, head,
    G: tl.constexpr, KEY: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Where the tokens of a block lie in arrays of one row a token, int64 [BLOCK_N]."""
    order = order_of(KEY, BLOCK_N)
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
    page = pages_of(pages, low, first, end, KEY, PAGE, BLOCK_N, EDGE)
    for block in range(low, high, BLOCK_N):
        # Ids are read a block ahead: what waits for no other read can be read blocks ahead.
        following = pages_of(pages, block + BLOCK_N, first, end, KEY, PAGE, BLOCK_N, EDGE)
        places = block + order_of(KEY, BLOCK_N)
        there = (places >= first) & (places < end)
        rows = rows_of(page - shift, block, head, G, KEY, PAGE, BLOCK_N)
        scores = _scores(
            q, wide, page - shift, rows, there, block, head, key, key_scale, key_least,
            G, DK, DKP, PAGE, KEY, HARDWARE, BLOCK_N, GROUP, EDGE,
        )  # fmt: skip
        if KEY == "int8" or KEY == "fp8":
            scores *= scales(_load(key_scale + rows, there, there, EDGE, False))[None, :]
        seen = (places[None, :] >= since[:, None]) & (places[None, :] <= until[:, None])
        seen = seen & there[None, :]
        if EDGE:
            scores = tl.where(seen, scores, float("-inf"))
        peak = tl.maximum(best, unit * tl.max(scores, axis=1))
        shrink = tl.exp2(best - peak)
        less = tl.broadcast_to(-peak[:, None], scores.shape)
        weights = tl.exp2(tl.fma(scores, tl.full(scores.shape, 0.0, tl.float32) + unit, less))
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
