"""Parts ``ceilings`` and ``linear`` of ``bench/gpu.py``: what the card gives, and our products."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import torch
from gpu_rows import Row, summary
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
    for name, work, unit in (("copy", moved / 1e9, "GB/s"), ("multiply", operations / 1e12, "TF/s")):
        seconds, spread = summary(taken[name])
        about = {"copy": "copy on the device, read + written", "multiply": "bf16 product"}[name]
        row = Row(setting.part, about, work / seconds, unit, spread, repeats, seconds=seconds)
        setting.emit(row)


def linear(setting: Setting) -> None:
    """``Backend.linear`` with bf16 weights; float32 activations are a part of the work."""
    backend = create_backend("cuda")
    out, inner = setting.choose((8192, 2048), (8192, 2048), (32, 16))
    values = np.random.default_rng(0).standard_normal((out, inner), np.float32)
    weight = backend.weight(values.astype(ml_dtypes.bfloat16))
    ceiling = {"copy": copying(setting), "multiply": multiplying(setting)}
    for rows in setting.choose((1, 8, 64, 512, 4096), (1, 64, 4096), (2,)):
        case = f"{rows} x {inner} -> {out}, bf16"
        setting.attempt(case, _linear_case(setting, backend, weight, rows, case, ceiling))


def _linear_case(
    setting: Setting, backend: Any, weight: Any, rows: int, case: str, ceiling: Any
) -> Callable[[], None]:
    (out, inner), repeats = weight.shape, setting.choose(15, 7, 2)

    def run() -> None:
        x = torch.randn(rows, inner, device=setting.kind)
        calls = {"ours": lambda: backend.linear(x, weight)}
        calls |= {name: call for name, (call, _) in ceiling.items()}
        taken = setting.watch.rounds(calls, repeats)
        seconds, spread = summary(taken["ours"])
        flops, moved = 2.0 * rows * out * inner, 2.0 * out * inner + 4.0 * rows * (out + inner)
        shares = {
            name: work / ceiling[name][1] * paired(taken["ours"], taken[name])
            for name, work in (("copy", moved), ("multiply", flops))
        }
        bound = max(shares, key=lambda name: shares[name])  # the nearer ceiling
        setting.emit(
            Row(
                setting.part, case, flops / seconds / 1e12, "TF/s", spread, repeats,
                ratio=shares[bound], of=f"{bound} ceiling",
                seconds=seconds, flops=flops, bytes=moved,
            )  # fmt: skip
        )

    return run
