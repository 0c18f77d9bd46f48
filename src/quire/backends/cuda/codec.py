"""Numbers between memory and arithmetic, in Triton: what ``formats.py`` defines, bit for bit.

Kinds are the names of page formats. Bfloat16 lies in memory as int16 bits, int8 and fp8 as uint8
bytes, scales as int16 bits of bfloat16. A kernel multiplies bf16, int8 and fp8 numbers as bfloat16
(all of them are exact there), fp16 and fp32 ones as they are. Int4 and int2 pages hold codes, 2 or
4 a byte, and a minimum and a step for each group of :data:`quire.formats.GROUP`.

``HARDWARE`` is False under Triton's interpreter, whose bfloat16 has no arithmetic and rounds
towards zero: there, such operands are float32 numbers that have been rounded to bfloat16.
"""

import triton
import triton.language as tl

__all__ = [
    "MASKS",
    "MINUS_0",
    "MINUS_128",
    "OF_FP8",
    "OF_INT8",
    "OF_LINES",
    "bf16_bits",
    "bits_of_line",
    "codes_on_line",
    "codes_operand",
    "decoded_operand",
    "encode_plain",
    "encode_token",
    "from_bits",
    "narrow",
    "number_of",
    "numbers_at",
    "operand",
    "part_of",
    "scales",
]


# Four bytes in a register to four bfloat16 numbers in two, in assembly: it has instructions for two
# halves of a register at a time. ``x`` and ``y`` hold two of the bytes each, in the lower half of
# 16 bits. Sums are fused multiply-adds, which all cards since 8.0 have; only the last is rounded.
_HALVES = """{{
    .reg .b32 w, x, y, a, b, one, bias;
    mov.b32 one, 0x3F803F80;
    mov.b32 bias, {bias};
    shr.b32 w, $2, {shift};
    prmt.b32 x, w, 0, 0x4140;
    prmt.b32 y, w, 0, 0x4342;
"""
# 0x4300 is 128 as bfloat16 with room for seven bits. The lower seven bits and 128, less 128, or 256
# where the highest bit is set.
OF_INT8 = """
    lop3.b32 a, {source}, 0x007F007F, 0x43004300, 0xEA;
    lop3.b32 b, {source}, 0x00800080, bias, 0xEA;
    fma.rn.bf16x2 {target}, a, one, b;
"""
# The exponent shifted into that of a bfloat16, which is then off by 2**120.
OF_FP8 = """
    shl.b32 b, {source}, 8;
    shl.b32 a, {source}, 4;
    and.b32 a, a, 0x07F007F0;
    lop3.b32 a, b, 0x80008000, a, 0xEA;
    mov.b32 one, 0x7B807B80;
    fma.rn.bf16x2 {target}, a, one, bias;
"""
_OF_CODES = """
    lop3.b32 a, {source}, {mask}, 0x43004300, 0xEA;
    fma.rn.bf16x2 {target}, a, one, bias;
"""
OF_LINES = """
    lop3.b32 a, {source}, {mask}, 0x43004300, 0xEA;
    fma.rn.bf16x2 a, a, one, bias;
    fma.rn.bf16x2 {target}, a, {step}, {least};
"""
MINUS_128, MINUS_0 = "0xC300C300", "0x80008000"


def _assembly(each: str, bias: str, shift: int = 0, mask: str = "") -> str:
    halves = (
        {"source": "x", "target": "$0", "step": "$3", "least": "$5"},
        {"source": "y", "target": "$1", "step": "$4", "least": "$6"},
    )
    lines = "".join(each.format(mask=mask, **half) for half in halves)
    return _HALVES.format(bias=bias, shift=shift) + lines + "}"


_INT8 = tl.constexpr(_assembly(OF_INT8, MINUS_128))
_FP8 = tl.constexpr(_assembly(OF_FP8, MINUS_0))


_PARTS = ((4, 0), (4, 1), (2, 0), (2, 1), (2, 2), (2, 3))  # bits, which of those in a byte
MASKS = {4: "0x000F000F", 2: "0x00030003"}
_CODES, _LINES = (
    tl.constexpr(tuple(_assembly(e, MINUS_128, bits * part, MASKS[bits]) for bits, part in _PARTS))
    for e in (_OF_CODES, OF_LINES)
)


@triton.jit
def bf16_bits(x):
    """Float32 rounded to nearest bfloat16, ties to even: its bits in the lower half of int32."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, rounded, (bits >> 16) | 0x40) & 0xFFFF


@triton.jit
def from_bits(bits):
    """The float32 whose upper half is int32 ``bits``."""
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def scales(raw):
    """Scales as they lie in memory, int16 -> float32."""
    return from_bits(raw.to(tl.int32))


@triton.jit
def part_of(raw, PART: tl.constexpr, KIND: tl.constexpr):
    """Codes ``PART`` of each byte as int32, the lowest bits are part 0: one of PER in a byte."""
    BITS: tl.constexpr = 4 if KIND == "int4" else 2
    return (raw.to(tl.int32) >> (BITS * PART)) & (2**BITS - 1)


@triton.jit
def number_of(codes):
    """Codes as float32 numbers: put into the bits of 2**23, which is then taken away."""
    return (codes | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def codes_operand(raw, PART: tl.constexpr, KIND: tl.constexpr, HARDWARE: tl.constexpr):
    """Codes ``PART`` of each byte as what is multiplied with bfloat16 numbers."""
    if HARDWARE:
        TEXT: tl.constexpr = _CODES[PART if KIND == "int4" else 2 + PART]
        out = tl.inline_asm_elementwise(TEXT, "=r,=r,r", [raw], tl.bfloat16, True, 4)
    else:
        out = number_of(part_of(raw, PART, KIND))
    return out


@triton.jit
def decoded_operand(
    raw, step, least, PART: tl.constexpr, KIND: tl.constexpr, HARDWARE: tl.constexpr
):  # fmt: skip
    """``least + step * code`` of codes ``PART`` of each byte, rounded to bfloat16.

    Bits of steps and minima have the shape of ``raw``.
    """
    if HARDWARE:
        TEXT: tl.constexpr = _LINES[PART if KIND == "int4" else 2 + PART]
        args = [raw, step, least]
        out = tl.inline_asm_elementwise(TEXT, "=r,=r,r,r,r,r,r", args, tl.bfloat16, True, 4)
    else:
        codes = number_of(part_of(raw, PART, KIND))
        out = narrow(tl.fma(scales(step), codes, scales(least)), KIND, HARDWARE)
    return out


@triton.jit
def narrow(x, KIND: tl.constexpr, HARDWARE: tl.constexpr):
    """Float32 -> an operand that can be multiplied with stored numbers of ``KIND``."""
    if KIND == "fp32":
        out = x
    elif KIND == "fp16":
        out = x.to(tl.float16)
    elif HARDWARE:
        out = x.to(tl.bfloat16)
    else:
        out = from_bits(bf16_bits(x))
    return out


@triton.jit
def _from_bytes(raw, TEXT: tl.constexpr, INNER: tl.constexpr):
    """Bytes to operands. INNER: their rows of memory run along the sums of the product.

    Then they are decoded where the product wants them. Else it would gather them byte by byte, so
    an argument that is not used keeps the compiler from that: they are decoded as they were read,
    and turned as bfloat16, for which there are instructions.
    """
    if INNER:
        out = tl.inline_asm_elementwise(TEXT, "=r,=r,r", [raw], tl.bfloat16, True, 4)
    else:
        none = tl.full((1, 1), 0, tl.int16).to(tl.bfloat16, bitcast=True)
        args = [raw, none]
        out = tl.inline_asm_elementwise(TEXT, "=r,=r,r,r,r", args, tl.bfloat16, True, 4)
    return out


@triton.jit
def numbers_at(pointer, KIND: tl.constexpr, HARDWARE: tl.constexpr):
    """Where numbers are stored, as what is read for :func:`operand`.

    Bfloat16 are read as such: what is done to bits between a read and a product would keep a
    product from taking operands where asynchronous copies have put them.
    """
    if KIND == "bf16" and HARDWARE:
        out = pointer.to(tl.pointer_type(tl.bfloat16), bitcast=True)
    else:
        out = pointer
    return out


@triton.jit
def operand(raw, KIND: tl.constexpr, HARDWARE: tl.constexpr, INNER: tl.constexpr = False):
    """Stored numbers, without their scales -> what they are multiplied as.

    Integer conversion runs at a quarter of the rate at which a GPU reads bytes, so int8 and fp8
    are put together from bits, four at a time; see the assembly.
    """
    if KIND == "bf16":
        if HARDWARE:
            out = raw.to(tl.bfloat16, bitcast=True)
        else:
            out = from_bits(raw.to(tl.int32))
    elif KIND == "int8":
        if HARDWARE:
            out = _from_bytes(raw, _INT8, INNER)
        else:
            out = raw.to(tl.int8, bitcast=True).to(tl.float32)
    elif KIND == "fp8":
        if HARDWARE:
            out = _from_bytes(raw, _FP8, INNER)
        else:
            wide = raw.to(tl.int32)
            shifted = ((wide & 0x80) << 24) | ((wide & 0x7F) << 20)
            out = shifted.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120
    else:
        out = raw
    return out


@triton.jit
def encode_plain(x, KIND: tl.constexpr, HARDWARE: tl.constexpr):
    """Float32 -> what lies in memory for a number that is stored on its own."""
    if KIND == "bf16":
        if HARDWARE:
            out = x.to(tl.bfloat16).to(tl.int16, bitcast=True)
        else:
            out = bf16_bits(x).to(tl.int16)
    elif KIND == "fp16":
        out = x.to(tl.float16)
    else:
        out = x
    return out


@triton.jit
def _to_int8(steps):
    """Rounded to nearest, ties to even, by what float32 keeps of 1.5 * 2**23 and a small number."""
    inside = tl.minimum(tl.maximum(steps, -127.0), 127.0)
    return ((inside + 12582912.0) - 12582912.0).to(tl.int32).to(tl.uint8)


@triton.jit
def _to_fp8(steps):
    """Rounded to nearest e4m3, ties to even; at most 448 from zero."""
    bits = steps.to(tl.int32, bitcast=True)
    size = tl.minimum(tl.abs(steps), 448.0)
    whole = size.to(tl.int32, bitcast=True)
    normal = ((whole + 0x7FFFF + ((whole >> 20) & 1)) >> 20) - 960  # exponents are 120 apart
    small = ((size * 512.0 + 12582912.0) - 12582912.0).to(tl.int32)  # steps of 2**-9 below 2**-6
    code = tl.where(size < 0.015625, small, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def encode_token(x, KIND: tl.constexpr):
    """Float32 ``[rows, dim]``, dim padded with zeros -> bytes, and bits of each row's scale.

    The same operations in the same order as ``formats.py``; divisions are IEEE's.
    """
    top: tl.constexpr = 127.0 if KIND == "int8" else 448.0
    largest: tl.constexpr = 0x7C01 if KIND == "int8" else 0x7B12  # 0x1.02p121, 0x1.24p119
    size = tl.abs(x)
    wild = tl.max(tl.where(size < float("inf"), 0, 1), axis=1)
    peak = tl.where(wild == 0, tl.max(size, axis=1), 0.0)
    bits = (tl.div_rn(peak, top).to(tl.int32, bitcast=True) + 0xFFFF) >> 16
    bits = tl.minimum(bits, largest)
    usable = (bits > 0) & (wild == 0)
    scale = tl.broadcast_to(tl.where(usable, from_bits(bits), 1.0)[:, None], x.shape)
    steps = tl.where(usable[:, None], tl.div_rn(x, scale), 0.0)
    if KIND == "int8":
        payload = _to_int8(steps)
    else:
        payload = _to_fp8(steps)
    return payload, tl.where(wild == 0, bits, 0x7FC0).to(tl.int16)


@triton.jit
def bits_of_line(low, high, wild, LEVELS: tl.constexpr):
    """Bits, int32, of minimum and step of groups that lie between float32 ``low`` and ``high``.

    ``wild`` marks those with an infinity or a NaN in them. See ``formats.py``: the same operations
    in the same order.
    """
    low = tl.where(wild | (low == 0.0), 0.0, low)  # -0 becomes 0
    high = tl.where(wild, 0.0, high)
    bits = low.to(tl.int32, bitcast=True)
    upper = (tl.where(bits < 0, bits + 0xFFFF, bits) >> 16) & 0xFFFF
    upper = tl.where(upper == 0xFF80, 0xFF7F, upper)
    least = from_bits(upper)
    span = tl.maximum(0.5 * high - 0.5 * least, 0.0)
    step = (tl.div_rn(span, 0.5 * LEVELS).to(tl.int32, bitcast=True) + 0xFFFF) >> 16
    top = 2.0 * (0.5 * least + 0.5 * from_bits(step) * LEVELS)
    step -= tl.where(tl.abs(top) < float("inf"), 0, 1)
    return upper, tl.where(wild, 0x7FC0, step)


@triton.jit
def codes_on_line(x, minimum, step, LEVELS: tl.constexpr):
    """Float32 numbers -> int32 codes; bits of minimum and step broadcast to the shape of x."""
    usable = (step > 0) & (step < 0x7F80)
    each = tl.where(usable, from_bits(step), 1.0)
    steps = tl.div_rn(0.5 * x - 0.5 * from_bits(minimum), 0.5 * each)
    inside = tl.minimum(tl.maximum(tl.where(usable, steps, 0.0), 0.0), LEVELS)
    return ((inside + 12582912.0) - 12582912.0).to(tl.int32)
