"""Session files that are damaged, hostile or of something else: refused, and why is said."""

import json
import os
import pickle
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.cache.session import (
    GroupPages,
    SessionFile,
    read_header,
    read_session,
    verify_session,
    write_session,
)
from quire.errors import SessionError
from sessions import (
    IDENTITY,
    assert_same,
    digest,
    expected,
    facts,
    forge,
    forge_text,
    session_of,
    tensors,
    without_sync,
)

MIB = 2**20
ONE_PAGE = [(100, None)]  # what a forged file holds


@pytest.fixture(autouse=True, scope="module")
def _fast() -> Iterator[None]:
    with without_sync():
        yield


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "talk.session"


def refused(path: Path, groups: Any = ONE_PAGE) -> str:
    """The message with which both readers that look at every byte refuse ``path``."""
    with pytest.raises(SessionError) as read:
        read_session(path, expected(groups))
    with pytest.raises(SessionError) as verified:
        verify_session(path)
    assert str(read.value) == str(verified.value)
    assert str(path) in str(read.value)
    return str(read.value)


# -- damage ---------------------------------------------------------------------------------------

SMALL = [(60, None), (30, 17)]
LARGE = [(700_000, None), (300_000, 17)]  # several pieces each


def every_flip_is_noticed(path: Path, groups: Any, offsets: list[int]) -> None:
    whole = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for offset in offsets:
            flipped = whole[offset] ^ (1 << offset % 8)
            os.pwrite(file.fileno(), bytes([flipped]), offset)
            refused(path, groups)
            os.pwrite(file.fileno(), whole[offset : offset + 1], offset)
    read_session(path, expected(groups))


def every_cut_is_noticed(path: Path, groups: Any, offsets: list[int]) -> None:
    whole = path.read_bytes()
    for offset in sorted(offsets, reverse=True):
        os.truncate(path, offset)
        refused(path, groups)
    path.write_bytes(whole + b"\0")
    assert "something was added" in refused(path, groups)


def spread(path: Path, count: int) -> list[int]:
    """Half of the offsets in the header and the checksums, half anywhere."""
    offsets, size = random.Random(0), path.stat().st_size
    return [offsets.randrange(1200 if i % 2 else size) for i in range(count)]


def test_no_byte_of_a_small_file_can_change_unnoticed(path: Path) -> None:
    write_session(path, session_of(20, 16, SMALL))
    every_flip_is_noticed(path, SMALL, list(range(path.stat().st_size)))
    every_cut_is_noticed(path, SMALL, list(range(0, path.stat().st_size, 7)))


def test_flips_and_cuts_of_a_large_file_are_noticed(path: Path) -> None:
    write_session(path, session_of(40, 16, LARGE))
    offsets = spread(path, 150)
    every_flip_is_noticed(path, LARGE, offsets)
    every_cut_is_noticed(path, LARGE, offsets)


@pytest.mark.slow
def test_flips_and_cuts_at_each_of_two_thousand_offsets_are_noticed(path: Path) -> None:
    write_session(path, session_of(40, 16, LARGE))
    offsets = spread(path, 2000)
    every_flip_is_noticed(path, LARGE, offsets)
    every_cut_is_noticed(path, LARGE, offsets)


def test_a_mixture_of_two_sessions_is_noticed(path: Path) -> None:
    other = path.with_name("other")
    for seed, place in enumerate((path, other)):
        write_session(place, session_of(20, 16, SMALL, seed))
    one, two = path.read_bytes(), other.read_bytes()
    start = 8 + int.from_bytes(one[:8], "little")
    assert len(one) == len(two)
    path.write_bytes(one[: start + 32] + two[start + 32 :])  # one's header, two's data
    assert "damaged in its checksums" in refused(path, SMALL)


def test_the_first_damaged_place_is_named(path: Path) -> None:
    write_session(path, session_of(40, 16, LARGE))
    size = path.stat().st_size
    pages = read_header(path).groups[1][1]
    group_1 = size - pages * 300_000
    with path.open("r+b") as file:
        for offset in (group_1 + 10, group_1 - 5):
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1]))
    assert "bytes 2097152 to 2099999 of group.0" in refused(path, LARGE)


def test_a_file_that_is_cut_while_it_is_read_is_refused(path: Path) -> None:
    write_session(path, session_of(16, 16, [(20 * MIB, None)]))

    def cut(done: int, total: int) -> None:
        os.truncate(path, 18 * MIB)

    with pytest.raises(SessionError, match="cut off while it was read"):
        verify_session(path, cut)


def test_an_error_of_the_caller_in_progress_stays_its_own(path: Path) -> None:
    write_session(path, session_of(16, 16, SMALL))

    def broken(done: int, total: int) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        verify_session(path, broken)


# -- forged headers: every checksum is right ------------------------------------------------------


def test_a_forged_file_is_read_if_nothing_is_wrong_with_it(path: Path) -> None:
    forge(path, facts())
    page = np.arange(100, dtype=np.uint8)[None]
    session = SessionFile(IDENTITY, tuple(range(16)), (GroupPages(0, page),), {})
    assert_same(read_session(path, expected(ONE_PAGE)), session)


def tensor(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"tokens": tensor("I32", [16], 96, 160)}, "'tokens'"),
        ({"tokens": tensor("U32", [-16], 96, 160)}, "-16"),
        ({"tokens": tensor("U32", [True], 96, 160)}, "True"),
        ({"tokens": tensor("U32", [16.0], 96, 160)}, "16.0"),
        ({"tokens": tensor("U32", [4, 4], 96, 160)}, "2 axes"),
        ({"tokens": tensor("U32", [10**17], 96, 160)}, "'checksums'"),
        ({"tokens": tensor("U32", [16], 96, 160) | {"more": 1}}, "more"),
        ({"tokens": {"dtype": "U32"}}, "a list is expected"),
        ({"tokens": [16]}, "no JSON object"),
        ({"tokens": None}, "no JSON object"),
        ({"group.0": tensor("F32", [1, 100], 160, 260)}, "F32"),
        ({"group.0": tensor("U8", [1, 100], 96, 196)}, "'group.0'"),  # overlaps the tokens
        ({"group.0": tensor("U8", [1, 90], 170, 260)}, "'group.0'"),  # a gap before it
        ({"group.0": tensor("U8", [1, 100], 160, -1)}, "-1"),
        ({"group.0": tensor("U8", [1, 100], 160.0, 260)}, "160.0"),
        ({"group.0": tensor("U8", [100], 160, 260)}, "1 axes"),
        ({"group.0": tensor("U8", [0, 100], 160, 160)}, "'checksums'"),
        ({"group.0": tensor("U8", [100, 0], 160, 260)}, "0 bytes"),
        ({"group.0": tensor("U8", [2**40, 2**20], 160, 260)}, "'checksums'"),
        ({"group.0": tensor("U8", [1, 101], 160, 261)}, "261|something was added|cut off"),
        ({"checksums": tensor("U8", [2, 32], 0, 96)}, "'checksums'"),
        ({"checksums": tensor("U8", [3, 32], 160, 256)}, "'checksums'"),
        ({"group.1": tensor("U8", [1, 1], 260, 261)}, "first pages for 2 groups|'checksums'"),
        ({"group.00": tensor("U8", [0, 1], 260, 260)}, "group.00"),
        ({"../../etc/passwd": tensor("U8", [0, 1], 260, 260)}, "etc/passwd"),
        ({"/etc/passwd": tensor("U8", [0, 1], 260, 260)}, "etc/passwd"),
        ({f"group.{i}": tensor("U8", [0, 1], 0, 0) for i in range(300)}, "300 layer groups"),
    ],
)
def test_tensors_lie_exactly_where_they_must(
    path: Path, changed: dict[str, Any], reason: str
) -> None:
    forge(path, facts(), tensors(**changed))
    message = refused(path)
    assert any(part in message for part in reason.split("|"))


@pytest.mark.parametrize("name", ["checksums", "tokens", "group.0"])
def test_no_tensor_may_be_missing(path: Path, name: str) -> None:
    forge(path, facts(), {n: entry for n, entry in tensors().items() if n != name})
    assert "instead of" in refused(path) or name == "group.0"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"version": 2}, "format version is 2, this Quire reads version 1"),
        ({"version": True}, "format version is True"),
        ({"version": "1"}, "format version is '1'"),
        ({"created": -1}, "its time"),
        ({"created": 1.5}, "its time"),
        ({"created": 10**18}, "19 digits"),
        ({"identity": []}, "identity is no JSON object"),
        ({"identity": {"a": 1}}, "not text"),
        ({"identity": {"a": "x" * 2**16}}, "at most 65536"),
        ({"first_pages": {}}, "a list is expected"),
        ({"first_pages": []}, "0 first pages for 1 groups"),
        ({"first_pages": [0, 0]}, "2 first pages for 1 groups"),
        ({"first_pages": [-1]}, "-1"),
        ({"first_pages": [0.0]}, "0.0"),
        ({"checksums": "00"}, "damaged in its checksums"),
        ({"checksums": []}, "damaged in its checksums"),
        ({"extra": "text"}, "extra is no JSON object"),
        ({"extra": {"text": "x" * MIB}}, "at most 1048576"),
        ({"extra": {"number": float("nan")}}, "NaN is no JSON number"),
        ({"extra": {"number": float("-inf")}}, "-Infinity is no JSON number"),
        ({"more": 1}, "more"),
    ],
)
def test_facts_are_of_the_right_kind(path: Path, changed: dict[str, Any], reason: str) -> None:
    forge(path, facts(**changed))
    assert reason in refused(path)


@pytest.mark.parametrize("name", ["version", "created", "identity", "first_pages", "extra"])
def test_no_fact_may_be_missing(path: Path, name: str) -> None:
    forge(path, {key: value for key, value in facts().items() if key != name})
    assert name == "version" or "instead of" in refused(path)
    refused(path)


def changed_text(before: str, after: str) -> str:
    text = json.dumps(facts())
    assert before in text
    return text.replace(before, after)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (changed_text('"created": 1', '"created": 1, "created": 2'), "'created' stands twice"),
        (changed_text('"created": 1', f'"created": 1{"0" * 5000}'), "5001 digits"),
        (changed_text('"created": 1', '"created": 1e999'), "cannot be stored"),
        (changed_text('"created": 1', f'"created": 0.{"1" * 99}'), "cannot be stored"),
        (changed_text('"extra": {}', '"extra": {"a": 1, "a": 1}'), "'a' stands twice"),
        (changed_text('"extra": {}', f'"extra": {"[" * 100_000}'), "nested too deeply"),
        (changed_text('"extra": {}', '"extra": ' + '{"a": ' * 100_000), "nested too deeply"),
        ("", "Expecting value"),
        ("[]", "no JSON object"),
        (json.dumps(facts()) + "x", "Extra data"),
    ],
)
def test_facts_are_strict_json(path: Path, text: str, reason: str) -> None:
    forge(path, text)
    assert reason in refused(path)


HEADER = json.dumps({"__metadata__": {"quire.session": json.dumps(facts())}, **tensors()})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("null", "no JSON object"),
        ("{}", "no JSON object"),
        ("[" * 10**6, "nested too deeply"),
        ('{"a":' * 10**5, "nested too deeply"),
        ('{"__metadata__": {}}', "without 'quire.session'"),
        ('{"__metadata__": {"quire.session": 3}}', "without 'quire.session'"),
        (HEADER.replace('"tokens"', '"group.0"'), "'group.0' stands twice"),
        (HEADER.replace('"__metadata__"', '"__other__"'), "no JSON object"),
        (HEADER.encode("utf-16"), "codec can't decode"),
        (HEADER.encode() + b"\xff", "codec can't decode"),
        (b"\0" * 1000, "Expecting value"),
        (" " * (4 * MIB + 1), "at most 4194304"),
    ],
)
def test_headers_are_strict_json(path: Path, text: str | bytes, reason: str) -> None:
    forge_text(path, text)
    assert reason in refused(path)


@settings(deadline=None)  # the disk decides
@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda s: s | st.lists(s))
)
def test_any_json_in_the_place_of_any_fact_is_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, value: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "forged.session"
    for name in facts():
        forge(path, facts(**{name: value}))
        try:
            read_session(path, expected(ONE_PAGE))
        except SessionError:
            continue
        assert name == "created" or value == facts()[name]
    for name in tensors():
        for key in ("dtype", "shape", "data_offsets"):
            forge(path, facts(), tensors(**{name: {**tensors()[name], key: value}}))
            if value != tensors()[name][key]:
                refused(path)


# -- no session at all ----------------------------------------------------------------------------


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_refused_and_never_loaded(path: Path) -> None:
    trap = path.with_name("trap")
    path.write_bytes(pickle.dumps(Bomb(trap)) + b"\0" * 100)
    refused(path)
    forge_text(path, pickle.dumps(Bomb(trap)))
    refused(path)
    assert not trap.exists()


def links(path: Path) -> None:
    write_session(path.with_name("real"), session_of(16, 16, ONE_PAGE))
    path.symlink_to("real")


def writes(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "No such file"),
        (links, "a symbolic link is not followed"),
        (lambda path: path.mkdir(), "no regular file"),
        (os.mkfifo, "no regular file"),
        (lambda path: path.touch(0o000), "Permission denied" if os.geteuid() else "0 bytes"),
        (writes(b""), "0 bytes"),
        (writes(b"\0" * 39), "39 bytes"),
        (writes(b"\0" * 40), "no session file"),
        (writes(b"\xff" * 1000), "header of 18446744073709551615"),
        (writes((2**63).to_bytes(8, "little") + b"{}" * 100), "header of 9223372036854775808"),
        (writes((169).to_bytes(8, "little") + b" " * 200), "header of 169"),
        (writes((168).to_bytes(8, "little") + b" " * 200), "no session file"),
    ],
)
def test_what_is_no_session_is_refused(
    path: Path, make: Callable[[Path], None], reason: str
) -> None:
    make(path)
    assert reason in refused(path)
    with pytest.raises(SessionError):
        read_header(path)


@pytest.mark.parametrize("place", ["/dev/zero", "/dev/null", "/"])
def test_devices_are_refused(place: str) -> None:
    assert "no regular file" in refused(Path(place))


def test_a_header_of_a_file_with_damaged_pages_is_read(path: Path) -> None:
    write_session(path, session_of(20, 16, SMALL))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert read_header(path).num_tokens == 20
    path.write_bytes(whole[:-1])
    with pytest.raises(SessionError, match="cut off"):
        read_header(path)


# -- memory ---------------------------------------------------------------------------------------


def vast(path: Path) -> int:
    """A sparse file of 1 TiB that claims to hold 2**20 pages; returns their tokens."""
    page, pages = MIB, 2**20
    tokens = 16 * pages
    pieces = tokens * 4 // MIB + pages
    table = 32 * (1 + pieces)
    begins = [0, table, table + 4 * tokens, table + 4 * tokens + page * pages]
    entries = {
        "checksums": tensor("U8", [1 + pieces, 32], *begins[:2]),
        "tokens": tensor("U32", [tokens], *begins[1:3]),
        "group.0": tensor("U8", [pages, page], *begins[2:]),
    }
    ours = facts(checksums=digest(b"\0" * 32 * pieces).hex())
    header = {"__metadata__": {"quire.session": json.dumps(ours)}, **entries}
    raw = json.dumps(header).encode()
    head = len(raw).to_bytes(8, "little") + raw
    path.write_bytes(head + digest(head))
    os.truncate(path, len(head) + begins[-1])
    return tokens


def peak_of(refuse: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(SessionError):
            refuse()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_vast_file_is_refused_in_little_memory(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)
    assert peak_of(lambda: verify_session(path)) < MIB
    tokens = vast(path)
    assert read_header(path).num_tokens == tokens
    assert peak_of(lambda: verify_session(path)) < 24 * MIB
    limited = expected([(MIB, None)], max_tokens=tokens - 1)
    assert peak_of(lambda: read_session(path, limited)) < MIB


LIMITED = """
import resource, sys
from pathlib import Path
from quire.cache.session import read_session, verify_session
from quire.errors import SessionError
from sessions import expected
resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
for read in (verify_session, lambda path: read_session(path, expected([(2**20, None)]))):
    try:
        read(Path(sys.argv[1]))
    except SessionError as error:
        print(error)
"""


def test_more_than_memory_can_take_is_an_error_that_says_so(path: Path) -> None:
    vast(path)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = done.stdout.splitlines()
    assert "bytes 0 to 1048575 of tokens are not what was written" in first
    assert "more than memory can take" in second


def test_a_header_full_of_small_things_takes_bounded_memory(path: Path) -> None:
    # Of all that was tried this takes the most. A quarter of the longest header, to be quick.
    inside = ",".join(["[{}]"] * (MIB // 5))
    forge_text(path, f'{{"__metadata__": [{inside}]}}')
    assert peak_of(lambda: read_header(path)) < 50 * MIB


# -- a session of something else ------------------------------------------------------------------


@pytest.mark.parametrize("key", IDENTITY)
def test_a_fact_of_identity_that_differs_is_named_with_both_values(path: Path, key: str) -> None:
    write_session(path, session_of(20, 16, SMALL))
    here = {**IDENTITY, key: "something else"}
    with pytest.raises(SessionError) as caught:
        read_session(path, expected(SMALL, identity=here))
    message = str(caught.value)
    assert f"{key} is {IDENTITY[key]!r} in the file and 'something else' here" in message
    assert "start a new session" in message
    assert [k for k in IDENTITY if f"{k} is " in message] == [key]


def test_all_differing_facts_are_named_and_extra_ones_do_not_count(path: Path) -> None:
    session = session_of(20, 16, SMALL)
    identity = {**IDENTITY, "model": "quill"}
    session = SessionFile(identity, session.tokens, session.groups, session.extra)
    write_session(path, session)
    assert_same(read_session(path, expected(SMALL)), session)
    with pytest.raises(SessionError) as caught:
        read_session(path, expected(SMALL, identity={"rope": "none", "new": "1", "weights": "0"}))
    assert "rope is 'default theta 10000' in the file and 'none' here" in str(caught.value)
    assert "new is None in the file and '1' here" in str(caught.value)
    assert "weights is 'blake2b:00ff' in the file and '0' here" in str(caught.value)


@pytest.mark.parametrize(
    ("groups", "page_size", "reason"),
    [
        ([(60, None)], 16, "holds 2 layer groups, the model has 1"),
        ([*SMALL, (1, None)], 16, "holds 2 layer groups, the model has 3"),
        ([(61, None), (30, 17)], 16, "group 0 holds 2 pages of 60 bytes .*2 pages of 61 bytes"),
        ([(60, None), (31, 17)], 16, "group 1 holds 2 pages of 30 bytes .*2 pages of 31 bytes"),
        ([(60, None), (30, 4)], 16, r"20 tokens in pages of 16 \(window 4\) are 1 pages"),
        (SMALL, 8, "20 tokens in pages of 8 .*3 pages of 60 bytes from page 0"),
        ([(60, 1), (30, 17)], 16, "from page 0 on, but .*from page 1 on"),
    ],
)
def test_pages_must_be_those_that_the_tokens_need(
    path: Path, groups: Any, page_size: int, reason: str
) -> None:
    write_session(path, session_of(20, 16, SMALL))
    with pytest.raises(SessionError, match=reason):
        read_session(path, expected(groups, page_size))


def test_more_tokens_than_can_be_used_are_refused(path: Path) -> None:
    write_session(path, session_of(20, 16, SMALL))
    read_session(path, expected(SMALL, max_tokens=20))
    with pytest.raises(SessionError, match="holds 20 tokens, 19 are possible"):
        read_session(path, expected(SMALL, max_tokens=19))
