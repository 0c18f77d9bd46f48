"""Plain page formats against definitions in bits, written out with ints; page shapes in bytes."""

import struct

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from caches import Array
from quire.errors import ConfigError
from quire.pages import PAGE_FORMATS, PageShape, page_format

Bits = npt.NDArray[np.uint32]
PLAIN = ("fp32", "bf16", "fp16")


def floats(bits: Bits) -> npt.NDArray[np.float32]:
    return bits.astype(np.uint32).view(np.float32)


def is_nan(bits: int) -> bool:
    """Whether the float32 of these bits is not a number."""
    return bits & 0x7FFFFFFF > 0x7F800000


def stored_as(name: str, values: Array) -> Array:
    (stored,) = page_format(name).key.encode(values)
    return stored


def decoded(name: str, stored: Array) -> Array:
    return page_format(name).value.decode((stored,), 1)


def encoded(name: str, bits: Bits) -> Array:
    stored = stored_as(name, floats(bits))
    return stored.view(np.uint16 if stored.itemsize == 2 else np.uint32)


def bf16_of(bits: int) -> int:
    """bfloat16 bits of float32 bits that are not NaN: the upper half, to nearest, ties to even."""
    upper, lower = divmod(bits, 1 << 16)
    return upper + (lower > 0x8000 or (lower == 0x8000 and upper % 2 == 1))


def fp16_of(bits: int) -> int:
    """IEEE binary16 bits of float32 bits that are not NaN."""
    (value,) = struct.unpack("<f", struct.pack("<I", bits))
    try:
        packed = struct.pack("<e", value)
    except OverflowError:
        return 0x7C00 if value > 0 else 0xFC00
    return int(struct.unpack("<H", packed)[0])


def fp32_of_fp16(bits: int) -> int:
    (value,) = struct.unpack("<e", struct.pack("<H", bits))
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def near_halves() -> list[int]:
    """float32 bits at, midway between and next to all neighbouring binary16 numbers."""
    found = set[int]()
    for half in range(0x7C00):  # the finite, non-negative ones
        here = fp32_of_fp16(half)
        (low,) = struct.unpack("<f", struct.pack("<I", here))
        (high,) = struct.unpack("<e", struct.pack("<H", half + 1)) if half < 0x7BFF else (65536.0,)
        (middle,) = struct.unpack("<I", struct.pack("<f", (low + high) / 2))
        found.update((here, middle - 1, middle, middle + 1))
    found.update((0, 1, 0x7F7FFFFF, 0x7F800000))
    return [bits | sign for bits in sorted(found) for sign in (0, 1 << 31)]


def test_bf16_rounds_to_nearest_even_at_every_boundary() -> None:
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        bits = upper | np.uint32(lower)
        bits = bits[(bits & 0x7FFFFFFF) <= 0x7F800000]
        assert encoded("bf16", bits).tolist() == [bf16_of(int(b)) for b in bits]


def test_fp16_rounds_to_nearest_even_at_every_boundary() -> None:
    bits = near_halves()
    assert encoded("fp16", np.array(bits, np.uint32)).tolist() == [fp16_of(b) for b in bits]


@given(st.lists(st.integers(0, 2**32 - 1).filter(lambda bits: not is_nan(bits)), max_size=50))
def test_any_number_is_stored_as_its_format_defines(bits: list[int]) -> None:
    array = np.array(bits, np.uint32)
    assert encoded("fp32", array).tolist() == bits
    assert encoded("bf16", array).tolist() == [bf16_of(b) for b in bits]
    assert encoded("fp16", array).tolist() == [fp16_of(b) for b in bits]


@pytest.mark.parametrize(
    ("name", "largest", "first_infinite"),
    [("bf16", 0x7F7F7FFF, 0x7F7F8000), ("fp16", 0x477FEFFF, 0x477FF000)],
)
def test_a_number_beyond_the_range_becomes_infinite(
    name: str, largest: int, first_infinite: int
) -> None:
    for sign, infinity in ((0, np.inf), (1 << 31, -np.inf)):
        bits = np.array([largest, first_infinite, 0x7F7FFFFF, 0x7F800000], np.uint32) | sign
        found = decoded(name, stored_as(name, floats(bits)))
        assert np.isfinite(found[0])
        assert found[1:].tolist() == [infinity] * 3


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(
    "bits", [0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0x7F800001, 0xFF80FFFF], ids=hex
)
def test_not_a_number_stays_so_without_a_warning(name: str, bits: int) -> None:
    stored = stored_as(name, floats(np.array([bits], np.uint32)))
    assert np.isnan(decoded(name, stored)).all()


@pytest.mark.parametrize("name", PLAIN)
def test_zero_keeps_its_sign(name: str) -> None:
    back = decoded(name, stored_as(name, np.array([0.0, -0.0], np.float32)))
    assert back.view(np.uint32).tolist() == [0, 1 << 31]


def test_decoding_is_exact_for_every_stored_number() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    bf16 = decoded("bf16", every.view(PAGE_FORMATS["bf16"].dtype))
    fp16 = decoded("fp16", every.view(np.float16))
    assert bf16.dtype == fp16.dtype == np.float32
    for bits, wide in zip(every.tolist(), bf16.view(np.uint32).tolist(), strict=True):
        assert wide == bits << 16 or (is_nan(bits << 16) and is_nan(wide))
    for bits, wide in zip(every.tolist(), fp16.view(np.uint32).tolist(), strict=True):
        assert wide == fp32_of_fp16(bits) or (bits & 0x7FFF > 0x7C00 and is_nan(wide))


@pytest.mark.parametrize("name", PLAIN)
def test_stored_numbers_come_back_as_they_went_in(name: str) -> None:
    format = page_format(name)
    assert format.lossless
    width = format.dtype.itemsize
    bits = np.random.default_rng(0).integers(0, 2 ** (8 * width), 10_000).astype(f"u{width}")
    stored = bits.view(format.dtype)
    stored = stored[~np.isnan(decoded(name, stored))]
    assert stored_as(name, decoded(name, stored)).tobytes() == stored.tobytes()


@pytest.mark.parametrize("name", PLAIN)
def test_any_shape_is_kept_and_the_input_left_alone(name: str) -> None:
    format = page_format(name)
    values = np.random.default_rng(0).standard_normal((2, 3, 5), np.float32).transpose(2, 0, 1)
    before = values.tobytes()
    stored = stored_as(name, values)
    assert (stored.shape, stored.dtype) == ((5, 2, 3), format.dtype)
    back = decoded(name, stored)
    assert (back.shape, back.dtype) == ((5, 2, 3), np.float32)
    stored[...] = 0
    back[...] = 0
    assert values.tobytes() == before
    assert stored_as(name, np.zeros((0, 4), np.float32)).shape == (0, 4)


def test_each_format_has_its_width() -> None:
    assert {name: f.bits for name, f in PAGE_FORMATS.items()} == {
        "fp32": 32,
        "bf16": 16,
        "fp16": 16,
        "fp8": 8,
        "int8": 8,
        "int4": 4,
        "int2": 2,
    }
    assert tuple(name for name, f in PAGE_FORMATS.items() if f.lossless) == PLAIN
    assert all(name == f.name == page_format(name).name for name, f in PAGE_FORMATS.items())


@pytest.mark.parametrize(("name", "token"), [("fp32", 2 * 13 * 4), ("bf16", 52), ("fp16", 52)])
def test_bytes_of_a_token_and_a_page(name: str, token: int) -> None:
    formats = [page_format(name)] * 2
    shape = PageShape(16, 2, 8, 5, *formats)  # 2 heads, keys of 8 and values of 5 numbers
    assert (shape.bytes_per_token, shape.bytes_per_page) == (token, 16 * token)
    assert PageShape(1, 2, 8, 5, *formats).bytes_per_page == token


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [("bf61", "bf16"), ("fp23", "fp32"), ("float16", "fp16"), ("BF16", "bf16")],
)
def test_an_unknown_format_names_the_nearest_and_all(wrong: str, nearest: str) -> None:
    with pytest.raises(
        ConfigError, match=f"unknown page format '{wrong}'; did you mean '{nearest}'"
    ):
        page_format(wrong)
    every = "fp32, bf16, fp16, fp8, int8, int4, int2"
    with pytest.raises(ConfigError, match=rf"\(formats: auto, {every}\)"):
        page_format(wrong)


def test_a_format_like_no_other_names_only_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"unknown page format 'zzz' \(formats:"):
        page_format("zzz")
