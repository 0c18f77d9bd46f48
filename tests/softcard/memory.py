"""Memory of the card: that of tensors, and what programs share; every access is checked."""

import ctypes
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["Copies", "DeviceMemory", "Fault", "Shared"]

Array = Any
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Fault(Exception):
    """What a card would stop a kernel for, or should."""


def _words(flat: Array, width: int) -> Array:
    """Bytes [n] as rows [n / width, width]; what is left over at the end is no row."""
    return flat[: len(flat) // width * width].reshape(-1, width)


class DeviceMemory:
    """Tensors that kernels may touch, by their addresses."""

    def __init__(self, known: "DeviceMemory | None" = None) -> None:
        self._pieces: dict[int, Array] = {} if known is None else dict(known._pieces)

    def add(self, address: int, size: int) -> None:
        """Let kernels touch ``size`` bytes from ``address`` on."""
        if size and len(self._pieces.get(address, ())) < size:
            source = (ctypes.c_uint8 * size).from_address(address)
            self._pieces[address] = np.ctypeslib.as_array(source)

    def _piece(self, addresses: Array, width: int) -> tuple[Array, Array] | None:
        """The piece that all addresses [n] lie in, as rows of ``width`` bytes, and their rows."""
        low, high = int(addresses.min()), int(addresses.max()) + width
        for start, flat in self._pieces.items():
            if start <= low and high <= start + len(flat):
                return _words(flat, width), (addresses - np.uint64(start)) // width
        return None

    def _pieces_of(
        self, addresses: Array, width: int, whose: Array, what: str
    ) -> Iterator[tuple[Any, Array, Array]]:
        """Lanes, the piece that they touch and their rows there: one piece for each program."""
        if (addresses % width).any():
            raise Fault(f"{what} of {width} bytes at an address that is no multiple of it")
        every = self._piece(addresses, width)
        if every is not None:
            yield slice(None), *every
            return
        for program in np.unique(whose):
            lanes = np.flatnonzero(whose == program)
            found = self._piece(addresses[lanes], width)
            if found is None:
                low, high = (int(end) for end in (addresses[lanes].min(), addresses[lanes].max()))
                near = min(self._pieces, key=lambda start: abs(start - low), default=0)
                raise Fault(
                    f"{what} of bytes {low - near} to {high + width - near} of a tensor of "
                    f"{len(self._pieces.get(near, ()))} bytes"
                )
            yield lanes, *found

    def load(self, addresses: Array, width: int, whose: Array) -> Array:
        """Bytes [n, width] at addresses uint64 [n], each of a program int64 [n]."""
        out = np.empty((len(addresses), width), np.uint8)
        for lanes, rows, at in self._pieces_of(addresses, width, whose, "a read"):
            out[lanes] = rows[at]
        return out

    def store(self, addresses: Array, data: Array, whose: Array) -> None:
        """Put bytes [n, width] at addresses uint64 [n], each of a program int64 [n]."""
        pieces = list(self._pieces_of(addresses, data.shape[1], whose, "a write"))
        for lanes, rows, at in pieces:
            rows[at] = data[lanes]


class Shared:
    """Shared memory of ``programs``: bytes [programs, size], NaN where nothing was written."""

    def __init__(self, data: Array) -> None:
        self.data = data

    @classmethod
    def empty(cls, programs: int, size: int) -> "Shared":
        """For a launch; a whole number of rows of 16 bytes, so that none is cut short."""
        return cls(np.full((programs, -(-size // 16) * 16), 0xFF, np.uint8))

    def _rows(self, programs: Array, addresses: Array, width: int) -> tuple[Array, Array]:
        size = self.data.shape[1]
        if (addresses % width).any() or int(addresses.max(initial=0)) + width > size:
            raise Fault(f"shared memory of {size} bytes at {int(addresses.max())} + {width}")
        at = programs * (size // width) + addresses.astype(np.int64) // width
        return self.data.reshape(-1, width), at

    def load(self, programs: Array, addresses: Array, width: int) -> Array:
        """Bytes [n, width] at addresses [n] of each one's program int64 [n]."""
        rows, at = self._rows(programs, addresses, width)
        return rows[at]

    def store(self, programs: Array, addresses: Array, data: Array) -> None:
        """Put bytes [n, width]."""
        rows, at = self._rows(programs, addresses, data.shape[1])
        rows[at] = data


@dataclass
class Copies:
    """Asynchronous copies into shared memory, which arrive when they are waited for, not before.

    Each is (addresses [lanes], bytes [lanes, width], which lanes copy [lanes]).
    """

    open: list[tuple[Array, Array, Array]] = field(default_factory=list)
    groups: list[list[tuple[Array, Array, Array]]] = field(default_factory=list)

    def commit(self) -> None:
        """What was begun since the last time is one group."""
        self.groups.append(self.open)
        self.open = []

    def arrive(self, left: int) -> Iterable[tuple[Array, Array, Array]]:
        """Take out all groups but the ``left`` newest."""
        while len(self.groups) > left:
            yield from self.groups.pop(0)

    def of(self, lanes: Array) -> "Copies":
        """Those of some lanes."""

        def some(copies: list[tuple[Array, Array, Array]]) -> list[tuple[Array, Array, Array]]:
            return [tuple(part[lanes] for part in each) for each in copies]  # type: ignore[misc]

        return Copies(some(self.open), list(map(some, self.groups)))
