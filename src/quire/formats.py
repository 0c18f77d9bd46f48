"""Page formats: how the numbers of a page are stored, and what they cost in bytes.

The NumPy encode and decode here are the definition of each format; kernels are tested against
them, and do the same float32 operations in the same order. A format is a row of
:data:`PAGE_FORMATS`, never a subclass of the cache. docs/formats.md explains the choices.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from quire.errors import ConfigError, did_you_mean

__all__ = [
    "BF16",
    "GROUP",
    "PAGE_FORMATS",
    "ROTATED",
    "Coding",
    "PageFormat",
    "Part",
    "Stored",
    "page_format",
]

Array: TypeAlias = npt.NDArray[Any]
Stored: TypeAlias = tuple[Array, ...]  # the arrays that numbers are stored as
Part: TypeAlias = tuple[tuple[int, ...], np.dtype[Any]]  # shape and dtype of one of them

ROTATED = ":rotated"  # behind a name: keys are turned first, see rotation.py
GROUP = 32  # tokens, or numbers of a value, that share a minimum and a step

BF16 = np.dtype(ml_dtypes.bfloat16)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


@dataclass(frozen=True)
class Coding:
    """How keys, or values, are stored.

    encode   float32 ``[..., tokens, heads, dim]`` -> stored arrays
    decode   (stored arrays, dim) -> float32 ``[..., tokens, heads, dim]``
    parts    (page_size, heads, dim) -> shape and dtype of each array of one page

    Where a format stores each token on its own, ``tokens`` is any number and axis 0 of every part
    counts tokens; else it is a multiple of :data:`GROUP`.
    """

    encode: Callable[[Array], Stored]
    decode: Callable[[Stored, int], Array]
    parts: Callable[[int, int, int], tuple[Part, ...]]

    def page_bytes(self, page_size: int, heads: int, dim: int) -> int:
        """Bytes that keys, or values, of a page take, scales included."""
        return sum(
            math.prod(shape) * dtype.itemsize for shape, dtype in self.parts(page_size, heads, dim)
        )


@dataclass(frozen=True)
class PageFormat:
    """One way to store keys and values.

    name      as in ``--kv-format``, without what is behind a colon
    bits      bits a number, without scales
    kind      ``"plain"``: each number on its own; ``"token"``: the numbers of one token and head
              share a scale; ``"page"``: numbers of different tokens do, so that whole pages are
              stored at once
    dtype     NumPy dtype of what holds the numbers
    key, value   how keys and values are stored
    rotated   keys, and the queries that attend to them, are turned first: see rotation.py
    """

    name: str
    bits: int
    kind: Literal["plain", "token", "page"]
    dtype: np.dtype[Any]
    key: Coding
    value: Coding
    rotated: bool = False

    @property
    def text(self) -> str:
        """As in ``--kv-format``, all of it."""
        return self.name + ROTATED if self.rotated else self.name

    @property
    def lossless(self) -> bool:
        """True if numbers of ``dtype`` come back as they went in."""
        return self.kind == "plain"


# -- each number on its own ----------------------------------------------------------------------


def _encode_plain(values: Array, dtype: np.dtype[Any]) -> Stored:
    """Rounded to nearest, ties to even.

    Infinities and NaNs are kept; a finite number beyond the format's range becomes infinite.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # a signalling NaN stays a NaN
        return (np.asarray(values).astype(dtype),)


def _decode_plain(stored: Stored, _dim: int) -> Array:
    """Exact."""
    return stored[0].astype(np.float32)


def _plain(name: str, dtype: Any) -> PageFormat:
    kept = np.dtype(dtype)
    coding = Coding(
        partial(_encode_plain, dtype=kept),
        _decode_plain,
        lambda size, heads, dim: (((size, heads, dim), kept),),
    )
    return PageFormat(name, kept.itemsize * 8, "plain", kept, coding, coding)


# -- one scale for each token and head -----------------------------------------------------------


def _bf16_up(x: Array) -> Array:
    """The least bfloat16 that is not below x, float32, finite and at least 0."""
    return ((x.view(np.uint32) + 0xFFFF) >> 16).astype(np.uint16).view(BF16)


def _encode_token(
    values: Array, top: float, largest: float, narrow: Callable[[Array], Array]
) -> Stored:
    """payload ``[..., dim]`` and scale bf16 ``[...]``, which is max|x| / top, rounded up.

    ``largest`` is the greatest bf16 whose product with ``top`` is finite in float32; a scale is
    never above it. Vectors whose scale is 0 (max|x| / top is below the least float32) have 0 for
    payload. A vector with an infinity or a NaN in it has NaN for scale and 0 for payload.
    """
    values = np.asarray(values, np.float32)
    with np.errstate(all="ignore"):
        peak = np.abs(values).max(axis=-1, initial=0)
        finite = np.isfinite(peak)
        scale = _bf16_up(np.where(finite, peak, np.float32(0)) / np.float32(top))
        scale = np.minimum(scale, BF16.type(largest))
        scale = np.where(finite, scale, BF16.type(np.nan))
        steps = values / scale.astype(np.float32)[..., None]
        return narrow(np.where((scale > 0)[..., None], steps, np.float32(0))), scale


def _decode_token(stored: Stored, _dim: int) -> Array:
    """payload * scale; exact, since it has few bits and is in range."""
    payload, scale = stored
    out: Array = payload.astype(np.float32) * scale.astype(np.float32)[..., None]
    return out


def _to_int8(steps: Array) -> Array:
    return np.clip(np.rint(steps), -127, 127).astype(np.int8)


def _to_fp8(steps: Array) -> Array:
    return np.clip(steps, np.float32(-448), np.float32(448)).astype(FP8)


def _token(
    name: str, dtype: Any, top: float, largest: str, narrow: Callable[[Array], Array]
) -> PageFormat:
    kept = np.dtype(dtype)
    coding = Coding(
        partial(_encode_token, top=top, largest=float.fromhex(largest), narrow=narrow),
        _decode_token,
        lambda size, heads, dim: (((size, heads, dim), kept), ((size, heads), BF16)),
    )
    return PageFormat(name, 8, "token", kept, coding, coding)


# -- a minimum and a step for each group of numbers ----------------------------------------------


def _bf16_down(x: Array) -> Array:
    """The greatest finite bfloat16 that is not above x, float32 and finite; -0 becomes 0.

    Below the least finite bfloat16 there is none: then that one.
    """
    bits = (x + np.float32(0)).view(np.uint32)
    upper = np.where(bits >> 31 == 1, bits + 0xFFFF, bits) >> 16
    return np.where(upper == 0xFF80, 0xFF7F, upper).astype(np.uint16).view(BF16)


_HALF = np.float32(0.5)


def _line(minimum: Array, step: Array, number: Any) -> Array:
    """minimum + step * number, rounded once, as a fused multiply-add does.

    The product is exact but may overflow where the sum does not; that of halves cannot.
    """
    out: Array = 2 * (_HALF * minimum + _HALF * step * number)
    return out


def _encode_groups(values: Array, axis: int, levels: int) -> tuple[Array, Array, Array]:
    """Numbers uint8 (0 to ``levels``) as values has them, minimum and step bf16 without ``axis``.

    minimum   of the group, rounded down
    step      (maximum - minimum) / levels, rounded up; the bf16 before that where minimum +
              levels * step would not be finite; 0 where the quotient is
    number    (x - minimum) / step, to nearest, ties to even

    Differences are those of halves, which cannot overflow. A group with an infinity or a NaN in it
    has 0 for numbers and minimum, and NaN for step.
    """
    with np.errstate(all="ignore"):
        low, high = values.min(axis=axis, keepdims=True), values.max(axis=axis, keepdims=True)
        finite = np.isfinite(low) & np.isfinite(high)
        low, high = (np.where(finite, end, np.float32(0)) for end in (low, high))
        minimum = _bf16_down(low)
        least = minimum.astype(np.float32)
        span = np.maximum(_HALF * high - _HALF * least, np.float32(0))
        step = _bf16_up(span / (_HALF * np.float32(levels)))
        beyond = ~np.isfinite(_line(least, step.astype(np.float32), np.float32(levels)))
        step = (step.view(np.uint16) - beyond).astype(np.uint16).view(BF16)
        numbers = (_HALF * values - _HALF * least) / (_HALF * step.astype(np.float32))
        numbers = np.where(finite & (step > 0), np.clip(np.rint(numbers), 0, levels), 0)
        step = np.where(finite, step, BF16.type(np.nan))
    return numbers.astype(np.uint8), minimum.squeeze(axis), step.squeeze(axis)


def _decode_groups(numbers: Array, minimum: Array, step: Array, axis: int) -> Array:
    """minimum + step * number, float32 as ``numbers`` has them."""
    least, each = (np.expand_dims(a.astype(np.float32), axis) for a in (minimum, step))
    return _line(least, each, numbers.astype(np.float32))


def _pack(numbers: Array, bits: int, axis: int) -> Array:
    """8 / bits neighbours along ``axis`` a byte, the first in its lowest bits; zeros at the end."""
    per = 8 // bits
    last = np.moveaxis(numbers, axis, -1)
    count = last.shape[-1]
    whole = -(-count // per)
    padded = np.zeros((*last.shape[:-1], whole * per), np.uint8)
    padded[..., :count] = last
    fields = padded.reshape(*last.shape[:-1], whole, per) << (bits * np.arange(per, dtype=np.uint8))
    return np.ascontiguousarray(np.moveaxis(fields.sum(axis=-1, dtype=np.uint8), -1, axis))


def _unpack(packed: Array, bits: int, axis: int, count: int) -> Array:
    """The ``count`` numbers that :func:`_pack` was given along ``axis``."""
    last, per = np.moveaxis(packed, axis, -1), 8 // bits
    fields = last[..., None] >> (bits * np.arange(per, dtype=np.uint8)) & (2**bits - 1)
    numbers = fields.reshape(*last.shape[:-1], last.shape[-1] * per)
    return np.moveaxis(numbers[..., :count], -1, axis)


def _by_tokens(array: Array) -> Array:
    """[..., tokens, heads, dim] -> [..., groups, GROUP, heads, dim]."""
    *outer, tokens, heads, dim = array.shape
    if tokens % GROUP:
        raise ConfigError(
            f"keys are stored in groups of {GROUP} tokens, and {tokens} are no multiple of that"
        )
    return array.reshape(*outer, tokens // GROUP, GROUP, heads, dim)


def _encode_keys(values: Array, bits: int) -> Stored:
    """Each channel over GROUP tokens: keys have outlier channels.

    payload uint8 ``[..., tokens * bits / 8, heads, dim]``, minimum and step bf16
    ``[..., tokens / GROUP, heads, dim]``.
    """
    groups = _by_tokens(np.asarray(values, np.float32))
    numbers, minimum, step = _encode_groups(groups, -3, 2**bits - 1)
    return _pack(numbers.reshape(values.shape), bits, -3), minimum, step


def _decode_keys(stored: Stored, _dim: int, bits: int) -> Array:
    payload, minimum, step = stored
    numbers = _unpack(payload, bits, -3, payload.shape[-3] * 8 // bits)
    out = _decode_groups(_by_tokens(numbers), minimum, step, -3)
    return out.reshape(numbers.shape)


def _encode_values(values: Array, bits: int) -> Stored:
    """Each token and head, in groups of GROUP numbers along dim, the last perhaps shorter.

    payload uint8 ``[..., tokens, heads, ceil(dim * bits / 8)]``, minimum and step bf16
    ``[..., tokens, heads, ceil(dim / GROUP)]``.
    """
    values = np.asarray(values, np.float32)
    *outer, dim = values.shape
    fill = [(0, 0)] * len(outer) + [(0, -dim % GROUP)]
    padded = np.pad(values, fill, mode="edge")  # ends stay the ends
    groups = padded.reshape(*outer, padded.shape[-1] // GROUP, GROUP)
    numbers, minimum, step = _encode_groups(groups, -1, 2**bits - 1)
    return _pack(numbers.reshape(padded.shape)[..., :dim], bits, -1), minimum, step


def _decode_values(stored: Stored, dim: int, bits: int) -> Array:
    payload, minimum, step = stored
    numbers = np.zeros((*minimum.shape[:-1], minimum.shape[-1] * GROUP), np.uint8)
    numbers[..., :dim] = _unpack(payload, bits, -1, dim)
    out = _decode_groups(numbers.reshape(*minimum.shape, GROUP), minimum, step, -1)
    return out.reshape(numbers.shape)[..., :dim]


def _key_parts(size: int, heads: int, dim: int, bits: int) -> tuple[Part, ...]:
    if size % GROUP:
        raise ConfigError(
            f"int{bits} keys are stored in groups of {GROUP} tokens of one page, so that a page "
            f"of {size} tokens cannot hold them; give a page_size that is a multiple of {GROUP}"
        )
    group = (size // GROUP, heads, dim), BF16
    return ((size * bits // 8, heads, dim), np.dtype(np.uint8)), group, group


def _value_parts(size: int, heads: int, dim: int, bits: int) -> tuple[Part, ...]:
    group = (size, heads, -(-dim // GROUP)), BF16
    return ((size, heads, -(-dim * bits // 8)), np.dtype(np.uint8)), group, group


def _page(bits: int) -> PageFormat:
    key = Coding(
        partial(_encode_keys, bits=bits),
        partial(_decode_keys, bits=bits),
        partial(_key_parts, bits=bits),
    )
    value = Coding(
        partial(_encode_values, bits=bits),
        partial(_decode_values, bits=bits),
        partial(_value_parts, bits=bits),
    )
    return PageFormat(f"int{bits}", bits, "page", np.dtype(np.uint8), key, value)


PAGE_FORMATS: dict[str, PageFormat] = {
    format.name: format
    for format in (
        _plain("fp32", np.float32),
        _plain("bf16", ml_dtypes.bfloat16),
        _plain("fp16", np.float16),
        _token("fp8", FP8, 448, "0x1.24p119", _to_fp8),
        _token("int8", np.int8, 127, "0x1.02p121", _to_int8),
        _page(4),
        _page(2),
    )
}


def page_format(name: str) -> PageFormat:
    """The format that ``name`` says, such as ``"int4"`` or, for keys, ``"int4:rotated"``.

    Raises ConfigError, naming the nearest, if there is none, and for a rotated lossless one.
    """
    plain = name.removesuffix(ROTATED)
    if plain != name and plain in PAGE_FORMATS:
        return _turned(PAGE_FORMATS[plain])
    if name not in PAGE_FORMATS:
        lossy = [known for known, format in PAGE_FORMATS.items() if not format.lossless]
        names = [*PAGE_FORMATS, *(known + ROTATED for known in lossy)]
        raise ConfigError(
            f"unknown page format {name!r}{did_you_mean(name, names)} "
            f"(formats: auto, {', '.join(PAGE_FORMATS)}); {ROTATED} behind {', '.join(lossy)} "
            "turns keys first"
        )
    return PAGE_FORMATS[name]


def _turned(format: PageFormat) -> PageFormat:
    if format.lossless:
        raise ConfigError(
            f"{format.name}{ROTATED}: turning keys lessens what quantising loses, and "
            f"{format.name} does not quantise: it would change bits for nothing; write "
            f"{format.name!r}"
        )
    return replace(format, rotated=True)
