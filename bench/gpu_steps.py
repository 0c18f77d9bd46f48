"""Parts ``step`` and ``exact`` of ``bench/gpu.py``: decode steps of Llama 1B shapes.

A step takes from one call of ``Engine.step`` to the next, by the host's clock, as a mean of many:
the device computes the next one meanwhile. How long kernels run in a step comes from torch's
profiler, in steps of their own, because watching takes time.
"""

import gc
import json
import random
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_checkpoints import LLAMA_1B, TINY, checkpoint
from gpu_rows import summary
from gpu_timing import Setting
from torch.profiler import ProfilerActivity, profile

import quire

__all__ = ["Decoding", "busy", "exact", "step"]

WINDOWS, STEPS = 6, 12  # of which means are taken; all but one step in a window may be slow


class Decoding:
    """An engine whose sequences decode after contexts of ``context`` tokens."""

    def __init__(self, setting: Setting, backend: str, most: int) -> None:
        self.setting = setting
        self.context = setting.choose(1040, 1040, 16)  # page lists keep their length class
        self.windows, self.steps = setting.choose((WINDOWS, STEPS), (4, 8), (2, 1))
        self.shape = setting.choose(LLAMA_1B, LLAMA_1B, TINY)
        longest = self.context + (self.windows + 3) * self.steps + 8
        cache = quire.CacheConfig(num_pages=most * (longest // 16 + 2), prefix_cache=False)
        self._params = quire.SamplingParams(max_new_tokens=longest, ignore_eos=True)
        self._draw = random.Random(0)
        self.engine = quire.Engine(
            checkpoint(setting.work, self.shape, "bfloat16", setting.kind), backend=backend,
            cache=cache, max_sequences=most, max_batch_tokens=setting.choose(8192, 8192, 64),
        )  # fmt: skip

    def start(self, sequences: int) -> list[quire.Request]:
        """Submit, and step until every sequence decodes in steps as those that follow."""
        ids = range(self.shape.vocabulary)
        requests = [
            self.engine.submit(self._draw.choices(ids, k=self.context), self._params)
            for _ in range(sequences)
        ]
        while any(len(request.samples[0].tokens) < self.context + 2 for request in requests):
            self.engine.step()
        self.run(self.steps)
        return requests

    def run(self, steps: int) -> None:
        """So many steps."""
        for _ in range(steps):
            self.engine.step()

    def measure(self) -> list[float]:
        """Mean seconds of a step in each window."""
        wall = self.setting.watch.wall
        return [wall(partial(self.run, self.steps))[0] / self.steps for _ in range(self.windows)]

    def end(self, requests: Iterable[quire.Request]) -> None:
        """Let the sequences go."""
        for request in requests:
            self.engine.cancel(request)


def busy(trace: Sequence[dict[str, Any]], kinds: Sequence[str]) -> float:
    """Seconds in which an event of these kinds runs; what runs side by side counts once.

    ``trace`` as torch's profiler exports it: ``ts`` and ``dur`` in microseconds.
    """
    spans = sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in trace
        if event.get("ph") == "X" and event.get("cat") in kinds
    )
    total, reached = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total / 1e6


def _profiled(decoding: Decoding) -> tuple[float, float]:
    """Seconds of a step in which kernels run, and in which copies do."""
    setting, path = decoding.setting, decoding.setting.work / "trace.json"
    dry = setting.mode == "dry"
    with profile(activities=[ProfilerActivity.CPU if dry else ProfilerActivity.CUDA]) as watched:
        decoding.run(decoding.steps)
        setting.watch.synchronize()
    watched.export_chrome_trace(str(path))
    trace = json.loads(Path(path).read_text(encoding="utf-8"))["traceEvents"]
    kernels = busy(trace, ["cpu_op"] if dry else ["kernel"]) / decoding.steps
    if not kernels:
        raise RuntimeError("torch's profiler saw no kernel (CUPTI may be missing here)")
    return kernels, busy(trace, ["gpu_memcpy", "gpu_memset"]) / decoding.steps


def step(setting: Setting) -> None:
    """Time of a step outside kernels, and its share of the step."""
    counts = setting.choose((1, 8, 64), (1, 64), (2,))
    decoding = Decoding(setting, "cuda", max(counts))
    for sequences in counts:
        case = f"{sequences} sequences after {decoding.context}"
        setting.attempt(case, partial(_step_case, setting, decoding, sequences, case))


def _step_case(setting: Setting, decoding: Decoding, sequences: int, case: str) -> None:
    requests = decoding.start(sequences)
    try:
        seconds, spread = summary(decoding.measure())
        setting.row(
            f"step, {case}", seconds * 1e3, "ms", spread, decoding.windows,
            "wall", note=f"{sequences / seconds:.4g} tokens/s", seconds=seconds,
        )  # fmt: skip
        kernels, copies = _profiled(decoding)
    finally:
        decoding.end(requests)
    outside = seconds - kernels
    note = f"kernels {kernels * 1e3:.3g} ms, copies {copies * 1e3:.3g} ms"
    setting.row(
        f"outside kernels, {case}", outside * 1e3, "ms", spread,
        decoding.windows, "wall", outside / seconds, "the step", at_most=0.1, note=note,
    )  # fmt: skip


def exact(setting: Setting) -> None:
    """Steps of cuda-exact and of cuda over the same weights, and prefill of as many tokens."""
    counts = setting.choose((1, 8, 64), (1, 64), (2,))
    times: dict[str, dict[str, list[float]]] = {}
    for name in ("cuda", "cuda-exact"):
        setting.attempt(name, partial(_exact_times, setting, name, counts, times))
        gc.collect()  # a model's worth of weights
    for case, ours in times.get("cuda-exact", {}).items():
        seconds, spread = summary(ours)
        fast = times.get("cuda", {}).get(case)
        ratio = None if fast is None else seconds / summary(fast)[0]
        note = "" if fast is None else f"cuda: {summary(fast)[0] * 1e3:.4g} ms"
        setting.row(
            f"{case}, cuda-exact", seconds * 1e3, "ms", spread, len(ours),
            "wall", ratio, "cuda's time", note=note, seconds=seconds,
        )  # fmt: skip


def _exact_times(
    setting: Setting, name: str, counts: Sequence[int], times: dict[str, dict[str, list[float]]]
) -> None:
    decoding = Decoding(setting, name, max(counts))
    taken = times.setdefault(name, {})
    for sequences in counts:
        requests = decoding.start(sequences)
        try:
            taken[f"step of {sequences} after {decoding.context}"] = decoding.measure()
        finally:
            decoding.end(requests)
    once = quire.SamplingParams(max_new_tokens=1, ignore_eos=True)
    for at in range(setting.choose(4, 3, 2)):
        ids = random.Random(at).choices(range(decoding.shape.vocabulary), k=decoding.context)
        seconds, _ = setting.watch.wall(partial(decoding.engine.generate, [ids], once))
        if at:  # the first compiles
            taken.setdefault(f"prefill of {decoding.context}", []).append(seconds)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
