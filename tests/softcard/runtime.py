"""``torch.cuda`` in software: ops on its tensors, launches and copies are queued as CUDA does."""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from softcard.tensors import RUBBISH, CardTensor, Memory, raw
from softcard.timeline import LATE, Timeline, torch_names

__all__ = ["Runtime"]

aten = torch.ops.aten
_CARD = "cuda:0"

# Ops whose result the host has to know before it can go on.
_WAITED_FOR = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default,
    aten.masked_select.default, aten._unique2.default, aten.repeat_interleave.Tensor,
}  # fmt: skip

_INDEXING = {aten.index.Tensor, aten.index_put_.default}

Launch = Callable[[Any, tuple[int, ...], Sequence[Any], dict[str, Any]], None]


class Runtime:
    """A card of ``total`` bytes whose kernels ``launch`` runs, on plain tensors.

    capability      what it says of itself: 80, 90; and ``shared`` bytes of a program's own memory
    computes        False: nothing is computed or moved, and the host finds zeros; what remains is
                    who asks for which memory, at real sizes
    sent, fetched   copies to the card and from it
    """

    def __init__(
        self,
        launch: Launch,
        *,
        policy: str | int = LATE,
        total: int = 1 << 30,
        processors: int = 4,
        capability: int = 90,
        shared: int = 0,
        computes: bool = True,
    ) -> None:
        self.timeline = Timeline(policy)
        self.memory = Memory(self.timeline, total, untouched=not computes)
        self._computes = computes
        self.sent = self.fetched = 0
        self._launch = launch
        self._card = SimpleNamespace(
            name="a card in software", major=capability // 10, minor=capability % 10,
            total_memory=total, multi_processor_count=processors,
            shared_memory_per_block_optin=shared,
        )  # fmt: skip
        self._pinned: set[int] = set()
        self._mode = _Mode(self)

    # -- ops -------------------------------------------------------------------------------------

    def call(self, func: Any, args: Sequence[Any], named: dict[str, Any]) -> Any:
        """An op of torch, on tensors of the card or of the host."""
        if func is aten._to_copy.default:
            return self._moved(func, args[0], **named)
        if func is aten.copy_.default:
            return self._copied(*args, **named)
        there = any(isinstance(each, CardTensor) for each in tree_leaves((args, named)))
        if not there and not _is_card(named.get("device")):
            return self._on_host(func, args, named)
        if func._can_decompose():  # in inference mode ops come whole
            with self._mode:
                return func.decompose(*args, **named)
        return self._of_card(func, args, named)

    def _of_card(self, func: Any, args: Sequence[Any], named: dict[str, Any]) -> Any:
        if func in _INDEXING:  # places may be the host's
            args = (args[0], tree_map_only(torch.Tensor, self._on_card, args[1]), *args[2:])
        tensors = [each for each in tree_leaves((args, named)) if isinstance(each, torch.Tensor)]
        if any(not isinstance(each, CardTensor) and each.dim() for each in tensors):
            raise RuntimeError(f"{func}: tensors of the host among those of the card")
        if torch.Tag.inplace_view in func.tags or func is aten.set_.source_Tensor:
            return self._set(func, *args)
        if func.is_view:
            out = func(*_raw(args), **_raw(named))
            return tree_map_only(torch.Tensor, self.memory.wrapped, out)
        if func in _WAITED_FOR or (func is aten.index.Tensor and _masks(args[1])):
            self.wait()
            if not self._computes and func is aten._local_scalar_dense.default:
                return 0
            out = func(*_raw(args), **_raw(named))
            return tree_map_only(torch.Tensor, self._taken_in, out)
        return self._queued(func, args, named)

    def _on_host(self, func: Any, args: Sequence[Any], named: dict[str, Any]) -> Any:
        pinned = named.pop("pin_memory", False)
        out = func(*args, **named)
        if pinned:
            storage = out.untyped_storage()
            self._pinned.add(storage.data_ptr())
            weakref.finalize(storage, self._pinned.discard, storage.data_ptr()).atexit = False
        return out

    def _set(self, func: Any, tensor: Any, source: Any) -> Any:
        """Another tensor's memory for this one's."""
        if func is not aten.set_.source_Tensor:
            raise NotImplementedError(f"{func} on a card in software")
        with torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
            func(tensor, source)
        self.memory.hold(tensor, raw(tensor))
        return tensor

    def _queued(self, func: Any, args: Sequence[Any], named: dict[str, Any]) -> Any:
        """Numbers come later; shapes, which the host has at once, from torch's own rules."""
        plain, plainly = _raw(args), {**_raw(named), **_host(named)}
        returns = func._schema.returns
        written = [each.alias_info is not None and each.alias_info.is_write for each in returns]
        if any(written):
            self._do(func, lambda: _compute(func, plain, plainly))
            return _written(func, args, named)
        shaped = func(*_shapes(args), **{**_shapes(named), **_meta(named)})
        made = [self._empty_like(each) for each in tree_leaves(shaped)]
        wrapped = iter([self.memory.wrapped(each) for each in made])
        out = tree_map_only(torch.Tensor, lambda _: next(wrapped), shaped)
        if "empty" in func.name():
            return out

        def work() -> None:
            for into, each in zip(made, tree_leaves(_compute(func, plain, plainly)), strict=True):
                into.copy_(each)

        self._do(func, work)
        return out

    def _empty_like(self, shape: torch.Tensor) -> torch.Tensor:
        return self.memory.empty(shape.size(), shape.stride(), shape.dtype)

    def _on_card(self, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, CardTensor):
            return tensor
        moved: torch.Tensor = self._moved(aten._to_copy.default, tensor, device=_CARD)
        return moved

    def _taken_in(self, numbers: torch.Tensor) -> CardTensor:
        made = self._empty_like(numbers)
        made.copy_(numbers)
        return self.memory.wrapped(made)

    def _do(self, what: Any, work: Callable[[], None]) -> None:
        if not self._computes:
            return

        def told() -> None:
            try:
                # Whoever waits may watch ops; and what was made in inference mode stays there.
                with _disable_current_modes(), torch.inference_mode():
                    work()
            except BaseException as error:
                error.add_note(f"on a card in software, some time after {what} was queued")
                raise

        self.timeline.queue(told)

    # -- copies ----------------------------------------------------------------------------------

    def _moved(self, func: Any, x: Any, **named: Any) -> Any:
        device = named.get("device")
        if not isinstance(x, CardTensor) and not _is_card(device):
            return self._on_host(func, (x,), named)
        if isinstance(x, CardTensor) and (device is None or _is_card(device)):
            return self._queued(func, (x,), {**named, "non_blocking": False})
        shape = func(_shapes(x), **{**named, "device": "meta", "non_blocking": False})
        if isinstance(x, CardTensor):
            here = torch.empty_strided(shape.size(), shape.stride(), dtype=shape.dtype)
            self._fetch(here, x)
            return here
        made = self._empty_like(shape)
        self._send(made, x, non_blocking=bool(named.get("non_blocking")))
        return self.memory.wrapped(made)

    def _copied(self, into: Any, source: Any, non_blocking: bool = False) -> Any:
        if isinstance(into, CardTensor) and isinstance(source, CardTensor):
            to, numbers = raw(into), raw(source)
            self._do("copy_", lambda: to.copy_(numbers))
        elif isinstance(into, CardTensor):
            self._send(raw(into), source, non_blocking)
        elif isinstance(source, CardTensor):
            if non_blocking:
                self._fetch_late(into, source)
            else:
                self._fetch(into, source)
        else:
            into.copy_(source)
        return into

    def _send(self, into: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> None:
        """From pinned memory whenever the card comes to it, from other memory as it is now."""
        late = non_blocking and self._is_pinned(source)
        if not late:
            self.timeline.require_no_capture("a copy from memory that is not pinned")
        numbers = source if late or not self._computes else source.clone()
        self.sent += 1
        self._do("a copy to the card", lambda: into.copy_(numbers))
        if not non_blocking:
            self.wait()

    def _fetch(self, into: torch.Tensor, source: Any) -> None:
        self.wait()
        self.fetched += 1
        into.copy_(raw(source)) if self._computes else into.zero_()

    def _fetch_late(self, into: torch.Tensor, source: Any) -> None:
        if not self._is_pinned(into):
            raise RuntimeError("a copy from the card that nobody waits for, to memory not pinned")
        numbers = raw(source)
        self.fetched += 1
        byte = RUBBISH if self._computes else 0
        rubbish = torch.full((into.numel() * into.element_size(),), byte, dtype=torch.uint8)
        into.copy_(rubbish.view(into.dtype).view(into.shape))  # until it is there
        self._do("a copy from the card", lambda: into.copy_(numbers))

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned

    def wait(self) -> None:
        """The host waits for the current stream."""
        self.timeline.current.synchronize()

    # -- kernels ---------------------------------------------------------------------------------

    def launch(self, kernel: Any, grid: tuple[int, ...], args: Any, named: dict[str, Any]) -> None:
        """Queue a kernel of Triton."""
        tensors = [each for each in args if isinstance(each, torch.Tensor)]
        if not all(isinstance(each, CardTensor) for each in tensors):
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        plain = _raw(args)
        self._do(kernel, lambda: self._launch(kernel, grid, plain, dict(named)))

    # -- torch.cuda ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def plugged_in(self) -> Iterator[None]:
        """Meanwhile ``torch.cuda`` is this card, in every thread that begins now."""
        mode, run = self._mode, threading.Thread.run

        def run_with_card(thread: threading.Thread) -> None:
            with mode:
                run(thread)

        with (
            patch.multiple(torch.cuda, **torch_names(self.timeline), **self._names()),
            patch.object(torch.Tensor, "to", _numbered(torch.Tensor.to)),
            patch.object(torch, "tensor", _made_here(torch.tensor)),
            patch.object(torch, "Generator", _Generator),
            patch.object(threading.Thread, "run", run_with_card),
            mode,
        ):
            yield

    def _names(self) -> dict[str, Any]:
        """What stands for the parts of ``torch.cuda`` that say what there is."""
        memory, card = self.memory, self._card

        def reset() -> None:
            memory.most = memory.used

        return {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "get_device_name": lambda device=None: card.name,
            "get_device_properties": lambda device=None: card,
            "mem_get_info": lambda device=None: (memory.free, memory.total),
            "memory_allocated": lambda device=None: memory.used,
            "max_memory_allocated": lambda device=None: memory.most,
            "reset_peak_memory_stats": lambda device=None: reset(),
            "empty_cache": memory.give_back,
        }


class _Mode(TorchDispatchMode):
    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self._runtime = runtime

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._runtime.call(func, args, dict(kwargs or {}))


class _Generator(torch.Generator):
    """The host's, wherever it is asked for."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        return super().__new__(cls)


def _numbered(function: Any) -> Any:
    """Torch asks a card without a number for it, and was not built for one."""

    def call(*args: Any, **named: Any) -> Any:
        plain = [_CARD if isinstance(each, str) and each == "cuda" else each for each in args]
        if named.get("device") == "cuda":
            named["device"] = _CARD
        return function(*plain, **named)

    return call


def _made_here(function: Any) -> Any:
    """Torch hides the copy that takes a list to a card."""

    def call(data: Any, *, device: Any = None, **named: Any) -> Any:
        made = function(data, **named)
        return made if device is None else made.to(device)

    return call


def _is_card(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _masks(places: Sequence[Any]) -> bool:
    return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in places)


def _raw(tree: Any) -> Any:
    return tree_map_only(CardTensor, raw, tree)


def _shapes(tree: Any) -> Any:
    def shape(t: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="meta")

    return tree_map_only(torch.Tensor, shape, tree)


def _host(named: dict[str, Any]) -> dict[str, Any]:
    return {"device": "cpu"} if named.get("device") is not None else {}


def _meta(named: dict[str, Any]) -> dict[str, Any]:
    return {"device": "meta"} if "device" in named else {}


def _written(func: Any, args: Sequence[Any], named: dict[str, Any]) -> Any:
    """The arguments that an op has changed, which it gives back."""
    declared = func._schema.arguments
    given = dict(zip([each.name for each in declared], args, strict=False)) | named
    changed = [
        given[each.name]
        for each in declared
        if each.alias_info is not None and each.alias_info.is_write
    ]
    return changed[0] if len(func._schema.returns) == 1 else tuple(changed)


def _compute(func: Any, args: Sequence[Any], named: dict[str, Any]) -> Any:
    if func in (aten.mm.dtype, aten.mm.dtype_out):  # a card's only
        x, y, dtype = args
        return torch.mm(x.to(dtype), y.to(dtype), **named)
    return func(*args, **named)
