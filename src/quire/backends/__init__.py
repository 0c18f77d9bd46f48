"""Backends by name, and why one is not available here."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from quire.backends.base import Ahead, Backend, Logits, SomeRows, Summaries
from quire.backends.blocks import (
    AttentionParams,
    MlpParams,
    Network,
    Projection,
    attend_chosen,
    choosing,
    keep,
    turned,
)
from quire.backends.reference import ReferenceBackend
from quire.backends.selecting import summary_bytes
from quire.errors import BackendError, did_you_mean

__all__ = [
    "Ahead",
    "AttentionParams",
    "Backend",
    "BackendStatus",
    "Logits",
    "MlpParams",
    "Network",
    "Projection",
    "SomeRows",
    "Summaries",
    "attend_chosen",
    "backend_status",
    "choosing",
    "create_backend",
    "keep",
    "read_memory",
    "summary_bytes",
    "turned",
]


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can be used here; ``detail`` says what it is, or why it is off."""

    name: str
    available: bool
    detail: str


def backend_status() -> tuple[BackendStatus, ...]:
    """Every backend that Quire knows, the preferred first. Imports torch where it is installed."""
    return tuple(status() for status in _STATUS.values())


def _native_status() -> BackendStatus:
    try:
        from quire.backends.native import NativeBackend
    except ImportError as error:
        return BackendStatus("native", False, f"its extension is not there ({error})")
    best, *others = NativeBackend.variants()
    return BackendStatus(
        "native", True, f"C++ kernels, {best} (also runs here: {', '.join(others) or 'none'})"
    )


def _cuda_status(name: str) -> BackendStatus:
    from quire.extras import why_unfit  # late: only who asks for this backend pays for it

    unfit = why_unfit("cuda")  # asked first: kernels do not even load in other versions
    if unfit is not None:
        return BackendStatus(name, False, unfit)
    try:
        from quire.backends.cuda import device_name, why_there_is_none
    except ImportError as error:
        return BackendStatus(name, False, f"the extra quire[cuda] is not there ({error})")
    reason = why_there_is_none()
    if reason is not None:
        return BackendStatus(name, False, reason)
    kind = ", batch-invariant" if name == "cuda-exact" else ""
    return BackendStatus(name, True, f"PyTorch and Triton{kind}, {device_name()}")


def _reference_status() -> BackendStatus:
    return BackendStatus("reference", True, "NumPy, float32, exact; slow by design")


_STATUS: dict[str, Callable[[], BackendStatus]] = {
    "native": _native_status,
    "cuda": partial(_cuda_status, "cuda"),
    "cuda-exact": partial(_cuda_status, "cuda-exact"),
    "reference": _reference_status,
}


def create_backend(name: str = "auto", threads: int | None = None) -> Backend:
    """The backend called ``name``; ``"auto"`` is the native one, or else the reference.

    ``threads`` None is what the machine allows. Warns when ``"auto"`` has to do without the native
    backend. Raises BackendError, with the names there are, for one that is unknown or off, and for
    threads that it cannot take.
    """
    chosen = name
    if name == "auto":
        chosen = "native" if _native_status().available else "reference"
    if chosen not in _STATUS:
        raise BackendError(
            f"unknown backend {name!r}{did_you_mean(name, ['auto', *_STATUS])} "
            f"(available: {_available()})"
        )
    status = _STATUS[chosen]()
    if not status.available:
        raise BackendError(f"backend {name!r} is off: {status.detail} (available: {_available()})")
    if name == "auto" and chosen == "reference":
        warnings.warn(
            f"the native backend is off: {_native_status().detail}; using the reference backend, "
            "which is many times as slow. Install Quire with a C++ compiler at hand.",
            stacklevel=2,
        )
    if chosen == "native":
        from quire.backends.native import NativeBackend

        return NativeBackend(threads=threads)
    if threads is not None:
        raise BackendError(
            f"threads={threads} is for the native backend; the {chosen} backend takes its threads "
            f"from {'BLAS: set OPENBLAS_NUM_THREADS' if chosen == 'reference' else 'the GPU'}"
        )
    if chosen in ("cuda", "cuda-exact"):
        from quire.backends.cuda import CudaBackend

        return CudaBackend(exact=chosen == "cuda-exact")
    return ReferenceBackend()


def _available() -> str:
    return ", ".join(["auto", *(status.name for status in backend_status() if status.available)])


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
