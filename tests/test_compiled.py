"""The cuda backend's kernels as Triton compiles them for a card, run on one in software.

The same tests as under the interpreter, of which there are more; ``softcard`` says what this finds
that the interpreter does not. Collected where triton compiles (conftest.py).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import quire
from cuda_counts import counted
from cuda_memory import peaks
from softcard.card import plugged_in
from tiny import random_prompt, write_llama

TESTS = Path(__file__).parent
slow = pytest.mark.slow

OPS = "test_linear or test_activations or norm or rope or hadamard or identity"
ATTENTION = "a_lone or smallest or 14x2x128 or 6x3x33 or large_scores"
PACKED = "any_size or every_head_size"
OWN = "many_rows or hard_numbers or each_head or greedy_tokens or over_several_splits or pool_verbs"


def run(capability: int, *arguments: str) -> None:
    """Pytest in a process whose cuda backends launch on a card of this kind."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "softcard.plugin", "-p", "no:cacheprovider",
         "--capability", str(capability), *arguments],
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def run_chosen(capability: int, chosen: dict[str, str]) -> None:
    """Of each file those tests, all in one process."""
    each = (f"({Path(file).name} and ({which}))" for file, which in chosen.items())
    run(capability, *(f"tests/{file}" for file in chosen), "-k", " or ".join(each))


FOR_90 = {
    "conformance": {
        "conformance/test_ops.py": f"cuda-exact and ({OPS})",
        "conformance/test_attention.py": f"cuda and ({ATTENTION})",
        "conformance/test_packed_pages.py": f"cuda and not exact and ({PACKED})",
        "conformance/test_choosing.py": "cuda-exact",
    },
    "own": {"test_cuda.py": OWN},
    "rooms": {
        "test_cuda_reading.py": "bounds or signatures or highest or outside",
        "test_cuda_weighing.py": "norms or 16777216",
        "test_cuda_streams.py": "moved_pages",
    },
}
MORE_FOR_90 = {
    "conformance": {
        "conformance/test_packed_pages.py": "cuda-exact",
        "conformance/test_stored_formats.py": "cuda",
    },
    "own": {"test_cuda.py": f"not ({OWN}) and not interpreted"},
    "rooms": dict.fromkeys(
        ("test_cuda_products.py", "test_cuda_fused.py", "test_cuda_sampling.py"), "test"
    ),
}
FOR_80 = {"conformance/test_attention.py": "cuda and smallest"}
MORE_FOR_80 = {
    "conformance/test_attention.py": f"cuda and ({ATTENTION})",
    "conformance/test_packed_pages.py": f"cuda and ({PACKED})",
    "conformance/test_ops.py": f"cuda-exact and ({OPS})",
}


@pytest.mark.parametrize("group", FOR_90)
def test_compiled_for_90(group: str) -> None:
    run_chosen(90, FOR_90[group])


@slow
@pytest.mark.parametrize("group", MORE_FOR_90)
def test_more_compiled_for_90(group: str) -> None:
    run_chosen(90, MORE_FOR_90[group])


@pytest.mark.parametrize("chosen", [FOR_80, pytest.param(MORE_FOR_80, marks=slow)])
def test_compiled_for_80(chosen: dict[str, str]) -> None:
    """Products of 64 rows and more are by warps there, not by four of them at once."""
    run_chosen(80, chosen)


@pytest.mark.parametrize("backend", ["cuda", pytest.param("cuda-exact", marks=slow)])
def test_an_engine_compiles_what_it_needs_once(tmp_path: Path, backend: str) -> None:
    """What a step counts (sequences, pages, splits, tokens) is no reason to compile it again."""
    model = write_llama(tmp_path / "model", head_dim=16)
    params = quire.SamplingParams(max_new_tokens=12, ignore_eos=True)

    def prompts(*lengths: int) -> list[list[int]]:
        return [random_prompt(length, seed=length) for length in lengths]

    with plugged_in(90) as card:
        engine = quire.Engine(model, backend=backend, max_batch_tokens=64)
        engine.generate(prompts(1, 7, 70), params)
        engine.generate(prompts(*range(2, 20)), params)
        compiled = card.compiled
        engine.generate(prompts(3), params)
        engine.generate(prompts(50, 33, 16, 17, 64), params)
        engine.generate(prompts(*range(20, 36)), params)
        assert card.compiled == compiled
        assert card.launched["decode_kernel"] > 100


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_decode_reads_pages_once_and_shared_memory_keeps_up(format: str) -> None:
    """Every byte of a page is asked for once. Beside that a program of 256 places, or more, reads

    four queries of 128 float32, twice where pages are packed, and of each of its 8 blocks and of
    the sequence a few numbers of the tables, 64 bytes at most; of each block it may touch the ends
    of 8 sectors more. A card that reads 18 bytes a cycle and processor takes seven cycles for 128
    bytes of pages, in which shared memory has seven rounds.
    """
    programs = 8 * 2048 // 256
    beside = programs * (2 * 4 * 128 * 4 + 9 * 64)
    with plugged_in(90) as card:
        counts, pages = counted(card, format, 2048, 1)
    assert pages <= counts.asked["read"] <= pages + beside
    assert sum(counts.rounds.values()) * 128 < 7 * pages
    if format != "int4":  # whose steps are read in pieces of a sector
        assert counts.moved["read"] <= pages + beside + programs * 8 * 8 * 32


def test_what_memory_is_asked_for_does_not_depend_on_what_is_computed(tmp_path: Path) -> None:
    """The page-streaming experiment, as ``cuda_memory.py`` counts it; ours is the smaller one."""
    counted, computed = (dict(peaks(tmp_path, "dry", computes=each)) for each in (False, True))
    assert counted == computed
    for found in counted.values():
        assert found["bf16"] < found["fp32"] < found["loop"]


def test_the_hosts_time_is_measured_dry() -> None:
    """Of two layers; what is launched is what kernels between products and in attention are."""
    script = TESTS.parent / "bench" / "gpu_host.py"
    done = subprocess.run(
        [sys.executable, script, "--layers", "2", "--rounds", "1"],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    table = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if "|" in line]
    launches = {what: int(count) for what, _, _, count in table[2:]}
    # Of the last layer, where nothing is decoded, only what keys and values take; else the last
    # norm and the likeliest tokens, two kernels, too.
    assert launches == {
        "decode, 1, replayed": 1,
        "decode, 8, replayed": 1,
        "decode, 64, replayed": 1,
        "prefill, 512": 5 + 2,
        "prefill, 496 beside decode, 16": 7 + 7 + 3,
    }
