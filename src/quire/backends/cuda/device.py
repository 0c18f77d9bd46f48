"""Where tensors live and kernels run: an NVIDIA GPU, or this process under Triton's interpreter."""

import functools
import threading
import warnings
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import triton

from quire.backends.cuda.attention import prefill_kernel
from quire.backends.cuda.streams import Streams
from quire.config import format_bytes
from quire.errors import BackendError

__all__ = ["LEAST_SHARED", "Device", "aligned", "find_device", "why_there_is_none"]

Array = npt.NDArray[Any]
LEAST_SHARED = 101_376  # bytes of a program on cards of compute capability 8.6 and 8.9

_INTERPRETING = threading.RLock()  # Triton's interpreter runs one kernel at a time


def aligned(count: int) -> int:
    """Numbers of 8 bytes that ``count`` of them take up where what follows is aligned to 16 bytes.

    Triton compiles a kernel anew for a pointer that is not.
    """
    return count + count % 2


def why_there_is_none() -> str | None:
    """Why kernels cannot run here; None if they can."""
    if isinstance(prefill_kernel, triton.runtime.JITFunction):
        if torch.cuda.is_available():
            return None
        return (
            f"torch {torch.__version__} finds no NVIDIA GPU (TRITON_INTERPRET=1 runs the kernels "
            "on this CPU, thousands of times as slowly, to test them)"
        )
    return None


def find_device() -> "Device":
    """The GPU that torch calls current, or the CPU under the interpreter; else BackendError."""
    reason = why_there_is_none()
    if reason is not None:
        raise BackendError(f"the cuda backend is off: {reason}")
    hardware = isinstance(prefill_kernel, triton.runtime.JITFunction)
    return Device("cuda" if hardware else "cpu", hardware)


class Known(Protocol):
    """Arrays that are on the device already."""

    def find(self, array: object) -> Any | None:
        """The copy of this very array, or None."""


class Device:
    """A torch device and whether kernels are compiled for it (``hardware``) or interpreted.

    Copies between host and device go through pinned memory, without which the driver would copy
    twice and wait.
    """

    def __init__(self, kind: str, hardware: bool) -> None:
        self.kind, self.hardware = kind, hardware
        self._known: Known | None = None
        self.replays = 0  # of steps: they share memory, so one may overwrite what any other gave
        self._logits: Any = None

    @property
    def name(self) -> str:
        """What a person calls it."""
        return torch.cuda.get_device_name() if self.hardware else "this CPU, interpreted"

    @property
    def free_bytes(self) -> int | None:
        """Bytes of the card's memory that nobody has; None where there is no card."""
        return torch.cuda.mem_get_info()[0] if self.hardware else None

    def memory(self) -> str:
        """How much memory is free, for a message."""
        free = self.free_bytes
        return "unknown" if free is None else f"{format_bytes(free)} ({free} bytes)"

    def give_back(self) -> None:
        """Give the memory that torch keeps for later tensors back to the card."""
        if self.hardware:
            torch.cuda.empty_cache()

    @property
    def own_memory(self) -> int | None:
        """Bytes that pools may take: what is free but for a tenth of the card, for a step's needs.

        None where there is no card.
        """
        if not self.hardware:
            return None
        free, total = torch.cuda.mem_get_info()
        return max(0, free - total // 10)

    @functools.cached_property
    def processors(self) -> int:
        """Streaming multiprocessors; programs beyond as many wait or share."""
        if not self.hardware:
            return 4
        return torch.cuda.get_device_properties().multi_processor_count

    @functools.cached_property
    def shared_memory(self) -> int:
        """Bytes of shared memory that a program may have; where there is no card, the least."""
        if not self.hardware:
            return LEAST_SHARED
        return int(torch.cuda.get_device_properties().shared_memory_per_block_optin)

    def zeros(self, shape: Sequence[int], dtype: Any) -> Any:
        """A tensor of zeros."""
        return torch.zeros(tuple(shape), dtype=dtype, device=self.kind)

    def empty(self, shape: Sequence[int], dtype: Any = torch.float32) -> Any:
        """A tensor of anything."""
        return torch.empty(tuple(shape), dtype=dtype, device=self.kind)

    def to_device(self, array: Array) -> Any:
        """A copy of a NumPy array of a dtype that torch has, queued behind what runs."""
        held = torch.empty(array.shape, dtype=_torch_dtype(array), pin_memory=self.hardware)
        held.numpy()[...] = array
        return held.to(self.kind, non_blocking=True)

    def all_to_device(self, arrays: Sequence[Array]) -> list[Any]:
        """Copies of int64 and float64 arrays [n], in one transfer; each is :func:`aligned`."""
        starts = [0, *accumulate(aligned(len(array)) for array in arrays)]
        flat = np.zeros(starts.pop(), np.int64)
        parts = [slice(at, at + len(array)) for at, array in zip(starts, arrays, strict=True)]
        for part, array in zip(parts, arrays, strict=True):
            flat[part] = array.view(np.int64)
        there = self.to_device(flat)
        return [
            there[part].view(_torch_dtype(array)) for part, array in zip(parts, arrays, strict=True)
        ]

    def hold(self, known: Known) -> None:
        """From now on :meth:`integers` takes copies from ``known``, where it has one."""
        self._known = known

    def integers(self, numbers: Any) -> Any:
        """int64 numbers, as a tensor; one that is there already is given back."""
        if isinstance(numbers, torch.Tensor):
            return numbers
        copy = None if self._known is None else self._known.find(numbers)
        return self.to_device(np.asarray(numbers, dtype=np.int64)) if copy is None else copy

    def mirrored(self, count: int) -> tuple[Any, Any]:
        """int64 [count] of zeros twice, in pinned memory and on the device: see :meth:`renew`."""
        here = torch.zeros(count, dtype=torch.int64, pin_memory=self.hardware)
        return here, torch.zeros(count, dtype=torch.int64, device=self.kind)

    def renew(self, there: Any, here: Any, count: int) -> None:
        """Copy the first ``count`` numbers of ``here`` over those ``there``, behind what runs.

        They may not be changed here before that copy is done: see :meth:`mark`.
        """
        there[:count].copy_(here[:count], non_blocking=True)

    def mark(self) -> Any:
        """A mark behind all that is queued, for :meth:`wait`."""
        return torch.cuda.current_stream().record_event() if self.hardware else None

    def wait(self, mark: Any) -> None:
        """Return when what lies before ``mark`` is done."""
        if mark is not None:
            mark.synchronize()

    @functools.cached_property
    def graph_memory(self) -> Any:
        """The memory that captured steps share: only one of them runs at a time."""
        return torch.cuda.graph_pool_handle()

    def logits(self, rows: int, vocab: int) -> Any:
        """float32 [rows, vocab] for a captured step, in memory that all of them write to.

        Where it has become too small there is a new one, and steps that have the old one keep it:
        buckets double, so that of one vocabulary all old ones together are smaller than the new.
        """
        count = rows * vocab
        if self._logits is None or len(self._logits) < count:
            self._logits = self.empty((count,))
        return self._logits[:count].view(rows, vocab)

    @functools.cached_property
    def streams(self) -> Streams:
        """Streams beside the one that computes."""
        return Streams(self.hardware)

    def to_host(self, tensor: Any) -> Any:
        """A copy in host memory, complete when this returns."""
        return self.fetch(tensor)()

    def fetch(self, tensor: Any) -> Callable[[], Any]:
        """Queue a copy to host memory; what is given waits for it, and for nothing behind it."""
        if not self.hardware:
            copy = tensor.detach().clone()
            return lambda: copy
        held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        held.copy_(tensor, non_blocking=True)
        mark = self.mark()

        def take() -> Any:
            self.wait(mark)
            return held

        return take

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
        """Run ``kernel`` over ``grid``; nothing if the grid is empty."""
        if 0 in grid:
            return
        if self.hardware:
            # What is not written as a fused multiply-add is not made one: bits are the source's.
            kernel[grid](*args, enable_fp_fusion=False, **named)
            return
        with (
            _INTERPRETING,
            warnings.catch_warnings(),
        ):  # hardware does not warn of infinities and NaN either
            warnings.simplefilter("ignore", RuntimeWarning)
            kernel[grid](*args, **named)


def _torch_dtype(array: Array) -> Any:
    return torch.from_numpy(np.empty(0, array.dtype)).dtype
