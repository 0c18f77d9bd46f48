"""What the compiler made of a kernel, read from its machine code: for ``cuda_compile.py``.

The loop that is described is the one over keys that need no masks, found by the line that calls it
(``nvdisasm`` prints the lines that instructions come from). Not known from code alone: how long
instructions wait, how shared memory is banked, what the clock does.
"""

import inspect
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

from quire.backends.cuda import columns, walking

__all__ = ["Listing", "read"]

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_LINE = re.compile(r'//## File "([^"]*)", line (\d+)(?: inlined at "([^"]*)", line (\d+))?')
_INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(.*?)\s*;")
_REGISTERS, _WARPS, _PROGRAMS = 65_536, 64, 32  # of a processor
_SHARED = {80: 167_936, 90: 233_472}  # bytes of a processor; 1 KiB of each program is the system's


@dataclass(frozen=True)
class Listing:
    """One kernel.

    registers, local   of a thread: registers, bytes of memory (spilled ones and arrays)
    programs           how many of them a processor holds at a time
    loop               instructions of a warp in one turn of the loop, by name; or none
    """

    registers: int
    local: int
    programs: int
    loop: Counter[str]

    def of(self, *names: str) -> int:
        """Instructions of the loop whose names begin so."""
        return sum(count for name, count in self.loop.items() if name.startswith(names))

    def loads(self) -> str:
        """Reads of device memory in the loop, bytes of a thread each: copies, or to registers."""
        widths: Counter[str] = Counter()
        for name, count in self.loop.items():
            if name.startswith(("LDGSTS", "LDG.")):
                bits = next((p for p in reversed(name.split(".")) if p in _BITS), "32")
                kind = "copies" if name.startswith("LDGSTS") else "loads"
                widths[f"{kind} of {_BITS.get(bits, 4)} B"] += count
        return ", ".join(f"{count} {what}" for what, count in sorted(widths.items()))


_BITS = {"128": 16, "64": 8, "32": 4, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def read(cubin: bytes, warps: int, shared: int, capability: int) -> Listing:
    """What ``cubin`` is, for a program of ``warps`` with ``shared`` bytes of shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-gi", "-c", file.name)
    registers = max(map(int, re.findall(r"REG:(\d+)", usage)))
    local = max(map(int, re.findall(r"STACK:(\d+)", usage)))
    each = -(-registers // 8) * 8 * 32 * warps
    room = _SHARED.get(capability, min(_SHARED.values())) // (shared + 1024)
    programs = min(_REGISTERS // each, room, _WARPS // warps, _PROGRAMS)
    return Listing(registers, local, programs, _main_loop(code))


def _run(tool: str, *arguments: str) -> str:
    command = [_TOOLS / tool, *arguments]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout


def _unmasked_calls() -> set[tuple[str, int]]:
    """The lines that walk blocks without masks: the second calls of the functions that do."""
    found = set()
    rooms = (walking, walking._walk_range), (columns, columns._walk_range_of_columns)
    for room, function in rooms:
        lines, start = inspect.getsourcelines(function.fn)
        calls = [start + i for i, text in enumerate(lines) if " = _walk" in text]
        found.add((Path(room.__file__).name, calls[1]))
    return found


def _main_loop(code: str) -> Counter[str]:
    """Instructions of the shortest loop with products that mostly comes from that call."""
    instructions, labels = _parsed(code)
    wanted, found = _unmasked_calls(), list[Counter[str]]()
    for end, (text, _) in enumerate(instructions):
        target = re.search(r"\bBRA\b.*?(\.L_x_\d+)", text)
        begin = labels.get(target[1], end + 1) if target else end + 1
        body = instructions[begin : end + 1]
        names = Counter(_name(each) for each, _ in body)
        ours = sum(not wanted.isdisjoint(lines) for _, lines in body)
        if any("MMA" in name for name in names) and ours > 0.3 * len(body):
            found.append(names)
    return min(found, key=lambda names: names.total(), default=Counter())


def _parsed(code: str) -> tuple[list[tuple[str, set[tuple[str, int]]]], dict[str, int]]:
    """Instructions, each with the lines (file and number) that it comes from; labels."""
    instructions: list[tuple[str, set[tuple[str, int]]]] = []
    labels: dict[str, int] = {}
    lines, open_group = set[tuple[str, int]](), False
    for text in map(str.strip, code.splitlines()):
        if place := _LINE.match(text):
            if not open_group:
                lines, open_group = set(), True
            pairs = (place[1], place[2]), (place[3], place[4])
            lines |= {(Path(file).name, int(n)) for file, n in pairs if file}
        elif label := re.match(r"(\.L_x_\d+):", text):
            labels[label[1]] = len(instructions)
        elif instruction := _INSTRUCTION.match(text):
            open_group = False
            instructions.append((instruction[1], lines))
    return instructions, labels


def _name(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]
