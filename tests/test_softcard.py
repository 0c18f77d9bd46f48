"""The card in software itself: against Python's own integers, NumPy, and programs that break rules.

Collected where triton compiles (conftest.py). What the backend's kernels compute on this card is in
test_compiled.py.
"""

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from quire.backends.cuda.codec import codes_operand, decoded_operand, operand
from quire.backends.cuda.units import (
    pairs_in_words,
    scaled_pairs,
    split_pairs,
    unit_bytes,
    unit_decoded,
    unit_operand,
)
from softcard.card import Card, plugged_in
from softcard.computing import pure
from softcard.counting import Counts
from softcard.machine import Launch, translate
from softcard.memory import DeviceMemory, Fault
from softcard.parse import parse

RNG = np.random.default_rng(0)
WORDS = np.concatenate(
    [
        RNG.integers(0, 1 << 32, 500, np.uint32),
        np.array([0, 1, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF], np.uint32),
    ]
)


@pytest.fixture(params=[80, 90])
def card(request: pytest.FixtureRequest) -> Iterator[Card]:
    with plugged_in(request.param) as card:
        yield card


def signed(x: int, size: int = 32) -> int:
    return x - (1 << size) if x >> (size - 1) else x


# -- instructions --------------------------------------------------------------------------------


def lop3(a: int, b: int, c: int, table: int) -> int:
    bits = ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1 for i in range(32))
    return sum((table >> bit & 1) << i for i, bit in enumerate(bits))


def prmt(a: int, b: int, selector: int) -> int:
    whole = (a | b << 32).to_bytes(8, "little")
    picks = [selector >> 4 * i & 15 for i in range(4)]
    found = [whole[p & 7] if p < 8 else 255 * (whole[p & 7] >> 7) for p in picks]
    return int.from_bytes(bytes(found), "little")


def bfe(a: int, at: int, count: int, sign: bool) -> int:
    at, count = at & 255, count & 255
    top = min(at + count - 1, 31)
    fill = a >> top & 1 if sign and count else 0
    bits = ((a >> at + i & 1 if at + i < 32 else fill) if i < count else fill for i in range(32))
    return sum(bit << i for i, bit in enumerate(bits))


OBVIOUS = {
    "lop3.b32": (lambda a, b, c: lop3(a, b, c, 0xEA), 3),
    "prmt.b32": (prmt, 3),
    "bfe.u32": (lambda a, b, c: bfe(a, b & 63, c & 63, False), 3),
    "bfe.s32": (lambda a, b, c: bfe(a, b & 63, c & 63, True), 3),
    "shl.b32": (lambda a, b: a << min(b & 63, 32) & 0xFFFFFFFF, 2),
    "shr.u32": (lambda a, b: a >> min(b & 63, 32), 2),
    "shr.s32": (lambda a, b: signed(a) >> min(b & 63, 31) & 0xFFFFFFFF, 2),
    "mul.hi.u32": (lambda a, b: a * b >> 32, 2),
    "mul.hi.s32": (lambda a, b: signed(a) * signed(b) >> 32 & 0xFFFFFFFF, 2),
    "mul.lo.s32": (lambda a, b: a * b & 0xFFFFFFFF, 2),
    "mad.lo.s32": (lambda a, b, c: a * b + c & 0xFFFFFFFF, 3),
    "mul.wide.s32": (lambda a, b: signed(a) * signed(b) & (1 << 64) - 1, 2),
    "mul.wide.u32": (lambda a, b: a * b, 2),
    "max.s32": (lambda a, b: max(signed(a), signed(b)) & 0xFFFFFFFF, 2),
    "max.relu.s32": (lambda a, b: max(signed(a), signed(b), 0), 2),
    "div.s32": (lambda a, b: int(Fraction(signed(a), signed(b))) & 0xFFFFFFFF, 2),
    "rem.u32": (lambda a, b: a % b, 2),
    "sub.s32": (lambda a, b: a - b & 0xFFFFFFFF, 2),
    "add.s16x2": (lambda a, b: (a + b & 0xFFFF) | ((a >> 16) + (b >> 16) & 0xFFFF) << 16, 2),
    "cvt.s64.s32": (lambda a: signed(a) & (1 << 64) - 1, 1),
    "cvt.s32.s16": (lambda a: signed(a & 0xFFFF, 16) & 0xFFFFFFFF, 1),
    "cvt.u16.u32": (lambda a: a & 0xFFFF, 1),
}


@pytest.mark.parametrize("name", OBVIOUS)
def test_whole_numbers_are_what_pythons_own_integers_say(name: str) -> None:
    law, count = OBVIOUS[name]
    args = [RNG.permutation(WORDS) for _ in range(count)]
    if name.startswith(("bfe", "sh")):  # amounts
        args[1:] = [each & np.uint32(63) for each in args[1:]]
    if name.startswith(("div", "rem")):
        args[1] = np.where(args[1] == 0, np.uint32(7), args[1])
    known = pure(name)
    assert known is not None
    got = known.run(*args, 0xEA) if name == "lop3.b32" else known.run(*args)
    assert [int(x) for x in got] == [law(*map(int, row)) for row in zip(*args, strict=True)]


def nearest(x: Fraction, kind: Any) -> float:
    """The number of a narrow type that is nearest, ties to even: looked for among all of them."""
    with np.errstate(invalid="ignore"):
        every = np.arange(1 << 16, dtype=np.uint16).view(kind).astype(np.float64)
    every = np.unique(every[np.isfinite(every)])
    at = np.searchsorted(every, float(x))
    near = every[max(0, at - 2) : at + 3]
    bits = {n: int(np.array([n]).astype(kind).view(np.uint16)[0]) for n in near}
    return min(near, key=lambda n: (abs(Fraction(n) - x), bits[n] & 1))


@pytest.mark.parametrize(("name", "kind"), [("bf16", ml_dtypes.bfloat16), ("f16", np.float16)])
def test_narrow_numbers_are_rounded_once(name: str, kind: Any) -> None:
    """Also where rounding to float32 before would make a tie of what is none."""
    shape = (3, 300)
    a, b, c = (RNG.standard_normal(shape) * 2.0 ** RNG.integers(-6, 7, shape)).astype(kind)
    pairs = [np.ascontiguousarray(x).view(np.uint32) for x in (a, b, c)]
    fma = pure(f"fma.rn.{name}x2")
    assert fma is not None
    got = fma.run(*pairs).view(kind).astype(np.float64)
    rows = zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    assert got.tolist() == [nearest(Fraction(x) * Fraction(y) + Fraction(z), kind)
                            for x, y, z in rows]  # fmt: skip
    singles = np.concatenate(
        [RNG.standard_normal(300), [0.0, -0.0, np.inf, np.nan, 1 + 2**-8, 1 + 2**-8 + 2**-20]]
    ).astype(np.float32)
    narrow = pure(f"cvt.rn.{name}.f32")
    assert narrow is not None
    assert narrow.run(singles.view(np.uint32)).tobytes() == singles.astype(kind).tobytes()


def test_comparisons_with_nan() -> None:
    numbers = np.array([1.0, np.nan], np.float32).view(np.uint32)
    one = np.array([1.0], np.float32).view(np.uint32)
    wanted = {"eq": [1, 0], "neu": [0, 1], "ne": [0, 0], "gt": [0, 0], "geu": [1, 1]}
    for how, each in wanted.items():
        known = pure(f"setp.{how}.f32")
        assert known is not None
        assert known.run(numbers, one).tolist() == [bool(x) for x in each], how
    for name, each in {"max.f32": 1.0, "max.NaN.f32": np.nan}.items():
        known = pure(name)
        assert known is not None
        assert np.array_equal(known.run(numbers, one).view(np.float32), [1.0, each], True), name


# -- kernels that Triton compiles ----------------------------------------------------------------


@triton.jit
def _product(out, a, b, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    left, right = tl.load(a + m * K + k[None, :]), tl.load(b + k[:, None] * N + n)
    tl.store(out + m * N + n, tl.dot(left, right))


@pytest.mark.parametrize("shape", [(16, 16, 16), (64, 128, 64), (128, 64, 32)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products(card: Card, shape: tuple[int, int, int], dtype: Any) -> None:
    """Small ones by warps, those of 64 rows and more on 90 by four warps from shared memory."""
    m, n, k = shape
    a, b = (torch.randint(-9, 10, size).to(dtype) for size in ((m, k), (k, n)))
    out = torch.zeros(m, n)
    card.launch(_product, (1,), (out, a, b), {"M": m, "N": n, "K": k, "num_warps": 4})
    law = (a.double() @ b.double()).float()
    assert torch.equal(out, law)  # of small whole numbers: exact


@triton.jit
def _turned_product(out, a, b, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    left, right = tl.load(a + m * K + k[None, :]), tl.load(b + n * K + k[:, None])
    tl.store(out + m * N + n, tl.dot(left, right))


def test_products_with_a_matrix_that_lies_turned(card: Card) -> None:
    a, b = (torch.randint(-9, 10, size).half() for size in ((64, 64), (32, 64)))
    out = torch.zeros(64, 32)
    card.launch(_turned_product, (1,), (out, a, b), {"M": 64, "N": 32, "K": 64, "num_warps": 4})
    assert torch.equal(out, (a.double() @ b.double().T).float())


@pytest.mark.parametrize("columns", [8, 16])
def test_products_of_bytes(card: Card, columns: int) -> None:
    a, b = (torch.randint(-128, 128, size).to(torch.int8) for size in ((16, 64), (64, columns)))
    out = torch.zeros(16, columns, dtype=torch.int32)
    sizes = {"M": 16, "N": columns, "K": 64, "num_warps": 1}
    card.launch(_product, (1,), (out, a, b), sizes)
    assert torch.equal(out, a.int() @ b.int())


@triton.jit
def _summed_up(out, x, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.cumsum(tl.load(x + at), axis=0))


def test_sums_of_all_before(card: Card) -> None:
    x, out = torch.randint(0, 1000, (256,)).double(), torch.zeros(256, dtype=torch.float64)
    card.launch(_summed_up, (1,), (out, x), {"BLOCK": 256, "num_warps": 2})
    assert torch.equal(out, x.cumsum(0))


@triton.jit
def _ragged(out, x, lengths, BLOCK: tl.constexpr):
    """Programs of different lengths; erf takes different ways by the size of a number."""
    row, at, total = tl.program_id(0), tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.float32)
    length = tl.load(lengths + row)
    for first in range(0, length, BLOCK):
        inside = first + at < length
        total += tl.where(inside, tl.erf(tl.load(x + first + at, mask=inside, other=0.0)), 0.0)
    tl.store(out + row, tl.sum(total, axis=0))


def test_programs_and_threads_that_part(card: Card) -> None:
    x, lengths = torch.linspace(-4, 4, 500), [0, 1, 33, 500, 64]
    out = torch.zeros(len(lengths))
    args = out, x, torch.tensor(lengths)
    card.launch(_ragged, (len(lengths),), args, {"BLOCK": 32, "num_warps": 1})
    law = [math.fsum(map(math.erf, x[:length].tolist())) for length in lengths]
    # Each erf is good to two units of 2**-24, each of a few hundred sums to half of one.
    assert np.abs(out.numpy() - law).max() <= 500 * 4 * 2.0**-24


@triton.jit
def _shifted(out, x, by, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at + by))


def test_a_read_beyond_a_tensor_is_found(card: Card) -> None:
    x, out, named = torch.arange(72.0), torch.zeros(64), {"BLOCK": 64, "num_warps": 1}
    card.launch(_shifted, (1,), (out, x, 8), named)
    assert torch.equal(out, x[8:])
    with pytest.raises(Fault, match=r"a read of bytes \d+ to 292 of a tensor of 288 bytes"):
        card.launch(_shifted, (1,), (out, x, 9), named)
    with pytest.raises(Fault, match="a write of bytes"):
        card.launch(_shifted, (1,), (out[:60].clone(), x, 8), named)


@triton.jit
def _halves(out, addresses, BLOCK: tl.constexpr):
    """Each program copies half a block from each of the two addresses that it finds."""
    nth, lanes = tl.program_id(0), tl.arange(0, BLOCK)
    at = tl.load(addresses + 2 * nth + lanes // (BLOCK // 2)) + 4 * lanes
    tl.store(out + nth * BLOCK + lanes, tl.load(at.to(tl.pointer_type(tl.float32))))


def test_programs_find_tensors_by_addresses_each_of_them_one(card: Card) -> None:
    tensors = [card.know(torch.rand(32)) for _ in range(2)]
    first, second = (tensor.data_ptr() for tensor in tensors)
    out, named = torch.zeros(2, 32), {"BLOCK": 32, "num_warps": 1}
    card.launch(_halves, (2,), (out, torch.tensor([second, second, first, first])), named)
    assert torch.equal(out, torch.stack(tensors[::-1]))
    with pytest.raises(Fault, match="a read of bytes"):
        card.launch(_halves, (1,), (out, torch.tensor([first, second])), named)


# -- programs as a compiler should not write them ------------------------------------------------

COPIED = """
.visible .entry copied(.param .u64 source, .param .u64 target)
{
    .reg .b32 %r<4>; .reg .b64 %rd<5>;
    mov.u32 %r1, %tid.x;
    shl.b32 %r2, %r1, 2;
    ld.param.b64 %rd1, [source];
    ld.param.b64 %rd2, [target];
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd4, %rd1, %rd3;
    cp.async.ca.shared.global [ %r2 + 0 ], [ %rd4 + OFFSET ], 0x4;
    cp.async.commit_group;
    WAIT
    ld.shared.b32 %r3, [%r2];
    add.s64 %rd4, %rd2, %rd3;
    st.global.b32 [ %rd4 ], { %r3 };
    ret;
}
"""


def copied(wait: str, offset: int = 0) -> Any:
    """What 32 threads copy asynchronously, int32 [32]."""
    source, target = np.arange(32, dtype=np.int32), np.zeros(32, np.int32)
    text = COPIED.replace("WAIT", wait).replace("OFFSET", str(offset))
    program, memory = parse(text), DeviceMemory()
    values = {}
    for name, array in zip(program.parameters, (source, target), strict=True):
        memory.add(array.ctypes.data, array.nbytes)
        values[name] = np.array([array.ctypes.data], np.uint64)
    translate(program).run(Launch(memory, values, (1, 1, 1), 32, 128))
    return target


def test_copies_arrive_when_they_are_waited_for() -> None:
    assert copied("cp.async.wait_group 0;").tolist() == list(range(32))
    assert (copied("") == -1).all()  # shared memory that nobody wrote
    assert (copied("cp.async.wait_group 1;") == -1).all()


def test_a_misaligned_read_is_found() -> None:
    with pytest.raises(Fault, match=r"of 4 bytes at an address that is no multiple"):
        copied("", offset=2)


def test_what_is_not_known_is_refused_by_name() -> None:
    with pytest.raises(NotImplementedError, match=r"does not have: atom\.add"):
        copied("atom.add.f32 %r3, [%rd4], %r1;")


# -- counting ------------------------------------------------------------------------------------

LANES = np.arange(32)


@pytest.mark.parametrize(
    ("stride", "width", "asked", "moved"),
    [(4, 4, 128, 128), (32, 4, 128, 1024), (16, 16, 512, 512), (0, 8, 8, 32), (2, 2, 64, 64)],
)
def test_device_memory_moves_in_sectors(stride: int, width: int, asked: int, moved: int) -> None:
    counts = Counts()
    two = np.concatenate([LANES * stride, LANES * stride]).astype(np.uint64) + np.uint64(4096)
    counts.device("read", np.repeat([0, 1], 32), two, width)  # warps ask on their own
    assert (counts.asked["read"], counts.moved["read"]) == (2 * asked, 2 * moved)


@pytest.mark.parametrize(
    ("stride", "width", "rounds", "best"),
    [(4, 4, 1, 1), (8, 4, 2, 1), (128, 4, 32, 1), (0, 4, 1, 1), (16, 16, 4, 4), (128, 16, 32, 4),
     (144, 16, 4, 4), (8, 8, 2, 2), (2, 2, 1, 1)],
)  # fmt: skip
def test_shared_memory_takes_as_many_rounds_as_its_busiest_bank(
    stride: int, width: int, rounds: int, best: int
) -> None:
    counts = Counts()
    counts.shared("read", LANES, (LANES * stride).astype(np.uint32), width)
    assert (counts.rounds["read"], counts.best["read"]) == (rounds, best)


# -- assembly ------------------------------------------------------------------------------------


@triton.jit
def _decode_bytes(out, raw, KIND: tl.constexpr, INNER: tl.constexpr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    held = operand(tl.load(raw + at), KIND, True, INNER)
    tl.store(out + at, held.to(tl.float32))


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_every_byte_is_decoded_as_the_definition_does(card: Card, kind: str, inner: bool) -> None:
    raw, out = torch.arange(256, dtype=torch.uint8), torch.zeros(256)
    card.launch(_decode_bytes, (1,), (out, raw), {"KIND": kind, "INNER": inner, "num_warps": 1})
    numbers = raw.numpy().view(np.int8 if kind == "int8" else ml_dtypes.float8_e4m3fn)
    law = numbers.astype(np.float32)
    finite = np.isfinite(law) & (law != -128)  # neither is ever stored
    assert np.array_equal(out.numpy()[finite], law[finite])


@triton.jit
def _decode_codes(codes, numbers, raw, step, least, PART: tl.constexpr, KIND: tl.constexpr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    held = tl.load(raw + at)
    tl.store(codes + at, codes_operand(held, PART, KIND, True).to(tl.float32))
    line = decoded_operand(held, tl.load(step + at), tl.load(least + at), PART, KIND, True)
    tl.store(numbers + at, line.to(tl.float32))


@pytest.mark.parametrize(
    ("kind", "part"), [("int4", 0), ("int4", 1), *(("int2", i) for i in range(4))]
)
def test_every_code_is_decoded_as_the_definition_does(card: Card, kind: str, part: int) -> None:
    raw, bits = torch.arange(256, dtype=torch.uint8), 4 if kind == "int4" else 2
    step, least = (torch.randn(256).bfloat16() for _ in range(2))
    codes, numbers = torch.zeros(256), torch.zeros(256)
    args = codes, numbers, raw, step.view(torch.int16), least.view(torch.int16)
    card.launch(_decode_codes, (1,), args, {"PART": part, "KIND": kind, "num_warps": 1})
    law = (raw.numpy().astype(int) >> bits * part & (1 << bits) - 1).astype(np.float64)
    assert np.array_equal(codes.numpy(), law)
    line = law * step.double().numpy() + least.double().numpy()
    assert np.array_equal(numbers.numpy(), line.astype(np.float32).astype(ml_dtypes.bfloat16))


@triton.jit
def _decode_units(low, high, codes, numbers, raw, step, least, KIND: tl.constexpr):
    """All of 65,536 units; codes and numbers of int4 at 4 places of each, [4, 65536]."""
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    held = tl.load(raw + at)
    if KIND == "int4":
        first = pairs_in_words(tl.load(step + at), True)
        second = pairs_in_words(tl.load(least + at), True)
        line = unit_decoded(held, first, second, KIND, True)
        for part in tl.static_range(4):
            code = unit_operand(held, 4 * part, KIND, True)
            tl.store(codes + part * 65536 + at, code.to(tl.float32))
            tl.store(numbers + part * 65536 + at, line[part].to(tl.float32))
    else:
        both = unit_bytes(held, KIND, True)
        tl.store(low + at, both[0].to(tl.float32))
        tl.store(high + at, both[1].to(tl.float32))


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_every_unit_of_16_bits_is_decoded_as_the_definition_does(card: Card, kind: str) -> None:
    raw = torch.arange(65536).to(torch.int16)
    step, least = (torch.randn(65536).bfloat16() for _ in range(2))
    low, high, codes, numbers = (torch.zeros(n * 65536) for n in (1, 1, 4, 4))
    args = low, high, codes, numbers, raw, step.view(torch.int16), least.view(torch.int16)
    card.launch(_decode_units, (64,), args, {"KIND": kind, "num_warps": 4})
    units = raw.numpy().view(np.uint16)
    if kind == "int4":
        law = np.stack([units >> 4 * part & 15 for part in range(4)]).astype(np.float64)
        assert np.array_equal(codes.numpy().reshape(4, -1), law + 128)
        line = law * step.double().numpy() + least.double().numpy()
        rounded = line.astype(np.float32).astype(ml_dtypes.bfloat16)
        assert np.array_equal(numbers.numpy().reshape(4, -1), rounded)
        return
    for got, part in ((low, units & 255), (high, units >> 8)):
        held = part.astype(np.uint8).view(np.int8 if kind == "int8" else ml_dtypes.float8_e4m3fn)
        law = held.astype(np.float32)
        finite = np.isfinite(law) & (law != -128)  # neither is ever stored
        assert np.array_equal(got.numpy()[finite], law[finite])


@triton.jit
def _scale_pairs(out, x, y, steps, ODD: tl.constexpr):
    at = tl.arange(0, 256)
    high, low = split_pairs(tl.load(x + at), tl.load(y + at), True)
    both = scaled_pairs(high, low, tl.load(steps + at), ODD, True)
    tl.store(out + at, both[0].to(tl.float32))
    tl.store(out + 256 + at, both[1].to(tl.float32))


@pytest.mark.parametrize("odd", [0, 1])
def test_queries_times_steps_are_rounded_as_the_product_is(card: Card, odd: int) -> None:
    """To within what ``scaled_pairs`` says: 2**-9 of a unit in the last place, or half of it."""
    x, y, out = torch.randn(256), torch.randn(256), torch.zeros(512)
    steps = torch.rand(256, 4).bfloat16()
    args = out, x, y, steps.view(torch.int16).view(torch.int64).reshape(-1)
    card.launch(_scale_pairs, (1,), args, {"ODD": odd, "num_warps": 1})
    law = np.concatenate([x.double() * steps[:, odd], y.double() * steps[:, odd + 2]])
    error = np.abs(out.numpy() - law)
    ulp = 2.0 ** (np.floor(np.log2(np.abs(law))) - 7)
    assert (error <= (0.5 + 2**-8) * ulp).all()
