"""Basic blocks as Python functions, and programs of a grid run through them side by side.

All programs are at one place of the code until they want to go different ways; from there on each
group of them goes on alone. Where threads of one program do, which is rare (Triton writes what only
some of them do as guarded instructions), both ways are gone until they meet again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from softcard import matrices
from softcard.computing import bits_of, immediate, pure, size_of
from softcard.counting import Counts
from softcard.memory import Copies, DeviceMemory, Fault, Shared
from softcard.parse import ENDS, Program, Register, Statement

__all__ = ["Code", "Launch", "translate"]

Array = Any
Step = Callable[["State", list[Array]], None]
_NOTHING = (
    "bar", "barrier", "fence", "bar.warp", "membar", "wgmma.fence", "wgmma.commit_group",
    "wgmma.wait_group", "nanosleep",
)  # fmt: skip
_DONE = -1


@dataclass(frozen=True)
class Launch:
    """What all programs of a grid have in common.

    parameters   bits of each, [1]
    counts       where what is done is counted, or None
    """

    memory: DeviceMemory
    parameters: dict[str, Array]
    grid: tuple[int, int, int]
    threads: int
    shared: int
    counts: Counts | None = None


class State:
    """A group of programs that are at the same place: ``programs`` int64 [n], their numbers."""

    def __init__(self, launch: Launch, programs: Array, shared: Shared, copies: Copies) -> None:
        self.launch, self.programs, self.shared, self.copies = launch, programs, shared, copies
        self.active: Array | None = None  # lanes [lanes] that take part; None for all
        self.lanes = len(programs) * launch.threads
        self.whose = np.repeat(np.arange(len(programs)), launch.threads)

    def split(self, chosen: Array) -> "State":
        """Those programs of the group [n] that are chosen."""
        lanes = np.repeat(chosen, self.launch.threads)
        shared = Shared(self.shared.data[chosen])
        return State(self.launch, self.programs[chosen], shared, self.copies.of(lanes))

    def count(self, space: str, what: str, lanes: Array, at: Array, width: int) -> None:
        """An access of ``width`` bytes at addresses [n] by lanes [n], or by all (a slice)."""
        counts = self.launch.counts
        if counts is None or not len(at):
            return
        who = np.arange(self.lanes)[lanes]
        if space == "global":
            counts.device(what, who // 32, at, width)
        else:
            counts.shared(what, who, at, width)

    def full(self, x: Array) -> Array:
        """A register with a number for every lane."""
        return np.broadcast_to(x, (self.lanes,))

    def special(self, name: str) -> Array:
        """%tid, %ctaid, %nctaid, %ntid."""
        what, axis = name[1:].split(".")
        nth, grid = "xyz".index(axis), self.launch.grid
        if what == "nctaid":
            return np.array([grid[nth]], np.uint32)
        if what == "ctaid":
            below = int(np.prod(grid[:nth]))
            one = self.programs // below % grid[nth]
            return np.repeat(one, self.launch.threads).astype(np.uint32)
        if what == "ntid":
            return np.array([self.launch.threads if nth == 0 else 1], np.uint32)
        if what == "tid" and nth == 0:
            threads = np.arange(self.launch.threads, dtype=np.uint32)
            return np.tile(threads, len(self.programs))
        if what == "tid":
            return np.zeros(1, np.uint32)
        raise NotImplementedError(name)


@dataclass(frozen=True)
class Code:
    """A kernel as Python: blocks, each of which gives the number of the next one, or a choice.

    registers   each one before anything is written: all bits are set, [1]
    meets       for each block, the first one that all ways from it come to
    sizes       instructions of each block
    """

    blocks: list[Callable[[State, list[Array]], Any]]
    registers: list[Array]
    meets: list[int]
    sizes: list[int]

    def run(self, launch: Launch, most: int = 1 << 16) -> None:
        """All programs of the grid, as many at a time as have ``most`` threads together."""
        count = int(np.prod(launch.grid))
        each = max(1, most // launch.threads)
        for first in range(0, count, each):
            programs = np.arange(first, min(first + each, count))
            shared = Shared.empty(len(programs), launch.shared)
            state = State(launch, programs, shared, Copies())
            groups = [(state, list(self.registers), 0)]
            with np.errstate(all="ignore"):
                while groups:
                    self._go(*groups.pop(), _DONE, groups)

    def _count(self, state: State, at: int) -> None:
        counts = state.launch.counts
        if counts is not None:
            counts.instructions += self.sizes[at] * (state.lanes // 32)

    def _go(
        self, state: State, registers: list[Array], at: int, stop: int, groups: list[Any]
    ) -> list[Array]:
        """From block ``at`` to block ``stop``; registers there. Programs that part go to groups."""
        while at != stop:
            following = self.blocks[at](state, registers)
            self._count(state, at)
            if following is None:
                at += 1
            elif isinstance(following, int):
                at = following
            else:
                goes, target = following
                chosen = _agreed(goes, state)
                if isinstance(chosen, bool):
                    at = target if chosen else at + 1
                elif len(chosen) == len(state.programs) and state.active is None:
                    groups.append((*_part(state, registers, ~chosen), at + 1))
                    state, registers = _part(state, registers, chosen)
                    at = target
                else:
                    meet = self.meets[at]
                    registers = self._both(state, registers, chosen, (target, at + 1, meet))
                    at = meet
        return registers

    def _both(
        self, state: State, registers: list[Array], goes: Array, ways: tuple[int, int, int]
    ) -> list[Array]:
        """Registers where threads that part meet again."""
        target, other, meet = ways
        active, ends = state.active, []
        for lanes, at in ((goes, target), (~goes, other)):
            state.active = lanes if active is None else lanes & active
            ends.append(self._go(state, registers[:], at, meet, []))
        state.active = active
        return [a if a is b else np.where(goes, a, b) for a, b in zip(*ends, strict=True)]


def _agreed(goes: Array, state: State) -> Array | bool:
    """Which programs jump, [n]; which lanes, where threads differ; one answer if all agree."""
    asked = goes if state.active is None or len(goes) == 1 else goes[state.active]
    if asked.all():
        return True
    if not asked.any():
        return False
    by_program = goes.reshape(-1, state.launch.threads)
    first = by_program[:, 0]
    apart = state.active is not None or (by_program != first[:, None]).any()
    return goes if apart else first.copy()


def _part(state: State, registers: list[Array], chosen: Array) -> tuple[State, list[Array]]:
    lanes = np.repeat(chosen, state.launch.threads)
    kept = [x if len(x) == 1 else x[lanes] for x in registers]
    return state.split(chosen), kept


def _meets(ways: list[list[int]]) -> list[int]:
    """For each block the first that all ways from it to the end pass, by the blocks behind each."""
    end = len(ways)
    behind = [set(range(end + 1)) for _ in ways] + [{end}]  # blocks on all ways to the end
    changed = True
    while changed:
        changed = False
        for at in reversed(range(end)):
            found = set.intersection(*(behind[way] for way in ways[at])) | {at}
            changed |= found != behind[at]
            behind[at] = found
    return [max(behind[at] - {at}, key=lambda each: len(behind[each])) for at in range(end)]


# -- translation -----------------------------------------------------------------------------


def translate(program: Program) -> Code:
    """Raises NotImplementedError for an instruction that is not known here."""
    blocks, ways = [], []
    for nth, block in enumerate(program.blocks):
        writer = _Writer(program)
        for statement in block.statements:
            writer.add(statement)
        blocks.append(writer.function())
        ways.append(_ways(program, nth))
    meets = [_DONE if each == len(blocks) else each for each in _meets(ways)]
    blocks.append(lambda state, registers: _DONE)
    unwritten = [~np.zeros(1, bits_of(kind)) for kind in program.registers]
    sizes = [len(block.statements) for block in program.blocks]
    return Code(blocks, unwritten, meets, [*sizes, 0])


def _ways(program: Program, nth: int) -> list[int]:
    """Blocks that may follow a block; the one behind the last is the end."""
    held, end = program.blocks[nth].statements, len(program.blocks)
    last = held[-1] if held else None
    if last is None or last.name.split(".")[0] not in ENDS:
        return [min(nth + 1, end)]
    target = program.labels[str(last.operands[0])] if last.name.startswith("bra") else end
    return [target] if last.guard is None else [target, nth + 1]


class _Writer:
    """One block's source, and the objects that it names."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._lines: list[str] = []
        self._names: dict[str, Any] = {"where": np.where}

    def function(self) -> Callable[[State, list[Array]], Any]:
        body = "\n".join(f"    {line}" for line in self._lines or ["pass"])
        exec(f"def block(S, R):\n{body}\n", self._names)
        found: Callable[[State, list[Array]], Any] = self._names["block"]
        return found

    def _name(self, thing: Any) -> str:
        name = f"n{len(self._names)}"
        self._names[name] = thing
        return name

    def _number(self, operand: Any, kind: str) -> str:
        """The expression of a source operand."""
        if isinstance(operand, Register):
            return f"R[{operand.nth}]"
        if isinstance(operand, tuple) and operand[0] == "not":
            return f"~R[{operand[1].nth}]"
        if kind == "number":
            return str(int(operand, 0))
        if operand.startswith("%"):
            return f"S.special({operand!r})"
        if operand[0].isdigit() or operand[0] == "-":
            return self._name(immediate(operand, kind))
        return self._name(np.zeros(1, bits_of(kind)))  # a symbol: where shared memory begins

    def add(self, statement: Statement) -> None:
        name, operands = statement.name, statement.operands
        op = name.split(".")[0]
        if op in ENDS:
            target = self._program.labels[str(operands[0])] if op == "bra" else _DONE
            self._lines.append(f"return {self._guarded(statement.guard, str(target))}")
        elif name.startswith(_NOTHING):
            pass
        elif op == "mov":
            self._move(statement)
        elif known := pure(name):
            sources = [self._number(o, k) for o, k in zip(operands[1:], known.takes, strict=True)]
            self._put(statement, operands[0], f"{self._name(known.run)}({', '.join(sources)})")
        else:
            self._lines.append(f"{self._name(self._step(statement))}(S, R)")

    def _guarded(self, guard: tuple[Register, bool] | None, target: str) -> str:
        if guard is None:
            return target
        return f"({'~' if guard[1] else ''}R[{guard[0].nth}], {target})"

    def _put(self, statement: Statement, to: Any, value: str) -> None:
        if statement.guard is not None:
            register, turned = statement.guard
            mask = f"{'~' if turned else ''}R[{register.nth}]"
            value = f"where({mask}, {value}, R[{to.nth}])"
        self._lines.append(f"R[{to.nth}] = {value}")

    def _move(self, statement: Statement) -> None:
        kind, (to, source) = statement.name.split(".")[-1], statement.operands
        size = 1 if kind == "pred" else size_of(kind)
        if isinstance(source, tuple) and source[0] != "not":
            parts = [self._number(each, f"b{size // len(source)}") for each in source]
            self._put(statement, to, f"{self._name(_joined(size))}({', '.join(parts)})")
        elif isinstance(to, tuple):
            apart = self._name(_apart(size, len(to)))
            for nth, part in enumerate(to):
                if part != "_":
                    self._put(statement, part, f"{apart}({self._number(source, kind)}, {nth})")
        else:
            self._put(statement, to, self._number(source, kind))

    def _step(self, statement: Statement) -> Step:
        name = statement.name
        for begin, make in _STEPS.items():
            if name.startswith(begin):
                return _told(make(statement), statement.text)
        raise NotImplementedError(f"an instruction that this card does not have: {statement.text}")


def _told(step: Step, text: str) -> Step:
    def run(state: State, registers: list[Array]) -> None:
        try:
            step(state, registers)
        except Fault as error:
            raise Fault(f"{error}, in: {text}") from None

    return run


def _joined(size: int) -> Callable[..., Array]:
    kind = bits_of(f"b{size}")

    def run(*parts: Array) -> Array:
        each = size // len(parts)
        shape = np.broadcast_shapes(*(part.shape for part in parts))
        out = np.zeros(shape, kind)
        for nth, part in enumerate(parts):
            out |= part.astype(kind) << kind(each * nth)
        return out

    return run


def _apart(size: int, count: int) -> Callable[[Array, int], Array]:
    each = size // count
    kind, small = bits_of(f"b{size}"), bits_of(f"b{each}")
    return lambda x, nth: (x >> kind(each * nth)).astype(small)


# -- instructions that do more than compute ----------------------------------------------------


def _value(operand: Any, kind: str) -> Callable[[State, list[Array]], Array]:
    """What reads a source operand."""
    if isinstance(operand, Register):
        return lambda state, registers: registers[operand.nth]
    number = immediate(str(operand), kind)
    return lambda state, registers: number


def _mask(statement: Statement) -> Callable[[State, list[Array]], Array | None]:
    """Lanes that take part, [lanes]; None for all."""
    if statement.guard is None:
        return lambda state, registers: state.active
    register, turned = statement.guard

    def run(state: State, registers: list[Array]) -> Array | None:
        held = registers[register.nth]
        held = ~held if turned else held
        held = held if state.active is None else held & state.active
        return None if held.all() else state.full(held)

    return run


def _address(operand: Any) -> Callable[[State, list[Array]], Array]:
    """Addresses [lanes]."""
    _, base, offset = operand
    if not isinstance(base, Register):
        return lambda state, registers: state.full(np.array([offset], np.uint64))
    if offset == 0:
        return lambda state, registers: state.full(registers[base.nth])

    def run(state: State, registers: list[Array]) -> Array:
        held = registers[base.nth]
        return state.full(held + held.dtype.type(offset & (1 << 8 * held.itemsize) - 1))

    return run


def _form(name: str) -> tuple[str, int, str]:
    """Space, vector length and type of a load or store."""
    parts = name.split(".")
    count = next((int(p[1:]) for p in parts if p in ("v2", "v4", "v8")), 1)
    return parts[1], count, parts[-1]


def _targets(operand: Any) -> list[Any]:
    return list(operand) if isinstance(operand, tuple) else [operand]


def _load(statement: Statement) -> Step:
    space, count, kind = _form(statement.name)
    targets = _targets(statement.operands[0])
    if space == "param":
        name = statement.operands[1][1]  # type: ignore[index]

        def parameter(state: State, registers: list[Array]) -> None:
            registers[targets[0].nth] = state.launch.parameters[name]

        return parameter
    address, mask = _address(statement.operands[1]), _mask(statement)
    small, width = bits_of(kind), size_of(kind) // 8
    signed = np.dtype(f"i{width}") if kind[0] == "s" else None

    def run(state: State, registers: list[Array]) -> None:
        at, some = address(state, registers), mask(state, registers)
        lanes = slice(None) if some is None else np.flatnonzero(some)
        taken = at[lanes]
        state.count(space, "read", lanes, taken, width * count)
        if not len(taken):
            data = np.empty((0, width * count), np.uint8)
        elif space == "global":
            data = state.launch.memory.load(taken, width * count, state.whose[lanes])
        elif space == "shared":
            data = state.shared.load(state.whose[lanes], taken, width * count)
        else:
            raise NotImplementedError(statement.text)
        numbers = np.ascontiguousarray(data).view(small)
        for nth, target in enumerate(targets):
            if target == "_":
                continue
            held = np.ascontiguousarray(numbers[:, nth])
            wide = bits_of(target.kind)
            if signed is not None:
                held = held.view(signed).astype(np.dtype(f"i{np.dtype(wide).itemsize}")).view(wide)
            elif held.dtype != wide:
                held = held.astype(wide)
            if some is not None:
                out = state.full(registers[target.nth]).copy()
                out[lanes] = held
                held = out
            registers[target.nth] = held

    return run


def _store(statement: Statement) -> Step:
    space, count, kind = _form(statement.name)
    address, mask = _address(statement.operands[0]), _mask(statement)
    sources = [_value(each, kind) for each in _targets(statement.operands[1])]
    small, width = bits_of(kind), size_of(kind) // 8
    assert len(sources) == count

    def run(state: State, registers: list[Array]) -> None:
        at, some = address(state, registers), mask(state, registers)
        lanes = slice(None) if some is None else np.flatnonzero(some)
        taken = at[lanes]
        if not len(taken):
            return
        state.count(space, "write", lanes, taken, width * count)
        held = [state.full(source(state, registers))[lanes].astype(small) for source in sources]
        data = np.stack(held, axis=1).view(np.uint8)
        if space == "global":
            state.launch.memory.store(taken, data, state.whose[lanes])
        else:
            state.shared.store(state.whose[lanes], taken, data)

    return run


def _copy(statement: Statement) -> Step:
    """``cp.async``: read now, there when it is waited for; less than all bytes are zeros behind."""
    name = statement.name
    if name.endswith("commit_group"):
        return lambda state, registers: state.copies.commit()
    if "wait" in name:
        left = 0 if name.endswith("all") else int(str(statement.operands[0]), 0)

        def wait(state: State, registers: list[Array]) -> None:
            if name.endswith("all"):
                state.copies.commit()
            for addresses, data, some in state.copies.arrive(left):
                state.shared.store(state.whose[some], addresses[some], data[some])

        return wait
    to, source, size, *given = statement.operands
    here, there, mask = _address(to), _address(source), _mask(statement)
    width = int(str(size), 0)
    taken = _value(given[0], "b32") if given else None

    def run(state: State, registers: list[Array]) -> None:
        some = mask(state, registers)
        some = np.ones(state.lanes, bool) if some is None else some
        bytes_of = np.full(state.lanes, width) if taken is None else state.full(
            taken(state, registers))  # fmt: skip
        data = np.zeros((state.lanes, width), np.uint8)
        reads = some & (bytes_of > 0)
        if (bytes_of[reads] != width).any():
            raise NotImplementedError("a copy of less than all bytes")
        if reads.any():
            source = there(state, registers)[reads]
            state.count("global", "read", reads, source, width)
            data[reads] = state.launch.memory.load(source, width, state.whose[reads])
        target = here(state, registers).copy()
        state.count("shared", "write", some, target[some], width)
        state.copies.open.append((target, data, some))

    return run


def _shuffle(statement: Statement) -> Step:
    how = statement.name.split(".")[2]
    to, source, by = statement.operands[:3]
    read, lane = _value(source, "b32"), _value(by, "b32")

    def run(state: State, registers: list[Array]) -> None:
        args = read(state, registers), lane(state, registers), state.lanes
        registers[to.nth] = matrices.shuffled(how, *args)  # type: ignore[union-attr]

    return run


def _reduce(statement: Statement) -> Step:
    _, _, how, kind = statement.name.split(".")
    to, source = statement.operands[:2]
    read = _value(source, "b32")

    def run(state: State, registers: list[Array]) -> None:
        found = matrices.reduced(how, kind, read(state, registers), state.lanes)
        registers[to.nth] = found  # type: ignore[union-attr]

    return run


def _rows(at: Array, matrices: int) -> tuple[Array, Array]:
    """Lanes that name rows of matrices, and the rows' addresses."""
    lanes = np.flatnonzero(np.arange(len(at)) % 32 < 8 * matrices)
    return lanes, at[lanes]


def _load_matrices(statement: Statement) -> Step:
    targets, address = _targets(statement.operands[0]), _address(statement.operands[1])
    turned = ".trans" in statement.name

    def run(state: State, registers: list[Array]) -> None:
        at = address(state, registers)
        state.count("shared", "read", *_rows(at, len(targets)), 16)
        args = state.shared, state.whose, at, len(targets), turned
        for target, held in zip(targets, matrices.load_matrices(*args), strict=True):
            registers[target.nth] = held

    return run


def _store_matrices(statement: Statement) -> Step:
    address = _address(statement.operands[0])
    sources = [_value(each, "b32") for each in _targets(statement.operands[1])]
    turned = ".trans" in statement.name

    def run(state: State, registers: list[Array]) -> None:
        pairs = [source(state, registers) for source in sources]
        at = address(state, registers)
        state.count("shared", "write", *_rows(at, len(pairs)), 16)
        matrices.store_matrices(state.shared, state.whose, at, pairs, turned)

    return run


def _read_all(operands: Sequence[Any], kind: str) -> Callable[[State, list[Array]], list[Array]]:
    sources = [_value(each, kind) for each in operands]
    return lambda state, registers: [source(state, registers) for source in sources]


def _multiply(statement: Statement) -> Step:
    to, *operands = map(_targets, statement.operands)
    left, right, sums = (_read_all(each, "b32") for each in operands)

    def run(state: State, registers: list[Array]) -> None:
        args = (each(state, registers) for each in (left, right, sums))
        found = matrices.product(statement.name, *args, state.lanes)
        for target, held in zip(to, found, strict=True):
            registers[target.nth] = held

    return run


def _multiply_wide(statement: Statement) -> Step:
    to, first, second, adds, *flags = statement.operands
    sums, right = _read_all(_targets(to), "b32"), _value(second, "b64")
    fragments = isinstance(first, tuple)
    left = _read_all(first, "b32") if fragments else _value(first, "b64")  # type: ignore[arg-type]
    rest = [_value(adds, "pred"), *(_value(each, "b32") for each in flags)]

    def run(state: State, registers: list[Array]) -> None:
        read = tuple(each(state, registers) for each in rest)
        found = matrices.wide_product(
            statement.name, left(state, registers), right(state, registers),
            sums(state, registers), read, state.shared, state.whose,
        )  # fmt: skip
        for target, held in zip(_targets(to), found, strict=True):
            registers[target.nth] = held

    return run


_STEPS: dict[str, Callable[[Statement], Step]] = {
    "ld.": _load,
    "st.": _store,
    "cp.async.": _copy,
    "shfl.sync.": _shuffle,
    "redux.sync.": _reduce,
    "ldmatrix.": _load_matrices,
    "stmatrix.": _store_matrices,
    "mma.sync.": _multiply,
    "wgmma.mma_async.": _multiply_wide,
}
