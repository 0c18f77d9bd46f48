"""Write docs/tour.md from the programs in examples/ and what they print now.

tests/test_examples.py checks that it is current.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

__all__ = ["PROGRAMS", "run", "tour"]

ROOT = Path(__file__).parents[1]
PATH = ROOT / "docs" / "tour.md"
PROGRAMS = tuple(sorted((ROOT / "examples").glob("[0-9]*.py")))

_HEAD = """# A tour

Short programs, each with what it prints; made by `docs/make_tour.py`, run by the tests. They need
nothing but Quire and NumPy, and no network; `python examples/01_cache_basics.py` in a checkout runs
the first. What they claim they assert. What they print is the same on every processor: where low
bits depend on its kernels, figures are rounded so that they do not show.
"""


def run(program: Path) -> str:
    """What a program prints, in a process of its own, offline.

    Raises RuntimeError if it fails or has anything to say on stderr.
    """
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        encoding="utf-8",
        env=offline,
        check=False,
    )
    if done.returncode or done.stderr:
        raise RuntimeError(f"{program.name} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


def tour(output_of: Callable[[Path], str] = run) -> str:
    """The whole page; ``output_of`` runs a program."""
    titles = [(program, *_parts(program)) for program in PROGRAMS]
    contents = [
        f"{number}. [{title}](#{program.stem.replace('_', '-')})"
        for number, (program, title, _, _) in enumerate(titles, 1)
    ]
    parts = [_HEAD, "\n".join(contents) + "\n"]
    for program, title, text, code in titles:
        anchor = f'<a id="{program.stem.replace("_", "-")}"></a>'
        source = f"[examples/{program.name}](../examples/{program.name})"
        parts.append(f"{anchor}\n\n## {title}\n\n{source}\n\n{text}\n")
        parts.append(f"```python\n{code}\n```\n\nIt prints:\n")
        parts.append(f"```text\n{output_of(program).rstrip()}\n```\n")
    return "\n".join(parts)


def _parts(program: Path) -> tuple[str, str, str]:
    """Title and text from the docstring of a program, and its code without that."""
    source = program.read_text(encoding="utf-8")
    [docstring, *rest] = ast.parse(source).body
    title, _, text = (ast.get_docstring(ast.Module([docstring], [])) or "").partition("\n\n")
    code = "\n".join(source.splitlines()[rest[0].lineno - 1 :])
    return title.removesuffix("."), text, code


if __name__ == "__main__":
    PATH.write_text(tour(), encoding="utf-8")
