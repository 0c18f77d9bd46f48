"""Tiles of the attention kernels: how many rows and keys a program multiplies at a time.

None was tried on a card. They were chosen by what the compiler makes of them: registers, shared
memory, instructions for a key (``tests/cuda_compile.py``); ``bench/gpu_tune.py`` tries others.
"""

from dataclasses import dataclass, replace

from quire.backends.cuda.columns import parts_of
from quire.backends.cuda.stored import power_of_two
from quire.formats import GROUP
from quire.pages import PageShape

__all__ = [
    "HOPPER",
    "ROOMY",
    "SPLIT",
    "Tiles",
    "decode_tiles",
    "in_columns",
    "prefill_tiles",
]

SPLIT = 256  # places; a multiple of every block of keys
ROOMY = 160 << 10  # bytes of shared memory of a program: cards for data centres have that or more
HOPPER = 227 << 10  # and those since 9.0 this


@dataclass(frozen=True)
class Tiles:
    """Rows (or columns) of queries and keys of a block; warps; blocks in flight."""

    rows: int
    keys: int
    warps: int
    stages: int


def in_columns(shape: PageShape, share: int) -> bool:
    """True where decode has the ``share`` heads of a KV head for columns: see ``columns.py``.

    Of packed keys every other number is one operand, which products want 16 of.
    """
    key, value = shape.key_format, shape.value_format
    whole = shape.value_dim % parts_of(value.name) == 0
    fours = key.kind != "page" or (shape.key_dim % 4 == 0 and shape.key_dim > 16)
    return share <= 16 and whole and fours and "fp32" not in (key.name, value.name)


def decode_tiles(shape: PageShape, share: int) -> Tiles:
    """For the ``share`` heads of one token: few rows; bytes on their way are what counts.

    In columns, of which products have eight: a warp is a program, so that warps wait for nothing
    of each other's, and what each of them does for all dims at once, it does once a block.
    """
    wide = max(shape.key_dim, shape.value_dim) > 128
    if in_columns(shape, share):
        plain = 16 in (shape.key_format.bits, shape.value_format.bits)
        tiles = Tiles(8, 32, 2 if wide or share > 8 else 1, 3 if plain else 4)
    elif "fp32" in (shape.key_format.name, shape.value_format.name):
        tiles = Tiles(16, 32, 8, 1)
    else:
        tiles = Tiles(16, 32, 4, 2) if wide else Tiles(16, 32, 2, 4)
    return replace(tiles, rows=max(tiles.rows, power_of_two(share)))


def prefill_tiles(shape: PageShape, share: int, shared: int, *, many: bool = False) -> Tiles:
    """For several tokens' heads: as many rows as registers and ``shared`` bytes of memory hold.

    many    True where rows are enough for large tiles on all processors

    tests/cuda_compile.py checks that against what the compiler takes.
    """
    wide = max(shape.key_dim, shape.value_dim) > 128
    bits = {shape.key_format.bits, shape.value_format.bits}
    if "fp32" in (shape.key_format.name, shape.value_format.name):
        tiles = Tiles(16, 32, 8, 1) if wide else Tiles(32, 32, 8, 1)
    elif many and bits == {16} and shared >= HOPPER and not wide:
        # Four warps multiply 64 rows at a time, with keys and values from shared memory. Beside 64
        # rows and keys this takes a third of the instructions off, and a fifth of the rounds of
        # shared memory; 128 keys with 64 rows, or decoded ones, take more rounds.
        tiles = Tiles(128, 128, 8, 2)
    else:
        # Products take 16-bit numbers from where copies put them, which is a block more in memory.
        narrow = Tiles(64, 64, 4, 3 if shared >= ROOMY and 16 not in bits else 2)
        tiles = Tiles(64, 32, 8, 2) if wide else narrow
    if shape.key_format.kind == "page":
        # Keys that share minima and steps; queries stay at hand in float32, to be scaled.
        tiles = replace(tiles, keys=GROUP, rows=32 if wide else tiles.rows)
    return replace(tiles, rows=max(tiles.rows, power_of_two(share)))
