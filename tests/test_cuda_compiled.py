"""The cuda backend's kernels as Triton compiles them for a card, run on one in software.

The same tests as under the interpreter, of which there are more: ``softcard`` says what this finds
that the interpreter does not. Each list of them runs in a process that compiles, whatever this one
does.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
INSTALLED = all(importlib.util.find_spec(name) for name in ("torch", "triton"))
needs_triton = pytest.mark.skipif(not INSTALLED, reason="the extra cuda is not installed")
slow = pytest.mark.slow

OPS = "test_linear or test_activations or norm or rope or hadamard or identity"
ATTENTION = "a_lone or smallest or 14x2x128 or 6x3x33 or large_scores"
PACKED = "sealing or any_size or agrees"
OWN = "hard_numbers or each_head or greedy_tokens or over_several_splits or pool_verbs"


def run(capability: int, *arguments: str) -> None:
    """Pytest in a process whose cuda backends launch on a card of this kind."""
    env = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "softcard.plugin", "-p", "no:cacheprovider",
         "--capability", str(capability), *arguments],
        cwd=TESTS.parent,
        env={**env, "PYTHONPATH": os.pathsep.join([str(TESTS), env.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@needs_triton
@pytest.mark.parametrize(
    ("file", "chosen"),
    [
        ("conformance/test_ops.py", f"cuda-exact and ({OPS})"),
        ("conformance/test_attention.py", f"cuda and ({ATTENTION})"),
        ("conformance/test_packed_pages.py", f"cuda and ({PACKED})"),
        ("conformance/test_choosing.py", "cuda-exact"),
        ("test_cuda.py", OWN),
        ("test_cuda_products.py", "test"),
        pytest.param("test_cuda.py", f"not ({OWN}) and not interpreted", marks=slow),
        pytest.param("test_cuda_fused.py", "test", marks=slow),
        pytest.param("test_cuda_sampling.py", "test", marks=slow),
        pytest.param("conformance/test_stored_formats.py", "cuda", marks=slow),
    ],
)
def test_compiled_for_90(file: str, chosen: str) -> None:
    run(90, f"tests/{file}", "-k", chosen)


@needs_triton
@pytest.mark.parametrize(
    ("file", "chosen"),
    [
        ("conformance/test_attention.py", "cuda and smallest"),
        pytest.param("conformance/test_attention.py", f"cuda and ({ATTENTION})", marks=slow),
        pytest.param("conformance/test_packed_pages.py", f"cuda and ({PACKED})", marks=slow),
        pytest.param("conformance/test_ops.py", f"cuda-exact and ({OPS})", marks=slow),
    ],
)
def test_compiled_for_80(file: str, chosen: str) -> None:
    """Products of 64 rows and more are by warps there, not by four of them at once."""
    run(80, f"tests/{file}", "-k", chosen)
