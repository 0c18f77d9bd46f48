"""Triton's interpreter, without what it does again and again.

It puts its own functions in the places of the language's at each launch, and anew whenever a kernel
calls a function: a third of the time that our kernels take there. Nobody else wants the language in
a process that interprets, so that once for each module with kernels is enough. It makes a table of
all types each time that it asks for NumPy's name of one. It computes whether integers overflow, in
64 bits, but looks at the answer only in its debugging mode: a quarter of the rest. And two fifths
of what is left go into making the same types again for every result, and into finding out that two
shapes are alike.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from types import FunctionType, SimpleNamespace
from typing import Any

__all__ = ["interpret_quickly"]

_LEFT = SimpleNamespace(restore=lambda: None)  # for what a launch would take back


def interpret_quickly() -> None:
    """For the rest of this process, in which TRITON_INTERPRET is set."""
    from triton.language import core
    from triton.runtime import interpreter

    interpreter._patch_lang = _once_a_module(interpreter._patch_lang)
    interpreter._get_np_dtype = _once_a_type(interpreter._get_np_dtype)
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)
    core.block_type.__init__ = _once_a_shape(core.block_type.__init__)
    core.tensor.__init__ = _tensor_of(core)
    semantic = type(interpreter.interpreter_semantic)
    semantic.broadcast_impl_value = _unless_alike(semantic.broadcast_impl_value)


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


def _once_a_shape(make: Callable[[Any, Any, Any], None]) -> Callable[[Any, Any, Any], None]:
    """Types of blocks of one kind and shape are alike, and never changed."""
    known = dict[tuple[Any, ...], dict[str, Any]]()

    def init(self: Any, element: Any, shape: Any) -> None:
        space = getattr(element, "address_space", None)  # which its name does not say
        key = (element.name, space, *(getattr(size, "value", size) for size in shape))
        if key not in known:
            make(self, element, shape)
            known[key] = dict(vars(self))
        vars(self).update(known[key])

    return init


def _tensor_of(core: Any) -> Callable[[Any, Any, Any], None]:
    """What a tensor says of itself, made once for each shape."""
    known = {(): (core.constexpr(1), core.tuple([]))}

    def init(self: Any, handle: Any, kind: Any) -> None:
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        shape = (*kind.shape.values,) if kind.is_block() else ()
        if shape not in known:
            sizes = core.tuple([core.constexpr(size) for size in shape])
            known[shape] = core.constexpr(math.prod(shape)), sizes
        self.numel, self.shape = known[shape]

    return init


def _unless_alike(broadcast: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    """Tensors of one shape, and two scalars, are given back as they are."""

    def broadcast_value(self: Any, one: Any, other: Any) -> Any:
        blocks = one.type.is_block(), other.type.is_block()
        if blocks == (False, False):
            return one, other
        if blocks == (True, True) and one.type.shape.values == other.type.shape.values:
            return one, other
        return broadcast(self, one, other)

    return broadcast_value
