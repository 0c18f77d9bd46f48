"""PTX text to statements in basic blocks (PTX ISA, chapters 4 and 9)."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["ENDS", "Block", "Program", "Register", "Statement", "parse"]

_REG = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
_GUARD = re.compile(r"@(!?)([%\w$]+)\s+(.*)", re.DOTALL)
ENDS = ("bra", "ret", "exit")


@dataclass(frozen=True)
class Register:
    """One of the kernel's: ``kind`` is its declared type, ``pred`` or ``b16`` to ``b64``."""

    nth: int
    kind: str


@dataclass(frozen=True)
class Statement:
    """An instruction. ``guard``: (register, whether it is to be false), or None.

    Operands are registers, texts of immediates and symbols, tuples for vectors, and ``("at", base,
    offset)`` for addresses; a negated predicate is ``("not", register)``.
    """

    name: str
    operands: tuple[object, ...]
    guard: tuple[Register, bool] | None
    text: str


@dataclass
class Block:
    """Statements, of which at most the last one jumps; else the next block follows."""

    statements: list[Statement] = field(default_factory=list)


@dataclass
class Program:
    """A kernel: names of its parameters, kinds of its registers, blocks, and labels of blocks."""

    parameters: list[str]
    registers: list[str]
    blocks: list[Block]
    labels: dict[str, int]


def parse(text: str) -> Program:
    """The one kernel in ``text``. Raises ValueError for what is not understood."""
    entry = re.search(r"\.visible\s+\.entry\s+\w+\s*\((.*?)\)", text, re.DOTALL)
    if entry is None:
        raise ValueError("there is no kernel in this PTX")
    parameters = re.findall(r"(\w+)\s*(?:,|$)", entry[1].strip())
    reader = _Reader()
    for kind, piece in _pieces(text, text.index("{", entry.end()) + 1):
        reader.take(kind, piece)
    return Program(parameters, reader.kinds, reader.blocks, reader.labels)


def _pieces(text: str, start: int) -> Iterator[tuple[str, str]]:
    """Statements, labels and braces of scopes, until the brace that closes the kernel."""
    lines = text[start:].splitlines()
    kept = [re.sub(r"//.*", "", line) for line in lines if not re.match(r"\s*\.(loc|file)\b", line)]
    depth, held = 1, ""
    for char in "\n".join(kept):
        blank = not held.strip()
        if char == ";":
            yield "statement", held.strip()
            held = ""
        elif char == ":" and re.fullmatch(r"\s*[$\w]+", held):
            yield "label", held.strip()
            held = ""
        elif char in "{}" and blank:
            depth += 1 if char == "{" else -1
            if depth == 0:
                return
            yield ("open" if char == "{" else "close"), ""
            held = ""
        else:
            held += char


class _Reader:
    def __init__(self) -> None:
        self.kinds = list[str]()
        self.blocks, self.labels = [Block()], dict[str, int]()
        self._scopes: list[dict[str, Register]] = [{}]

    def take(self, kind: str, piece: str) -> None:
        if kind == "open":
            self._scopes.append({})
        elif kind == "close":
            self._scopes.pop()
        elif kind == "label" and not piece.startswith(("$L__tmp", "$L__func")):  # of lines
            if self.blocks[-1].statements:
                self.blocks.append(Block())
            self.labels[piece] = len(self.blocks) - 1
        elif kind == "statement" and (found := _REG.match(piece)):
            self._declare(found[1], found[2])
        elif kind == "statement" and piece and not piece.startswith(".pragma"):
            self._instruction(piece)

    def _declare(self, kind: str, names: str) -> None:
        kind = {"f32": "b32", "f64": "b64"}.get(kind, kind)
        kind = re.sub(r"^[us](\d+)$", r"b\1", kind)
        for name in map(str.strip, names.split(",")):
            many = re.fullmatch(r"(.*)<(\d+)>", name)
            each = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]
            for one in each:
                self._scopes[-1][one] = Register(len(self.kinds), kind)
                self.kinds.append(kind)

    def _instruction(self, text: str) -> None:
        guard, rest = None, text
        if found := _GUARD.match(text):
            register = self._find(found[2])
            if register is None:
                raise ValueError(f"no such predicate: {text}")
            guard, rest = (register, found[1] == "!"), found[3]
        name, *more = re.split(r"\s+", rest, maxsplit=1)
        operands = tuple(self._operand(each) for each in _split(more[0] if more else ""))
        self.blocks[-1].statements.append(Statement(name, operands, guard, text))
        if name.split(".")[0] in ENDS:
            self.blocks.append(Block())

    def _find(self, name: str) -> Register | None:
        return next((scope[name] for scope in reversed(self._scopes) if name in scope), None)

    def _operand(self, text: str) -> object:
        if text.startswith("{"):
            return tuple(self._operand(each) for each in _split(text[1:-1]))
        if text.startswith("["):
            base, _, offset = text[1:-1].replace(" ", "").partition("+")
            return ("at", self._operand(base), int(offset or "0", 0))
        if text.startswith("!"):
            return ("not", self._operand(text[1:]))
        return self._find(text) or text


def _split(text: str) -> list[str]:
    """At commas that are not inside of brackets."""
    parts, depth, held = [], 0, ""
    for char in text.strip():
        depth += (char in "{[") - (char in "}]")
        if char == "," and depth == 0:
            parts.append(held.strip())
            held = ""
        else:
            held += char
    return [*parts, held.strip()] if held.strip() else parts
