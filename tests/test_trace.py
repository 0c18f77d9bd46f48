"""Traces of requests: reading them, and what their prompts share."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from quire.analysis.trace import (
    BLOCK,
    Arrival,
    Tokens,
    common_prefixes,
    read_trace,
    unbounded_hits,
)
from quire.errors import ConfigError, QuireError

EXAMPLE = Path(__file__).parents[1] / "examples" / "trace.jsonl"
GOOD = {"timestamp": 27, "input_length": 700, "output_length": 5, "hash_ids": [0, 9]}


def shared_with_earlier(trace: Sequence[Arrival]) -> list[int]:
    """A tree of tokens, (block, offset) each, with a node for every prefix that was asked."""
    root: dict[tuple[int, int], Any] = {}
    found = []
    for arrival in trace:
        node, count, known = root, 0, True
        for at in range(arrival.input_length):
            token = arrival.blocks[at // BLOCK], at % BLOCK
            known = known and token in node
            count += known
            node = node.setdefault(token, {})
        found.append(count)
    return found


def test_a_mooncake_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    later = {**GOOD, "timestamp": 1500.5, "input_length": 512, "hash_ids": [0], "more": "ignored"}
    path.write_text(f"{json.dumps(later)}\n\n{json.dumps(GOOD)}\n", encoding="utf-8")
    first, second = Arrival(0.027, 700, 5, (0, 9)), Arrival(1.5005, 512, 5, (0,))
    assert read_trace(path) == read_trace(path, 9) == [first, second]
    assert read_trace(path, 1) == [second]
    assert unbounded_hits([first, second]) == 511


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting property name"),
        ("[1]", "must be a JSON object"),
        ({"timestamp": None}, "timestamp must be milliseconds, 0 or more, not None"),
        ({"timestamp": -1}, "timestamp must be milliseconds, 0 or more, not -1"),
        ({"timestamp": float("nan")}, "timestamp must be milliseconds, 0 or more, not nan"),
        ({"input_length": 0}, "input_length must be an int of at least 1, not 0"),
        ({"input_length": -700}, "input_length must be an int of at least 1, not -700"),
        ({"input_length": True}, "input_length must be an int"),
        ({"input_length": 1e300}, "input_length must be an int"),
        ({"output_length": "5"}, "output_length must be an int of at least 0, not '5'"),
        ({"output_length": -5}, "output_length must be an int of at least 0, not -5"),
        ({"hash_ids": 7}, "hash_ids must be a list of ints, not 7"),
        ({"hash_ids": [0, "1"]}, "hash_ids must be a list of ints"),
        ({"hash_ids": [1]}, "hash_ids has 1 ids; input_length 700 is 2 blocks of 512"),
        ({"hash_ids": [1, 2, 3]}, "hash_ids has 3 ids; input_length 700 is 2 blocks of 512"),
        ("{}", "timestamp is missing; there are none"),
        ('{"timestamp": 1, "length": 2}', "input_length is missing; there are timestamp, length"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_bad_line_is_refused_by_name(tmp_path: Path, line: Any, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    text = line if isinstance(line, str) else json.dumps({**GOOD, **line})
    path.write_text(f"{json.dumps(GOOD)}\n{text}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"trace.jsonl, line 2: .*{message}") as caught:
        read_trace(path)
    assert isinstance(caught.value, QuireError)
    assert read_trace(path, 1) == [Arrival(0.027, 700, 5, (0, 9))]


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_trace_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"trace.jsonl holds no request; .*hash_ids"):
        read_trace(path)


def test_a_file_that_is_not_there_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_trace(tmp_path / "trace.jsonl")


def test_what_prompts_share_is_what_a_tree_of_tokens_finds() -> None:
    trace = read_trace(EXAMPLE, 40)
    again = trace[3]
    shorter = Arrival(1e3, 400, 1, again.blocks[:1])
    parted = Arrival(1e3, 2 * BLOCK, 1, (again.blocks[0], -7))
    longer_end = Arrival(1e3, 700, 1, (900, 901)), Arrival(1e3, 900, 1, (900, 901))
    trace = [*trace, again, shorter, parted, *longer_end]
    found = common_prefixes(trace)
    assert found == shared_with_earlier(trace)
    assert found[-5:] == [again.input_length, 400, BLOCK, 0, 700]
    hits = (min(n, a.input_length - 1) for n, a in zip(found, trace, strict=True))
    assert unbounded_hits(trace) == sum(hits)


def test_equal_blocks_are_equal_tokens_and_nothing_else_is() -> None:
    trace = [Arrival(0, 1000, 3, (5, 6)), Arrival(1, 600, 0, (5, 8)), Arrival(2, 900, 2, (8, 5))]
    tokens = Tokens(trace)
    one, two, three = map(tokens.of_prompt, trace)
    assert [len(one), len(two), len(three)] == [1000, 600, 900]
    assert one[:BLOCK] == two[:BLOCK]
    assert three[BLOCK:] == one[: 900 - BLOCK]
    assert two[BLOCK:] == three[: 600 - BLOCK]
    replies = [tokens.of_reply(arrival) for arrival in trace]
    assert [len(reply) for reply in replies] == [3, 1, 2]
    prompts = {*one, *two, *three}
    assert len(prompts) == BLOCK + (1000 - BLOCK) + BLOCK
    spoken = [*prompts, *itertools.chain(*replies)]
    assert len(set(spoken)) == len(spoken)
    assert all(0 <= token < 1 << 32 for token in spoken)


def test_too_many_tokens_are_refused() -> None:
    trace = [Arrival(0, BLOCK, (1 << 31) - 1, (at,)) for at in range(3)]
    with pytest.raises(ConfigError, match="more token ids than there are; replay fewer requests"):
        Tokens(trace)


def test_the_example_is_in_order_and_shares_prefixes() -> None:
    trace = read_trace(EXAMPLE)
    assert len(trace) == 64
    assert all(one.seconds <= other.seconds for one, other in itertools.pairwise(trace))
    asked = sum(arrival.input_length for arrival in trace)
    assert asked / 3 < unbounded_hits(trace) < asked
    assert EXAMPLE.stat().st_size < 40_000
