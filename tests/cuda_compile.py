"""Compiles the cuda backend's paged kernels for cards that are not there; needs no GPU.

Run as ``python tests/cuda_compile.py 80 90``: for each compute capability, formats and head sizes,
one line with the shared memory and the local memory (spilled registers) that a program takes.
Exits with 1 where a program takes more shared memory than a card of any kind has.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quire.backends.cuda import attending, attention, sealing, stored
from quire.formats import GROUP
from quire.pages import PageShape, page_format

MOST_SHARED = (
    101_376  # bytes: cards of compute capability 8.6 and 8.9, the least of those since 8.0
)
KV_HEADS, SHARE = 8, 4
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
    big = attending.prefill_tiles(shape, SHARE, MOST_SHARED)
    for name, kernel, tiles, split in (
        ("decode", attention.decode_kernel, attending.decode_tiles(shape, SHARE), None),
        ("decode, exact", attention.decode_kernel, big, None),
        ("prefill", attention.prefill_kernel, big, 0),
        ("prefill, exact", attention.prefill_kernel, big, 256),
    ):
        given = {**sizes, "BLOCK_M": tiles.rows, "BLOCK_N": tiles.keys}
        more = {"HEADS": KV_HEADS} if split is None else {"SPLIT": split, "PARTS": False}
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
    known["length"] = "i32"
    known |= dict.fromkeys(("key_scale", "value_scale"), "*i16")
    known |= dict.fromkeys(("out", "query", "part_mixed", "part_best", "part_total"), "*fp32")
    known |= {"num_pages": "i32", "first": "i32", "packed": "*u8"}
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
        if kind.startswith("*")
    }
    return signature, aligned


def spilled(cubin: bytes) -> int:
    """Bytes of local memory a thread, as the disassembler says."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, check=True)
    return max(map(int, re.findall(rb"STACK:(\d+)", said.stdout)))


def main(capabilities: list[int]) -> bool:
    fits = True
    for key, value, dim in CASES:
        shape = PageShape(GROUP, KV_HEADS, dim, dim, page_format(key), page_format(value))
        for name, kernel, given, tiles in launches(shape):
            signature, aligned = types(kernel, given)
            consts = {(kernel.arg_names.index(n),): v for n, v in given.items()}
            source = ASTSource(kernel, signature, consts, aligned)
            for capability in capabilities:
                built = triton.compile(
                    source,
                    target=GPUTarget("cuda", capability, 32),
                    options={
                        "num_warps": tiles.warps,
                        "num_stages": tiles.stages,
                        "enable_fp_fusion": False,
                    },
                )
                shared = built.metadata.shared
                fits &= shared <= MOST_SHARED
                local, marked = spilled(built.asm["cubin"]), "" if shared <= MOST_SHARED else " !"
                what = f"{capability} k={key},v={value} x {dim} {name}"
                print(f"{what}: {shared:,} B shared, {local:,} B local{marked}", flush=True)
    return fits


if __name__ == "__main__":
    sys.exit(0 if main([int(capability) for capability in sys.argv[1:]]) else 1)
