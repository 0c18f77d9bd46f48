"""Tensors of a card in software: they say that they are on a GPU, and lie in host memory."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch.utils._python_dispatch import _disable_current_modes

from softcard.timeline import Stream, Timeline

__all__ = ["CardTensor", "Memory", "raw"]

RUBBISH = 0xFF  # a byte of NaN in every format, and of -1
_PIECE = 512  # bytes that memory is handed out in


class CardTensor(torch.Tensor):
    """A tensor whose numbers a host may not look at before it has them copied."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    held: Any

    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> "CardTensor":
        made: CardTensor = torch.Tensor._make_subclass(cls, numbers)  # type: ignore[attr-defined]
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} was called by a thread that knows of no card in software")

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The card."""
        return torch.device("cuda:0")

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        """True."""
        return True

    def to(self, *args: Any, **named: Any) -> torch.Tensor:  # type: ignore[override]
        """Torch's own takes it for a tensor of the host, and gives it back where that is wanted."""
        copied = named.get("copy", False)
        device, dtype, late, _ = torch._C._nn._parse_to(*args, **named)  # type: ignore[attr-defined]
        dtype = self.dtype if dtype is None else dtype
        if device is not None and device.type == "cpu":
            made: torch.Tensor = torch.ops.aten._to_copy.default(
                self, dtype=dtype, device=device, non_blocking=late
            )
            return made
        return super().to(dtype, copy=copied)

    def cpu(self, *_: Any, **__: Any) -> torch.Tensor:
        """A copy on the host; waits."""
        return self.to("cpu")

    def tolist(self) -> Any:
        """A copy on the host; waits."""
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> NoReturn:
        """As for any tensor of a card."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"CardTensor({list(self.shape)}, {self.dtype})"


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """Another view of the same numbers, for who does the card's work."""
    with torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
        # A view of torch's would hold on to the tensor, and so to its memory.
        alias: torch.Tensor = torch.Tensor._make_subclass(torch.Tensor, tensor)  # type: ignore[attr-defined]
    return alias


@dataclass
class _Block:
    """Memory of one or several tensors, made for a stream, or for graphs: then in their pool."""

    stream: Stream
    bytes: torch.Tensor
    tensors: int = 0
    captured: "tuple[int, int] | None" = None

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        return -(-self.bytes.numel() // _PIECE) * _PIECE


class _GraphPool:
    """Places in the memory that captured steps share, where one's tensors take those of another.

    The smallest free one that is large enough, the rest of which stays free; neighbours are joined.
    """

    def __init__(self) -> None:
        self._free = list[tuple[int, int, int]]()  # size, segment, where it begins
        self._segments = 0

    def take(self, size: int) -> tuple[tuple[int, int], int]:
        """A segment and where in it, and how much new memory that takes."""
        place = next((each for each in sorted(self._free) if each[0] >= size), None)
        if place is None:
            self._segments += 1
            return (self._segments, 0), size
        self._free.remove(place)
        whole, segment, start = place
        if whole > size:
            self._free.append((whole - size, segment, start + size))
        return (segment, start), 0

    def give(self, place: tuple[int, int], size: int) -> None:
        """It is free again."""
        segment, start = place
        end = start + size
        for each in list(self._free):
            if each[1] == segment and each[2] in (end, start - each[0]):
                self._free.remove(each)
                start, end = min(start, each[2]), max(end, each[2] + each[0])
        self._free.append((end - start, segment, start))


class Memory:
    """What a card has, and who holds it, in the manner of torch's caching allocator.

    Memory that is given up may be another tensor's at once, in the order of the stream that it was
    made for: so rubbish is written there, in that order. A stream that still reads it has a race.

    total       bytes; what goes beyond raises :class:`torch.OutOfMemoryError`
    untouched   True: nobody writes to it, rubbish neither
    used        bytes of tensors
    kept        bytes that torch keeps for later ones
    most        bytes of tensors at a time
    """

    def __init__(self, timeline: Timeline, total: int, untouched: bool = False) -> None:
        self._timeline, self.total, self._untouched = timeline, total, untouched
        self.used = self.kept = self.most = 0
        self._blocks: dict[int, _Block] = {}
        self._graphs = _GraphPool()

    def empty(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A plain tensor of rubbish in memory of the card."""
        timeline = self._timeline
        timeline.require_memory_may_grow()
        numbers = torch.empty_strided(tuple(size), tuple(stride), dtype=dtype)
        every = torch.empty(0, dtype=torch.uint8).set_(numbers.untyped_storage())  # type: ignore[call-overload]
        block = _Block(timeline.current, every)
        if timeline.capturing is None:
            self._take(block.size)
        else:
            block.captured, new = self._graphs.take(block.size)
            self._take(new)
        if not self._untouched:
            every.fill_(RUBBISH)
        graph = timeline.capturing
        if graph is not None:
            graph.memory.append(lambda: _spoil(every))
        if every.numel():
            self._blocks[every.data_ptr()] = block
        return numbers

    @property
    def held(self) -> int:
        """Bytes of tensors that live now: the rest of a graph's memory may be another graph's."""
        return sum(block.size for block in self._blocks.values() if block.tensors)

    @property
    def free(self) -> int:
        """Bytes that nobody has."""
        return self.total - self.used - self.kept

    def _take(self, size: int) -> None:
        with self._timeline.lock:
            if size > self.kept and self.used + self.kept + size > self.total:
                self.give_back()
            if self.used + size > self.total:
                free = self.total - self.used
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {size} bytes, of which {free} are free."
                )
            self.kept = max(0, self.kept - size)
            self.used += size
            self.most = max(self.most, self.used)

    def give_back(self) -> None:
        """As :func:`torch.cuda.empty_cache`."""
        self.kept = 0

    def wrapped(self, numbers: torch.Tensor) -> CardTensor:
        """What a host has of numbers of the card."""
        tensor = CardTensor(numbers)
        self.hold(tensor, numbers)
        return tensor

    def hold(self, tensor: CardTensor, numbers: torch.Tensor) -> None:
        """``tensor`` has the memory of ``numbers`` while it lives."""
        before = getattr(tensor, "held", None)
        block = self._blocks.get(numbers.untyped_storage().data_ptr())
        if block is not None:
            block.tensors += 1
            tensor.held = weakref.finalize(tensor, self._let_go, block)
            tensor.held.atexit = False
        if before is not None:
            before()

    def _let_go(self, block: _Block) -> None:
        with self._timeline.lock:
            block.tensors -= 1
            if block.tensors:
                return
            if block.captured:  # graphs keep it
                self._graphs.give(block.captured, block.size)
                return
            self.used -= block.size
            self.kept += block.size
            del self._blocks[block.bytes.data_ptr()]
            every = block.bytes
            if self._untouched:
                return
            block.stream.add(lambda: _spoil(every))


def _spoil(every: torch.Tensor) -> None:
    with _disable_current_modes(), torch.inference_mode():
        every.fill_(RUBBISH)
