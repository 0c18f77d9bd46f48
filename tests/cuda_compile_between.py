"""Compiles what the cuda backend launches between products, for cards that are not there.

Run as ``python tests/cuda_compile_between.py 80 90``: one line for each kernel with what a program
takes (see ``cuda_compile.py``). Exits with 1 where one takes more shared memory than a card of any
kind has, or where a row's sum is taken in another order because a kernel does more than another.
"""

import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cuda_compile import KV_HEADS, POINTERS, SHARE, described
from quire.backends.cuda import attention, fused, products, rows, stored
from quire.backends.cuda.device import LEAST_SHARED
from quire.backends.cuda.tiles import Tiles


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
    for rounded, x, parts in ((True, "*i16", False), (True, "*i16", True), (False, "*fp32", True)):
        given = {**bf16, "ROUNDED": rounded, "BIAS": False, "PARTS": parts, **products._TILES}
        name = f"exact product{', rounded before' if rounded else ''}{', in spans' * parts}"
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


def build(
    kernel: Any, given: dict[str, Any], others: dict[str, str], warps: int, capability: int
) -> Any:
    """The kernel as a launch would build it."""
    names = {n: "constexpr" if n in given else others.get(n, "*i64") for n in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(names.items())
        if kind.startswith("*") or name in ("inner", "columns")
    }
    consts = {(kernel.arg_names.index(n),): v for n, v in given.items()}
    source = ASTSource(kernel, names, consts, aligned)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main(capabilities: list[int]) -> bool:
    """Whether all fit, and sums of equal rows are taken alike."""
    fits, sums = True, defaultdict(set)
    for name, kernel, given, others, warps in launches_between():
        for capability in capabilities:
            built = build(kernel, given, others, warps, capability)
            fits &= built.metadata.shared <= LEAST_SHARED
            tiles = Tiles(0, 0, warps, 1)
            print(f"{capability} {name}: {described(built, tiles, capability, 0)}", flush=True)
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
    sys.exit(0 if main([int(each) for each in sys.argv[1:]] or [80, 90]) else 1)
