"""What the disk tier promises beside test_tiers.py: kills, damage, full disks, sharing."""

import contextlib
import json
import os
import pickle
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import tier_programs
from quire.cache import disk_format
from quire.cache.disk import DiskTier
from quire.cache.disk_contents import open_contents
from quire.cache.disk_file import STORE_NAME
from quire.cache.disk_store import MIN_BUDGET, StoreWriter
from quire.cache.tiers import PageRecord
from quire.errors import TierError
from tier_programs import IDENTITY, size
from tier_records import chain, payload, record

AMPLE = 1 << 30


def program(*args: object) -> list[str]:
    return [sys.executable, str(Path(tier_programs.__file__)), *map(str, args)]


def run(*args: object) -> list[str]:
    """Run a program to its end; the lines it printed. A crash of the interpreter fails."""
    done = subprocess.run(program(*args), capture_output=True, text=True, timeout=900, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def tier_of(directory: Path, budget: int = AMPLE, **identity: str) -> DiskTier:
    return DiskTier(directory, budget, IDENTITY | identity)


def fill(directory: Path, pages: list[PageRecord]) -> None:
    """Store page i with the payload of number i."""
    tier = tier_of(directory)
    for i, page in enumerate(pages):
        assert tier.put(page, payload(i, size(i)))
    tier.close()
    assert tier.usage().stored == len(pages)


def damaged(directory: Path) -> list[str]:
    with open_contents(directory) as contents:
        return [damage.why for damage in contents.verify() if damage is not None]


def sql(directory: Path, *statements: str) -> None:
    """Change the database of a store behind its back."""
    db = sqlite3.connect(directory / STORE_NAME)
    with db:
        for statement in statements:
            db.execute(statement)
    db.close()


# -- across processes and time


def test_pages_outlive_the_process(tmp_path: Path) -> None:
    pages = chain(0, 12)
    fill(tmp_path, pages)
    tier = tier_of(tmp_path)
    assert tier.contains([page.key for page in pages]) == [True] * 12
    assert [tier.get(page) for page in pages] == [payload(i, size(i)) for i in range(12)]
    tier.close()
    assert damaged(tmp_path) == []


def test_pages_of_another_identity_are_not_found_and_share_the_budget(tmp_path: Path) -> None:
    page = record(1)
    fill(tmp_path, [page])
    other = tier_of(tmp_path, weights="4567")
    assert other.contains([page.key]) == [False]
    assert other.get(page) is None
    assert other.put(page, b"other" * 100)
    other.flush()
    assert (other.get(page), other.usage().pages) == (b"other" * 100, 2)
    other.close()
    renamed = tier_of(tmp_path, model="moved")  # a name for people only
    assert renamed.get(page) == payload(0, size(0))
    renamed.close()


def test_uses_are_counted_and_kept(tmp_path: Path) -> None:
    pages = chain(0, 3)
    fill(tmp_path, pages)
    for _ in range(2):
        tier = tier_of(tmp_path)
        for page in (*pages, pages[0]):
            assert tier.get(page) is not None
        tier.close()
    with open_contents(tmp_path) as contents:
        (prefix,) = contents.identities()[0].prefixes
    assert prefix.hits == 4


def test_a_smaller_budget_shrinks_the_file_first(tmp_path: Path) -> None:
    tier = tier_of(tmp_path)
    for i in range(40):
        tier.put(record(i), payload(i, 500_000))
        tier.flush()
    tier.close()
    assert tier.usage().bytes_used > 20_000_000
    tier = tier_of(tmp_path, MIN_BUDGET)
    tier.flush()
    usage = tier.usage()
    assert usage.bytes_used <= MIN_BUDGET
    assert usage.evicted + usage.pages == 40
    assert usage.pages > 8
    tier.close()
    assert damaged(tmp_path) == []


def test_two_processes_share_one_store_and_its_budget(tmp_path: Path) -> None:
    most = _watch_two(tmp_path, steps=500)
    assert MIN_BUDGET * 0.7 < most <= MIN_BUDGET


@pytest.mark.slow
def test_two_processes_share_one_store_for_long(tmp_path: Path) -> None:
    assert _watch_two(tmp_path, steps=20_000) <= MIN_BUDGET


def _watch_two(directory: Path, steps: int) -> int:
    """The most bytes that the files took while two processes used them."""
    running = [
        subprocess.Popen(
            program("share", directory, MIN_BUDGET, seed, steps),
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in range(2)
    ]
    most = 0
    while any(process.poll() is None for process in running):
        total = 0
        for file in directory.iterdir():
            try:
                total += file.stat().st_size
            except FileNotFoundError:
                continue
        most = max(most, total)
        time.sleep(0.0005)
    for process in running:
        counts, states = process.communicate()[0].splitlines()
        stored, hits, wrong, bad, evicted = map(int, counts.split())
        assert (process.returncode, wrong, bad, states) == (0, 0, 0, "None None")
        assert stored > 10
        assert hits > 10
        assert evicted > 0
    assert damaged(directory) == []
    return most


def test_no_transaction_journals_more_than_its_share_of_the_budget(tmp_path: Path) -> None:
    pages = chain(0, 900)
    fill_sizes = [2_000 if i % 5 else 80_000 for i in range(900)]
    tier = tier_of(tmp_path)
    for i, page in enumerate(pages):
        assert tier.put(page, payload(i, fill_sizes[i]))
    tier.close()
    store = StoreWriter(tmp_path / STORE_NAME, MIN_BUDGET)
    with _watch(tmp_path / f"{STORE_NAME}-journal") as most:
        store.touch(dict.fromkeys(range(1, 901), (10**10, 1)))
        store.remove(1, [page.key for page in pages[::3]])
        assert store.trim(store.max_pages) > 0  # evicts, and moves pages from the end of the file
        store.trim(10)
    store.close()
    assert 100_000 < most[0] <= 3 << 19
    assert (tmp_path / STORE_NAME).stat().st_size < 200_000
    assert damaged(tmp_path) == []


@contextlib.contextmanager
def _watch(file: Path) -> Iterator[list[int]]:
    """The most bytes that ``file`` took, in a list of one."""
    most, done = [0], threading.Event()

    def look() -> None:
        while not done.wait(0.0002):
            with contextlib.suppress(FileNotFoundError):
                most[0] = max(most[0], file.stat().st_size)

    thread = threading.Thread(target=look)
    thread.start()
    yield most
    done.set()
    thread.join()


# -- kills


@pytest.mark.parametrize("budget", [AMPLE, MIN_BUDGET])
def test_a_killed_writer_loses_nothing_that_was_stored(tmp_path: Path, budget: int) -> None:
    _kill(tmp_path, times=8, budget=budget)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [AMPLE, MIN_BUDGET])
def test_a_writer_killed_two_hundred_times(tmp_path: Path, budget: int) -> None:
    _kill(tmp_path, times=200, budget=budget)


def _kill(root: Path, times: int, budget: int) -> None:
    """Writers are forks of one process: starting Python takes longer than they run."""
    generator, pipe = random.Random(budget), root / "told"
    os.mkfifo(pipe)
    server = subprocess.Popen(
        program("serve"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with server as forks:
        assert forks.stdin is not None
        assert forks.stdout is not None
        for turn in range(times):
            directory = root / str(turn // 10)  # ten kills on each store
            writer = ["write", str(directory), str(budget), str(10_000 * turn), "5000"]
            print(json.dumps([str(pipe), *writer]), file=forks.stdin, flush=True)
            process = int(forks.stdout.readline())
            with pipe.open() as lines:
                told = [lines.readline()]
                time.sleep(generator.uniform(0, 0.15))
                os.kill(process, signal.SIGKILL)
                told += lines.readlines()
            assert int(forks.stdout.readline()) == -signal.SIGKILL
            # The kill may cut the last line short.
            stored = [int(i) for line in told if line.endswith("\n") for i in line.split()]
            assert stored
            _assert_kept(directory, stored, budget)


def _assert_kept(directory: Path, stored: list[int], budget: int) -> None:
    assert sum(file.stat().st_size for file in directory.iterdir()) <= budget
    tier = tier_of(directory, budget)
    assert tier.off is None
    got = [tier.get(record(i)) for i in stored]
    wrong = [
        i for i, data in zip(stored, got, strict=True) if data not in (None, payload(i, size(i)))
    ]
    lost = [i for i, data in zip(stored, got, strict=True) if data is None]
    tier.close()
    assert wrong == []
    if budget == AMPLE:  # nobody was evicted
        assert lost == []
    assert damaged(directory) == []


def test_what_a_killed_writer_left_half_done_can_be_listed(tmp_path: Path) -> None:
    """A journal to be rolled back: the reader must do that first."""
    fill(tmp_path, chain(0, 5))
    path = tmp_path / STORE_NAME
    code = (
        f"import os, sqlite3; db = sqlite3.connect({str(path)!r}, isolation_level=None);"
        "db.execute('PRAGMA cache_size=1'); db.execute('BEGIN IMMEDIATE');"
        "db.execute('UPDATE payload SET data = zeroblob(length(data))');"
        "os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert (tmp_path / f"{STORE_NAME}-journal").stat().st_size > 0
    assert damaged(tmp_path) == []


# -- a disk that is full


def test_a_file_size_limit_stops_writing_and_nothing_else(tmp_path: Path) -> None:
    counts, reason = run("fill", tmp_path, 3_000_000)
    held, same, stored, dropped = map(int, counts.split())
    assert 10 < held == same == stored
    assert stored + dropped == 200
    assert "disk full" in reason
    assert "still read" in reason
    tier = tier_of(tmp_path)
    assert [tier.get(record(i)) is not None for i in range(held)] == [True] * held
    assert tier.put(record(500), b"goes on" * 100)
    tier.close()
    assert (tier.usage().stored, tier.usage().no_writes) == (1, None)
    assert damaged(tmp_path) == []


# -- damage


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 40 pages with free space in it."""
    directory = tmp_path_factory.mktemp("pristine")
    fill(directory, chain(0, 40))
    tier = tier_of(directory)
    for i in range(2000, 2006):
        tier.put(record(i), payload(i, size(i)))
    tier.flush()
    tier.discard([record(i).key for i in range(2000, 2006)])
    tier.close()
    assert damaged(directory) == []
    return directory


def _damage(pristine: Path, scratch: Path, flips: int, cuts: int) -> None:
    length = (pristine / STORE_NAME).stat().st_size
    generator = random.Random(flips)
    headers = [page * 16384 + i for page in range(1, length // 16384) for i in range(12)]
    offsets = [*range(0, 100, 1 if flips > 1000 else 5)]  # the header of the file
    offsets += generator.sample(headers, flips // 3)  # of B-tree pages, or the next overflow page
    offsets += generator.sample(range(length), flips - len(offsets))
    offsets += [-generator.randrange(1, length) for _ in range(cuts)]
    ((line),) = run("damage", pristine, scratch, 40, *offsets)
    hits, off, refused = map(int, line.split())
    assert hits > 10 * len(offsets)  # most damage costs one page, not the store
    assert off + refused > 0
    assert refused <= 8  # format version, application id


def test_a_flipped_byte_or_a_cut_never_gives_another_page(pristine: Path, tmp_path: Path) -> None:
    _damage(pristine, tmp_path / "broken", flips=130, cuts=20)


@pytest.mark.slow
def test_two_thousand_flips_and_cuts(pristine: Path, tmp_path: Path) -> None:
    _damage(pristine, tmp_path / "broken", flips=1700, cuts=300)


def test_a_damaged_record_is_counted_deleted_and_can_be_stored_again(tmp_path: Path) -> None:
    pages = chain(0, 3)
    fill(tmp_path, pages)
    sql(tmp_path, "UPDATE payload SET data = zeroblob(length(data)) WHERE id = 2")
    assert damaged(tmp_path) == ["the record's checksum is wrong"]
    tier = tier_of(tmp_path)
    assert [tier.get(page) is not None for page in pages] == [True, False, True]
    usage = tier.usage()
    assert (usage.damaged, usage.misses, usage.off) == (1, 1, None)
    assert "page 1" in str(usage.last_damage)
    assert "checksum" in str(usage.last_damage)
    assert tier.contains([pages[1].key]) == [False]
    assert tier.put(pages[1], payload(1, size(1)))
    tier.close()
    assert damaged(tmp_path) == []


def test_a_damaged_file_turns_the_tier_off_and_stays(tmp_path: Path) -> None:
    path = tmp_path / STORE_NAME
    path.write_bytes(b"no database" * 5000)
    tier = tier_of(tmp_path)
    assert "not a database" in str(tier.off)
    assert "move it away or delete it" in str(tier.off)
    assert not tier.put(record(1), b"x")
    assert tier.get(record(1)) is None
    assert tier.contains([record(1).key]) == [False]
    tier.discard([record(1).key])
    tier.flush()
    tier.close()
    assert tier.usage().last_drop == tier.off
    assert path.read_bytes() == b"no database" * 5000


def test_a_file_that_is_no_database_is_closed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads it is told so, and no connection waits for the collector."""
    opened, closed = list[sqlite3.Connection](), list[sqlite3.Connection]()

    class Watched(sqlite3.Connection):
        def __init__(self, *args: Any, **named: Any) -> None:
            super().__init__(*args, **named)
            opened.append(self)

        def close(self) -> None:
            closed.append(self)
            super().close()

    (tmp_path / STORE_NAME).write_bytes(b"no database " * 1000)
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Watched))
    with pytest.raises(TierError, match="not a database"), open_contents(tmp_path):
        pass
    assert opened
    assert closed == opened


def test_damage_in_use_turns_the_tier_off(tmp_path: Path) -> None:
    pages = chain(0, 20)
    fill(tmp_path, pages)
    tier = tier_of(tmp_path)
    with (tmp_path / STORE_NAME).open("r+b") as file:
        file.seek(100)
        file.write(b"\xff" * 50_000)
    got = [tier.get(page) for page in pages]
    assert all(data in (None, payload(i, size(i))) for i, data in enumerate(got))
    tier.put(record(99), b"x" * 1000)
    tier.flush()
    tier.close()
    assert "cannot be used" in str(tier.off)


# -- files that are not ours, and hostile ones


def test_the_file_of_another_program_is_refused_and_left_alone(tmp_path: Path) -> None:
    sql(tmp_path, "CREATE TABLE photos (name TEXT)", "INSERT INTO photos VALUES ('cat')")
    before = (tmp_path / STORE_NAME).read_bytes()
    with pytest.raises(TierError, match="another program; choose another"):
        tier_of(tmp_path)
    with pytest.raises(TierError, match="another program"):
        damaged(tmp_path)
    assert (tmp_path / STORE_NAME).read_bytes() == before


def test_another_format_is_refused(tmp_path: Path) -> None:
    sql(tmp_path, "CREATE TABLE page (id)", f"PRAGMA application_id={disk_format.APPLICATION_ID}")
    sql(tmp_path, "PRAGMA user_version=7")
    with pytest.raises(TierError, match="format 7 and this version of Quire reads 1"):
        tier_of(tmp_path)


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER t AFTER INSERT ON page BEGIN DELETE FROM page; END",
        "CREATE VIEW v AS SELECT * FROM page",
        "CREATE TABLE more (x)",
        "DROP INDEX page_key",
        "ALTER TABLE payload ADD COLUMN more BLOB",
    ],
)
def test_a_changed_schema_is_damage(tmp_path: Path, statement: str) -> None:
    fill(tmp_path, chain(0, 2))
    sql(tmp_path, statement)
    assert "header or schema is damaged" in str(tier_of(tmp_path).off)


def test_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    (tmp_path / "cache").mkdir()
    for name in (STORE_NAME, f"{STORE_NAME}-journal"):
        link = tmp_path / "cache" / name
        link.symlink_to(target)
        with pytest.raises(TierError, match="symbolic links are not followed"):
            tier_of(tmp_path / "cache")
        link.unlink()
    assert not target.exists()


def test_places_that_cannot_be_a_cache_are_refused_with_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("text")
    with pytest.raises(TierError, match="cannot be a cache directory: File exists"):
        tier_of(file)
    with pytest.raises(TierError, match="cannot be a cache directory: Not a directory"):
        tier_of(file / "below")
    (tmp_path / "odd" / STORE_NAME).mkdir(parents=True)
    with pytest.raises(TierError, match="no plain file"):
        tier_of(tmp_path / "odd")
    with pytest.raises(TierError, match="4 MiB is too small; the least is 8 MiB"):
        tier_of(tmp_path / "small", 4 << 20)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(TierError, match="this user may write"):
        tier_of(tmp_path)


def test_a_cache_directory_is_for_its_owner_only(tmp_path: Path) -> None:
    fill(tmp_path / "new", chain(0, 1))
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0


class _Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    hostile, trace = pickle.dumps(_Touch(tmp_path / "trace")), tmp_path / "trace"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / STORE_NAME).write_bytes(hostile * 1000)
    assert tier_of(tmp_path / "a").off is not None
    fill(tmp_path / "b", chain(0, 3))
    literal = f"x'{hostile.hex()}'"
    sql(
        tmp_path / "b",
        f"UPDATE payload SET data = {literal}",
        f"UPDATE identity SET facts={literal}",
    )
    tier = tier_of(tmp_path / "b")
    assert [tier.get(page) for page in chain(0, 3)] == [None] * 3
    tier.close()
    assert not trace.exists()


@pytest.mark.parametrize(
    "change",
    [
        "page SET size = 1000000000000",
        "page SET size = -1",
        "page SET codec = 77",
        "page SET depth = 'text'",
        "page SET element = 1.5",
        "page SET checksum = 5",
        "page SET checksum = x''",
        "payload SET data = 17",
        "payload SET data = zeroblob(30000000)",
        "page SET id = id + 1000",
        "page SET identity = 9",
        "recency SET used = 'x', depth = x'00', hits = 1e300",
    ],
)
def test_absurd_rows_are_misses(
    tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quire.cache.disk_file.MAX_PAYLOAD", 20_000_000)
    pages = chain(0, 4)
    fill(tmp_path, pages)
    sql(tmp_path, f"UPDATE {change}")
    assert len(damaged(tmp_path)) == (0 if change.startswith("recency") else 4)
    with open_contents(tmp_path) as contents:
        contents.identities()
    tier = tier_of(tmp_path)
    got = [tier.get(page) for page in pages]
    assert all(data in (None, payload(i, size(i))) for i, data in enumerate(got))
    assert change.startswith("recency") or got == [None] * 4
    tier.put(record(50), b"x" * 1000)
    tier.flush()
    assert tier.get(record(50)) == b"x" * 1000
    assert tier.off is None
    tier.close()


@pytest.mark.parametrize("claimed", [1 << 33, 1 << 20])
def test_a_bomb_with_a_right_checksum_is_refused_in_constant_memory(
    tmp_path: Path, claimed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Absurd(bytes):
        def __len__(self) -> int:
            return claimed

    # A zstd frame header that claims 8 GiB: magic, descriptor, content size.
    bomb = b"\x28\xb5\x2f\xfd\xe0" + (1 << 33).to_bytes(8, "little") + b"\x01\x00\x00"
    monkeypatch.setattr(disk_format, "pack", lambda payload, element: (1, bomb))
    digest = disk_format.identity_digest(IDENTITY)
    page = disk_format.pack_page(digest, record(1), Absurd())
    store = StoreWriter(tmp_path / STORE_NAME, AMPLE)
    assert store.insert(store.identity_id(IDENTITY), [page], 0) == (1, 1)
    store.close()
    tier = tier_of(tmp_path)
    assert tier.get(record(1)) is None
    assert "claims" in str(tier.usage().last_damage) or "says" in str(tier.usage().last_damage)
    tier.close()


def test_the_checksum_covers_every_field() -> None:
    digest = disk_format.identity_digest(IDENTITY)
    page = record(1)
    packed = disk_format.pack_page(digest, page, b"ab" * 5000)
    row = [page.key, page.parent, page.tokens, page.depth, page.element]
    row += [packed.codec, packed.size, packed.checksum, packed.packed]
    assert disk_format.verified(digest, row) == (page, b"ab" * 5000)
    changes = [b"\1" * 33, b"\1" * 32, b"\1" * 64, 1, 4, 1, 9999, bytes(16), packed.packed + b"x"]
    for i, change in enumerate(changes):
        with pytest.raises(TierError, match="checksum"):
            disk_format.verified(digest, [*row[:i], change, *row[i + 1 :]])
    with pytest.raises(TierError, match="checksum"):
        disk_format.verified(disk_format.identity_digest({"weights": "x"}), row)
    moved = replace(page, key=page.key + page.parent[:1], parent=page.parent[1:])
    with pytest.raises(TierError, match="checksum"):
        disk_format.verified(digest, [moved.key, moved.parent, *row[2:]])


def test_a_store_that_stays_locked_costs_misses_and_no_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quire.cache.disk_file._READ_LOCK_SECONDS", 0.01)
    page = record(1)
    fill(tmp_path, [page])
    tier = tier_of(tmp_path)
    other = sqlite3.connect(tmp_path / STORE_NAME, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    assert tier.contains([page.key]) == [False]
    other.execute("ROLLBACK")
    other.close()
    assert tier.get(page) is None  # not asked again for a while
    assert tier.usage().off is None
    monkeypatch.setattr(tier, "_busy_until", 0.0)
    assert tier.get(page) is not None
    tier.close()
