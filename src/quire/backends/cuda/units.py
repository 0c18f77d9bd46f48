"""Stored numbers in units of 16 bits, of which an operand takes one number each, in Triton.

The instructions that read operands move units of 16 bits as they lie. Of two units in a register a
shift, a mask and one instruction more make two bfloat16 numbers: see ``codec.py`` for the bits.
"""

import triton
import triton.language as tl

from quire.backends.cuda.codec import (
    MASKS,
    MINUS_0,
    MINUS_128,
    OF_FP8,
    OF_INT8,
    OF_LINES,
    bf16_bits,
    from_bits,
    narrow,
    number_of,
    operand,
    scales,
)

__all__ = [
    "bits_operand",
    "pairs_in_words",
    "scaled_pairs",
    "split_pairs",
    "unit_bytes",
    "unit_decoded",
    "unit_operand",
]

# Units of 16 bits, two in a register, to two bfloat16 numbers: one of each unit.
_UNITS = """{{
    .reg .b32 x, a, b, one, bias;
    mov.b32 one, 0x3F803F80;
    mov.b32 bias, {bias};
"""
_SHIFTED = """
    shr.b32 x, {raw}, {shift};
"""
_BIASED = "lop3.b32 {target}, x, {mask}, 0x43004300, 0xEA;"


def _of_units(each: str, bits: int, shifts: tuple[int, ...]) -> str:
    """Numbers of ``bits`` at ``shifts`` of a unit, one output each."""
    bias = MINUS_0 if each is OF_FP8 else MINUS_128
    count, lines = len(shifts), ""
    for i, shift in enumerate(shifts):
        lines += _SHIFTED.format(raw=f"${count}", shift=shift) + each.format(
            source="x", target=f"${i}", step=f"${count + 1}", least=f"${count + 2}",
            mask=MASKS.get(bits),
        )  # fmt: skip
    return _UNITS.format(bias=bias) + lines + "}"


_TIMES_ONE = tl.constexpr("""{
    .reg .b32 one, none;
    mov.b32 one, 0x3F803F80;
    mov.b32 none, 0x80008000;
    fma.rn.bf16x2 $0, $1, one, none;
}""")
_PAIR = tl.constexpr("cvt.rn.bf16x2.f32 $0, $2, $1;")  # the first goes into the upper half
_SCALED = tl.constexpr(
    tuple(
        f"""{{
    .reg .b32 x, y, a, none;
    mov.b32 none, 0x80008000;
    mov.b64 {{x, y}}, $4;
    prmt.b32 x, x, y, {halves};
    fma.rn.bf16x2 a, $3, x, none;
    fma.rn.bf16x2 a, $2, x, a;
    mov.b32 {{$0, $1}}, a;
}}"""
        for halves in ("0x5410", "0x7632")
    )
)
_UNIT_CODES = tl.constexpr(
    tuple(_of_units(_BIASED, 2, (i,)) for i in range(0, 16, 2))
    + tuple(_of_units(_BIASED, 4, (i,)) for i in range(0, 16, 4))
)
_UNIT_INT4 = tl.constexpr(_of_units(OF_LINES, 4, tuple(range(0, 16, 4))))
_UNIT_INT2 = tl.constexpr(_of_units(OF_LINES, 2, tuple(range(0, 16, 2))))
_UNIT_INT8 = tl.constexpr(_of_units(OF_INT8, 8, (0, 8)))
_UNIT_FP8 = tl.constexpr(_of_units(OF_FP8, 8, (0, 8)))


@triton.jit
def _bits_of_unit(raw, SHIFT: tl.constexpr, BITS: tl.constexpr):
    return (raw.to(tl.int32) >> SHIFT) & (2**BITS - 1)


@triton.jit
def unit_operand(raw, SHIFT: tl.constexpr, KIND: tl.constexpr, HARDWARE: tl.constexpr):
    """128 plus the code at bit SHIFT of int16 units, as a bfloat16 operand."""
    BITS: tl.constexpr = 4 if KIND == "int4" else 2
    if HARDWARE:
        TEXT: tl.constexpr = _UNIT_CODES[SHIFT // 2 if BITS == 2 else 8 + SHIFT // 4]
        out = tl.inline_asm_elementwise(TEXT, "=r,r", [raw], tl.bfloat16, True, 2)
    else:
        out = number_of(_bits_of_unit(raw, SHIFT, BITS)) + 128.0
    return out


@triton.jit
def pairs_in_words(bits, HARDWARE: tl.constexpr):
    """Bits of bfloat16 numbers, int16, as they are: two in a register from here on.

    Times one, which the compiler does not see through: else it puts two together at every use.
    """
    if HARDWARE:
        out = tl.inline_asm_elementwise(_TIMES_ONE, "=r,r", [bits], tl.int16, True, 2)
    else:
        out = bits
    return out


@triton.jit
def unit_decoded(raw, step, least, KIND: tl.constexpr, HARDWARE: tl.constexpr):
    """``least + step * code``, rounded to bfloat16, of the codes of int16 units: a tuple of them.

    Bits of steps and minima have the shape of ``raw``.
    """
    if HARDWARE and KIND == "int4":
        out = tl.inline_asm_elementwise(
            _UNIT_INT4, "=r,=r,=r,=r,r,r,r", [raw, step, least],
            (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), True, 2,
        )  # fmt: skip
    elif HARDWARE:
        out = tl.inline_asm_elementwise(
            _UNIT_INT2, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r", [raw, step, least],
            (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16,
             tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), True, 2,
        )  # fmt: skip
    else:
        BITS: tl.constexpr = 4 if KIND == "int4" else 2
        out = ()
        for part in tl.static_range(16 // BITS):
            codes = number_of(_bits_of_unit(raw, BITS * part, BITS))
            x = tl.fma(scales(step), codes, scales(least))
            out = out + (narrow(x, KIND, HARDWARE),)  # noqa: RUF005
    return out


@triton.jit
def split_pairs(one, other, HARDWARE: tl.constexpr):
    """Float32 numbers, two a word of bfloat16 ones, ``one`` in the lower half: rounded, and what
    is left of them, rounded too."""
    if HARDWARE:
        high = tl.inline_asm_elementwise(_PAIR, "=r,r,r", [one, other], tl.int32, True, 1)
        one, other = one - from_bits(high), other - (high & -65536).to(tl.float32, bitcast=True)
        low = tl.inline_asm_elementwise(_PAIR, "=r,r,r", [one, other], tl.int32, True, 1)
    else:
        high = bf16_bits(one) | (bf16_bits(other) << 16)
        one, other = one - from_bits(high), other - (high & -65536).to(tl.float32, bitcast=True)
        low = bf16_bits(one) | (bf16_bits(other) << 16)
    return high, low


@triton.jit
def scaled_pairs(high, low, steps, ODD: tl.constexpr, HARDWARE: tl.constexpr):
    """Words of :func:`split_pairs` times steps, as two operands: of lower and of upper halves.

    ``steps`` int64 are bits of four: of channels 0 and 2, with ODD 1 and 3, for the two halves.
    What is rounded is the float32 number times its step, but for what rounding ``low`` times that
    loses, 2**-9 of a unit in the last place.
    """
    if HARDWARE:
        TEXT: tl.constexpr = _SCALED[ODD]
        out = tl.inline_asm_elementwise(
            TEXT, "=h,=h,r,r,l", [high, low, steps], (tl.bfloat16, tl.bfloat16), True, 1
        )
    else:
        one = from_bits((steps >> (16 * ODD)).to(tl.int32))
        other = from_bits((steps >> (16 * ODD + 32)).to(tl.int32))
        rest = narrow(from_bits(low) * one, "bf16", False)
        first = narrow(tl.fma(from_bits(high), one, rest), "bf16", False)
        rest = narrow(from_bits(low >> 16) * other, "bf16", False)
        out = first, narrow(tl.fma(from_bits(high >> 16), other, rest), "bf16", False)
    return out


@triton.jit
def bits_operand(bits, HARDWARE: tl.constexpr):
    """The bfloat16 numbers whose bits are the lower halves of int32 words, as operands."""
    if HARDWARE:
        out = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        out = from_bits(bits)
    return out


@triton.jit
def unit_bytes(raw, KIND: tl.constexpr, HARDWARE: tl.constexpr):
    """Int8 or fp8 numbers, low and high bytes of int16 units, as :func:`operand` has them."""
    if HARDWARE:
        TEXT: tl.constexpr = _UNIT_INT8 if KIND == "int8" else _UNIT_FP8
        out = tl.inline_asm_elementwise(TEXT, "=r,=r,r", [raw], (tl.bfloat16, tl.bfloat16), True, 2)
    else:
        low = operand(_bits_of_unit(raw, 0, 8).to(tl.uint8), KIND, HARDWARE)
        out = low, operand(_bits_of_unit(raw, 8, 8).to(tl.uint8), KIND, HARDWARE)
    return out
