"""Parts ``ceilings`` and ``linear`` of ``bench/gpu.py``: what the card gives, and our products."""

from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import torch
from gpu_rows import summary
from gpu_timing import Call, Setting, paired

from quire.backends import create_backend

__all__ = ["ceilings", "copying", "linear", "multiplying"]


def copying(setting: Setting) -> tuple[Call, float]:
    """Copies of a large tensor on the device, and the bytes that one reads and writes."""
    count = setting.choose(1 << 30, 1 << 30, 1 << 12)
    source = torch.ones(count // 4, dtype=torch.int32, device=setting.kind)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2.0 * count


def multiplying(setting: Setting) -> tuple[Call, float]:
    """A large product of bf16 matrices (random: zeros are faster), and its operations."""
    n = setting.choose(8192, 8192, 32)
    a, b = (torch.randn(n, n, device=setting.kind).bfloat16() for _ in range(2))
    return lambda: a @ b, 2.0 * n**3


def ceilings(setting: Setting) -> None:
    """Copy bandwidth and the rate of bf16 products."""
    repeats = setting.choose(15, 7, 2)
    copy, moved = copying(setting)
    multiply, operations = multiplying(setting)
    taken = setting.watch.rounds({"copy": copy, "multiply": multiply}, repeats)
    for name, case, work, unit in (
        ("copy", "copy on the device, read + written", moved / 1e9, "GB/s"),
        ("multiply", "bf16 product", operations / 1e12, "TF/s"),
    ):
        seconds, spread = summary(taken[name])
        setting.row(case, work / seconds, unit, spread, repeats, seconds=seconds)


def linear(setting: Setting) -> None:
    """``Backend.linear`` with bf16 weights; float32 activations are a part of the work."""
    backend = create_backend("cuda")
    out, inner = setting.choose((8192, 2048), (8192, 2048), (32, 16))
    values = np.random.default_rng(0).standard_normal((out, inner), np.float32)
    weight = backend.weight(values.astype(ml_dtypes.bfloat16))
    ceiling = {"copy": copying(setting), "multiply": multiplying(setting)}
    for rows in setting.choose((1, 8, 64, 512, 4096), (1, 64, 4096), (2,)):
        case = f"{rows} x {inner} -> {out}, bf16"
        x = torch.randn(rows, inner, device=setting.kind)
        ours = partial(backend.linear, x, weight)
        moved = 2.0 * out * inner + 4.0 * rows * (out + inner)
        work = 2.0 * rows * out * inner, moved
        setting.attempt(case, partial(_linear_case, setting, case, ours, work, ceiling))


def _linear_case(
    setting: Setting, case: str, ours: Call, work: tuple[float, float], ceiling: Any
) -> None:
    """``work``: operations and bytes; ``ceiling``: name to call and its operations, or bytes."""
    (flops, moved), repeats = work, setting.choose(15, 7, 2)
    calls = {"ours": ours, **{name: call for name, (call, _) in ceiling.items()}}
    taken = setting.watch.rounds(calls, repeats)
    seconds, spread = summary(taken["ours"])
    shares = {
        name: done / ceiling[name][1] * paired(taken["ours"], taken[name])
        for name, done in (("copy", moved), ("multiply", flops))
    }
    bound = max(shares, key=lambda name: shares[name])  # the nearer ceiling
    setting.row(
        case, flops / seconds / 1e12, "TF/s", spread, repeats, ratio=shares[bound],
        of=f"{bound} ceiling", seconds=seconds, flops=flops, bytes=moved,
    )  # fmt: skip
