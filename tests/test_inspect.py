"""``quire inspect`` on a cache directory: what it lists, checks, prunes, and leaves alone."""

import hashlib
import json
import os
import pty
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from quire.cache.disk import DiskTier
from quire.cache.disk_contents import open_contents, prune_store
from quire.cache.disk_file import STORE_NAME
from quire.cache.tiers import PageRecord
from quire.cli.inspect import inspect
from quire.errors import TierError
from quire.models import resolve_model
from quire.models.text import load_text_codec
from tier_records import ROOT, chain, payload, record

QUILL = resolve_model(None)
TEXT = "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n" * 8


def pages_of(ids: list[int], groups: int = 1, page_size: int = 16) -> list[PageRecord]:
    """The whole pages of a prompt, one record for each layer group."""
    pages, parent = [], ROOT
    for depth in range(len(ids) // page_size):
        some = ids[depth * page_size : (depth + 1) * page_size]
        tokens = b"".join(i.to_bytes(4, "little") for i in some)
        digest = hashlib.sha256(parent + tokens).digest()
        pages += [PageRecord(digest + bytes([g]), parent, tokens, depth, 2) for g in range(groups)]
        parent = digest
    return pages


def fill(directory: Path, pages: list[PageRecord], **identity: str) -> None:
    tier = DiskTier(directory, 1 << 30, {"weights": "0123", **identity})
    for i, page in enumerate(pages):
        assert tier.put(page, payload(i, 2000))
    tier.close()


def run(*args: object) -> Result:
    return CliRunner().invoke(inspect, [str(arg) for arg in args])


def as_json(*args: object, code: int = 0) -> Any:
    result = run(*args, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


@pytest.fixture
def encoded() -> list[int]:
    codec = load_text_codec(QUILL)
    assert codec is not None
    return codec.encode(TEXT)


def test_prefixes_are_listed_as_text_with_what_they_take(
    tmp_path: Path, encoded: list[int]
) -> None:
    pages = pages_of(encoded)
    fill(tmp_path, pages, model=str(QUILL))
    found = as_json(tmp_path)
    assert found["kind"] == "disk cache"
    assert found["pages"] == len(pages)
    assert found["raw_bytes"] == 2000 * len(pages)
    assert found["file_bytes"] == (tmp_path / STORE_NAME).stat().st_size
    (identity,) = found["identities"]
    assert identity["identity"] == {"weights": "0123", "model": str(QUILL)}
    (prefix,) = identity["prefixes"]
    assert prefix["tokens"] == 16 * len(pages)
    assert prefix["stored_bytes"] == identity["stored_bytes"] == found["stored_bytes"]
    assert (prefix["start"], prefix["pages"], prefix["hits"]) == (0, len(pages), 0)
    assert abs(prefix["created"] - time.time()) < 60
    assert prefix["text"].startswith("def fibonacci(n):")
    assert " … " in prefix["text"]
    assert "\n" not in prefix["text"]


def test_without_a_tokenizer_prefixes_are_token_ids(tmp_path: Path) -> None:
    fill(tmp_path, pages_of([*range(7, 23)]), model="nowhere")
    assert as_json(tmp_path)["identities"][0]["prefixes"][0]["text"].startswith("7 8 9 10 ")


def test_a_shared_beginning_is_in_every_prefix_and_counted_once(tmp_path: Path) -> None:
    common = [*range(64)]
    one, two = pages_of([*common, *range(100, 132)]), pages_of([*common, *range(200, 216)])
    fill(tmp_path, list(dict.fromkeys([*one, *two])))
    found = as_json(tmp_path)
    assert found["pages"] == 4 + 2 + 1
    prefixes = found["identities"][0]["prefixes"]
    assert sorted((p["tokens"], p["pages"]) for p in prefixes) == [(80, 5), (96, 6)]


def test_groups_of_layers_are_one_prefix_and_a_missing_head_is_said(tmp_path: Path) -> None:
    pages = pages_of([*range(80)], groups=2)
    fill(tmp_path, pages[4:])  # the first two pages are gone
    (prefix,) = as_json(tmp_path)["identities"][0]["prefixes"]
    assert (prefix["start"], prefix["tokens"], prefix["pages"]) == (32, 48, 6)
    assert prefix["text"].startswith("… 32 33")


def test_identities_have_a_table_each(tmp_path: Path) -> None:
    fill(tmp_path, [record(1)], format="bf16")
    fill(tmp_path, [record(1)], format="fp32")
    result = run(tmp_path)
    assert result.exit_code == 0
    assert "2 pages" in result.output
    assert "format bf16" in result.output
    assert "format fp32" in result.output
    assert result.output.count("last used") == 2


def test_long_lists_are_cut_and_say_so(tmp_path: Path) -> None:
    fill(tmp_path, [record(i) for i in range(25)])
    assert "and 5 prefixes that were used less recently; --json lists all" in run(tmp_path).output
    assert len(as_json(tmp_path)["identities"][0]["prefixes"]) == 25


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    codec = load_text_codec(QUILL)
    assert codec is not None
    ids = codec.encode("\x1b[2J\x1b]0;title\x07 hello " * 8)
    fill(tmp_path, pages_of(ids), model=str(QUILL), other="\x1b[31m")
    output = run(tmp_path).output
    assert "hello" in output
    assert "\x1b" not in output
    assert "\x07" not in output


def test_listing_and_verifying_change_nothing(tmp_path: Path) -> None:
    fill(tmp_path, chain(0, 20))
    path = tmp_path / STORE_NAME
    before = (path.read_bytes(), path.stat().st_mtime_ns)
    for option in ((), ("--verify",), ("--json",)):
        assert run(tmp_path, *option).exit_code == 0
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_it_works_while_a_tier_is_in_use(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 1 << 30, {})
    for i in range(10):
        tier.put(record(i), payload(i, 1000))
        tier.flush()
        assert as_json(tmp_path, "--verify")["pages"] == i + 1
    prune_store(tmp_path, 0)
    assert tier.get(record(1)) is None
    assert tier.put(record(1), b"again" * 50)
    tier.flush()
    assert tier.get(record(1)) == b"again" * 50
    tier.close()


def test_damage_is_named_and_exits_1(tmp_path: Path) -> None:
    fill(tmp_path, chain(0, 5))
    assert as_json(tmp_path, "--verify")["damaged"] == []
    assert "verified 5 pages, 0 damaged" in run(tmp_path, "--verify").output
    db = sqlite3.connect(tmp_path / STORE_NAME)
    with db:
        db.execute("UPDATE payload SET data = zeroblob(length(data)) WHERE id IN (2, 4)")
    db.close()
    damaged = as_json(tmp_path, "--verify", code=1)["damaged"]
    assert [d["what"] for d in damaged] == ["record 2, depth 1", "record 4, depth 3"]
    assert {d["why"] for d in damaged} == {"the record's checksum is wrong"}
    shown = run(tmp_path, "--verify")
    assert shown.exit_code == 1
    assert "damaged: record 2, depth 1: the record's checksum is wrong" in shown.output
    assert run(tmp_path).exit_code == 0  # it was not asked for


def test_a_file_that_cannot_be_read_is_an_error_with_what_to_do(tmp_path: Path) -> None:
    fill(tmp_path, chain(0, 5))
    path = tmp_path / STORE_NAME
    path.write_bytes(path.read_bytes()[:20_000])
    result = run(tmp_path, "--verify")
    named = "damaged" in result.output and result.exit_code == 1
    assert named or "move it away or delete it" in str(result.exception)


def test_pruning_removes_the_least_recently_used_and_shrinks_the_file(tmp_path: Path) -> None:
    seconds = iter(range(1000, 2000))
    tier = DiskTier(tmp_path, 1 << 30, {}, clock=lambda: next(seconds))
    for i in range(40):
        tier.put(record(i), payload(i, 100_000))
        tier.flush()
    tier.close()
    found = as_json(tmp_path, "--prune", "2MiB")
    assert found["file_bytes"] <= 2 << 20
    assert found["pruned"] + found["pages"] == 40
    assert 10 < found["pages"] < 21
    tier = DiskTier(tmp_path, 1 << 30, {})
    kept = tier.contains([record(i).key for i in range(40)])
    tier.close()
    assert kept == [False] * (40 - found["pages"]) + [True] * found["pages"]
    assert as_json(tmp_path, "--prune", "all", "--verify")["pages"] == 0
    assert (tmp_path / STORE_NAME).stat().st_size < 200_000
    assert "pruned 0 pages" in run(tmp_path, "--prune", "all").output


def test_paths_that_are_neither_a_cache_nor_a_session(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    result = run(tmp_path / "missing")
    assert result.exit_code == click.UsageError.exit_code
    assert "there is nothing at" in result.output
    assert "is no session file" in str(run(tmp_path / "file").exception)


def test_a_directory_without_a_cache_and_a_bad_size_are_refused(tmp_path: Path) -> None:
    assert "holds no cache" in str(run(tmp_path).exception)
    assert list(tmp_path.iterdir()) == []
    fill(tmp_path, chain(0, 1))
    assert "not a size" in str(run(tmp_path, "--prune", "much").exception)
    with pytest.raises(TierError, match="holds no cache"):
        prune_store(tmp_path / "..", 0)


def test_verifying_draws_a_bar_on_a_terminal_only(tmp_path: Path) -> None:
    fill(tmp_path, chain(0, 5))
    code = "from quire.cli.inspect import inspect; inspect()"
    command = [sys.executable, "-c", code, str(tmp_path), "--verify"]
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stderr == b""
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        drawn = b""
        try:
            while piece := os.read(ours, 4096):
                drawn += piece
        except OSError:  # the other end was closed
            pass
        finally:
            os.close(ours)
        assert process.stdout is not None
        assert b"verified 5 pages" in process.stdout.read()
    assert b"verifying" in drawn
    assert b"5/5" in drawn


def test_a_chain_that_bites_its_tail_is_listed(tmp_path: Path) -> None:
    tokens = bytes(64)
    a, b = b"a" * 32, b"b" * 32
    loop = [PageRecord(a + b"\0", b, tokens, 0, 1), PageRecord(b + b"\0", a, tokens, 1, 1)]
    fill(tmp_path, [*loop, PageRecord(b"c" * 33, a, tokens, 2, 1)])
    with open_contents(tmp_path) as contents:
        (identity,) = contents.identities()
    assert [prefix.pages for prefix in identity.prefixes] == [3]
