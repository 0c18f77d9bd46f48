"""What every backend must do. A new backend is one more row of :data:`SUBJECTS`."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from quire.backends import Backend, backend_status, create_backend

__all__ = ["ALL_SUBJECTS", "Subject", "activations", "assert_as_good_as_plain", "backend_of"]


@dataclass(frozen=True)
class Subject:
    """A backend under test.

    arithmetic  the precision that its sums and products claim
    exact       True if it claims the exactness law bit for bit
    """

    name: str
    arithmetic: type[np.floating[Any]]
    exact: bool


SUBJECTS = (Subject("reference", np.float32, True),)

ALL_SUBJECTS = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)


def backend_of(subject: Subject) -> Backend:
    """The backend, or a skip that says why it is off on this machine."""
    for status in backend_status():
        if status.name == subject.name and not status.available:
            pytest.skip(f"{subject.name}: {status.detail}")
    return create_backend(subject.name)


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
