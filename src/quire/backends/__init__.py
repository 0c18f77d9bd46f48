"""Backends by name, and why one is not available here."""

from dataclasses import dataclass

from quire.backends.base import Backend
from quire.backends.reference import ReferenceBackend
from quire.errors import BackendError, did_you_mean

__all__ = ["Backend", "BackendStatus", "backend_status", "create_backend"]


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can be used here; ``detail`` says what it is, or why it is off."""

    name: str
    available: bool
    detail: str


def backend_status() -> tuple[BackendStatus, ...]:
    """Every backend that Quire knows, the preferred first."""
    absent = "not part of this version of Quire"
    return (
        BackendStatus("native", False, absent),
        BackendStatus("cuda", False, absent),
        BackendStatus("reference", True, "NumPy, float32, exact; slow by design"),
    )


def create_backend(name: str = "auto") -> Backend:
    """The backend called ``name``; ``"auto"`` is the first one available.

    Raises BackendError, with the names there are, for one that is unknown or off.
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
    return ReferenceBackend()
