"""The digest that names a checkpoint's weights."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from quire.errors import CheckpointError
from quire.models import digest as module
from quire.models.digest import PIECE, weights_digest


def plainly(files: list[Path]) -> str:
    """The definition, on whole files in memory."""
    parts = []
    for path in files:
        data = path.read_bytes()
        pieces = [data[at : at + PIECE] for at in range(0, max(len(data), 1), PIECE)]
        inner = b"".join(hashlib.sha256(piece).digest() for piece in pieces)
        parts.append(hashlib.sha256(inner).hexdigest())
    return hashlib.sha256("".join(parts).encode()).hexdigest()


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    paths = [tmp_path / f"{n}.safetensors" for n in range(3)]
    for path, size in zip(paths, (0, 1000, 5_000_000), strict=True):
        path.write_bytes(os.urandom(size))
    return paths


@pytest.mark.parametrize("piece", [PIECE, 4_000_000, 5_000_000, 300])
def test_it_is_a_hash_over_pieces(
    files: list[Path], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE", piece)
    monkeypatch.setitem(globals(), "PIECE", piece)
    assert weights_digest(files[:2] if piece == 300 else files) == plainly(
        files[:2] if piece == 300 else files
    )


def test_any_change_of_the_files_is_another_digest(files: list[Path]) -> None:
    seen = {weights_digest(files), weights_digest(files[::-1]), weights_digest(files[1:])}
    data = bytearray(files[2].read_bytes())
    data[-1] ^= 1
    files[2].write_bytes(data)
    seen.add(weights_digest(files))
    assert len(seen) == 4


def test_what_is_remembered_is_not_read_again_until_it_changes(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memo, read = tmp_path / "weights.json", []
    inner = module._file_digest
    monkeypatch.setattr(module, "_file_digest", lambda path: read.append(path) or inner(path))
    first = weights_digest(files, memo)
    assert weights_digest(files, memo) == first == weights_digest(files)
    assert len(read) == 2 * len(files)  # with the memo once, without it once
    read.clear()
    same_size = bytes(1000)
    before = files[1].stat()
    files[1].write_bytes(same_size)
    os.utime(files[1], ns=(before.st_atime_ns, before.st_mtime_ns))  # ctime still tells
    assert weights_digest(files, memo) == plainly(files) != first
    assert read == [files[1]]


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"a": 7}', "[" * 100_000, "\x00"])
def test_a_memo_that_is_not_one_is_ignored(files: list[Path], tmp_path: Path, content: str) -> None:
    memo = tmp_path / "weights.json"
    memo.write_text(content)
    assert weights_digest(files, memo) == plainly(files)
    assert len(json.loads(memo.read_text())) >= len(files)


def test_a_memo_that_cannot_be_written_costs_only_time(files: list[Path], tmp_path: Path) -> None:
    assert weights_digest(files, files[0] / "weights.json") == plainly(files)
    assert weights_digest(files, tmp_path / "new" / "weights.json") == plainly(files)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors cannot be read"):
        weights_digest([tmp_path / "gone.safetensors"])
