"""The programs in examples/ run as they stand, and docs/tour.md shows what they print."""

import ast
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from conformance import ALL_SUBJECTS, SUBJECTS, Subject
from quire.backends import Backend
from quire.backends.reference import ReferenceBackend

ROOT = Path(__file__).parents[1]
MAKER: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "make_tour.py"))
TOUR = ROOT / "docs" / "tour.md"

ALL_PROGRAMS = pytest.mark.parametrize("program", MAKER["PROGRAMS"], ids=lambda path: path.stem)

# The others say themselves what computes: another backend would change nothing.
FREE_TO_CHOOSE = [
    path for path in MAKER["PROGRAMS"] if 'backend="reference"' not in path.read_text("utf-8")
]

# Without the native backend programs say on stderr that they are slow.
NATIVE = pytest.mark.skipif(len(SUBJECTS) == 1, reason="Quire was built without a compiler")


def shown(program: Path) -> str:
    """What the tour says that ``program`` prints."""
    section = TOUR.read_text(encoding="utf-8").partition(f"(../examples/{program.name})")[2]
    return section.partition("```text\n")[2].partition("```\n")[0]


@NATIVE
@ALL_PROGRAMS
def test_a_program_prints_what_the_tour_shows(program: Path) -> None:
    assert MAKER["run"](program).rstrip() + "\n" == shown(program), "run: python docs/make_tour.py"


def test_the_tour_is_current() -> None:
    """All of it but what programs print, which is the test above."""
    wanted = TOUR.read_text(encoding="utf-8")
    assert MAKER["tour"](shown) == wanted, "run: python docs/make_tour.py"


@ALL_PROGRAMS
def test_a_program_needs_the_base_install_alone_and_is_short(program: Path) -> None:
    source = program.read_text(encoding="utf-8")
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).partition(".")[0])
    assert imported - set(sys.stdlib_module_names) <= {"quire", "numpy", "safetensors"}
    assert len(source.splitlines()) <= 115


@pytest.mark.slow
@ALL_SUBJECTS
@pytest.mark.parametrize("program", FREE_TO_CHOOSE, ids=lambda path: path.stem)
def test_every_backend_prints_the_same(
    program: Path,
    subject: Subject,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def create(name: str = "auto", threads: int | None = None) -> Backend:
        return ReferenceBackend() if name == "reference" else subject.make()

    monkeypatch.setattr("quire.backends.create_backend", create)
    monkeypatch.setattr("quire.engine.engine.create_backend", create)
    runpy.run_path(str(program), run_name="__main__")
    assert capsys.readouterr().out.rstrip() + "\n" == shown(program)
