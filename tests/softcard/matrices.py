"""Instructions of a whole warp, or of four: shuffles, and products with their operands.

Which thread holds what of a matrix is in the PTX ISA, 9.7.15 (``mma``, ``ldmatrix``) and 9.7.16
(``wgmma`` and its descriptors of matrices in shared memory). Products are summed up in float64 and
rounded once; in which order a card does it is its own affair.
"""

import re
from typing import Any

import ml_dtypes
import numpy as np

from softcard.memory import Fault, Shared

__all__ = ["load_matrices", "product", "reduced", "shuffled", "store_matrices", "wide_product"]

Array = Any
_LANE = np.arange(32)
_ROW, _PAIR = _LANE // 4, _LANE % 4 * 2
_NUMBERS = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}


def _warps(x: Array, lanes: int) -> Array:
    """Registers as [warps, 32]."""
    return np.broadcast_to(x, (lanes,)).reshape(-1, 32)


def shuffled(how: str, x: Array, by: Array, lanes: int) -> Array:
    """``shfl.sync`` of whole warps: lane i reads lane i ^ by, i - by, i + by, or lane ``by``.

    One that would read a lane that is not there keeps its own.
    """
    held, by = _warps(x, lanes), _warps(by, lanes).astype(np.int64)
    lane = np.broadcast_to(_LANE, by.shape)
    source = {"bfly": lane ^ by, "up": lane - by, "down": lane + by, "idx": by & 31}[how]
    source = np.where((source < 0) | (source > 31), lane, source)
    return np.take_along_axis(held, source, axis=1).reshape(-1)


def reduced(how: str, kind: str, x: Array, lanes: int) -> Array:
    """``redux.sync`` of whole warps."""
    function = {"max": np.max, "min": np.min, "add": np.sum, "or": np.bitwise_or.reduce,
                "and": np.bitwise_and.reduce}[how]  # fmt: skip
    held = np.ascontiguousarray(_warps(x, lanes))
    numbers = held.view(np.int32 if kind == "s32" else np.uint32)
    found = function(numbers, axis=1).astype(numbers.dtype)
    return np.repeat(found, 32).view(np.uint32)


def _rows_of_matrices(addresses: Array, count: int, lanes: int) -> Array:
    """Addresses of the rows of ``count`` matrices 8 x 8, [warps, count, 8]."""
    return _warps(addresses, lanes)[:, : 8 * count].reshape(-1, count, 8)


def load_matrices(
    shared: Shared, programs: Array, addresses: Array, count: int, turned: bool
) -> list[Array]:
    """``ldmatrix``: for each of ``count`` matrices of 16-bit numbers, a pair for every lane."""
    lanes = len(programs)
    at = _rows_of_matrices(addresses, count, lanes)
    whose = np.broadcast_to(programs.reshape(-1, 32)[:, :1, None], at.shape)
    held = shared.load(whose.reshape(-1), at.reshape(-1), 16).view(np.uint16)
    held = held.reshape(-1, count, 8, 8)
    if turned:
        held = held.transpose(0, 1, 3, 2)
    pairs = np.ascontiguousarray(held).view(np.uint32).reshape(-1, count, 32)
    return [np.ascontiguousarray(pairs[:, nth]).reshape(-1) for nth in range(count)]


def store_matrices(
    shared: Shared, programs: Array, addresses: Array, pairs: list[Array], turned: bool
) -> None:
    """``stmatrix``: the reverse of :func:`load_matrices`."""
    lanes, count = len(programs), len(pairs)
    at = _rows_of_matrices(addresses, count, lanes)
    whose = np.broadcast_to(programs.reshape(-1, 32)[:, :1, None], at.shape)
    held = np.stack([_warps(each, lanes) for each in pairs], axis=1)
    numbers = np.ascontiguousarray(held).view(np.uint16).reshape(-1, count, 8, 8)
    if turned:
        numbers = numbers.transpose(0, 1, 3, 2)
    data = np.ascontiguousarray(numbers).view(np.uint8).reshape(-1, 16)
    shared.store(whose.reshape(-1), at.reshape(-1), data)


def _narrow(x: Array, lanes: int, kind: str) -> Array:
    """Registers of two numbers each as float64 [warps, 32, 2]."""
    pairs = np.ascontiguousarray(_warps(x, lanes)).view(_NUMBERS[kind]).reshape(-1, 32, 2)
    return pairs.astype(np.float64)


def _left(parts: list[Array], lanes: int, kind: str) -> Array:
    """Fragments of the left operand, [warps, 16, 16]."""
    out = np.empty((lanes // 32, 16, 16))
    for nth, part in enumerate(parts):
        numbers = _narrow(part, lanes, kind)
        for one in range(2):
            out[:, _ROW + 8 * (nth % 2), _PAIR + one + 8 * (nth // 2)] = numbers[:, :, one]
    return out


def _right(parts: list[Array], lanes: int, kind: str) -> Array:
    """Fragments of the right operand, [warps, 16, 8]."""
    out = np.empty((lanes // 32, 16, 8))
    for nth, part in enumerate(parts):
        numbers = _narrow(part, lanes, kind)
        for one in range(2):
            out[:, _PAIR + one + 8 * nth, _ROW] = numbers[:, :, one]
    return out


def _sums(parts: list[Array], lanes: int) -> Array:
    """Accumulators, float32 [warps, 16, 2 * len(parts)]: pairs of two rows, 8 columns each."""
    out = np.empty((lanes // 32, 16, 2 * len(parts)), np.float32)
    for nth, part in enumerate(parts):
        held = np.ascontiguousarray(_warps(part, lanes)).view(np.float32)
        out[:, _ROW + 8 * (nth // 2 % 2), 8 * (nth // 4) + _PAIR + nth % 2] = held
    return out


def _parts(sums: Array) -> list[Array]:
    """What :func:`_sums` was given."""
    out = []
    for nth in range(sums.shape[2] // 2):
        held = sums[:, _ROW + 8 * (nth // 2 % 2), 8 * (nth // 4) + _PAIR + nth % 2]
        out.append(np.ascontiguousarray(held).view(np.uint32).reshape(-1))
    return out


def _added(left: Array, right: Array, sums: Array) -> Array:
    with np.errstate(all="ignore"):  # infinities and NaN are numbers here
        return (np.matmul(left, right) + sums.astype(np.float64)).astype(np.float32)


def _bytes(parts: list[Array], lanes: int) -> Array:
    """Fragments of int8 as int64 [warps, rows, 32]: 16 rows from four registers, 8 from two."""
    across = len(parts) // 2
    out = np.empty((lanes // 32, 8 * across, 32), np.int64)
    for nth, part in enumerate(parts):
        held = np.ascontiguousarray(_warps(part, lanes)).view(np.int8).reshape(-1, 32, 4)
        for one in range(4):
            columns = _PAIR * 2 + one + 16 * (nth // across)
            out[:, _ROW + 8 * (nth % across), columns] = held[:, :, one]
    return out


def _product_of_bytes(
    left: list[Array], right: list[Array], sums: list[Array], lanes: int
) -> list[Array]:
    """``mma.sync.m16n8k32`` of int8, which stops at the largest int32."""
    held = _sums(sums, lanes).view(np.int32)
    total = _bytes(left, lanes) @ _bytes(right, lanes).transpose(0, 2, 1) + held
    limits = np.iinfo(np.int32)
    return _parts(np.clip(total, limits.min, limits.max).astype(np.int32).view(np.float32))


def product(
    name: str, left: list[Array], right: list[Array], sums: list[Array], lanes: int
) -> list[Array]:
    """``mma.sync``: m16n8k16 with float32 sums, or m16n8k32 of int8."""
    if name == "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32":
        return _product_of_bytes(left, right, sums, lanes)
    found = re.fullmatch(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(\w+)\.\1\.f32", name)
    if found is None:
        raise NotImplementedError(name)
    a, b = _left(left, lanes, found[1]), _right(right, lanes, found[1])
    return _parts(_added(a, b, _sums(sums, lanes)))


def wide_product(
    name: str,
    left: list[Array] | Array,
    right: Array,
    sums: list[Array],
    flags: tuple[Array, ...],
    shared: Shared,
    programs: Array,
) -> list[Array]:
    """``wgmma.mma_async.m64nNk16`` of groups of four warps, at once.

    left    four registers, or a descriptor; right a descriptor
    flags   whether sums are added to, signs, and which operands lie turned in shared memory
    """
    found = re.match(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(\w+)\.\2$", name)
    if found is None:
        raise NotImplementedError(name)
    columns, kind, lanes = int(found[1]), found[2], len(programs)
    adds, *rest = flags
    signs, turned = rest[:2], rest[2:]
    if any(int(sign[0]) != 1 for sign in signs):
        raise NotImplementedError(f"{name} with a sign")
    groups = programs.reshape(-1, 128)[:, 0]
    if isinstance(left, list):
        a = _left(left, lanes, kind).reshape(-1, 64, 16)
    else:
        a = _described(shared, groups, left, lanes, 64, kind, bool(int(turned[0][0])))
    b = _described(shared, groups, right, lanes, columns, kind, bool(int(turned[-1][0])))
    held = _sums(sums, lanes).reshape(-1, 64, columns)
    held = np.where(np.broadcast_to(adds, (lanes,)).reshape(-1, 128)[:, :1, None], held, 0)
    return _parts(_added(a, b.transpose(0, 2, 1), held).reshape(-1, 16, columns))


def _described(
    shared: Shared, groups: Array, descriptor: Array, lanes: int, rows: int, kind: str, turned: bool
) -> Array:
    """A matrix [rows, 16] in shared memory, of each group of warps, as float64.

    A descriptor has the address, a leading and a stride offset, all in units of 16 bytes, and how
    16-byte pieces are swizzled: over 128, 64 or 32 bytes, or not. ``turned``: what lies side by
    side belongs to one of the 16, not to one of the rows.
    """
    words = np.broadcast_to(descriptor, (lanes,)).reshape(-1, 128)[:, 0]

    def field(low: int, bits: int) -> Array:
        return ((words >> np.uint64(low)) & np.uint64((1 << bits) - 1)).astype(np.int64)[
            :, None, None
        ]

    start, leading, stride = field(0, 14) * 16, field(16, 14) * 16, field(32, 14) * 16
    modes = set(field(62, 2).reshape(-1).tolist())
    if len(modes) > 1 or field(49, 3).any():
        raise NotImplementedError("operands of one product that lie differently")
    span = {0: 16, 1: 128, 2: 64, 3: 32}[modes.pop()]
    row, k = np.arange(rows)[None, :, None], np.arange(16)[None, None, :]
    if turned:  # pieces of ``span`` bytes along rows, eight of k make a tile
        each = span // 2
        at = start + row // each * leading + k // 8 * stride + k % 8 * span + row % each * 2
    elif span == 16:
        at = start + row // 8 * stride + k // 8 * leading + row % 8 * 16 + k % 8 * 2
    else:
        at = start + row // 8 * stride + row % 8 * span + k * 2
    at ^= (at >> 7) % (span // 16) << 4
    if int(at.max()) + 2 > shared.data.shape[1]:
        raise Fault(f"shared memory of {shared.data.shape[1]} bytes at {int(at.max())} + 2")
    whose = np.broadcast_to(groups[:, None, None], at.shape).reshape(-1)
    held = shared.load(whose, at.reshape(-1), 2).view(_NUMBERS[kind])
    return held.reshape(at.shape).astype(np.float64)
