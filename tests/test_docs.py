"""The documents agree with the program."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_command_line_reference_is_current() -> None:
    """In a process of its own: click remembers how a test called a command."""
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "make_cli.py", "--print"],
        capture_output=True,
        text=True,
        check=True,
    )
    made = done.stdout
    current = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert made == current, "run: python docs/make_cli.py"


def test_the_readme_tour_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # it saves a session
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tours = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert len(tours) == 1
    exec(compile(tours[0], "README.md", "exec"), {})
    assert "4096)" in capsys.readouterr().out


def test_links_in_documents_lead_somewhere() -> None:
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_architecture_names_the_modules_that_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    source = ROOT / "src" / "quire"
    named = set(re.findall(r"^\s+(\w+\.py)\s", text, flags=re.MULTILINE))
    real = {p.name for p in source.rglob("*.py") if not p.name.startswith("__")}
    cli = {p.name for p in (source / "cli").glob("*.py")}
    assert named - real == set()
    assert real - named - cli == set()
