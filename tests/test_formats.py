"""Quantised page formats against tables of all numbers, bounds from arithmetic, byte counts."""

import math
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.errors import ConfigError
from quire.formats import GROUP, PAGE_FORMATS, Coding, page_format
from quire.pages import PageShape

Array = npt.NDArray[Any]

TOKEN = ("int8", "fp8")
PAGE = ("int4", "int2")
TOP = {"int8": 127.0, "fp8": 448.0}

GREATEST = float(np.finfo(np.float32).max)
LEAST_BF16 = 2.0**-133
# Every finite bfloat16 and every e4m3 number of at least 0, in order.
BF16 = np.arange(0x7F80, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float64)
FP8 = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)


def float32s(bits: Any) -> Array:
    return np.asarray(bits, np.uint64).astype(np.uint32).view(np.float32)


def vectors() -> Array:
    """float32 [n, 1, 32]: constant, huge, tiny, subnormal, outliers, zeros, plain, offset."""
    rng = np.random.default_rng(0)
    plain = rng.standard_normal((300, 32)).astype(np.float32)
    scales = np.float32(10.0) ** rng.integers(-37, 38, (300, 1)).astype(np.float32)
    outliers = plain.copy()
    outliers[:, 5] *= 1000
    subnormal = float32s(
        rng.integers(0, 0x80_0000, (100, 32)) | rng.integers(0, 2, (100, 32)) << 31
    )
    few = np.float32(1e-45) * rng.integers(-3, 4, (50, 32)).astype(np.float32)
    huge = np.clip(rng.uniform(-1.2, 1.2, (100, 32)), -1, 1).astype(np.float32) * GREATEST
    near = float32s(0x7F7F_FFFF - rng.integers(0, 0x4_0000, (100, 32)))
    constant = np.repeat(np.float32([0, -0.0, 1, -1, 1.0001, -7e-39, 1e-45, 3e38]), 32).reshape(
        -1, 32
    )
    ends = np.repeat(float32s([0x7F7F_FFFF, 0xFF7F_FFFF, 0x7F7F_0000, 1, 0x8000_0001]), 32)
    offset = plain + np.float32(1000)
    narrow = plain * np.float32(1e-6) - 3
    many = [plain, plain * scales, outliers, subnormal, few, huge, near, -near, constant, offset]
    return np.concatenate([*many, ends.reshape(-1, 32), narrow]).astype(np.float32)[:, None]


def assert_untouched(name: str, side: str, values: Array) -> None:
    coding = getattr(page_format(name), side)
    before = values.tobytes()
    stored = coding.encode(values)
    for array in stored:
        array[...] = 0
    assert values.tobytes() == before


# -- one scale for each token and head -----------------------------------------------------------


def scale_of(name: str, peak: float) -> float:
    """max|x| / top in float32, then the least bf16 that is not below, of those in range."""
    quotient = float(np.float32(peak) / np.float32(TOP[name]))
    scale = BF16[np.searchsorted(BF16, quotient)]
    with np.errstate(over="ignore"):
        possible = BF16[np.isfinite((BF16 * TOP[name]).astype(np.float32))]
    return float(min(scale, possible[-1]))


def nearest_fp8(steps: Array) -> Array:
    """e4m3 bits of ``steps`` >= 0, to nearest, of two that are equally near the even one."""
    above = np.clip(np.searchsorted(FP8, steps), 1, len(FP8) - 1)
    low, high = FP8[above - 1], FP8[above]
    up = (steps - low > high - steps) | ((steps - low == high - steps) & (above % 2 == 0))
    return np.where(up, above, above - 1)


@pytest.mark.parametrize("name", TOKEN)
def test_a_vector_is_stored_as_its_definition_says(name: str) -> None:
    values = vectors()[:, 0]
    payload, scale = page_format(name).key.encode(values)
    assert [float(s) for s in scale] == [scale_of(name, float(np.abs(v).max())) for v in values]
    wide = scale.astype(np.float32)[:, None]
    steps = np.divide(values, wide, out=np.zeros_like(values), where=wide > 0)
    if name == "int8":
        wanted = [[max(-127, min(127, round(float(s)))) for s in row] for row in steps]
        assert payload.tolist() == wanted
    else:
        signs = np.where(np.signbit(steps), 0x80, 0)
        bits = nearest_fp8(np.abs(steps).astype(np.float64)) | signs
        assert payload.view(np.uint8).tolist() == bits.tolist()


@pytest.mark.parametrize("name", TOKEN)
def test_decoding_is_payload_times_scale_exactly(name: str) -> None:
    values = vectors()[:, 0]
    format = page_format(name)
    payload, scale = stored = format.value.encode(values)
    found = format.value.decode(stored, 32)
    assert found.dtype == np.float32
    exact = payload.astype(np.float64) * scale.astype(np.float64)[:, None]
    assert np.array_equal(found.astype(np.float64), exact)
    assert np.isfinite(found).all()


def assert_token_bound(name: str, values: Array, found: Array) -> None:
    """Half a step of the payload; the scale is at most a bf16 above what is needed.

    Where the quotient that it is made of is below the least float32, there is none: then 0.
    """
    x = values.astype(np.float64)
    peak = np.abs(x).max(axis=-1, keepdims=True)
    scale = peak / TOP[name] * (1 + 2.0**-7) + LEAST_BF16
    half = scale / 2
    if name == "fp8":  # three bits behind the leading one, and subnormal steps of 2**-9
        half = np.maximum(np.abs(x) * 2.0**-4, scale * 2.0**-10)
    half = np.maximum(half * (1 + 2.0**-20), 2.0**-150 * TOP[name])
    assert (np.abs(found.astype(np.float64) - x) <= half).all()


@pytest.mark.parametrize("name", TOKEN)
def test_numbers_come_back_within_half_a_step(name: str) -> None:
    values = vectors()
    coding = page_format(name).key
    assert_token_bound(name, values, coding.decode(coding.encode(values), 32))


@pytest.mark.parametrize("name", TOKEN)
def test_every_magnitude_of_a_peak_is_in_range(name: str) -> None:
    """A sample of all finite float32, among them every one that a scale could overflow at."""
    bits = np.concatenate(
        [np.arange(1, 0x7F80_0000, 9973), np.arange(0x7F7A_0000, 0x7F80_0000), np.arange(1, 70_000)]
    )
    values = float32s(bits).reshape(-1, 1, 1)
    coding = page_format(name).key
    found = coding.decode(coding.encode(values), 1)
    assert np.isfinite(found).all()
    assert_token_bound(name, values, found)
    if name == "int8":  # the peak itself is within a hundred-and-twenty-seventh
        normal = values > 1e-36
        assert (np.abs(found / values - 1)[normal] <= 0.5 / 126).all()


@pytest.mark.parametrize("name", TOKEN)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_vectors_keep_the_rules(name: str, data: st.DataObject) -> None:
    """Each vector on its own; finite ones within the bound; the others NaN throughout."""
    rows, dim = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    bits = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=rows * dim, max_size=rows * dim))
    values = float32s(bits).reshape(rows, 1, dim)
    coding = page_format(name).key
    stored = coding.encode(values)
    found = coding.decode(stored, dim)
    finite = np.isfinite(values).all(axis=-1)
    assert np.isnan(found[~finite]).all()
    assert not stored[0].astype(np.float32)[~finite].any()
    assert np.isfinite(found[finite]).all()
    assert_token_bound(name, values[finite], found[finite])
    for row in range(rows):
        for part, alone in zip(stored, coding.encode(values[row : row + 1]), strict=True):
            assert part[row : row + 1].tobytes() == alone.tobytes()


@pytest.mark.parametrize("name", TOKEN)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf, float32s(0x7F80_0001).item()])
def test_one_bad_number_makes_its_vector_nan_and_no_other(name: str, bad: float) -> None:
    values = np.random.default_rng(0).standard_normal((4, 2, 8)).astype(np.float32)
    clean = values.copy()
    values[2, 1, 5] = bad
    coding = page_format(name).value
    payload, scale = stored = coding.encode(values)
    found, expected = coding.decode(stored, 8), coding.decode(coding.encode(clean), 8)
    assert np.isnan(found[2, 1]).all()
    assert np.isnan(scale.astype(np.float32)).sum() == 1
    assert not payload[2, 1].astype(np.float32).any()
    found[2, 1] = expected[2, 1]
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("name", TOKEN)
def test_a_vector_of_zeros_has_no_scale(name: str) -> None:
    coding = page_format(name).key
    payload, scale = coding.encode(np.array([[0.0, -0.0]], np.float32))
    assert payload.tobytes() == bytes(2)
    assert scale.tobytes() == bytes(2)
    assert coding.decode((payload, scale), 2).tolist() == [[0, 0]]


@pytest.mark.parametrize("name", TOKEN)
def test_an_outlier_costs_its_own_vector_only(name: str) -> None:
    values = np.random.default_rng(0).standard_normal((3, 2, 16)).astype(np.float32)
    coding = page_format(name).key
    before = coding.decode(coding.encode(values), 16)
    values[1, 0, 7] = 1e4
    after = coding.decode(coding.encode(values), 16)
    changed = (after != before).any(axis=-1)
    assert changed.tolist() == [[False, False], [True, False], [False, False]]


# -- a minimum and a step for each group ---------------------------------------------------------


def group_of(values: list[float], levels: int) -> tuple[float, float, list[int]]:
    """Minimum, step and numbers of one group, from tables of every bf16, in float64."""
    low, high = min(values), max(values)
    both = np.concatenate([-BF16[:0:-1], BF16])
    minimum = float(both[max(0, np.searchsorted(both, low, side="right") - 1)])
    span = max(np.float32(high / 2) - np.float32(minimum / 2), np.float32(0))
    at = int(np.searchsorted(BF16, float(span / np.float32(levels / 2))))
    if minimum + levels * BF16[at] >= 2.0**128 - 2.0**103:  # what rounds to infinity
        at -= 1
    step = float(BF16[at])
    if step == 0:
        return minimum, step, [0] * len(values)
    numbers = [
        float((np.float32(x / 2) - np.float32(minimum / 2)) / np.float32(step / 2)) for x in values
    ]
    return minimum, step, [max(0, min(levels, round(n))) for n in numbers]


def fields(payload: Array, bits: int) -> list[int]:
    """Numbers of ``bits`` out of bytes, the first in the lowest bits."""
    whole = int.from_bytes(payload.tobytes(), "little")
    return [whole >> bits * i & 2**bits - 1 for i in range(len(payload) * 8 // bits)]


@pytest.mark.parametrize("name", PAGE)
@pytest.mark.parametrize("side", ["key", "value"])
def test_a_group_is_stored_as_its_definition_says(name: str, side: str) -> None:
    format, rows = page_format(name), vectors()[::3, 0]
    # One group each: as the channel of a page of 32 tokens, or as the value of a token.
    values = rows[:, :, None, None] if side == "key" else rows[:, None, None, :]
    payload, minimum, step = getattr(format, side).encode(values)
    for i, row in enumerate(rows):
        low, each, numbers = group_of([float(x) for x in row], 2**format.bits - 1)
        assert float(minimum[i].item()) == low
        assert float(step[i].item()) == each
        assert fields(payload[i].ravel(), format.bits) == numbers
        assert not np.signbit(minimum[i].astype(np.float32)) or low < 0


def assert_group_bound(values: Array, found: Array, levels: int, axis: int) -> None:
    """Half a step, where both ends of the group can be reached; float32's own rounding."""
    x = values.astype(np.float64)
    low, high = x.min(axis=axis, keepdims=True), x.max(axis=axis, keepdims=True)
    least = low - np.abs(low) * 2.0**-7 - LEAST_BF16  # the minimum, rounded down
    step = (high - least) / levels * (1 + 2.0**-7) + LEAST_BF16
    bound = step / 2 * (1 + 2.0**-20) + 2.0**-23 * np.maximum(np.abs(x), np.abs(least))
    bound = np.where(x < -BF16[-1], np.maximum(bound, -BF16[-1] - x), bound)  # there is no less
    assert (np.abs(found.astype(np.float64) - x) <= bound).all()


@pytest.mark.parametrize("name", PAGE)
@pytest.mark.parametrize("side", ["key", "value"])
def test_numbers_of_a_group_come_back_within_half_a_step(name: str, side: str) -> None:
    format, rows = page_format(name), vectors()[:, 0]
    values = rows[:, :, None, None] if side == "key" else rows[:, None, None, :]
    coding = getattr(format, side)
    found = coding.decode(coding.encode(values), values.shape[-1])
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert_group_bound(values, found, 2**format.bits - 1, 1 if side == "key" else -1)


@pytest.mark.parametrize("name", PAGE)
def test_groups_that_end_at_the_greatest_number_stay_finite(name: str) -> None:
    """From every bf16 minimum up to the greatest float32, and to a few below it."""
    low = np.concatenate([BF16, -BF16]).astype(np.float32)
    format = page_format(name)
    for down in (0, 1, 2, 1000, 0xFFFF):
        high = np.full_like(low, float32s(0x7F7F_FFFF - down))
        values = np.stack([low, high, low, high], axis=-1)[:, None]
        found = format.value.decode(format.value.encode(values), 4)
        assert np.isfinite(found).all()
        assert_group_bound(values, found, 2**format.bits - 1, -1)


@pytest.mark.parametrize("name", PAGE)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_values_keep_the_rules(name: str, data: st.DataObject) -> None:
    format = page_format(name)
    dim = data.draw(st.sampled_from([1, 3, 31, 32, 33, 40, 64, 70]))
    kind = st.integers(0, 2**32 - 1) | st.floats(-10, 10, width=32)
    drawn = data.draw(st.lists(kind, min_size=dim, max_size=dim))
    values = np.array(
        [n if isinstance(n, float) else float32s(n).item() for n in drawn], np.float32
    )
    stored = format.value.encode(values[None, None])
    found = format.value.decode(stored, dim)[0, 0]
    for start in range(0, dim, GROUP):
        group = slice(start, start + GROUP)
        if np.isfinite(values[group]).all():
            assert_group_bound(values[group], found[group], 2**format.bits - 1, -1)
        else:
            assert np.isnan(found[group]).all()
            low = stored[1][0, 0, start // GROUP]
            assert low.tobytes() == bytes(2)


@pytest.mark.parametrize("name", PAGE)
def test_keys_are_grouped_by_channel_and_values_by_token(name: str) -> None:
    """An outlier channel of keys, or token of values, costs the others nothing."""
    format, rng = page_format(name), np.random.default_rng(0)
    values = rng.standard_normal((96, 2, 40)).astype(np.float32)
    for coding, where in ((format.key, np.s_[:, 1, 7]), (format.value, np.s_[40, 1, 33])):
        before = coding.decode(coding.encode(values), 40)
        outlying = values.copy()
        outlying[where] += 500
        after = coding.decode(coding.encode(outlying), 40)
        changed = after != before
        assert changed[where].all()
        changed[where] = False
        if coding is format.value:
            changed[40, 1, 32:] = False  # its group: the last 8 numbers of 40
        assert not changed.any()


@pytest.mark.parametrize("name", PAGE)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_number_makes_its_group_nan_and_no_other(name: str, bad: float) -> None:
    format = page_format(name)
    values = np.random.default_rng(0).standard_normal((64, 2, 40)).astype(np.float32)
    values[40, 1, 33] = bad
    key = format.key.decode(format.key.encode(values), 40)
    assert np.isnan(key[32:, 1, 33]).all()
    assert np.isnan(key).sum() == 32
    value = format.value.decode(format.value.encode(values), 40)
    assert np.isnan(value[40, 1, 32:]).all()
    assert np.isnan(value).sum() == 8


@pytest.mark.parametrize("name", PAGE)
def test_constant_groups_are_nearly_exact(name: str) -> None:
    format = page_format(name)
    for number in (0.0, -0.0, 1.0, -2.5, 1000.3, 3.4e38, -3.4e38, 1e-45, 7e-39):
        values = np.full((32, 1, 32), number, np.float32)
        for coding in (format.key, format.value):
            found = coding.decode(coding.encode(values), 32)
            bound = abs(number) * 2.0**-7 / (2**format.bits - 1) + LEAST_BF16
            bound = max(bound, -BF16[-1] - number)
            assert np.abs(found.astype(np.float64) - values).max() <= bound


@pytest.mark.parametrize("name", PAGE)
def test_pages_are_encoded_one_by_one_or_together_alike(name: str) -> None:
    values = np.random.default_rng(0).standard_normal((3, 64, 2, 40)).astype(np.float32)
    format = page_format(name)
    for coding in (format.key, format.value):
        together = coding.encode(values)
        for page in range(3):
            for part, alone in zip(together, coding.encode(values[page]), strict=True):
                assert part[page].tobytes() == alone.tobytes()
        assert coding.decode(together, 40).shape == values.shape


def test_keys_of_half_a_group_are_refused() -> None:
    with pytest.raises(ConfigError, match="groups of 32 tokens, and 40 are no multiple"):
        page_format("int4").key.encode(np.zeros((40, 1, 4), np.float32))


@pytest.mark.parametrize("name", [*TOKEN, *PAGE])
@pytest.mark.parametrize("side", ["key", "value"])
def test_the_input_is_left_alone(name: str, side: str) -> None:
    values = np.random.default_rng(0).standard_normal((32, 2, 32)).astype(np.float32)
    assert_untouched(name, side, values)
    assert_untouched(name, side, values.transpose(0, 2, 1))


# -- bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [  # bytes of one head: 32 tokens of 40 numbers
        ("fp32", 5120, 5120),
        ("bf16", 2560, 2560),
        ("fp8", 32 * (40 + 2), 32 * (40 + 2)),
        ("int8", 32 * (40 + 2), 32 * (40 + 2)),
        ("int4", 40 * (16 + 4), 32 * (20 + 2 * 4)),
        ("int2", 40 * (8 + 4), 32 * (10 + 2 * 4)),
    ],
)
def test_bytes_of_a_page_count_the_scales(name: str, key: int, value: int) -> None:
    format = page_format(name)
    shape = PageShape(32, 3, 40, 40, format, format)
    assert shape.key_bytes_per_page == 3 * key
    assert shape.bytes_per_page == 3 * (key + value)
    assert shape.bytes_per_token * 32 == shape.bytes_per_page
    assert PageShape(96, 3, 40, 40, format, format).bytes_per_page == 9 * (key + value)


@pytest.mark.parametrize("name", PAGE_FORMATS)
@pytest.mark.parametrize(("size", "heads", "dim"), [(32, 1, 1), (64, 3, 33), (96, 2, 128)])
def test_what_is_stored_is_what_is_accounted(name: str, size: int, heads: int, dim: int) -> None:
    format = page_format(name)
    values = np.random.default_rng(0).standard_normal((size, heads, dim)).astype(np.float32)

    def bytes_of(coding: Coding) -> int:
        stored = coding.encode(values)
        assert [(a.shape, a.dtype) for a in stored] == list(coding.parts(size, heads, dim))
        return sum(array.nbytes for array in stored)

    shape = PageShape(size, heads, dim, dim, format, format)
    assert bytes_of(format.key) == shape.key_bytes_per_page
    assert bytes_of(format.key) + bytes_of(format.value) == shape.bytes_per_page


def test_bytes_of_a_token_may_be_a_fraction() -> None:
    int4, int8 = page_format("int4"), page_format("int8")
    shape = PageShape(32, 1, 3, 3, int4, int8)
    assert shape.bytes_per_token == 3 * 20 / 32 + 5
    whole = PageShape(16, 2, 64, 64, int8, int8).bytes_per_token
    assert (whole, type(whole)) == (2 * 2 * 66, int)


@pytest.mark.parametrize("size", [1, 16, 33, 48])
def test_a_page_of_parts_of_groups_is_refused(size: int) -> None:
    int4, bf16 = page_format("int4"), page_format("bf16")
    with pytest.raises(ConfigError, match=rf"int4 keys .* a page of {size} tokens"):
        PageShape(size, 1, 8, 8, int4, bf16)
    assert PageShape(size, 1, 8, 8, bf16, int4).bytes_per_page == size * (16 + 4 + 4)


def test_fp8_is_e4m3_without_infinities() -> None:
    """448 is the greatest, 2**-9 the least, as in the OCP specification of 8-bit numbers."""
    assert FP8[-1] == TOP["fp8"]
    assert FP8[1] == 2.0**-9
    assert math.isnan(np.uint8(0x7F).view(ml_dtypes.float8_e4m3fn))
