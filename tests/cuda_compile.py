"""Compiles the cuda backend's paged kernels for cards that are not there; needs no GPU.

Run as ``python tests/cuda_compile.py 80 90 [--only int4,128]``: for each compute capability,
formats and head sizes, one line with what a program takes (registers, shared and local memory, how
many a processor holds) and of the loop over keys what a number of K or V costs: instructions of
a thread, products, reads of device memory and how wide they are, bytes that are on their way while
a block is computed, divisions, conversions. Exits with 1 where a program takes more shared memory
than a card of any kind has.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cuda_listing import read
from quire.backends.cuda import attention, gathering, sealing, stored
from quire.backends.cuda.device import LEAST_SHARED
from quire.backends.cuda.tiles import (
    HOPPER,
    ROOMY,
    Tiles,
    decode_tiles,
    in_columns,
    prefill_tiles,
)
from quire.formats import GROUP
from quire.pages import PageShape, page_format

KV_HEADS, SHARE = 8, 4
ROOM, SINCE = "data centres", "since 9.0"  # in names of launches: for which cards alone
POINTERS = {"fp32": "*fp32", "fp16": "*fp16", "bf16": "*i16"}  # else bytes
CASES = (
    ("bf16", "bf16", 64),
    ("bf16", "bf16", 80),
    ("bf16", "bf16", 128),
    ("bf16", "bf16", 256),
    ("fp16", "fp16", 96),
    ("int8", "int8", 128),
    ("int8", "fp8", 128),
    ("fp8", "fp8", 256),
    ("fp32", "fp32", 128),
    ("fp32", "fp32", 256),
    ("int4", "int4", 64),
    ("int4", "int4", 80),
    ("int4", "int4", 128),
    ("int4", "int2", 256),
    ("int2", "int2", 128),
    ("int8", "int4", 128),
)


def launches(shape: PageShape) -> Iterator[tuple[str, Any, dict[str, Any], Tiles]]:
    """Name, kernel, what it is compiled for and tiles, of every launch that there is."""
    padded, opened = max(16, stored.power_of_two(shape.key_dim)), shape.open_shape
    sizes = {
        "SHARE": SHARE, "DK": shape.key_dim, "DV": shape.value_dim, "DKP": padded, "DVP": padded,
        "PAGE": shape.page_size, "GROUP": GROUP, "KEY": shape.key_format.name,
        "VALUE": shape.value_format.name, "PACKED": shape.by_page,
        "OPEN_KEY": opened.key_format.name, "OPEN_VALUE": opened.value_format.name,
        "HARDWARE": True, "G": KV_HEADS,
    }  # fmt: skip
    decode, prefill = attention.decode_kernel, attention.prefill_kernel
    big = prefill_tiles(shape, SHARE, LEAST_SHARED)
    found = [
        ("decode", decode, decode_tiles(shape, SHARE), None),
        ("decode, exact", decode, big, None),
        ("prefill, exact", prefill, big, 256),
        ("prefill", prefill, big, 0),
        (f"prefill, {ROOM}", prefill, prefill_tiles(shape, SHARE, ROOMY), 0),
    ]
    many = prefill_tiles(shape, SHARE, HOPPER, many=True)
    if many.rows > found[-1][2].rows:
        found.append((f"prefill of many rows, {SINCE}", prefill, many, 0))
    for name, kernel, tiles, split in found:
        given = {**sizes, "BLOCK_M": tiles.rows, "BLOCK_N": tiles.keys}
        more = (
            {"HEADS": KV_HEADS, "COLUMNS": name == "decode" and in_columns(shape, SHARE)}
            if split is None
            else {"SPLIT": split, "PARTS": False, "OUT": "bf16"}
        )
        yield name, kernel, {**given, **more}, tiles
    yield from _seals(shape)
    moved = {"PUT": True, "WIDE": True, "BLOCK": 4096}
    yield "pages put back", gathering.gather_kernel, moved, Tiles(0, 0, 4, 1)


def _seals(shape: PageShape) -> Iterator[tuple[str, Any, dict[str, Any], Tiles]]:
    given, warps = (
        {"G": KV_HEADS, "PAGE": shape.page_size, "GROUP": GROUP},
        Tiles(0, 0, 4, 1),
    )
    for side, format, dim in (
        ("keys", shape.key_format, shape.key_dim),
        ("values", shape.value_format, shape.value_dim),
    ):
        if format.kind != "page":
            continue
        given = {**given, "D": dim, "BITS": format.bits}
        if side == "keys":
            sizes = {"DP": stored.power_of_two(dim)}
            yield "seal keys", sealing.seal_keys_kernel, {**given, **sizes}, warps
        else:
            sizes = {"GP": stored.power_of_two(-(-dim // GROUP)), "ROWS": 16}
            yield "seal values", sealing.seal_values_kernel, {**given, **sizes}, warps


def types(kernel: Any, given: dict[str, Any]) -> tuple[dict[str, str], dict[Any, Any]]:
    """Signature and alignments of a kernel's arguments, as a launch would find them."""
    known = {"num_chunks": "i32", "window": "i32", "SPLIT": "i32", "unit": "fp32"}
    known["length"] = "i32"
    known |= dict.fromkeys(("key_scale", "value_scale"), "*i16")
    known |= dict.fromkeys(("query", "part_mixed", "part_best", "part_total"), "*fp32")
    known["out"] = "*i16"
    known |= {"num_pages": "i32", "first": "i32", "packed": "*u8", "rows": "*i32", "words": "i32"}
    known |= dict.fromkeys(("opened", "packed_step", "packed_least"), "*i16")
    known |= dict.fromkeys(
        ("key_least", "value_least", "open_key_scale", "open_value_scale"), "*i16"
    )
    for name in ("key", "value", "open_key", "open_value"):
        known[name] = POINTERS.get(given.get(name.upper(), ""), "*u8")
    signature = {
        name: "constexpr" if name in given else known.get(name, "*i64") for name in kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if kind.startswith("*") and kind != "*i64"
    }
    return signature, aligned


def ahead(code: str) -> int:
    """Bytes that copies of the longest pipeline in ``code`` (TTGIR) may have on their way."""
    sizes = {"i8": 1, "i16": 2, "f16": 2, "bf16": 2, "i32": 4, "f32": 4, "i64": 8}
    pools: dict[str, int] = {}
    for loop in re.split(r"scf\.for", code):
        found = re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x([\dx]+)x(\w+),", loop)
        total = 0
        for slots, shape, kind in found:
            count = int(slots)
            for extent in shape.split("x"):
                count *= int(extent)
            total += count * sizes.get(kind, 4)
        pools[loop[:40]] = total
    return max(pools.values(), default=0)


def described(built: Any, tiles: Tiles, capability: int, numbers: int) -> str:
    """A line about a kernel whose loop takes ``numbers`` of K and V a turn; 0 for one without."""
    shared = built.metadata.shared
    code = read(built.asm["cubin"], tiles.warps, shared, capability)
    line = (
        f"{code.registers} registers, {shared:,} B shared, {code.local:,} B local, "
        f"{code.programs} a processor"
    )
    if not numbers or not code.loop:
        return line
    each = code.loop.total() * 32 * tiles.warps / numbers
    products = ", ".join(f"{n} {name}" for name, n in code.loop.items() if "MMA" in name)
    divided, converted = code.of("MUFU.RCP"), code.of("I2F.", "F2I.", "F2F.")
    return (
        f"{line}; {code.loop.total()} instructions a turn, {each:.2f} a number; {products}; "
        f"{code.loads()}; {ahead(built.asm['ttgir']):,} B in the pipeline; "
        f"{divided} divisions, {converted} conversions, {code.of('LDL', 'STL')} spills"
    )


def compiled(kernel: Any, given: dict[str, Any], tiles: Tiles, capability: int) -> Any:
    """The kernel as a launch with these tiles would build it."""
    signature, aligned = types(kernel, given)
    consts = {(kernel.arg_names.index(n),): v for n, v in given.items()}
    options = {
        "num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": False,
    }  # fmt: skip
    source = ASTSource(kernel, signature, consts, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main(capabilities: list[int], only: str) -> bool:
    """Compile all that ``only`` (formats and head size, or nothing) does not leave out."""
    fits, wanted = True, set(filter(None, only.split(",")))
    for key, value, dim in CASES:
        if not wanted <= {key, value, str(dim)}:
            continue
        shape = PageShape(GROUP, KV_HEADS, dim, dim, page_format(key), page_format(value))
        for name, kernel, given, tiles in launches(shape):
            numbers = 2 * dim * tiles.keys
            for capability in capabilities:
                if name.endswith(SINCE) and capability < 90:
                    continue
                built = compiled(kernel, given, tiles, capability)
                most = ROOMY if name.endswith(ROOM) else LEAST_SHARED
                most = HOPPER if capability >= 90 else most
                over = built.metadata.shared > most
                fits &= not over
                what = f"{capability} k={key},v={value} x {dim} {name}"
                line = described(built, tiles, capability, numbers)
                print(f"{what}: {line}{' TOO MUCH SHARED' if over else ''}", flush=True)
    return fits


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("capabilities", type=int, nargs="+")
    parser.add_argument("--only", default="", help="formats and head size, with commas between")
    options = parser.parse_args()
    sys.exit(0 if main(options.capabilities, options.only) else 1)
