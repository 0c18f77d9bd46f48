"""Memory of this process as the system and its allocator count it, for plans to be held against.

Linux with glibc; elsewhere the functions give None.
"""

import ctypes
import platform
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["allocated", "mapped_bytes", "numpy_bytes", "resident", "resident_bytes", "touch_mapped"]

Array = npt.NDArray[Any]

PAGE = 4096
_NUMPY = 389047  # np.lib.tracemalloc_domain, of memory that holds numbers of arrays


class _MallInfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc 2.33 and later."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def _libc(name: str) -> Callable[..., Any] | None:
    if platform.system() != "Linux":
        return None
    return getattr(ctypes.CDLL(None, use_errno=True), name, None)


def allocated() -> int | None:
    """Bytes that ``malloc`` has handed out and not got back, in all arenas.

    What kernels keep between steps is among them; small Python objects are not: they have an
    allocator of their own.
    """
    function = _libc("mallinfo2")
    if function is None:
        return None
    function.restype = _MallInfo  # type: ignore[attr-defined]
    info = function()
    return int(info.uordblks + info.hblkhd)


def resident() -> int | None:
    """Bytes of this process that are in memory (VmRSS)."""
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = [line for line in text.splitlines() if line.startswith("VmRSS:")]
    return int(found[0].split()[1]) * 1024 if found else None


def resident_bytes(arrays: Iterable[Array]) -> int | None:
    """Bytes of ``arrays`` that are in memory, by the system's own pages (mincore)."""
    mincore = _libc("mincore")
    if mincore is None:
        return None
    total = 0
    for array in arrays:
        address = array.__array_interface__["data"][0]
        start, end = address // PAGE * PAGE, address + array.nbytes
        count = -(-(end - start) // PAGE)
        seen = np.zeros(count, np.uint8)
        failed = mincore(
            ctypes.c_void_p(start),
            ctypes.c_size_t(count * PAGE),
            seen.ctypes.data_as(ctypes.c_void_p),
        )
        if failed:
            return None
        total += min(array.nbytes, int((seen & 1).sum()) * PAGE)
    return total


def _mappings(suffix: str) -> Iterable[tuple[int, int]]:
    """Start and end of every mapping of a file whose name ends so."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].endswith(suffix):
            start, end = (int(word, 16) for word in fields[0].split("-"))
            yield start, end


def touch_mapped(suffix: str) -> None:
    """Read a byte of every page of mapped files whose names end so."""
    for start, end in _mappings(suffix):
        pages = (ctypes.c_ubyte * (end - start)).from_address(start)
        np.ctypeslib.as_array(pages)[::PAGE].max(initial=0)


def mapped_bytes(suffix: str) -> int | None:
    """Bytes of mapped files whose names end so that are in memory, each byte of a file once.

    Tensors that are mapped one by one share the pages on which one ends and the next begins.
    """
    if platform.system() != "Linux":
        return None
    spans: dict[str, list[tuple[int, int]]] = {}
    span: tuple[str, int, int] | None = None
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        fields = line.split(maxsplit=5)
        if not fields[0].endswith(":"):
            start, end = (int(word, 16) for word in fields[0].split("-"))
            named = len(fields) > 5 and fields[5].endswith(suffix)
            span = (fields[5], int(fields[2], 16), end - start) if named else None
        elif fields[0] == "Rss:" and span is not None:
            name, offset, size = span
            spans.setdefault(name, []).append((offset, min(size, int(fields[1]) * 1024)))
    return sum(_union(file) for file in spans.values())


def _union(spans: Iterable[tuple[int, int]]) -> int:
    """Bytes that spans (start, length) cover together."""
    total = reached = 0
    for start, length in sorted(spans):
        total += max(0, start + length - max(start, reached))
        reached = max(reached, start + length)
    return total


def numpy_bytes() -> int:
    """Bytes of NumPy's arrays that ``tracemalloc`` has seen since it was started."""
    own = tracemalloc.DomainFilter(True, _NUMPY)
    found = tracemalloc.take_snapshot().filter_traces([own])
    return sum(trace.size for trace in found.traces)
