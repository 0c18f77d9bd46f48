"""Session files: what was written comes back, whole; who else reads them; what a crash leaves."""

import errno
import fcntl
import json
import os
import resource
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from quire.cache.session import (
    GroupPages,
    SessionFile,
    read_header,
    read_session,
    verify_session,
    write_session,
)
from quire.errors import CacheError, SessionError
from sessions import IDENTITY, assert_same, digest, expected, session_of, without_sync

MIB = 2**20

GROUPS = st.lists(
    st.tuples(st.integers(1, 300), st.none() | st.integers(1, 70)), min_size=1, max_size=4
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**16), 10**16)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@pytest.fixture(autouse=True, scope="module")
def _fast() -> Iterator[None]:
    with without_sync():
        yield


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "talk.session"


# -- what was written comes back ------------------------------------------------------------------


@settings(deadline=None)  # the disk decides
@given(
    tokens=st.integers(0, 100),
    page_size=st.integers(1, 20),
    groups=GROUPS,
    identity=st.dictionaries(st.text(), st.text()),
    extra=st.dictionaries(st.text(), JSON),
)
def test_what_was_written_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    tokens: int,
    page_size: int,
    groups: list[tuple[int, int | None]],
    identity: dict[str, str],
    extra: dict[str, Any],
) -> None:
    path = tmp_path_factory.getbasetemp() / "drawn.session"
    made = session_of(tokens, page_size, groups)
    session = SessionFile(identity, made.tokens, made.groups, extra)
    write_session(path, session)
    assert_same(read_session(path, expected(groups, page_size, identity=identity)), session)
    verify_session(path)
    header = read_header(path)
    assert (header.identity, header.extra, header.num_tokens) == (identity, extra, tokens)
    assert header.groups == tuple((g.first_page, *g.data.shape) for g in made.groups)
    assert header.file_bytes == path.stat().st_size


@pytest.mark.parametrize("size", [1, MIB - 1, MIB, MIB + 1, 16 * MIB, 33 * MIB + 5])
def test_pieces_and_rounds_end_where_they_should(path: Path, size: int) -> None:
    groups = [(size, None), (7, 20), (size // 3 + 1, None)]
    session = session_of(17, 20, groups)
    write_session(path, session)
    assert_same(read_session(path, expected(groups, 20)), session)
    calls: list[tuple[int, int]] = []
    verify_session(path, lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1] == path.stat().st_size - header_bytes(path)


def header_bytes(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_pages_that_lie_scattered_in_memory_are_stored_in_order(path: Path) -> None:
    data = np.arange(60, dtype=np.uint8).reshape(10, 6)[::2, ::3]
    write_session(path, SessionFile({}, (1,) * 5, (GroupPages(0, data),), {}))
    found = read_session(path, expected([(2, None)], 1, identity={}))
    assert found.groups[0].data.tolist() == data.tolist()


def test_ids_of_numpy_and_the_largest_id_are_stored(path: Path) -> None:
    tokens: tuple[Any, ...] = (np.int64(3), 2**32 - 1)
    write_session(path, SessionFile({}, tokens, (), {}))
    assert read_session(path, expected([], identity={})).tokens == (3, 2**32 - 1)


def test_the_file_says_when_it_was_written(path: Path) -> None:
    before = int(time.time())
    write_session(path, session_of(5, 16, [(10, None)]))
    assert before <= read_header(path).created <= time.time()


# -- who else reads them --------------------------------------------------------------------------


def test_the_safetensors_library_reads_the_same_numbers(path: Path) -> None:
    session = session_of(40, 16, [(100, None), (50, 17), (30, 1)])
    write_session(path, session)
    found = load_file(path)
    assert set(found) == {"checksums", "tokens", "group.0", "group.1", "group.2"}
    assert tuple(found["tokens"].tolist()) == session.tokens
    for index, group in enumerate(session.groups):
        assert np.array_equal(found[f"group.{index}"], group.data)


def test_checksums_are_what_the_document_says(path: Path) -> None:
    session = session_of(300_000, 2**20, [(2 * MIB + 9, None), (11, 1)])
    write_session(path, session)
    found = load_file(path)
    contents = [found["tokens"].tobytes(), *(g.data.tobytes() for g in session.groups)]
    rows = [digest(c[at : at + MIB]) for c in contents for at in range(0, len(c), MIB)]
    assert len(rows) == 2 + 3 + 1
    head = path.read_bytes()[: header_bytes(path)]
    assert found["checksums"].tobytes() == digest(head) + b"".join(rows)
    with safe_open(path, framework="numpy") as file:
        facts = json.loads(file.metadata()["quire.session"])
    assert facts.pop("created") > 0
    assert facts == {
        "version": 1,
        "identity": IDENTITY,
        "first_pages": [0, 0],
        "checksums": digest(b"".join(rows)).hex(),
        "extra": session.extra,
    }


# -- what cannot be stored ------------------------------------------------------------------------


def nested(depth: int) -> list[Any]:
    made: list[Any] = []
    for _ in range(depth):
        made = [made]
    return made


@pytest.mark.parametrize(
    ("part", "value", "reason"),
    [
        ("tokens", (2**32,), "below 2\\*\\*32"),
        ("tokens", (-1,), "below 2\\*\\*32"),
        ("tokens", (1.5,), "token ids"),
        ("extra", {"text": "x" * MIB}, "at most 1048576"),
        ("extra", {"number": float("nan")}, "JSON"),
        ("extra", {"number": float("inf")}, "JSON"),
        ("extra", {"number": 10**18}, "19 digits"),
        ("extra", {"deep": nested(10**5)}, "too deep"),
        ("extra", {"path": Path("x")}, "not JSON serializable"),
        ("extra", {1: "a", "1": "b"}, "stands twice"),
        ("identity", {"key": 3}, "not text"),
        ("identity", {"key": "x" * 2**16}, "at most 65536"),
        ("groups", (GroupPages(0, np.zeros((2, 3), np.int8)),), "int8"),
        ("groups", (GroupPages(0, np.zeros(3, np.uint8)),), r"\[3\]"),
        ("groups", (GroupPages(0, np.zeros((2, 0), np.uint8)),), r"\[2, 0\]"),
        ("groups", (GroupPages(-1, np.zeros((2, 3), np.uint8)),), "page -1"),
        ("groups", (GroupPages(0, np.zeros((1, 1), np.uint8)),) * 257, "257 layer groups"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(
    path: Path, part: str, value: Any, reason: str
) -> None:
    given = {"identity": IDENTITY, "tokens": (), "groups": (), "extra": {}, part: value}
    with pytest.raises(SessionError, match=reason):
        write_session(path, SessionFile(**given))
    assert list(path.parent.iterdir()) == []


def test_a_session_error_is_a_cache_error() -> None:
    assert issubclass(SessionError, CacheError)


# -- writing: all or nothing ----------------------------------------------------------------------

ONE = [(3000, None), (500, 20)]


def failing(monkeypatch: pytest.MonkeyPatch, verb: str, error: BaseException, after: int) -> None:
    real: Callable[..., Any] = getattr(os, verb)
    calls = iter(range(10**6))

    def fail(*args: Any, **kwargs: Any) -> Any:
        if next(calls) >= after:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(os, verb, fail)


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize(
    ("verb", "after"), [("open", 1), ("pwrite", 0), ("pwrite", 2), ("fsync", 0), ("rename", 0)]
)
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_a_failure_leaves_the_old_file_and_nothing_else(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    after: int,
    error: BaseException,
    there: bool,
) -> None:
    if there:
        write_session(path, session_of(40, 16, ONE, seed=1))
    before = {p: p.read_bytes() for p in path.parent.iterdir()}
    raised = SessionError if isinstance(error, OSError) else KeyboardInterrupt
    with monkeypatch.context() as patched:
        failing(patched, verb, error, after)
        with pytest.raises(raised) as caught:
            write_session(path, session_of(40, 16, ONE, seed=2))
    if raised is SessionError:
        assert "No space left" in str(caught.value)
        assert "make room" in str(caught.value)
    assert {p: p.read_bytes() for p in path.parent.iterdir()} == before


def test_a_directory_that_cannot_be_synced_is_reported(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_of(40, 16, ONE)
    with monkeypatch.context() as patched:
        failing(patched, "fsync", OSError(errno.EIO, "Input/output error"), after=1)
        with pytest.raises(SessionError, match="may be lost with power"):
            write_session(path, session)
    assert_same(read_session(path, expected(ONE)), session)


def test_a_limit_on_the_size_of_files_leaves_the_old_file(path: Path) -> None:
    write_session(path, session_of(40, 16, ONE))
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 * MIB, hard))
    try:
        with pytest.raises(SessionError, match="File too large"):
            write_session(path, session_of(40, 16, [(4 * MIB, None)]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_only_its_owner_may_read_a_session(path: Path) -> None:
    path.touch(0o666)
    write_session(path, session_of(40, 16, ONE))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("kind", ["link", "dangling link", "directory", "fifo"])
def test_only_a_regular_file_is_replaced(path: Path, kind: str) -> None:
    target = path.with_name("target")
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(target)
        if kind == "link":
            target.write_text("precious")
    before = sorted(path.parent.iterdir()), path.lstat().st_ino
    with pytest.raises(SessionError, match=r"regular file|symbolic link"):
        write_session(path, session_of(40, 16, ONE))
    assert (sorted(path.parent.iterdir()), path.lstat().st_ino) == before
    assert kind != "link" or target.read_text() == "precious"


def test_a_place_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "talk.session"
    with pytest.raises(SessionError, match=r"missing/talk.session .*No such file"):
        write_session(path, session_of(40, 16, ONE))


def test_the_next_writer_removes_what_a_killed_one_left_but_not_what_is_being_written(
    path: Path,
) -> None:
    left = path.with_name(".quire-0123456789abcdef.tmp")
    left.write_bytes(b"half")
    busy = path.with_name(".quire-fedcba9876543210.tmp")
    other = path.with_name(".quire-notes.tmp")
    other.write_bytes(b"somebody's")
    with busy.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_session(path, session_of(40, 16, ONE))
    assert sorted(path.parent.iterdir()) == sorted([path, busy, other])


def test_writers_of_the_same_file_do_not_disturb_each_other(path: Path) -> None:
    sessions = [session_of(40, 16, ONE, seed) for seed in range(2)]
    write_session(path, sessions[0])

    def write(session: SessionFile) -> None:
        for _ in range(10):
            write_session(path, session)

    writers = [threading.Thread(target=write, args=(session,)) for session in sessions]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        found = read_session(path, expected(ONE))
        assert_same(found, sessions[found.extra == sessions[1].extra])
    assert list(path.parent.iterdir()) == [path]


# -- a writer that is killed ----------------------------------------------------------------------

KILLS = """
import os, random, signal, sys, time
from pathlib import Path
from quire.cache.session import read_session, write_session
from sessions import assert_same, expected, session_of

path, times = Path(sys.argv[1]), int(sys.argv[2])
groups = [(100_000, None), (900_000, 20)]
possible = [session_of(40, 16, groups, seed) for seed in range(2)]
moments = random.Random(0)

def write_for_ever(ready):
    for turn in range(10**9):
        write_session(path, possible[turn % 2])
        if turn == 0:
            os.write(ready, b"!")

for _ in range(times):
    heard, ready = os.pipe()
    writer = os.fork()
    if writer == 0:
        write_for_ever(ready)
    os.read(heard, 1)
    time.sleep(moments.random() * 0.05)
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    os.close(heard)
    os.close(ready)
    found = read_session(path, expected(groups))
    assert_same(found, possible[found.extra == possible[1].extra])
    left = [p.name for p in path.parent.iterdir() if p != path]
    assert len(left) <= 1, "the next writer removes what the last one left"
    print(len(left))
"""


def killed_writers(path: Path, times: int) -> None:
    """Kill a process that overwrites ``path`` at random moments; each time it must be whole."""
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(path), str(times)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    left = done.stdout.split()
    assert len(left) == times
    assert "1" in left, "no writer was killed in the midst of writing"
    write_session(path, session_of(40, 16, ONE))
    assert list(path.parent.iterdir()) == [path]


def test_a_killed_writer_leaves_the_old_or_the_new_file_whole(path: Path) -> None:
    killed_writers(path, 30)


@pytest.mark.slow
def test_two_hundred_killed_writers(path: Path) -> None:
    killed_writers(path, 200)
