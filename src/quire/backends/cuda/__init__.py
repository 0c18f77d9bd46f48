"""The cuda backend: PyTorch for dense work on an NVIDIA GPU, Triton for all that touches pages.

Importing it needs the extra ``cuda`` (torch and triton). docs/gpu.md explains the design.

Nothing was run on a GPU yet.
"""

from quire.backends.cuda.backend import CudaBackend
from quire.backends.cuda.device import find_device, why_there_is_none

__all__ = ["CudaBackend", "device_name", "why_there_is_none"]


def device_name() -> str:
    """What kernels run on here; BackendError if they cannot."""
    return find_device().name
