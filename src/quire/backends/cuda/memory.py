"""Running out of a card's memory, said as Quire says things."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from quire.errors import BackendError

__all__ = ["tells_of_memory"]

Ops = TypeVar("Ops", bound=type)


def tells_of_memory(ops: Ops) -> Ops:
    """A class with a ``device``, whose public methods raise BackendError where memory runs out.

    Nothing is lost then: a step that raises is rolled back, and what torch had kept for later
    is given back to the card, so that another step, or a smaller one, may fit.
    """
    for name, op in vars(ops).items():
        if inspect.isfunction(op) and not name.startswith("_"):
            setattr(ops, name, _told(op))
    return ops


def _told(op: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(op)
    def wrapped(self: Any, *args: Any, **named: Any) -> Any:
        try:
            return op(self, *args, **named)
        except torch.OutOfMemoryError as error:
            asked = str(error).partition(". ")[2].partition(". ")[0] or str(error)
            self.device.give_back()
            raise BackendError(
                f"no memory on {self.device.name} for {op.__name__.replace('_', ' ')}: {asked}; "
                f"{self.device.memory()} are free now. Nothing was changed; lower kv_memory, "
                "max_batch_tokens or max_sequences"
            ) from error

    return wrapped
