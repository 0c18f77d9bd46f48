"""Packing whole open pages, in Triton: what ``formats.py`` defines for int4 and int2, bit for bit.

A source or target below 0 is skipped. GROUP numbers share a minimum and a step.
"""

import triton
import triton.language as tl

from quire.backends.cuda.codec import bits_of_line, codes_on_line, scales

__all__ = ["seal_keys_kernel", "seal_values_kernel"]


@triton.jit
def _is_wild(x):
    """1 where a number is infinite or not a number, else 0."""
    return tl.where(tl.abs(x) < float("inf"), 0, 1)


@triton.jit
def seal_keys_kernel(
    opened, source, target, packed, packed_step, packed_least, first,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Each channel over GROUP tokens of one head; grid (n * PAGE / GROUP, G).

    opened int16 [open pages, G, PAGE, D], whose ids begin at ``first``; packed uint8 [pages, G,
    PAGE * BITS / 8, D], packed_step and packed_least int16 [pages, G, PAGE / GROUP, D].
    """
    GROUPS: tl.constexpr = PAGE // GROUP
    PER: tl.constexpr = 8 // BITS
    LEVELS: tl.constexpr = 2**BITS - 1
    nth, group, head = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS, tl.program_id(1)
    read, write = tl.load(source + nth) - first, tl.load(target + nth)
    if (read >= 0) & (write >= 0):
        tokens, dims = tl.arange(0, GROUP), tl.arange(0, DP)
        inside = dims < D
        row = ((read * G + head) * PAGE + group * GROUP + tokens)[:, None] * D + dims[None, :]
        x = scales(tl.load(opened + row, mask=inside[None, :], other=0))
        wild = tl.max(_is_wild(x), axis=0) > 0
        least, step = bits_of_line(tl.min(x, axis=0), tl.max(x, axis=0), wild, LEVELS)
        codes = codes_on_line(x, least[None, :], step[None, :], LEVELS)
        apart = tl.reshape(codes, (GROUP // PER, PER, DP))
        payload = tl.sum(apart << (BITS * tl.arange(0, PER))[None, :, None], axis=1)
        to = ((write * G + head) * GROUPS + group) * D + dims
        tl.store(packed_least + to, least.to(tl.int16), mask=inside)
        tl.store(packed_step + to, step.to(tl.int16), mask=inside)
        rows = (write * G + head) * (PAGE // PER) + group * (GROUP // PER)
        rows += tl.arange(0, GROUP // PER)
        to = packed + rows[:, None] * D + dims[None, :]
        tl.store(to, payload.to(tl.uint8), mask=inside[None, :])


@triton.jit
def seal_values_kernel(
    opened, source, target, packed, packed_step, packed_least, first,
    G: tl.constexpr, D: tl.constexpr, GP: tl.constexpr, PAGE: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """GROUP numbers of each token of one head, ROWS tokens a program; grid (n * parts, G).

    opened as above; packed uint8 [pages, G, PAGE, ceil(D * BITS / 8)], packed_step and packed_least
    int16 [pages, G, PAGE, ceil(D / GROUP)]; GP is a power of two of that or more.
    """
    PARTS: tl.constexpr = (PAGE + ROWS - 1) // ROWS
    PER: tl.constexpr = 8 // BITS
    LEVELS: tl.constexpr = 2**BITS - 1
    WIDTH: tl.constexpr = (D + PER - 1) // PER
    GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
    nth, head = tl.program_id(0) // PARTS, tl.program_id(1)
    read, write = tl.load(source + nth) - first, tl.load(target + nth)
    if (read >= 0) & (write >= 0):
        token = tl.program_id(0) % PARTS * ROWS + tl.arange(0, ROWS)
        there, groups = token < PAGE, tl.arange(0, GP)
        dims = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        inside = there[:, None, None] & (dims[None, :, :] < D)
        row = ((read * G + head) * PAGE + token)[:, None, None] * D + dims[None, :, :]
        x = scales(tl.load(opened + row, mask=inside, other=0))
        wild = tl.max(_is_wild(x), axis=2) > 0
        low = tl.min(tl.where(inside, x, float("inf")), axis=2)
        high = tl.max(tl.where(inside, x, float("-inf")), axis=2)
        held = there[:, None] & (groups[None, :] < GROUPS)
        least, step = bits_of_line(low, high, wild | (held == 0), LEVELS)
        codes = codes_on_line(x, least[:, :, None], step[:, :, None], LEVELS)
        apart = tl.reshape(tl.where(inside, codes, 0), (ROWS, GP * GROUP // PER, PER))
        payload = tl.sum(apart << (BITS * tl.arange(0, PER))[None, None, :], axis=2)
        rows = (write * G + head) * PAGE + token
        to = rows[:, None] * GROUPS + groups[None, :]
        tl.store(packed_least + to, least.to(tl.int16), mask=held)
        tl.store(packed_step + to, step.to(tl.int16), mask=held)
        at = tl.arange(0, GP * GROUP // PER)
        to, mask = rows[:, None] * WIDTH + at[None, :], there[:, None] & (at[None, :] < WIDTH)
        tl.store(packed + to, payload.to(tl.uint8), mask=mask)
