"""The cuda backend as it is on a card, its launches, graphs, streams and memory, in software."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import triton
from triton.runtime.interpreter import InterpretedFunction

import quire.backends.cuda
from quire.backends.cuda import backend
from quire.backends.cuda import device as devices
from softcard.card import Card, Driver, shared_memory
from softcard.runtime import Runtime

__all__ = ["whole_card"]


@contextmanager
def whole_card(capability: int | None = None, **options: Any) -> Iterator[Runtime]:
    """Backends that are made meanwhile compute on a card in software, of which they see all.

    capability   of what kernels are compiled for (80, 90); None: Triton interprets them, as
                 TRITON_INTERPRET says for the whole process
    options      of :class:`Runtime`
    """
    says = capability or 90
    options = {"capability": says, "shared": shared_memory(says)} | options
    with ExitStack() as stack:
        if capability is None:
            runtime = Runtime(_interpreted, **options)
            stack.enter_context(patch.object(InterpretedFunction, "run", _queueing(runtime)))
        else:
            card = Card(capability)
            runtime = Runtime(_compiled(card), **options)
            active = patch.object(triton.runtime.driver, "_active", Driver(capability))
            stack.enter_context(active)
            own = triton.runtime.JITFunction.run
            stack.enter_context(
                patch.object(triton.runtime.JITFunction, "run", _queueing(runtime, own))
            )
        stack.enter_context(runtime.plugged_in())
        stack.enter_context(patch.multiple(
            quire.backends.cuda, find_device=_found, why_there_is_none=lambda: None
        ))  # fmt: skip
        stack.enter_context(patch.object(backend, "find_device", _found))
        stack.enter_context(patch.object(devices, "find_device", _found))
        yield runtime


def _found() -> devices.Device:
    return devices.Device("cuda", True)


def _queueing(runtime: Runtime, warmed: Any = None) -> Any:
    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        if warmup:
            return warmed(kernel, *args, grid=grid, warmup=True, **named)
        return runtime.launch(kernel, grid, args, named)

    return run


_interpret = InterpretedFunction.run


def _interpreted(
    kernel: Any, grid: Sequence[int], args: Sequence[Any], named: dict[str, Any]
) -> None:
    del named["enable_fp_fusion"]  # it computes as the source says
    if "HARDWARE" in named:
        named["HARDWARE"] = False  # assembly
    with warnings.catch_warnings():  # a card does not warn of infinities and NaN either
        warnings.simplefilter("ignore", RuntimeWarning)
        _interpret(kernel, *args, grid=grid, warmup=False, **named)


def _compiled(card: Card) -> Any:
    def run(kernel: Any, grid: Sequence[int], args: Sequence[Any], named: dict[str, Any]) -> None:
        card.launch(kernel, grid, args, named)

    return run
