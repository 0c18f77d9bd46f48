"""PTX instructions that compute on registers (PTX ISA, chapter 9.7): each a function of arrays.

A register is an array of unsigned integers, or of bools, with a number for every thread, or one for
all. What a card rounds once is computed in float64 and then rounded; of a fused multiply-add of
float32, or float64, the sum is rounded in float64 before, which seldom shows.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

__all__ = ["Pure", "bits_of", "immediate", "pure"]

Array = Any
_BITS = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_FLOATS = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32, "f64": np.float64}
_SIZES = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}


@dataclass(frozen=True)
class Pure:
    """``run`` takes arrays of the types ``takes`` and gives an array of bits, or of bools."""

    run: Callable[..., Array]
    takes: tuple[str, ...]


def size_of(kind: str) -> int:
    """Bits of a type."""
    return _SIZES.get(kind) or int(re.sub(r"\D", "", kind))


def bits_of(kind: str) -> Any:
    """The dtype that holds a type's numbers as bits; bool for predicates."""
    return np.bool_ if kind == "pred" else _BITS[size_of(kind)]


def seen_as(kind: str) -> Any:
    """The dtype that a type's numbers are computed in."""
    if kind in _FLOATS:
        return _FLOATS[kind]
    size = size_of(kind)
    return np.dtype(f"i{size // 8}") if kind[0] == "s" else _BITS[size]


def immediate(text: str, kind: str) -> Array:
    """A number that stands in an instruction, [1]."""
    if kind == "pred":
        return np.array([bool(int(text, 0))])
    if text.startswith(("0f", "0F")):
        return np.array([int(text[2:], 16)], np.uint32)
    if text.startswith(("0d", "0D")):
        return np.array([int(text[2:], 16)], np.uint64)
    return np.array([int(text.rstrip("U"), 0) & (1 << size_of(kind)) - 1], bits_of(kind))


def _view(x: Array, kind: str) -> Array:
    """Registers, perhaps wider ones, as numbers of a type."""
    narrow = x if x.dtype == bits_of(kind) else x.astype(bits_of(kind))
    return narrow.view(seen_as(kind))


def _bits(x: Array, kind: str) -> Array:
    return np.ascontiguousarray(x).view(bits_of(kind))


def round_once(x: Array, kind: str) -> Array:
    """Float64 rounded to nearest, ties to even, once: through float32 with its last bit sticky."""
    if kind in ("f64", "f32"):
        return x.astype(_FLOATS[kind])
    wide = x.astype(np.float32)
    bits, off = wide.view(np.uint32), wide.astype(np.float64) != x
    away = np.abs(wide.astype(np.float64)) > np.abs(x)
    inexact = off & np.isfinite(x) & (bits & 1 == 0)
    bits = np.where(inexact, np.where(away, bits - 1, bits + 1), bits)
    bits = bits.astype(np.uint32)
    return bits.view(np.float32).astype(_FLOATS[kind])


# -- arithmetic ------------------------------------------------------------------------------


def _typed(function: Callable[..., Array], kind: str) -> Callable[..., Array]:
    """A function of numbers of one type as one of bits."""

    def run(*args: Array) -> Array:
        return _bits(function(*(_view(x, kind) for x in args)).astype(seen_as(kind)), kind)

    return run


def _fused(kind: str) -> Callable[..., Array]:
    def run(*args: Array) -> Array:
        a, b, c = (_view(x, kind).astype(np.float64) for x in args)
        return _bits(round_once(a * b + c, kind), kind)

    return run


def _shifted(kind: str, left: bool) -> Callable[..., Array]:
    size = size_of(kind)

    def run(x: Array, by: Array) -> Array:
        wide, by = _view(x, kind), np.minimum(by, size).astype(np.int64)
        if left:
            moved = wide.astype(np.uint64) << np.minimum(by, 63).astype(np.uint64)
            return _bits(np.where(by >= size, 0, moved).astype(bits_of(kind)), kind)
        most = size - 1 if kind[0] == "s" else 63
        wider = wide.astype(np.int64 if kind[0] == "s" else np.uint64)
        moved = wider >> np.minimum(by, most).astype(wider.dtype)
        if kind[0] != "s":
            moved = np.where(by >= size, 0, moved)
        return _bits(moved.astype(seen_as(kind)), kind)

    return run


def _quotient(kind: str, rest: bool) -> Callable[..., Array]:
    """Rounded towards zero."""

    def run(a: Array, b: Array) -> Array:
        x, y = (_view(each, kind).astype(np.int64 if kind[0] == "s" else np.uint64)
                for each in (a, b))  # fmt: skip
        safe = np.where(y == 0, 1, y)
        found = np.fmod(x, safe) if rest else (x - np.fmod(x, safe)) // safe
        return _bits(found.astype(seen_as(kind)), kind)

    return run


def _wide(kind: str, added: bool) -> Callable[..., Array]:
    sign, size = kind[0], size_of(kind)
    to = f"{sign}{2 * size}"

    def run(*args: Array) -> Array:
        a, b = (_view(x, kind).astype(seen_as(to)) for x in args[:2])
        product = a * b
        return _bits(product + _view(args[2], to) if added else product, to)

    return run


def _high(kind: str) -> Callable[..., Array]:
    """The upper half of a product."""
    size = size_of(kind)

    def run(a: Array, b: Array) -> Array:
        x, y = (_view(each, kind).astype(object) for each in (a, b))  # Python's own integers
        upper = (x * y) >> size & (1 << size) - 1
        return upper.astype(bits_of(kind))

    return run


def _picked(kind: str) -> Callable[..., Array]:
    """Bits of a field; the sign bit repeated above it where the type is signed."""
    size = size_of(kind)

    def run(x: Array, at: Array, count: Array) -> Array:
        at, count = (np.minimum(y & 0xFF, size).astype(np.uint64) for y in (at, count))
        wide = _view(x, kind).astype(f"{'i' if kind[0] == 's' else 'u'}8").view(np.uint64)
        one = np.uint64(1)
        field = (wide >> np.minimum(at, np.uint64(63))) & (
            (one << np.minimum(count, np.uint64(63))) - one
        )
        if kind[0] == "s":
            top = np.minimum(at + count, np.uint64(size)) - one
            sign = (wide >> np.minimum(top, np.uint64(63))) & one
            above = ~((one << np.minimum(count, np.uint64(63))) - one)
            field = np.where((sign == 1) & (count > 0), field | above, field)
        return (field & np.uint64((1 << size) - 1)).astype(bits_of(kind))

    return run


def _logic(a: Array, b: Array, c: Array, table: int) -> Array:
    """Any function of three bits."""
    out = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.uint32)
    for row in range(8):
        if table >> row & 1:
            out |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return out


def _permuted(a: Array, b: Array, selector: Array) -> Array:
    """Bytes of two registers, chosen by four bits each; the highest of which spreads the sign."""
    both = np.uint64(1) * a | (b.astype(np.uint64) << np.uint64(32))
    out = np.zeros(np.broadcast_shapes(both.shape, selector.shape), np.uint32)
    for nth in range(4):
        which = (selector >> np.uint32(4 * nth)) & np.uint32(0xF)
        byte = (both >> ((which & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(0xFF)
        sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        byte = np.where(which & np.uint32(8), sign, byte)
        out |= byte.astype(np.uint32) << np.uint32(8 * nth)
    return out


def _halves(function: Callable[..., Array]) -> Callable[..., Array]:
    """A function of numbers of 16 bits as one of registers that hold two."""

    def run(*args: Array) -> Array:
        shape = np.broadcast_shapes(*(x.shape for x in args))
        pairs = [np.ascontiguousarray(np.broadcast_to(x, shape)).view(np.uint16) for x in args]
        return function(*pairs).view(np.uint32)

    return run


# -- comparing, choosing, converting ---------------------------------------------------------

_COMPARED = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal,
    "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def _compared(how: str, kind: str) -> Callable[..., Array]:
    """Ordered comparisons are false where a number is NaN, unordered ones true."""
    if how in ("nan", "num"):
        return lambda a, b: (np.isnan(_view(a, kind)) | np.isnan(_view(b, kind))) == (how == "nan")
    unordered = kind in _FLOATS and how.endswith("u") and how[:-1] in _COMPARED
    compare = _COMPARED[how[:-1] if unordered else how]

    def run(a: Array, b: Array) -> Array:
        x, y = _view(a, kind), _view(b, kind)
        if how == "ne" and kind in _FLOATS:
            return (x != y) & ~np.isnan(x) & ~np.isnan(y)
        found = compare(x, y)
        return found | np.isnan(x) | np.isnan(y) if unordered else found

    return run


def _converted(how: list[str]) -> Pure:
    """``cvt`` with its modifiers, target and source type last."""
    to, of = how[-2:]
    if to.endswith("x2"):
        half = to[:-2]

        def pair(high: Array, low: Array) -> Array:
            both = [_bits(round_once(_view(x, of).astype(np.float64), half), half).astype(np.uint32)
                    for x in (high, low)]  # fmt: skip
            return both[0] << np.uint32(16) | both[1]

        return Pure(pair, (of, of))

    def run(x: Array) -> Array:
        number = _view(x, of)
        if to in _FLOATS:
            wide = number.astype(np.float64) if size_of(of) < 64 or of in _FLOATS else number
            return _bits(round_once(wide, to) if wide.dtype == np.float64
                         else wide.astype(_FLOATS[to]), to)  # fmt: skip
        if of in _FLOATS:
            whole = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[how[0]]
            limits = np.iinfo(seen_as(to))
            wide = np.clip(np.nan_to_num(whole(number.astype(np.float64)), nan=0.0),
                           limits.min, limits.max)  # fmt: skip
            return _bits(wide.astype(seen_as(to)), to)
        return _bits(number.astype(seen_as(to)), to)

    return Pure(run, (of,))


def _power(x: Array) -> Array:
    """2**x as float32, results below the least normal number as 0."""
    found = np.exp2(_view(x, "f32").astype(np.float64)).astype(np.float32)
    return _bits(np.where(found < np.finfo(np.float32).tiny, np.float32(0), found), "f32")


def _approximately(function: Callable[..., Array]) -> Callable[..., Array]:
    """Float32 in float64, rounded: a card's own approximation is within a few units of it."""

    def run(x: Array) -> Array:
        return _bits(function(_view(x, "f32").astype(np.float64)).astype(np.float32), "f32")

    return run


def _relu_max(a: Array, b: Array) -> Array:
    return _bits(np.maximum(np.maximum(_view(a, "s32"), _view(b, "s32")), 0), "s32")


def _negated(x: Array) -> Array:
    return np.negative(x)


_PLAIN: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide,
    "abs": np.abs, "neg": _negated, "sqrt": np.sqrt,
}  # fmt: skip
_APPROXIMATE = {
    "rcp": lambda x: 1 / x, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x),
    "lg2": np.log2, "tanh": np.tanh, "sin": np.sin, "cos": np.cos,
}  # fmt: skip
_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}


@cache
def pure(name: str) -> Pure | None:  # noqa: PLR0911, PLR0912 - a table of an instruction set
    """What an instruction computes; None if it does more than that, or is not known."""
    op, *how = name.split(".")
    kind = how[-1] if how else ""
    if op == "cvt":
        return _converted(how)
    if op == "lop3":
        return Pure(_logic, ("b32", "b32", "b32", "number"))
    if op == "prmt":
        return Pure(_permuted, ("b32", "b32", "b32"))
    if op == "ex2":
        return Pure(_power, ("f32",))
    if op in _LOGIC:
        return Pure(_LOGIC[op], (kind,) * (1 if op == "not" else 2))
    if op in ("shl", "shr"):
        return Pure(_shifted(kind, op == "shl"), (kind, "u32"))
    if op == "setp" and len(how) == 2:
        return Pure(_compared(how[0], kind), (kind, kind))
    if op == "selp":
        return Pure(lambda a, b, p: np.where(p, a, b), (kind, kind, "pred"))
    if op == "popc" and kind == "b32":
        return Pure(lambda x: np.bitwise_count(_view(x, "u32")).astype(np.uint32), ("b32",))
    if op == "bfe":
        return Pure(_picked(kind), (kind, "u32", "u32"))
    if op in ("mul", "mad") and how[0] == "wide":
        more = (f"{kind[0]}{2 * size_of(kind)}",) if op == "mad" else ()
        return Pure(_wide(kind, op == "mad"), (kind, kind, *more))
    if op == "mul" and how[0] == "hi":
        return Pure(_high(kind), (kind, kind))
    if op == "mad":
        return Pure(_typed(lambda a, b, c: a * b + c, kind), (kind,) * 3)
    if op == "fma":
        if kind.endswith("x2"):
            return Pure(_halves(_fused(kind[:-2])), ("b32",) * 3)
        return Pure(_fused(kind), (kind,) * 3)
    if op in ("min", "max"):
        if how[0] == "relu":
            return Pure(_relu_max, (kind, kind))
        floats = np.fmin if op == "min" else np.fmax
        if "NaN" in how:
            floats = np.minimum if op == "min" else np.maximum
        whole = np.minimum if op == "min" else np.maximum
        return Pure(_typed(floats if kind in _FLOATS else whole, kind), (kind, kind))
    if op in _APPROXIMATE and "approx" in how and kind == "f32":
        return Pure(_approximately(_APPROXIMATE[op]), ("f32",))
    if op in ("div", "rem") and kind not in _FLOATS:
        return Pure(_quotient(kind, op == "rem"), (kind, kind))
    if op in _PLAIN:
        if kind.endswith("x2"):
            half = kind[:-2]
            return Pure(_halves(_typed(_PLAIN[op], half)), ("b32",) * 2)
        return Pure(_typed(_PLAIN[op], kind), (kind,) * (1 if op in ("abs", "neg", "sqrt") else 2))
    return None
