"""Learning-rate schedule and optimizers.

Sources: warmup-stable-decay, Hu et al. 2024 (arXiv:2404.06395); Muon, Jordan et al. 2024
(kellerjordan.github.io/posts/muon), with the update scaled to AdamW's RMS as in Liu et al. 2025
(arXiv:2502.16982); AdamW, Loshchilov & Hutter 2017 (arXiv:1711.05101).
"""

from __future__ import annotations

import torch

from training.model import Quill

WARMUP_STEPS = 60


def rate_factor(step: int, steps: int, decay_share: float) -> float:
    """Share of the peak rate at step (from 0) of steps: linear up, flat, linear down to 0.

    The way down is decay_share of all steps.

    The flat part does not depend on steps, so a run may be resumed with another total as long as
    its decay has not begun.
    """
    decay = max(1, round(steps * decay_share))
    return min(1.0, (step + 1) / WARMUP_STEPS, max(0, steps - step) / decay)


def make_optimizers(
    model: Quill, name: str, matrix_rate: float, other_rate: float
) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices and AdamW for embedding and norms, or AdamW for all of it."""
    layers = list(model.model.layers.parameters())
    matrices = [parameter for parameter in layers if parameter.ndim == 2]
    norms = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    embedding = [model.model.embed_tokens.weight]
    groups = [
        {"params": embedding, "lr": other_rate, "weight_decay": 0.0},
        {"params": norms, "lr": other_rate, "weight_decay": 0.0},
    ]
    if name == "adamw":
        groups.append({"params": matrices, "lr": other_rate, "weight_decay": 0.1})
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=(0.9, 0.95))]
    if name == "muon":
        muon = torch.optim.Muon(
            matrices, lr=matrix_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        )
        optimizers.append(muon)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def set_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's rate to its peak times factor."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
