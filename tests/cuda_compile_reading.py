"""Compiles the cuda backend's kernels that choose pages, or decode the keys by which tokens are
dropped, for cards that are not there; needs no GPU.

Run as ``python tests/cuda_compile_reading.py 80 90``: one line a kernel with what a program takes
(see ``cuda_compile.py``), for 32 query heads and 8 KV heads of 128.
"""

import sys
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cuda_compile import POINTERS, described
from quire.backends.cuda import knowing, picking
from quire.backends.cuda.tiles import Tiles
from quire.formats import GROUP, PAGE_FORMATS

BITS, PAGE, DIM, HEADS, SHARE = 128, 16, 128, 8, 4
KINDS = dict.fromkeys(("query", "scores", "normals"), "*fp32") | {"rows": "i32", "longest": "i32"}
KINDS |= dict.fromkeys(("bounds", "key_step", "key_least"), "*i16") | {"signs": "*i32"}


def launches() -> Iterator[tuple[str, Any, dict[str, Any], dict[str, str], int]]:
    """Name, kernel, what it is compiled for, types of arguments and warps."""
    for name in ("fp32", "bf16", "fp16", "fp8", "int8", "int4", "int2"):
        format = PAGE_FORMATS[name]
        per = 8 // format.bits if format.kind == "page" else 1
        sizes = {
            "G": HEADS, "D": DIM, "DP": DIM, "PAGE": PAGE if per == 1 else GROUP, "KEY": name,
            "HARDWARE": True, "PER": per, "GROUP": GROUP, "ROWS": 16,
        }  # fmt: skip
        stored = {"key": POINTERS.get(name, "*u8")}
        yield f"bounds, {name}", knowing.bounds_kernel, sizes, stored, 4
        yield f"signatures, {name}", knowing.signs_kernel, {**sizes, "BITS": BITS}, stored, 4
        if per == 1:
            plain = {each: sizes[each] for each in sizes if each not in ("PER", "GROUP")}
            more = {**stored, "out": "*fp32", "first_head": "i32", "tokens": "i32"}
            yield f"keys, {name}", knowing.keys_kernel, plain, more, 4
    asked = {"D": DIM, "DP": DIM, "ROWS": 16, "BITS": BITS}
    yield "signatures of queries", knowing.query_signs_kernel, asked, {}, 4
    scored = {"G": HEADS, "SHARE": SHARE}
    sizes = {**scored, "SHAREP": SHARE, "D": DIM, "DP": DIM, "PAGES": 32}
    yield "scores of bounds", picking.score_bounds_kernel, sizes, {}, 4
    sizes = {**scored, "PAGE": PAGE, "PAGEP": PAGE, "WORDS": 4, "WORDSP": 4, "PAGES": 64}
    yield "scores of signatures", picking.score_signs_kernel, sizes, {"query": "*i32"}, 4
    yield "pick", picking.pick_kernel, {"G": HEADS, "BLOCK": 4096}, {}, 8


def main(capabilities: list[int]) -> None:
    for name, kernel, given, more, warps in launches():
        known = {**dict.fromkeys(given, "constexpr"), **KINDS, **more}
        signature = {each: known.get(each, "*i64") for each in kernel.arg_names}
        places = {each: (nth,) for nth, each in enumerate(kernel.arg_names)}
        aligned = {
            places[each]: [["tt.divisibility", 16]]
            for each, kind in signature.items()
            if kind.startswith("*")
        }
        source = ASTSource(kernel, signature, {places[n]: v for n, v in given.items()}, aligned)
        for capability in capabilities:
            options = {"enable_fp_fusion": False, "num_warps": warps}
            target = GPUTarget("cuda", capability, 32)
            built = triton.compile(source, target=target, options=options)
            line = described(built, Tiles(0, 0, warps, 1), capability, 0)
            print(f"{capability} {name}: {line}", flush=True)


if __name__ == "__main__":
    main([int(capability) for capability in sys.argv[1:]])
