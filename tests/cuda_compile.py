"""Compiles the cuda backend's paged kernels for cards that are not there; needs no GPU.

Run as ``python tests/cuda_compile.py 80 90``: for each compute capability, formats and head sizes,
one line with the registers, shared memory and local memory (spilled registers) that a program
takes; then the same of what lies between products. Exits with 1 where a program takes more shared
memory than a card of any kind has, or where a row's sum is taken in another order because a kernel
does more than another.
"""

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quire.backends.cuda import attending, attention, fused, products, rows, sealing, stored
from quire.formats import GROUP
from quire.pages import PageShape, page_format

MOST_SHARED = (
    101_376  # bytes: cards of compute capability 8.6 and 8.9, the least of those since 8.0
)
KV_HEADS, SHARE = 8, 4
NAMES = (b"REG", b"STACK")
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


def launches(shape: PageShape) -> Iterator[tuple[str, Any, dict[str, Any], attending.Tiles]]:
    """Name, kernel, what it is compiled for and tiles, of every launch that there is."""
    padded, opened = max(16, stored.power_of_two(shape.key_dim)), shape.open_shape
    sizes = {
        "SHARE": SHARE, "DK": shape.key_dim, "DV": shape.value_dim, "DKP": padded, "DVP": padded,
        "PAGE": shape.page_size, "GROUP": GROUP, "KEY": shape.key_format.name,
        "VALUE": shape.value_format.name, "PACKED": shape.by_page,
        "OPEN_KEY": opened.key_format.name, "OPEN_VALUE": opened.value_format.name,
        "HARDWARE": True, "G": KV_HEADS,
    }  # fmt: skip
    for name, kernel, tiles, split in (
        ("decode", attention.decode_kernel, attending.decode_tiles(shape, SHARE), None),
        ("decode, exact", attention.decode_kernel, attending.prefill_tiles(shape, SHARE), None),
        ("prefill", attention.prefill_kernel, attending.prefill_tiles(shape, SHARE), 0),
        ("prefill, exact", attention.prefill_kernel, attending.prefill_tiles(shape, SHARE), 256),
    ):
        given = {**sizes, "BLOCK_M": tiles.rows, "BLOCK_N": tiles.keys}
        more = {"HEADS": KV_HEADS} if split is None else {"SPLIT": split, "OUT": "bf16"}
        yield name, kernel, {**given, **more}, tiles
    yield from _seals(shape)


def _seals(shape: PageShape) -> Iterator[tuple[str, Any, dict[str, Any], attending.Tiles]]:
    given, warps = (
        {"G": KV_HEADS, "PAGE": shape.page_size, "GROUP": GROUP},
        attending.Tiles(0, 0, 4, 1),
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
    known = {"num_sequences": "i32", "window": "i32", "SPLIT": "i32", "unit": "fp32"}
    known |= dict.fromkeys(("key_scale", "value_scale"), "*i16")
    known |= dict.fromkeys(("query", "part_mixed", "part_best", "part_total"), "*fp32")
    known |= {"num_pages": "i32", "first": "i32", "packed": "*u8"}
    known |= dict.fromkeys(("opened", "packed_step", "packed_least"), "*i16")
    known |= dict.fromkeys(
        ("key_least", "value_least", "open_key_scale", "open_value_scale"), "*i16"
    )
    known["out"] = POINTERS[given.get("OUT", "fp32")]
    for name in ("key", "value", "open_key", "open_value"):
        known[name] = POINTERS.get(given.get(name.upper(), ""), "*u8")
    signature = {
        name: "constexpr" if name in given else known.get(name, "*i64") for name in kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if kind.startswith("*")
    }
    return signature, aligned


def launches_between() -> Iterator[tuple[str, Any, dict[str, Any], dict[str, str], int]]:
    """Name, kernel, what it is compiled for, its other arguments and warps."""
    bf16, wide = {"KIND": "bf16", "HARDWARE": True}, dict.fromkeys(("x", "weight", "both"), "*fp32")
    floats = dict.fromkeys(("delta", "total", "bias", "norms", "cos", "sin", "factors"), "*fp32")
    floats |= {**wide, "query": "*fp32", "numbers": "*fp32", "eps": "fp32", "first": "i32"}
    scales = {"key_scale": "*i16", "value_scale": "*i16", "slots": "*i64"}
    for n in (2048, 4096, 8192):
        tile = min(fused.CHUNK, n)
        for add, kind in ((True, "bf16"), (False, "fp32")):
            given = {"n": n, "ADD": add, "KIND": kind, "HARDWARE": True, "TILE": tile}
            out = {"out": POINTERS[kind]}
            name = f"norm of {n}, {kind}{', with a sum' if add else ''}"
            yield name, fused.norm_kernel, given, floats | out, fused.warps_of(tile)
    for dim, key, value, rotated in (
        (64, "bf16", "bf16", False), (80, "int8", "fp8", False), (128, "bf16", "bf16", False),
        (128, "fp8", "int8", False), (128, "bf16", "bf16", True), (80, "int8", "bf16", True),
        (256, "fp16", "fp32", True),
    ):  # fmt: skip
        width = stored.power_of_two(dim)
        given = {
            "H": SHARE * KV_HEADS, "G": KV_HEADS, "D": dim, "DP": width, "PAGE": 16, "BIAS": True,
            "NORM": True, "ROTATED": rotated, "KEY": key, "VALUE": value, "HARDWARE": True,
        }  # fmt: skip
        pools = {"key": POINTERS.get(key, "*u8"), "value": POINTERS.get(value, "*u8")}
        name = f"place k={key}{':rotated' if rotated else ''},v={value} x {dim}"
        yield name, fused.place_kernel, given, floats | scales | pools, fused.warps_of(width)
        given = {"n": dim, "ADD": False, "KIND": "fp32", "HARDWARE": True, "TILE": width}
        out, warps = {"out": "*fp32"}, fused.warps_of(width)
        yield f"norm of heads of {dim}", fused.norm_kernel, given, floats | out, warps
    for activation in ("silu", "gelu", "gelu_new", "relu"):
        given = {"n": 8192, "ACTIVATION": activation, **bf16, "BLOCK": 1024}
        yield f"gated {activation}", fused.gated_kernel, given, floats | {"out": "*i16"}, 4
    more = {"rows": "i32", "columns": "i32", "inner": "i32", "out": "*fp32", "bias": "*fp32"}
    for rounded, x in ((True, "*i16"), (False, "*fp32")):
        given = {**bf16, "ROUNDED": rounded, "BIAS": False, **products._TILES}
        name = f"exact product{', rounded before' if rounded else ''}"
        yield name, rows.linear_kernel, given, more | {"x": x, "weight": "*i16"}, 4
    given = {"G": KV_HEADS, "SHARE": SHARE, "DV": 128, "DVP": 128, "PAGE": 16, "ROWS": SHARE}
    known = dict.fromkeys(("part_mixed", "part_best", "part_total"), "*fp32") | {"out": "*i16"}
    known |= {"window": "i32", "splits": "i32", "SPLIT": "i32"}
    given |= {"OUT": "bf16", "HARDWARE": True}
    yield "merge", attention.merge_kernel, given, known, 2


def orders(text: str) -> set[str]:
    """Layouts of what is summed over, as Triton's own language has them."""
    layouts = dict(re.findall(r"(#\w+) = (#ttg\.\w+<.*>)", text))
    summed = re.findall(r'"tt.reduce"\(.*?\}\) : \(tensor<(\w+), (#\w+)>\)', text, re.DOTALL)
    return {f"{size} {layouts[name]}" for size, name in summed if size.endswith("f32")}


def taken(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory a thread, as the disassembler says."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, check=True)
    return tuple(max(map(int, re.findall(rb"%s:(\d+)" % name, said.stdout))) for name in NAMES)


def build(
    what: str, kernel: Any, given: dict[str, Any], known: tuple[Any, Any], options: dict[str, Any]
) -> tuple[bool, Any]:
    """Compile for one card, print what it takes; whether it fits, and what came out."""
    consts = {(kernel.arg_names.index(n),): v for n, v in given.items()}
    capability, options = options.pop("capability"), {**options, "enable_fp_fusion": False}
    target = GPUTarget("cuda", capability, 32)
    source = ASTSource(kernel, known[0], consts, known[1])
    built = triton.compile(source, target=target, options=options)
    shared, (registers, local) = built.metadata.shared, taken(built.asm["cubin"])
    marked = "" if shared <= MOST_SHARED else " !"
    numbers = f"{registers} registers, {shared:,} B shared, {local:,} B local{marked}"
    print(f"{capability} {what}: {numbers}", flush=True)
    return shared <= MOST_SHARED, built


def main(capabilities: list[int]) -> bool:
    """Whether all fit, and sums of equal rows are taken alike."""
    fits = True
    for key, value, dim in CASES:
        shape = PageShape(GROUP, KV_HEADS, dim, dim, page_format(key), page_format(value))
        for name, kernel, given, tiles in launches(shape):
            known = types(kernel, given)
            for capability in capabilities:
                options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
                what = f"k={key},v={value} x {dim} {name}"
                options["capability"] = capability
                fits &= build(what, kernel, given, known, options)[0]
    return between(capabilities) and fits


def between(capabilities: list[int]) -> bool:
    """The kernels between products, as :func:`main`."""
    fits, sums = True, defaultdict(set)
    for name, kernel, given, others, warps in launches_between():
        names = {n: "constexpr" if n in given else others.get(n, "*i64") for n in kernel.arg_names}
        pointers = [i for i, kind in enumerate(names.values()) if kind.startswith("*")]
        known = names, {(i,): [["tt.divisibility", 16]] for i in pointers}
        for capability in capabilities:
            options = {"num_warps": warps, "capability": capability}
            good, built = build(name, kernel, given, known, options)
            fits &= good
            if kernel in (fused.norm_kernel, fused.place_kernel):
                width = given.get("n", given.get("D"))
                found = {o for o in orders(built.asm["ttgir"]) if not o.startswith("1x")}
                sums[capability, width] |= found
    for (capability, width), ways in sums.items():
        if len(ways) != 1:
            print(f"{capability} sums of {width} numbers: {len(ways)} ways: {sorted(ways)} !")
            fits = False
    return fits


if __name__ == "__main__":
    sys.exit(0 if main([int(capability) for capability in sys.argv[1:]]) else 1)
