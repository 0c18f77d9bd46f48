"""Fixtures that several files share."""

import importlib.util
import os
from itertools import cycle
from pathlib import Path

import pytest

from conformance import SUBJECTS
from interpreting import interpret_quickly
from quire.backends import Backend
from tiny import WRITERS

_INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
if _INTERPRETS and importlib.util.find_spec("triton"):
    interpret_quickly()

# Where kernels are compiled: it takes the extra cuda, and a process that does not interpret them.
_COMPILES = not _INTERPRETS and all(importlib.util.find_spec(name) for name in ("torch", "triton"))
_COMPILED = ["test_softcard.py", "test_compiled.py", "test_card_workspace.py"]
collect_ignore = [] if _COMPILES else _COMPILED


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint for each kind of cache, in bf16. Not to be written to."""
    root = tmp_path_factory.mktemp("models")
    return {name: write(root / name, dtype="bf16") for name, write in WRITERS.items()}


@pytest.fixture(params=SUBJECTS, ids=lambda subject: subject.name)
def every_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines made in the test compute with the backend in turn, whatever they ask for.

    Those of the native backend take turns with one, two and three threads.
    """
    subject, threads = request.param, cycle((1, 2, 3))

    def create(name: str, number: int | None = None) -> Backend:
        if not subject.name.startswith("native-"):
            return subject.make()
        from quire.backends.native import NativeBackend

        return NativeBackend(subject.name.removeprefix("native-"), next(threads))

    monkeypatch.setattr("quire.engine.engine.create_backend", create)
