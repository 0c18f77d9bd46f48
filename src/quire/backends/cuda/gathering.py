"""Whole pages of all layers of a group to and from one piece of memory, in Triton."""

import triton
import triton.language as tl

__all__ = ["gather_kernel"]


@triton.jit(do_not_specialize=["words"])
def gather_kernel(
    addresses, widths, starts, pages, rows, words,
    PUT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pages ``pages`` [n] of many arrays into rows [n, words]; with PUT, rows into the pages.

    addresses int64 [arrays], where each array [pages, width] begins; widths and starts int64
    [arrays], its words in a page and the first of them in a row. Words are int32 if WIDE, else
    bytes. Grid (n, arrays, parts of the widest).
    """
    nth, array, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at = part * BLOCK + tl.arange(0, BLOCK)
    width = tl.load(widths + array)
    mask = at < width
    if WIDE:
        begin = tl.load(addresses + array).to(tl.pointer_type(tl.int32))
    else:
        begin = tl.load(addresses + array).to(tl.pointer_type(tl.uint8))
    there = begin + tl.load(pages + nth) * width + at
    here = rows + nth.to(tl.int64) * words + tl.load(starts + array) + at
    if PUT:
        tl.store(there, tl.load(here, mask=mask), mask=mask)
    else:
        tl.store(here, tl.load(there, mask=mask), mask=mask)
