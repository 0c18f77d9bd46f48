"""Triton's interpreter, without what it does again and again.

It puts its own functions in the places of the language's at each launch, and anew whenever a kernel
calls a function: a third of the time that our kernels take there. Nobody else wants the language in
a process that interprets, so that once for each module with kernels is enough. It makes a table of
all types each time that it asks for NumPy's name of one. And it computes whether integers overflow,
in 64 bits, but looks at the answer only in its debugging mode: a quarter of the rest.
"""

from collections.abc import Callable
from dataclasses import replace
from types import FunctionType, SimpleNamespace
from typing import Any

__all__ = ["interpret_quickly"]

_LEFT = SimpleNamespace(restore=lambda: None)  # for what a launch would take back


def interpret_quickly() -> None:
    """For the rest of this process, in which TRITON_INTERPRET is set."""
    from triton.runtime import interpreter

    interpreter._patch_lang = _once_a_module(interpreter._patch_lang)
    interpreter._get_np_dtype = _once_a_type(interpreter._get_np_dtype)
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)


def _once_a_module(patch: Callable[[FunctionType], Any]) -> Callable[[FunctionType], Any]:
    patched = dict[int, dict[str, Any]]()

    def patch_lang(function: FunctionType) -> Any:
        names = function.__globals__
        if id(names) not in patched:
            patched[id(names)] = names
            patch(function)
        return _LEFT

    return patch_lang


def _once_a_type(look_up: Callable[[Any], Any]) -> Callable[[Any], Any]:
    known = dict[str, Any]()

    def numpy_type(kind: Any) -> Any:
        scalar = kind.scalar
        if scalar.name not in known:
            known[scalar.name] = look_up(scalar)
        return known[scalar.name]

    return numpy_type
