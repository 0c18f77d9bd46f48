"""Writing to pages, in Triton: appending tokens in a page's format, copying whole pages."""

import triton
import triton.language as tl

from quire.backends.cuda.codec import encode_plain, encode_token

__all__ = ["append_kernel", "copy_kernel"]


@triton.jit(do_not_specialize=["tokens"])
def append_kernel(
    numbers, slots, tokens, stored, stored_scale,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr,
    KIND: tl.constexpr, HARDWARE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Keys, or values, of new tokens into their slots; ROWS pairs of token and head a program.

    numbers float32 [T, G, D], slots int64 [T], stored [pages, G, PAGE, D], stored_scale [pages, G,
    PAGE] (unused where each number is stored on its own).
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = rows < tokens * G
    dims = tl.arange(0, DP)
    mask = there[:, None] & (dims[None, :] < D)
    slot = tl.load(slots + rows // G, mask=there, other=0)
    to = (slot // PAGE * G + rows % G) * PAGE + slot % PAGE
    x = tl.load(numbers + rows[:, None] * D + dims[None, :], mask=mask, other=0.0)
    if KIND == "int8" or KIND == "fp8":
        payload, scale = encode_token(x, KIND)
        tl.store(stored_scale + to, scale, mask=there)
    else:
        payload = encode_plain(x, KIND, HARDWARE)
    tl.store(stored + to[:, None] * D + dims[None, :], payload, mask=mask)


@triton.jit(do_not_specialize=["words"])
def copy_kernel(stored, source, target, words, BLOCK: tl.constexpr):
    """Rows ``source`` [n] of stored [rows, words] over ``target``; grid (n, parts of a row)."""
    nth, part = tl.program_id(0), tl.program_id(1)
    at = part * BLOCK + tl.arange(0, BLOCK)
    read, write = tl.load(source + nth) * words, tl.load(target + nth) * words
    tl.store(stored + write + at, tl.load(stored + read + at, mask=at < words), mask=at < words)
