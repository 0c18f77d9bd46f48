"""The text quill reads: the running interpreter's standard library, minus the held-out modules.

Only the sources under sysconfig's `stdlib` path are read; site-packages is skipped. Two shares are
kept apart, because the sampler gives them different weights: the library itself and its tests.
"""

from __future__ import annotations

import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path

HELD_OUT = (
    "bisect",
    "colorsys",
    "configparser",
    "csv",
    "fractions",
    "getopt",
    "graphlib",
    "heapq",
    "queue",
    "sched",
    "shelve",
    "statistics",
    "textwrap",
    "zipapp",
)
"""Modules never trained on; neither the network nor the tokenizer sees them or their tests."""

SKIPPED_FOLDERS = frozenset({"site-packages", "__pycache__", "pydoc_data", "tokenizedata"})
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
MINIMUM_CHARACTERS = 200
MAXIMUM_DATA_SHARE = 0.25
"""A file with more digits and backslashes than this share of its characters is a data table."""


@dataclass(frozen=True)
class Corpus:
    """Texts of one interpreter's standard library, each list in path order."""

    python_version: str
    library: list[str]
    tests: list[str]


def standard_library() -> Path:
    """Folder of the running interpreter's standard library sources."""
    return Path(sysconfig.get_path("stdlib"))


def read_corpus(root: Path | None = None) -> Corpus:
    """Read and sort every usable source file under root (the running interpreter's by default)."""
    base = root or standard_library()
    library: list[str] = []
    tests: list[str] = []
    for path in sorted(base.rglob("*.py")):
        parts = path.relative_to(base).parts
        if SKIPPED_FOLDERS.intersection(parts) or is_held_out(path.stem):
            continue
        text = _read(path)
        if text is None or is_data_table(text):
            continue
        (tests if TEST_FOLDERS.intersection(parts) else library).append(text)
    return Corpus(platform.python_version(), library, tests)


def read_held_out_sources(root: Path | None = None) -> dict[str, str]:
    """Texts of the held-out modules by name."""
    base = root or standard_library()
    return {name: (base / f"{name}.py").read_text("utf-8") for name in HELD_OUT}


def is_held_out(stem: str) -> bool:
    """Whether a file of this stem is a held-out module, a test of one, or its C-facing twin."""
    name = stem.removeprefix("test_").lstrip("_")
    return any(name == module or name.startswith(f"{module}_") for module in HELD_OUT)


def is_data_table(text: str) -> bool:
    """Whether the text is too short, or mostly numbers or escapes, to be read as code."""
    if len(text) < MINIMUM_CHARACTERS:
        return True
    data = sum(character.isdigit() or character == "\\" for character in text)
    return data / len(text) > MAXIMUM_DATA_SHARE or "Python Character Mapping Codec" in text[:200]


def _read(path: Path) -> str | None:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        return None  # a few tests are deliberately not UTF-8
