"""Compiles the cuda backend's sampling kernels for cards that are not there; needs no GPU.

Run as ``python tests/cuda_compile_choosing.py 80 90``: one line a kernel with what a program takes
(see ``cuda_compile.py``), at the vocabulary of Llama 3.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cuda_compile import described
from quire.backends.cuda import choosing
from quire.backends.cuda.sampling import BLOCK, MOST
from quire.backends.cuda.stored import power_of_two
from quire.backends.cuda.tiles import Tiles

VOCAB = 128_256
NUMBERS = dict.fromkeys(("vocab", "parts", "count"), "i32")
WIDE = ("sums", "values", "peaks", "temperatures", "floors", "draws", "ordered", "top_ps")
POINTERS = {"logits": "*fp32"} | dict.fromkeys((*WIDE, "cut_values"), "*fp64")


def main(capabilities: list[int]) -> None:
    for name in choosing.__all__:
        kernel = getattr(choosing, name)
        given = {"BLOCK": MOST if name == "cut_kernel" else BLOCK}
        if name == "token_kernel":
            del given["BLOCK"]
        others = {"PARTS": power_of_two(-(-VOCAB // BLOCK)), "CUT": True, "BENT": False}
        given |= {each: value for each, value in others.items() if each in kernel.arg_names}
        known = {**dict.fromkeys(given, "constexpr"), **NUMBERS, **POINTERS}
        signature = {each: known.get(each, "*i64") for each in kernel.arg_names}
        places = {each: (nth,) for nth, each in enumerate(kernel.arg_names)}
        aligned = {
            places[each]: [["tt.divisibility", 16]]
            for each, kind in signature.items()
            if kind.startswith("*") or each == "vocab"
        }
        source = ASTSource(kernel, signature, {places[n]: v for n, v in given.items()}, aligned)
        for capability in capabilities:
            target, options = GPUTarget("cuda", capability, 32), {"enable_fp_fusion": False}
            built = triton.compile(source, target=target, options=options)
            tiles = Tiles(0, 0, 4, 1)
            print(f"{capability} {name}: {described(built, tiles, capability, 0)}", flush=True)


if __name__ == "__main__":
    main([int(capability) for capability in sys.argv[1:]])
