"""What is known of the keys of pages, in Triton: made of pages as they are stored.

``quire/backends/selecting.py`` says what bounds and signatures are. Here bounds are bits of
bfloat16 in int16, signatures words of 32 bits. What is made of a page depends on its bytes alone.

Packed keys lie PER tokens a byte, PER is 1 for others; GROUP tokens share a minimum and a step.
"""

import triton
import triton.language as tl

from quire.backends.cuda.codec import number_of, operand, part_of, scales

__all__ = ["bounds_kernel", "keys_kernel", "query_signs_kernel", "signs_kernel"]


@triton.jit
def _keys(
    row, first, key, key_step, key_least,
    PART: tl.constexpr, PER: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr,
    KEY: tl.constexpr, HARDWARE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Keys of tokens ``(first + r) * PER + PART`` as they are decoded, float32 [ROWS, DP].

    And where they are numbers of a key; 0 elsewhere. ``row`` is ``page * G + head``.
    """
    rows, dims = first + tl.arange(0, ROWS), tl.arange(0, DP)
    there = rows < PAGE // PER
    inside = there[:, None] & (dims[None, :] < D)
    at = (row * (PAGE // PER) + rows)[:, None] * D + dims[None, :]
    raw = tl.load(key + at, mask=inside, other=0)
    if PER > 1:
        at = (row * (PAGE // GROUP) + rows * PER // GROUP)[:, None] * D + dims[None, :]
        step = scales(tl.load(key_step + at, mask=inside, other=0))
        least = scales(tl.load(key_least + at, mask=inside, other=0))
        x = 2.0 * (0.5 * least + 0.5 * step * number_of(part_of(raw, PART, KEY)))
    elif KEY == "bf16":
        x = scales(raw)
    else:
        x = operand(raw, KEY, HARDWARE, True).to(tl.float32)
        if KEY == "int8" or KEY == "fp8":
            x *= scales(tl.load(key_step + row * PAGE + rows, mask=there, other=0))[:, None]
    return tl.where(inside, x, 0.0), inside


@triton.jit(do_not_specialize=["first_head", "tokens"])
def keys_kernel(
    out, pages, first_head, tokens, key, key_step,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, KEY: tl.constexpr,
    HARDWARE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Keys of ``pages`` [n] as they are decoded, of heads from ``first_head`` on: out float32
    [heads, tokens, D], tokens being n * PAGE. Not of packed ones. Grid (n, heads).
    """
    nth, head = tl.program_id(0), tl.program_id(1)
    row, dims = tl.load(pages + nth) * G + first_head + head, tl.arange(0, DP)
    for first in range(0, PAGE, ROWS):
        x, inside = _keys(
            row, first, key, key_step, key_step, 0, 1, D, DP, PAGE, KEY, HARDWARE, 1, ROWS
        )
        place = head.to(tl.int64) * tokens + nth * PAGE + first + tl.arange(0, ROWS)
        tl.store(out + place[:, None] * D + dims[None, :], x, mask=inside)


@triton.jit
def _away(x, UP: tl.constexpr):
    """Bits of the nearest bfloat16 that is not below x, or with UP False not above it."""
    bits = x.to(tl.int32, bitcast=True)
    grows = ((bits & 0xFFFF) != 0) & ((bits >= 0) == UP)  # cutting is towards zero
    return ((bits >> 16) + tl.where(grows, 1, 0)).to(tl.int16)


@triton.jit
def bounds_kernel(
    bounds, pages, key, key_step, key_least,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, KEY: tl.constexpr,
    HARDWARE: tl.constexpr, PER: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Least and greatest keys of ``pages`` [n]: bounds int16 [P, G, 2, D]; NaN where one is.

    Grid (n, G). A page below 0 is skipped.
    """
    page, head = tl.load(pages + tl.program_id(0)), tl.program_id(1)
    if page >= 0:
        row, dims = page * G + head, tl.arange(0, DP)
        low = tl.full((DP,), float("inf"), tl.float32)
        high = tl.full((DP,), float("-inf"), tl.float32)
        wild = tl.zeros((DP,), tl.int32)
        for part in tl.static_range(PER):
            for first in range(0, PAGE // PER, ROWS):
                x, inside = _keys(
                    row, first, key, key_step, key_least,
                    part, PER, D, DP, PAGE, KEY, HARDWARE, GROUP, ROWS,
                )  # fmt: skip
                wild = tl.maximum(wild, tl.max((x != x).to(tl.int32), axis=0))
                low = tl.minimum(low, tl.min(tl.where(inside, x, float("inf")), axis=0))
                high = tl.maximum(high, tl.max(tl.where(inside, x, float("-inf")), axis=0))
        to = bounds + row * (2 * D) + dims
        tl.store(to, tl.where(wild > 0, 0x7FC0, _away(low, False)), mask=dims < D)
        tl.store(to + D, tl.where(wild > 0, 0x7FC0, _away(high, True)), mask=dims < D)


@triton.jit
def _sides(x, normals, word, D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr):
    """Bits of 32 planes that vectors x [n, DP] lie above: int32 [n]. Normals float32 [D, BITS]."""
    dims, planes = tl.arange(0, DP), tl.arange(0, 32)
    at = normals + dims[:, None] * BITS + word * 32 + planes[None, :]
    each = tl.load(at, mask=dims[:, None] < D, other=0.0)
    above = tl.dot(x, each, input_precision="ieee") > 0.0
    return tl.sum(above.to(tl.int32) << planes[None, :], axis=1)


@triton.jit
def signs_kernel(
    signs, pages, normals, key, key_step, key_least,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, KEY: tl.constexpr,
    HARDWARE: tl.constexpr, PER: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """Signatures of the keys of ``pages`` [n]: signs int32 [P, G, PAGE, BITS / 32].

    Grid (n, G). A page below 0 is skipped.
    """
    WORDS: tl.constexpr = BITS // 32
    page, head = tl.load(pages + tl.program_id(0)), tl.program_id(1)
    if page >= 0:
        row = page * G + head
        for part in tl.static_range(PER):
            for first in range(0, PAGE // PER, ROWS):
                x, _ = _keys(
                    row, first, key, key_step, key_least,
                    part, PER, D, DP, PAGE, KEY, HARDWARE, GROUP, ROWS,
                )  # fmt: skip
                rows = first + tl.arange(0, ROWS)
                to = signs + (row * PAGE + rows * PER + part) * WORDS
                for word in range(WORDS):
                    sides = _sides(x, normals, word, D, DP, BITS)
                    tl.store(to + word, sides, mask=rows < PAGE // PER)


@triton.jit
def query_signs_kernel(
    signs, query, normals, rows,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Signatures of query float32 [rows, D]: int32 [rows, BITS / 32]. Grid (parts, words)."""
    at, dims = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DP)
    inside = (at < rows)[:, None] & (dims[None, :] < D)
    x = tl.load(query + at[:, None] * D + dims[None, :], mask=inside, other=0.0)
    sides = _sides(x, normals, tl.program_id(1), D, DP, BITS)
    tl.store(signs + at * (BITS // 32) + tl.program_id(1), sides, mask=at < rows)
