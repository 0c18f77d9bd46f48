"""Launches of the cuda backend, compiled as for a card, and run by the machine of this package."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget

import quire.backends.cuda
from quire.backends.cuda import backend
from quire.backends.cuda import device as devices
from quire.backends.cuda.tiles import HOPPER
from softcard.counting import Counts
from softcard.machine import Code, Launch, translate
from softcard.memory import DeviceMemory
from softcard.parse import parse

__all__ = ["Card", "Driver", "plugged_in", "shared_memory"]

_SCALARS = {"i1": np.uint8, "i32": np.uint32, "u32": np.uint32, "i64": np.uint64,
            "u64": np.uint64, "fp32": np.float32, "fp64": np.float64}  # fmt: skip


class Driver:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch  # Triton keeps what it compiled apart by that

    def get_current_stream(self, device: int) -> int:
        return 0


class Card:
    """Compiles for ``capability`` (80, 90); keeps the code of each program that it has run.

    launched   names of kernels, and how often each was launched
    compiled   how many programs were compiled
    counts     of each kernel by name, while ``counting``
    """

    def __init__(self, capability: int) -> None:
        self.capability, self.counting = capability, False
        self.counts: dict[str, Counts] = {}
        self.launched: dict[str, int] = {}
        self._codes: dict[str, tuple[Code, list[str]]] = {}
        self._memory = DeviceMemory()

    @property
    def compiled(self) -> int:
        return len(self._codes)

    def know(self, tensor: Any) -> Any:
        """Let kernels touch a tensor whose address they find in memory."""
        storage = tensor.untyped_storage()
        self._memory.add(storage.data_ptr(), storage.nbytes())
        return tensor

    def launch(self, kernel: Any, grid: Sequence[int], args: Sequence[Any], named: Any) -> None:
        """Run ``kernel`` over ``grid``, as :meth:`Device.launch` would on a card."""
        built = kernel.warmup(*args, grid=tuple(grid), **{"enable_fp_fusion": False} | named)
        name = kernel.__name__ if hasattr(kernel, "__name__") else kernel.fn.__name__
        self.launched[name] = self.launched.get(name, 0) + 1
        if built.hash not in self._codes:
            program = parse(built.asm["ptx"])
            self._codes[built.hash] = translate(program), program.parameters
        code, parameters = self._codes[built.hash]
        memory = DeviceMemory(self._memory)
        values = [*self._values(kernel, built, args, named, memory)]
        values += [np.zeros(1, np.uint64)] * (len(parameters) - len(values))  # scratch: none
        whole = (*grid, 1, 1)[:3]
        threads = 32 * built.metadata.num_warps
        given = dict(zip(parameters, values, strict=True))
        counts = self.counts.setdefault(name, Counts()) if self.counting else None
        code.run(Launch(memory, given, whole, threads, built.metadata.shared, counts))

    def _values(
        self, kernel: Any, built: Any, args: Sequence[Any], named: Any, memory: DeviceMemory
    ) -> Iterator[Any]:
        """Bits of the arguments that are not compiled in, in order."""
        given = dict(zip(kernel.arg_names, args, strict=False)) | named
        for name, kind in built.src.signature.items():
            if kind == "constexpr":
                continue
            value = given[name]
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                memory.add(storage.data_ptr(), storage.nbytes())
                yield np.array([value.data_ptr()], np.uint64)
            else:
                number = np.array([value]).astype(_SCALARS[kind])
                yield number.view(np.dtype(f"u{number.itemsize}"))


def shared_memory(capability: int) -> int:
    """Bytes of a program on the least card of that capability."""
    return HOPPER if capability >= 90 else devices.LEAST_SHARED


@contextmanager
def plugged_in(capability: int) -> Iterator[Card]:
    """Backends that are made meanwhile launch their kernels on a card in software.

    Everything else, graphs, streams and memory, is as under Triton's interpreter. Triton must not
    interpret in this process (TRITON_INTERPRET).
    """
    card = Card(capability)

    def launch(self: Any, kernel: Any, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
        if 0 in grid:
            return
        if "HARDWARE" in kernel.arg_names:
            named["HARDWARE"] = True
        card.launch(kernel, grid, args, named)

    def zeros(self: Any, shape: Sequence[int], dtype: Any) -> Any:
        return card.know(torch.zeros(tuple(shape), dtype=dtype))

    def found() -> devices.Device:
        return devices.Device("cpu", False)

    with (
        patch.object(triton.runtime.driver, "_active", Driver(capability)),
        patch.multiple(quire.backends.cuda, find_device=found, why_there_is_none=lambda: None),
        patch.object(backend, "find_device", found),
        patch.object(devices, "find_device", found),
        patch.object(devices.Device, "launch", launch),
        patch.object(devices.Device, "zeros", zeros),
        patch.object(devices.Device, "shared_memory", shared_memory(capability)),
    ):
        yield card
