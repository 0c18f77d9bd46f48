"""Backends by name, and why one is not available here."""

import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quire.backends.base import Backend
from quire.backends.blocks import AttentionParams, MlpParams, Projection, keep, turned
from quire.backends.reference import ReferenceBackend
from quire.errors import BackendError, did_you_mean

__all__ = [
    "AttentionParams",
    "Backend",
    "BackendStatus",
    "MlpParams",
    "Projection",
    "backend_status",
    "create_backend",
    "keep",
    "read_memory",
    "turned",
]


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can be used here; ``detail`` says what it is, or why it is off."""

    name: str
    available: bool
    detail: str


def backend_status() -> tuple[BackendStatus, ...]:
    """Every backend that Quire knows, the preferred first."""
    return (
        _native_status(),
        BackendStatus("cuda", False, "not part of this version of Quire"),
        BackendStatus("reference", True, "NumPy, float32, exact; slow by design"),
    )


def _native_status() -> BackendStatus:
    try:
        from quire.backends.native import NativeBackend
    except ImportError as error:
        return BackendStatus("native", False, f"its extension is not there ({error})")
    best, *others = NativeBackend.variants()
    return BackendStatus(
        "native", True, f"C++ kernels, {best} (also runs here: {', '.join(others) or 'none'})"
    )


def create_backend(name: str = "auto", threads: int | None = None) -> Backend:
    """The backend called ``name``; ``"auto"`` is the first one available.

    ``threads`` None is what the machine allows. Warns when ``"auto"`` has to do without the native
    backend. Raises BackendError, with the names there are, for one that is unknown or off, and for
    threads that it cannot take.
    """
    known = {status.name: status for status in backend_status()}
    available = [status.name for status in known.values() if status.available]
    chosen = available[0] if name == "auto" else name
    if chosen not in known:
        raise BackendError(
            f"unknown backend {name!r}{did_you_mean(name, ['auto', *known])} "
            f"(available: auto, {', '.join(available)})"
        )
    if not known[chosen].available:
        raise BackendError(
            f"backend {name!r} is off: {known[chosen].detail} (available: auto, "
            f"{', '.join(available)})"
        )
    if name == "auto" and chosen == "reference":
        warnings.warn(
            f"the native backend is off: {known['native'].detail}; using the reference backend, "
            "which is many times as slow. Install Quire with a C++ compiler at hand.",
            stacklevel=2,
        )
    if chosen == "native":
        from quire.backends.native import NativeBackend

        return NativeBackend(threads=threads)
    if threads is not None:
        raise BackendError(
            f"the reference backend takes its threads from BLAS, not threads={threads}; set "
            "OPENBLAS_NUM_THREADS instead"
        )
    return ReferenceBackend()


def read_memory(backend: Backend, buffer: npt.NDArray[np.uint8]) -> bool:
    """Read every byte of ``buffer`` (a multiple of 1 MiB) with a backend's threads, to be timed.

    False if the backend has no kernel for it.
    """
    if backend.name != "native":
        return False
    from quire.backends.native import NativeBackend

    assert isinstance(backend, NativeBackend)
    backend.probe_read(buffer)
    return True
