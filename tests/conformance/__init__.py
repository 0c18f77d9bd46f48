"""What every backend must do. A new backend, or variant of one, is a row of :data:`SUBJECTS`."""

import importlib.util
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from quire.backends import Backend
from quire.backends.reference import ReferenceBackend

__all__ = [
    "ALL_SUBJECTS",
    "Subject",
    "activations",
    "assert_as_good_as_plain",
    "backend_of",
    "combinations",
]


@dataclass(frozen=True)
class Subject:
    """A backend under test.

    make        the backend
    arithmetic  the precision that its sums and products claim
    exact       True if it claims the exactness law bit for bit
    narrow      True if it multiplies bf16 and quantised numbers with operands rounded to bf16, or
                as coarsely
    half        True if it multiplies fp16 numbers with operands rounded to fp16
    """

    name: str
    make: Callable[[], Backend]
    arithmetic: type[np.floating[Any]] = np.float32
    exact: bool = True
    narrow: bool = False
    half: bool = False

    def operand(self, format: str) -> Any:
        """The dtype that numbers are rounded to before they meet stored ones of a format."""
        if self.half and format == "fp16":
            return np.float16
        wide = format in ("fp32", "fp16")
        return ml_dtypes.bfloat16 if self.narrow and not wide else self.arithmetic


def _subjects() -> list[Subject]:
    return [Subject("reference", ReferenceBackend), *_native_subjects(), *_cuda_subjects()]


def _native_subjects() -> list[Subject]:
    try:
        from quire.backends.native import NativeBackend
    except ImportError:  # built without a compiler
        return []
    return [
        Subject(f"native-{variant}", partial(NativeBackend, variant, threads=2), narrow=True)
        for variant in NativeBackend.variants()
    ]


def _cuda_subjects() -> list[Subject]:
    """On a GPU, or interpreted in a process that asks for it (tests/cuda starts such ones)."""
    if importlib.util.find_spec("triton") is None:
        return []
    from quire.backends.cuda import CudaBackend, why_there_is_none

    if why_there_is_none() is not None:
        return []
    make, kind = partial(CudaBackend, exact=True), {"narrow": True, "half": True}
    return [
        Subject("cuda", CudaBackend, exact=False, **kind),
        Subject("cuda-exact", make, **kind),
    ]


SUBJECTS = _subjects()

ALL_SUBJECTS = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)


def combinations(*factors: Sequence[Any]) -> list[Any]:
    """All combinations of values of the factors, as parameters of a test.

    Those beyond a few in which every pair of values meets are marked ``more``: an interpreter, to
    which each takes a second, can do without them.
    """
    places = itertools.product(*(range(len(values)) for values in factors))
    pairs = {at: set(itertools.combinations(enumerate(at), 2)) for at in places}
    few, missing = set(), set().union(*pairs.values())
    while missing:
        best = max(pairs, key=lambda at: len(pairs[at] & missing))
        few.add(best)
        missing -= pairs[best]
    return [
        pytest.param(
            *(values[i] for values, i in zip(factors, at, strict=True)),
            marks=[] if at in few else [pytest.mark.more],
        )
        for at in pairs
    ]


def backend_of(subject: Subject) -> Backend:
    """A backend of its own for a test."""
    return subject.make()


def activations(backend: Backend, x: np.ndarray) -> Any:
    """``x`` float32 [T, n] or [T, heads, D] as an array of the backend, by its own ops alone."""
    flat = backend.embed(backend.weight(x.reshape(len(x), math.prod(x.shape[1:]))), range(len(x)))
    return flat if x.ndim == 2 else backend.heads(flat, x.shape[1])


def assert_as_good_as_plain(
    got: np.ndarray, plain: np.ndarray, exact: np.ndarray, known_error: float = 0.0
) -> None:
    """``got`` is at most twice as far from ``exact`` as plain low-precision arithmetic is.

    The rule of flash-attention's tests. ``plain`` is the naive formula in the backend's own
    precision, ``exact`` the same in float64. Where plain arithmetic happens to make no error, two
    units in the last place of the largest result are allowed: its own rounding, and that of one
    step before it. ``known_error`` is what an op documents beyond that.
    """
    assert got.shape == exact.shape
    assert got.dtype == plain.dtype
    assert np.isfinite(exact).all()
    if exact.size == 0:
        return
    error = np.abs(got.astype(np.float64) - exact).max()
    of_plain = np.abs(plain.astype(np.float64) - exact).max()
    ulp = float(np.spacing(np.abs(exact).max().astype(plain.dtype)))
    assert error <= 2 * of_plain + 2 * ulp + known_error, (error, of_plain, ulp)
