"""What a step of the ``cuda`` backend takes of the host, measured where there is no GPU.

    python bench/gpu_host.py [--layers 16] [--rounds 7] [--backend cuda-exact]

Kernels are compiled by Triton for compute capability 9.0 and launched as on a card, to a launcher
that does nothing; PyTorch's ops run on ``meta`` tensors, which have no numbers, and products only
make room for their result. So what is measured is Python between a call of ``Engine.step`` and its
return: the engine's, the backend's, Triton's and PyTorch's. What CUDA takes to launch, and cuBLAS
to choose, is not in it; what PyTorch takes for an op without numbers may be more than with them.
Prints Markdown: medians, and the range, in milliseconds.
"""

import argparse
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton
from gpu_checkpoints import LLAMA_1B, LlamaShape, checkpoint
from triton.backends.compiler import GPUTarget

import quire
import quire.backends.cuda
from quire.backends.cuda import backend
from quire.backends.cuda import device as devices
from quire.backends.cuda.graphs import StepGraph
from quire.backends.cuda.products import Products

VOCABULARY, CHUNK, DECODING = 4096, 512, 16
DONE = SimpleNamespace(synchronize=lambda: None, query=lambda: True)


class Launcher:
    """Counts what it is given, replays of graphs among it, and does nothing."""

    count = 0

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *args: Any) -> None:
        Launcher.launched()

    @classmethod
    def launched(cls) -> None:
        cls.count += 1


class Driver:
    """As much of Triton's driver as compiling and launching ask for."""

    launcher_cls = Launcher
    utils = SimpleNamespace(
        load_binary=lambda *_: (object(), 1, 255, 0, 1024),
        unload_module=lambda *_: None,
        get_device_properties=lambda _: {"max_shared_mem": 227 << 10},
    )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class NoCard(devices.Device):
    """A device of 132 processors whose tensors have shapes and no numbers; all tokens are 0."""

    name, own_memory, free_bytes = "no card", 64 << 30, 64 << 30
    processors, shared_memory = 132, 227 << 10

    def __init__(self) -> None:
        super().__init__("meta", hardware=True)

    def memory(self) -> str:
        return "unknown"

    def give_back(self) -> None:
        pass

    def to_device(self, array: np.ndarray[Any, Any]) -> Any:
        held = torch.empty(array.shape, dtype=devices._torch_dtype(array))
        held.numpy()[...] = array  # as into pinned memory
        return held.to(self.kind)

    def mirrored(self, count: int) -> tuple[Any, Any]:
        here = torch.zeros(count, dtype=torch.int64)
        return here, torch.zeros_like(here, device=self.kind)

    def mark(self) -> Any:
        return DONE

    def fetch(self, tensor: Any) -> Callable[[], Any]:
        copy = torch.zeros(tensor.shape, dtype=tensor.dtype)
        return lambda: copy


def multiplied(self: Products, x: Any, weight: Any, out: Any) -> Any:
    """Room for a product."""
    return self._device.empty((x.shape[0], weight.shape[0])) if out is None else out


def captured(self: StepGraph) -> Any:
    """A graph that nothing comes of."""
    self._best = self._compute()
    return SimpleNamespace(replay=Launcher.launched)


@contextmanager
def no_card() -> Iterator[None]:
    """Backends that are made meanwhile have a device without numbers."""
    found = {"find_device": NoCard}
    with ExitStack() as stack:
        for patched in (
            patch.object(triton.runtime.driver, "_active", Driver()),
            patch.multiple(quire.backends.cuda, why_there_is_none=lambda: None, **found),
            patch.multiple(backend, **found),
            patch.multiple(devices, **found),
            patch.object(Products, "_fastest", multiplied),
            patch.object(StepGraph, "_capture", captured),
        ):
            stack.enter_context(patched)
        yield


class Steps:
    """An engine, and of its steps the milliseconds that each takes the host, and its launches."""

    def __init__(self, model: Path, name: str) -> None:
        self._random = random.Random(0)
        cache = quire.CacheConfig(num_pages=4000, prefix_cache=False)
        self.engine = quire.Engine(
            model, backend=name, cache=cache, max_batch_tokens=CHUNK, max_sequences=64
        )

    def submit(self, prompt: int, reply: int) -> quire.Request:
        tokens = self._random.choices(range(VOCABULARY), k=prompt)
        params = quire.SamplingParams(max_new_tokens=reply, ignore_eos=True)
        return self.engine.submit(tokens, params)

    def timed(self, steps: int) -> list[tuple[float, int]]:
        found = []
        for _ in range(steps):
            before, start = Launcher.count, time.perf_counter()
            self.engine.step()
            found.append((1e3 * (time.perf_counter() - start), Launcher.count - before))
        return found

    def end(self, requests: Sequence[quire.Request]) -> None:
        for request in requests:
            self.engine.cancel(request)
        while self.engine.has_work:
            self.engine.step()

    def decode(self, sequences: int, rounds: int) -> list[tuple[float, int]]:
        """Of replayed steps; a few of them capture a shape first."""
        requests = [self.submit(8, 400) for _ in range(sequences)]
        self.timed(sequences * 8 // CHUNK + 40)  # until prompts are through and shapes captured
        found = self.timed(20 * rounds)
        self.end(requests)
        return found

    def prefill(self, others: int, rounds: int) -> list[tuple[float, int]]:
        """Of launched steps of CHUNK tokens, ``others`` of which are decoded."""
        requests = [self.submit(8, 4000) for _ in range(others)]
        self.timed(3)
        found = []
        for once in range(rounds + 1):
            requests.append(self.submit(6 * (CHUNK - others) + 1, 1))
            self.timed(1)
            steps = self.timed(4)
            found += steps if once else []  # kernels are compiled in the first round
            self.timed(3)
        self.end(requests)
        return found


def lines(model: Path, name: str, rounds: int) -> Iterator[str]:
    """Of the table."""
    steps = Steps(model, name)
    yield "| a step of | ms of the host | from, to | launches |"
    yield "|---|---|---|---|"
    for count in (1, 8, 64):
        yield row(f"decode, {count}, replayed", steps.decode(count, rounds))
    for others in (0, DECODING):
        beside = f" beside decode, {others}" if others else ""
        yield row(f"prefill, {CHUNK - others}{beside}", steps.prefill(others, rounds))


def row(what: str, steps: Sequence[tuple[float, int]]) -> str:
    """One line; launches are those of the median step, too."""
    times, launches = zip(*steps, strict=True)
    middle, count = statistics.median(times), statistics.median_low(launches)
    return f"| {what} | {middle:.2f} | {min(times):.2f}, {max(times):.2f} | {count} |"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=LLAMA_1B.layers)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--backend", default="cuda", choices=["cuda", "cuda-exact"])
    asked = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: kernels would be interpreted, not launched")
    narrow = {"hidden": 128, "inner": 256, "vocabulary": VOCABULARY, "tied": True}
    shape: LlamaShape = replace(LLAMA_1B, layers=asked.layers, **narrow)
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    print(f"{asked.layers} layers; Python {platform.python_version()}, {versions}")
    with tempfile.TemporaryDirectory() as directory, no_card():
        model = checkpoint(Path(directory), shape, "bfloat16", "cpu")
        for line in lines(model, asked.backend, asked.rounds):
            print(line, flush=True)


if __name__ == "__main__":
    main()
