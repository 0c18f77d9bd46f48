"""Writing to pages, in Triton: appending tokens in a page's format, copying whole pages."""

import triton
import triton.language as tl

from quire.backends.cuda.codec import encode_plain, encode_token

__all__ = ["append_kernel", "copy_kernel"]


@triton.jit(do_not_specialize=["tokens", "first"])
def append_kernel(
    numbers, slots, tokens, first, stored, stored_scale,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr,
    KIND: tl.constexpr, HARDWARE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Keys, or values, of new tokens into their slots; ROWS pairs of token and head a program.

    numbers float32 [T, G, D], slots int64 [T], stored [pages, G, PAGE, D], whose slots are those
    from ``first`` on, stored_scale [pages, G, PAGE] (unused where each number is stored on its
    own). A token whose slot is lower is stored nowhere.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slots + rows // G, mask=rows < tokens * G, other=-1) - first
    there = (rows < tokens * G) & (slot >= 0)
    dims = tl.arange(0, DP)
    mask = there[:, None] & (dims[None, :] < D)
    to = (slot // PAGE * G + rows % G) * PAGE + slot % PAGE
    x = tl.load(numbers + rows[:, None] * D + dims[None, :], mask=mask, other=0.0)
    if KIND == "int8" or KIND == "fp8":
        payload, scale = encode_token(x, KIND)
        tl.store(stored_scale + to, scale, mask=there)
    else:
        payload = encode_plain(x, KIND, HARDWARE)
    tl.store(stored + to[:, None] * D + dims[None, :], payload, mask=mask)


@triton.jit(do_not_specialize=["first", "words"])
def copy_kernel(read, written, source, target, first, words, BLOCK: tl.constexpr):
    """Rows ``source`` [n], less ``first``, of read [rows, words] over rows ``target`` of written.

    Grid (n, parts of a row). A source or target below 0 is skipped.
    """
    nth, part = tl.program_id(0), tl.program_id(1)
    at = part * BLOCK + tl.arange(0, BLOCK)
    here, there = tl.load(source + nth) - first, tl.load(target + nth)
    if (here >= 0) & (there >= 0):
        held = tl.load(read + here * words + at, mask=at < words)
        tl.store(written + there * words + at, held, mask=at < words)
