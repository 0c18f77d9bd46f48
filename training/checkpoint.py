"""Checkpoints: model, optimizers and step; loaded as tensors only, nothing is ever unpickled."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from training.model import Quill, QuillConfig


def save_checkpoint(
    path: Path,
    model: Quill,
    optimizers: list[torch.optim.Optimizer],
    progress: dict[str, Any],
) -> None:
    """Write to a neighbour file, then rename: a crash leaves the former checkpoint whole.

    progress holds numbers and strings alone: step, tokens, seconds and the run's settings.
    """
    state = {
        "config": asdict(model.config),
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "progress": progress,
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def model_of(state: dict[str, Any]) -> Quill:
    """The network of a checkpoint, float32 on the CPU."""
    model = Quill(QuillConfig(**state["config"]))
    model.load_state_dict(state["model"])
    return model
