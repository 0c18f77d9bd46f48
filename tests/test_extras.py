"""Extras: which versions they take, and that what does not fit is told and never imported."""

import importlib.metadata
import platform
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from quire.backends import backend_status, create_backend
from quire.cli import cli
from quire.errors import BackendError
from quire.extras import Part, extras, why_off, why_unfit

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))


@pytest.fixture
def old_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where pip has put Triton 3.4 beside a torch that fits."""
    versions = {"torch": "2.13.0+cpu", "triton": "3.4.0"}
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: versions.get(name) or real(name)
    )
    monkeypatch.setitem(sys.modules, "quire.backends.cuda", None)  # an import fails


@pytest.mark.parametrize(
    ("installed", "fits"),
    [
        ("2.9.0", True), ("2.13.0+cpu", True), ("2.10.0.dev20251001+cu130", True),
        ("2.9.0a0+50eac811a6.nv25.9", True), ("2.9.0rc1", True), ("built here", True),
        ("2.8.1", False), ("2.8.0+cu128", False), (None, False),
    ],
)  # fmt: skip
def test_versions_that_an_extra_takes(installed: str | None, fits: bool) -> None:
    assert Part("torch", ">=2.9", installed).fits is fits


def test_parts_are_those_of_the_project() -> None:
    asked = PROJECT["project"]["optional-dependencies"]
    found = extras()
    assert found.keys() == asked.keys()
    for extra, parts in found.items():
        lines = [line.split(";")[0].strip() for line in asked[extra]]
        if platform.system() == "Linux":  # on others some parts are left out
            assert sorted(part.name + part.wanted for part in parts) == sorted(lines)


def test_what_is_missing_and_what_is_old_are_told_at_once() -> None:
    parts = [Part("torch", ">=2.9", "2.8.0"), Part("triton", ">=3.5", None), Part("x", "", "1")]
    assert why_off("cuda", parts) == (
        "triton not installed; torch 2.8.0 is installed, and >=2.9 is needed; "
        "pip install -U 'quire[cuda]'"
    )
    assert why_off("cuda", parts[2:]) is None


def test_a_missing_part_is_not_unfit(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", none)
    assert why_unfit("cuda") is None
    assert {part.installed for part in extras()["cuda"]} == {None}


def test_a_checkout_that_is_not_installed_knows_of_no_extras(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "metadata", none)
    assert extras() == {}
    assert why_unfit("cuda") is None


@pytest.mark.usefixtures("old_triton")
def test_a_backend_whose_extra_is_too_old_is_off_and_says_what_to_do() -> None:
    told = "triton 3.4.0 is installed, and >=3.5 is needed; pip install -U 'quire[cuda]'"
    states = {status.name: status for status in backend_status()}
    for name in ("cuda", "cuda-exact"):
        assert (states[name].available, states[name].detail) == (False, told)
        with pytest.raises(BackendError, match=r"triton 3\.4\.0 is installed, and >=3\.5 is"):
            create_backend(name)
    shown = " ".join(CliRunner().invoke(cli, ["doctor"]).output.split())
    assert f"backend cuda off: {told}" in shown
    assert f"extra cuda off: {told}" in shown
