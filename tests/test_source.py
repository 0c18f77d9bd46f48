"""From a name to a directory, through the real hub library and a cache laid out by hand."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

from quire.errors import CheckpointError
from quire.models import resolve_model

QUILL = resolve_model(None)


def test_none_and_quill_are_the_model_that_ships() -> None:
    assert resolve_model("quill") == QUILL
    assert (QUILL / "config.json").is_file()


def test_a_directory_is_itself(tmp_path: Path) -> None:
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path)) == tmp_path


def test_a_file_and_a_missing_path_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(CheckpointError, match="is a file; give the directory"):
        resolve_model(file)
    with pytest.raises(CheckpointError, match="no model directory at /no/where/at/all"):
        resolve_model("/no/where/at/all")


def test_a_hub_name_works_from_the_local_cache_without_a_network(tmp_path: Path) -> None:
    revision = "0" * 40
    cached = tmp_path / "hub" / "models--org--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(revision)
    shutil.copytree(QUILL, cached / "snapshots" / revision)
    code = "import quire; print(quire.Engine('org/tiny').directory)"
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=env
    )
    assert Path(done.stdout.strip()) == cached / "snapshots" / revision


def test_a_cache_without_weights_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").touch()
    asked = []

    def snapshot_download(name: str, *, local_files_only: bool, **patterns: list[str]) -> str:
        asked.append(local_files_only)
        assert "*.safetensors" in patterns["allow_patterns"]
        assert not any("bin" in pattern for pattern in patterns["allow_patterns"])
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model("org/name") == tmp_path
    assert asked == [True, False]


def test_a_name_that_the_hub_does_not_know_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(name: str, **options: object) -> str:
        raise OSError(f"404 for {name}\nand a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(
        CheckpointError, match=r"the hub did not give .* OSError: 404 for org/name$"
    ):
        resolve_model("org/name")
