"""Attention over pages, in Triton: decode in two kernels, prefill of ragged batches in one or two.

A tile of ``BLOCK_M`` rows holds the query heads of one KV head, for one token or several, so that a
page is read once for all of them; how its blocks of keys are walked is in ``walking.py``. Decode is
split along the context (flash-decoding: Dao et al., 2023) at multiples of ``SPLIT`` places, and so
is a prefill of few tiles; the parts are merged in order of place.

What a row adds up, and in which order, follows from the places that it sees: a block, or split,
that only its neighbours see adds exact zeros. With the same tile sizes and the same ``SPLIT`` a
token therefore gets the same bits from both kernels, in any company (``exact=True``).

Names in the kernels: those of ``walking.py``; SHARE query heads of each KV head. Where PACKED,
``key`` and ``value`` are packed pages and ``open_key`` and ``open_value`` the open ones, whose ids
begin at ``num_pages``; those that queries of sequence s stand in, from page number
``open_first[s]`` on, are ``open_indices[open_indptr[s]:]``. Else those arguments are not read.
"""

import triton
import triton.language as tl

from quire.backends.cuda.codec import encode_plain, narrow
from quire.backends.cuda.columns import parts_of, walk_columns, walk_three_parts_of_columns
from quire.backends.cuda.walking import walk_pages, walk_three_parts

__all__ = ["decode_kernel", "merge_kernel", "merge_tiles_kernel", "prefill_kernel"]

# Slices of one array, which begin anywhere: else a kernel is compiled for each set of alignments.
_TABLES = [
    "places", "query_indptr", "indptr", "indices", "first_page",
    "open_indptr", "open_indices", "open_first",
]  # fmt: skip
_CHUNKS = ["chunks", "chunk_indptr"]


@triton.jit
def _span(
    q, wide, at, at_min, at_max, low, high, window, sequence, head,
    indptr, indices, first_page, open_indptr, open_indices, open_first, num_pages,
    key, key_scale, key_least, value, value_scale, value_least,
    open_key, open_key_scale, open_value, open_value_scale, unit,
    G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DKP: tl.constexpr, DVP: tl.constexpr,
    PAGE: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, PACKED: tl.constexpr,
    OPEN_KEY: tl.constexpr, OPEN_VALUE: tl.constexpr, HARDWARE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """What rows at ``at_min`` to ``at_max`` see of places ``[low, high)``: best, total, mixed."""
    gone = tl.load(first_page + sequence)
    pages = indices + tl.load(indptr + sequence) - gone
    stored = (gone * PAGE).to(tl.int32)
    if PACKED:
        own = open_indices + tl.load(open_indptr + sequence) - tl.load(open_first + sequence)
        best, total, mixed = walk_three_parts(
            q, wide, at, at_min, at_max, stored, low, high, window, pages, own, num_pages, head,
            key, key_scale, key_least, value, value_scale, value_least,
            open_key, open_key_scale, open_value, open_value_scale, unit,
            G, DK, DV, DKP, DVP, PAGE, KEY, VALUE, OPEN_KEY, OPEN_VALUE, HARDWARE,
            BLOCK_M, BLOCK_N, GROUP,
        )  # fmt: skip
    else:
        best, total, mixed = walk_pages(
            q, wide, at, at_min, at_max, stored, low, high, window, pages, head,
            key, key_scale, key_least, value, value_scale, value_least, unit,
            G, DK, DV, DKP, DVP, PAGE, KEY, VALUE, HARDWARE, BLOCK_M, BLOCK_N, GROUP,
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
def _spans(
    q, wide, at, at_min, at_max, low, high, window, sequence, head,
    indptr, indices, first_page, open_indptr, open_indices, open_first, num_pages,
    key, key_scale, key_least, value, value_scale, value_least,
    open_key, open_key_scale, open_value, open_value_scale, unit,
    G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DKP: tl.constexpr, DVP: tl.constexpr,
    PAGE: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, PACKED: tl.constexpr,
    OPEN_KEY: tl.constexpr, OPEN_VALUE: tl.constexpr, HARDWARE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """As :func:`_span`; with SPLIT, the splits that ``low`` to ``high`` lie in, merged in order."""
    if SPLIT == 0:
        best, total, mixed = _span(
            q, wide, at, at_min, at_max, low, high, window, sequence, head,
            indptr, indices, first_page, open_indptr, open_indices, open_first, num_pages,
            key, key_scale, key_least, value, value_scale, value_least,
            open_key, open_key_scale, open_value, open_value_scale, unit,
            G, DK, DV, DKP, DVP, PAGE, KEY, VALUE, PACKED, OPEN_KEY, OPEN_VALUE, HARDWARE,
            BLOCK_M, BLOCK_N, GROUP,
        )  # fmt: skip
    else:
        best = tl.full((BLOCK_M,), -3.0e38, tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        mixed = tl.zeros((BLOCK_M, DVP), tl.float32)
        for split in range(low // SPLIT, at_max // SPLIT + 1):
            part_b, part_t, part_x = _span(
                q, wide, at, at_min, at_max, split * SPLIT, (split + 1) * SPLIT, window,
                sequence, head,
                indptr, indices, first_page, open_indptr, open_indices, open_first, num_pages,
                key, key_scale, key_least, value, value_scale, value_least,
                open_key, open_key_scale, open_value, open_value_scale, unit,
                G, DK, DV, DKP, DVP, PAGE, KEY, VALUE, PACKED, OPEN_KEY, OPEN_VALUE, HARDWARE,
                BLOCK_M, BLOCK_N, GROUP,
            )  # fmt: skip
            best, total, mixed = _merge(best, total, mixed, part_b, part_t, part_x)
    return best, total, mixed


@triton.jit
def _queries(
    query, token, head, rows, there,
    G: tl.constexpr, SHARE: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr,
    KEY: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Rows of query [T, G * SHARE, DK] -> operands [M, DKP], and as they are; 0 elsewhere."""
    dims = tl.arange(0, DKP)
    at = (token * (G * SHARE) + head * SHARE + rows % SHARE).to(tl.int64) * DK
    mask = there[:, None] & (dims[None, :] < DK)
    x = tl.load(query + at[:, None] + dims[None, :], mask=mask, other=0.0)
    return narrow(x, KEY, HARDWARE), x


@triton.jit
def _chunk_of(tile, chunk_indptr, num_chunks, TOKENS: tl.constexpr):
    """The chunk that ``tile`` belongs to.

    Those of chunk c begin with number ``chunk_indptr[c] // TOKENS + c``, so that each has enough
    and nothing must be counted.
    """
    low = 0
    high = num_chunks
    while high - low > 1:
        middle = (low + high) // 2
        begin = tl.load(chunk_indptr + middle) // TOKENS + middle
        low = tl.where(begin <= tile, middle, low)
        high = tl.where(begin <= tile, high, middle)
    return low


@triton.jit
def _tile(
    query_indptr, places, chunks, chunk_indptr, num_chunks,
    SHARE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """What program_id(0) computes: sequence, first and last token, or -1 for none, and places.

    Tiles are started from the last, which sees the longest context.
    """
    TOKENS: tl.constexpr = BLOCK_M // SHARE
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    chunk = _chunk_of(tile, chunk_indptr, num_chunks, TOKENS)
    sequence = tl.load(chunks + chunk)
    start, stop = tl.load(query_indptr + sequence), tl.load(query_indptr + sequence + 1)
    first = start + (tile - tl.load(chunk_indptr + chunk) // TOKENS - chunk) * TOKENS
    last = tl.where(first < stop, tl.minimum(first + TOKENS, stop) - 1, -1)
    at_min = tl.load(places + tl.maximum(tl.minimum(first, last), 0)).to(tl.int32)
    at_max = tl.load(places + tl.maximum(last, 0)).to(tl.int32)
    return sequence, first, last, at_min, at_max


@triton.jit
def _put(
    out, best, total, mixed, token, there, head, rows,
    G: tl.constexpr, SHARE: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    OUT: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """What rows have seen over the sum of their weights, as OUT, into out [T, G * SHARE, DV]."""
    dims = tl.arange(0, DVP)
    to = (token * (G * SHARE) + head * SHARE + rows % SHARE).to(tl.int64) * DV
    mask = there[:, None] & (dims[None, :] < DV)
    result = tl.div_rn(mixed, tl.broadcast_to(total[:, None], mixed.shape))
    tl.store(out + to[:, None] + dims[None, :], encode_plain(result, OUT, HARDWARE), mask=mask)


@triton.jit
def _put_part(
    part_mixed, part_best, part_total, best, total, mixed, part, there,
    DV: tl.constexpr, DVP: tl.constexpr,
):  # fmt: skip
    """Rows ``part`` of what splits have seen."""
    dims = tl.arange(0, DVP)
    tl.store(part_best + part, best, mask=there)
    tl.store(part_total + part, total, mask=there)
    mask = there[:, None] & (dims[None, :] < DV)
    tl.store(part_mixed + part[:, None] * DV + dims[None, :], mixed, mask=mask)


@triton.jit(
    do_not_specialize=["num_chunks", "window", "num_pages", "length"],
    do_not_specialize_on_alignment=[*_TABLES, *_CHUNKS],
)
def prefill_kernel(
    out, part_best, part_total, query, places, query_indptr, chunks, chunk_indptr, num_chunks,
    indptr, indices, first_page, window, open_indptr, open_indices, open_first, num_pages,
    key, key_scale, key_least, value, value_scale, value_least,
    open_key, open_key_scale, open_value, open_value_scale, unit, length,
    G: tl.constexpr, SHARE: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    DKP: tl.constexpr, DVP: tl.constexpr, PAGE: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, PACKED: tl.constexpr, OPEN_KEY: tl.constexpr,
    OPEN_VALUE: tl.constexpr, HARDWARE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr, SPLIT: tl.constexpr, PARTS: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Attention of all sequences with two new tokens or more; grid (tiles, G, splits).

    out [T, G * SHARE, DV], rounded to OUT, query [T, G * SHARE, DK], places [T]; which sequences
    as in Chunks, page tables as in GroupBatch. PARTS: each program walks ``length`` places, out is
    float32 [tiles, G, splits, BLOCK_M, DV], with part_best and part_total [tiles, G, splits,
    BLOCK_M], for :func:`merge_tiles_kernel`. Else one walks the whole context: in one go where
    SPLIT is 0, or merging splits as decode merges them.
    """
    sequence, first, last, at_min, at_max = _tile(
        query_indptr, places, chunks, chunk_indptr, num_chunks, SHARE, BLOCK_M
    )
    head, nth = tl.program_id(1), tl.program_id(2)
    stored = (tl.load(first_page + sequence) * PAGE).to(tl.int32)
    seen = tl.maximum(stored, tl.maximum(at_min - window + 1, 0))
    low, high = seen // BLOCK_N * BLOCK_N, at_max // BLOCK_N * BLOCK_N + BLOCK_N
    if PARTS:
        low = (seen // length + nth) * length
        high = low + length
    if (last >= 0) & (low <= at_max):
        rows = tl.arange(0, BLOCK_M)
        token = first + rows // SHARE
        there = token <= last
        token = tl.minimum(token, last)
        at = tl.load(places + token).to(tl.int32)
        q, wide = _queries(query, token, head, rows, there, G, SHARE, DK, DKP, KEY, HARDWARE)
        best, total, mixed = _spans(
            q, wide, at, at_min, at_max, low, high, window, sequence, head,
            indptr, indices, first_page, open_indptr, open_indices, open_first, num_pages,
            key, key_scale, key_least, value, value_scale, value_least,
            open_key, open_key_scale, open_value, open_value_scale, unit,
            G, DK, DV, DKP, DVP, PAGE, KEY, VALUE, PACKED, OPEN_KEY, OPEN_VALUE, HARDWARE,
            BLOCK_M, BLOCK_N, GROUP, SPLIT,
        )  # fmt: skip
        if PARTS:
            tile = (tl.program_id(0) * G + head).to(tl.int64) * tl.num_programs(2) + nth
            part = tile * BLOCK_M + rows
            _put_part(out, part_best, part_total, best, total, mixed, part, there, DV, DVP)
        else:
            _put(
                out, best, total, mixed, token, there, head, rows, G, SHARE, DV, DVP, OUT, HARDWARE
            )  # fmt: skip


@triton.jit(
    do_not_specialize=["num_chunks", "window", "splits", "length"],
    do_not_specialize_on_alignment=["places", "query_indptr", "first_page", *_CHUNKS],
)
def merge_tiles_kernel(
    out, part_mixed, part_best, part_total, places, query_indptr, chunks, chunk_indptr, num_chunks,
    first_page, window, splits, length,
    G: tl.constexpr, SHARE: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """The parts of :func:`prefill_kernel`, merged in order; grid (tiles, G, BLOCK_M / ROWS)."""
    sequence, first, last, at_min, at_max = _tile(
        query_indptr, places, chunks, chunk_indptr, num_chunks, SHARE, BLOCK_M
    )
    head = tl.program_id(1)
    rows = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    token = first + rows // SHARE
    there = token <= last
    stored = (tl.load(first_page + sequence) * PAGE).to(tl.int32)
    seen = tl.maximum(stored, tl.maximum(at_min - window + 1, 0))
    count = tl.where(last >= 0, at_max // length - seen // length + 1, 0)
    tile = (tl.program_id(0) * G + head).to(tl.int64) * splits
    best, total, mixed = _merged(
        part_mixed, part_best, part_total, tile * BLOCK_M + rows, BLOCK_M, count, there,
        DV, DVP, ROWS,
    )  # fmt: skip
    total = tl.where(there, total, 1.0)
    _put(out, best, total, mixed, token, there, head, rows, G, SHARE, DV, DVP, OUT, HARDWARE)


@triton.jit
def _merged(
    part_mixed, part_best, part_total, part, stride, count, there,
    DV: tl.constexpr, DVP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows ``part`` of ``count`` splits that lie ``stride`` rows apart: best, total, mixed."""
    dims = tl.arange(0, DVP)
    mask = there[:, None] & (dims[None, :] < DV)
    best = tl.full((ROWS,), -3.0e38, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, DVP), tl.float32)
    for nth in range(0, count):
        at = part + nth * stride
        part_b = tl.load(part_best + at, mask=there, other=-3.0e38)
        part_t = tl.load(part_total + at, mask=there, other=0.0)
        part_x = tl.load(part_mixed + at[:, None] * DV + dims[None, :], mask=mask, other=0.0)
        best, total, mixed = _merge(best, total, mixed, part_b, part_t, part_x)
    return best, total, mixed


@triton.jit
def _split_of_columns(
    query, first, end, place, stored, sequence, head,
    indptr, indices, first_page, open_indptr, open_indices, open_first, num_pages,
    key, key_scale, key_least, value, value_scale, value_least,
    open_key, open_key_scale, open_value, open_value_scale, unit,
    G: tl.constexpr, SHARE: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    DKP: tl.constexpr, DVP: tl.constexpr, PAGE: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, PACKED: tl.constexpr, OPEN_KEY: tl.constexpr,
    OPEN_VALUE: tl.constexpr, HARDWARE: tl.constexpr,
    C: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """What queries float32 [SHARE, DK] at ``place`` see of ``[first, end)``: as columns."""
    pages = indices + tl.load(indptr + sequence) - tl.load(first_page + sequence)
    if PACKED:
        own = open_indices + tl.load(open_indptr + sequence) - tl.load(open_first + sequence)
        best, total, mixed = walk_three_parts_of_columns(
            query, first, end, place, stored, pages, own, num_pages, head,
            key, key_scale, key_least, value, value_scale, value_least,
            open_key, open_key_scale, open_value, open_value_scale, unit,
            G, SHARE, DK, DV, DKP, DVP, PAGE, KEY, VALUE, OPEN_KEY, OPEN_VALUE, HARDWARE,
            C, BLOCK_N, GROUP,
        )  # fmt: skip
    else:
        best, total, mixed = walk_columns(
            query, first, end, pages, head,
            key, key_scale, key_least, value, value_scale, value_least, unit,
            G, SHARE, DK, DV, DKP, DVP, PAGE, KEY, VALUE, HARDWARE, C, BLOCK_N, GROUP,
        )  # fmt: skip
    return best, total, mixed


@triton.jit(do_not_specialize=["window", "num_pages"], do_not_specialize_on_alignment=_TABLES)
def decode_kernel(
    part_mixed, part_best, part_total, query, places, query_indptr, indptr, indices, first_page,
    window, open_indptr, open_indices, open_first, num_pages,
    key, key_scale, key_least, value, value_scale, value_least,
    open_key, open_key_scale, open_value, open_value_scale, unit, SPLIT,
    G: tl.constexpr, HEADS: tl.constexpr, SHARE: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    DKP: tl.constexpr, DVP: tl.constexpr, PAGE: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, PACKED: tl.constexpr, OPEN_KEY: tl.constexpr,
    OPEN_VALUE: tl.constexpr, HARDWARE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One split of each sequence with one new token; grid (S, G, splits).

    part_mixed [S, G, splits, SHARE, DV], part_best and part_total [S, G, splits, SHARE]. A program
    whose split lies beyond the context, or was given back, writes nothing. HEADS are the KV heads
    of a page; G is 1 where each of them has a table of its own, as if it were a sequence. COLUMNS:
    queries are columns of products, of which there are BLOCK_M; else rows.
    """
    sequence, head, nth = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(query_indptr + sequence)
    alone = tl.load(query_indptr + sequence + 1) - start == 1
    place = tl.load(places + start, mask=alone, other=0).to(tl.int32)
    stored = (tl.load(first_page + sequence) * PAGE).to(tl.int32)
    split = tl.maximum(stored, tl.maximum(place - window + 1, 0)) // SPLIT + nth
    if alone & (split * SPLIT <= place):
        rows = tl.arange(0, BLOCK_M)
        there = rows < SHARE
        part = ((sequence * G + head).to(tl.int64) * tl.num_programs(2) + nth) * SHARE + rows
        if COLUMNS:
            best, total, mixed = _split_of_columns(
                query + (start * (G * SHARE) + head * SHARE) * DK,
                tl.maximum(split * SPLIT, tl.maximum(stored, place - window + 1)),
                tl.minimum((split + 1) * SPLIT, place + 1), place, stored, sequence,
                (sequence * G + head) % HEADS,
                indptr, indices, first_page, open_indptr, open_indices, open_first, num_pages,
                key, key_scale, key_least, value, value_scale, value_least,
                open_key, open_key_scale, open_value, open_value_scale, unit,
                HEADS, SHARE, DK, DV, DKP, DVP, PAGE, KEY, VALUE, PACKED, OPEN_KEY, OPEN_VALUE,
                HARDWARE, BLOCK_M, BLOCK_N, GROUP,
            )  # fmt: skip
            tl.store(part_best + part, best, mask=there)
            tl.store(part_total + part, total, mask=there)
            PARTS: tl.constexpr = parts_of(VALUE)
            for nth_of_unit in tl.static_range(PARTS):
                dims = tl.arange(0, DVP // PARTS) * PARTS + nth_of_unit
                to = part_mixed + part[None, :] * DV + dims[:, None]
                tl.store(to, mixed[nth_of_unit], mask=there[None, :] & (dims < DV)[:, None])
        else:
            at = tl.full((BLOCK_M,), 0, tl.int32) + place
            q, wide = _queries(query, start, head, rows, there, G, SHARE, DK, DKP, KEY, HARDWARE)
            best, total, mixed = _span(
                q, wide, at, place, place, split * SPLIT, (split + 1) * SPLIT, window, sequence,
                (sequence * G + head) % HEADS,
                indptr, indices, first_page, open_indptr, open_indices, open_first, num_pages,
                key, key_scale, key_least, value, value_scale, value_least,
                open_key, open_key_scale, open_value, open_value_scale, unit,
                HEADS, DK, DV, DKP, DVP, PAGE, KEY, VALUE, PACKED, OPEN_KEY, OPEN_VALUE, HARDWARE,
                BLOCK_M, BLOCK_N, GROUP,
            )  # fmt: skip
            _put_part(part_mixed, part_best, part_total, best, total, mixed, part, there, DV, DVP)


@triton.jit(
    do_not_specialize=["window", "splits"],
    do_not_specialize_on_alignment=["places", "query_indptr", "first_page"],
)
def merge_kernel(
    out, part_mixed, part_best, part_total, places, query_indptr, first_page, window, splits, SPLIT,
    G: tl.constexpr, SHARE: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, OUT: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """The splits of :func:`decode_kernel`, merged in order of place; rounded to OUT.

    Grid (S, G).
    """
    sequence, head = tl.program_id(0), tl.program_id(1)
    start = tl.load(query_indptr + sequence)
    if tl.load(query_indptr + sequence + 1) - start == 1:
        place = tl.load(places + start).to(tl.int32)
        stored = (tl.load(first_page + sequence) * PAGE).to(tl.int32)
        first = tl.maximum(stored, tl.maximum(place - window + 1, 0))
        rows = tl.arange(0, ROWS)
        there = rows < SHARE
        part = (sequence * G + head).to(tl.int64) * splits * SHARE + rows
        count = place // SPLIT - first // SPLIT + 1
        best, total, mixed = _merged(
            part_mixed, part_best, part_total, part, SHARE, count, there, DV, DVP, ROWS
        )
        total = tl.where(there, total, 1.0)
        _put(out, best, total, mixed, start, there, head, rows, G, SHARE, DV, DVP, OUT, HARDWARE)
