"""Traces of requests with shared prefixes: who came when, how long, and which blocks.

A trace says of each request when it came, how long prompt and reply are, and which blocks of 512
tokens the prompt consists of: equal ids at the same place of an equal beginning are equal tokens.
That is the format of the traces that were published with Mooncake (arXiv:2407.00079): one JSON
object a line,

    {"timestamp": milliseconds, "input_length": tokens, "output_length": tokens,
     "hash_ids": [block, ...]}

with one id for every 512 tokens of the prompt or part of them; other fields are ignored. Replies
have no ids, so what a next turn repeats of them is not known to be the same; a hit there would come
on top. Nor does a trace say which tokens: :class:`Tokens` makes some up that are equal where its
blocks are.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quire.errors import ConfigError

__all__ = ["BLOCK", "Arrival", "Tokens", "common_prefixes", "read_trace", "unbounded_hits"]

BLOCK = 512
FIELDS = ("timestamp", "input_length", "output_length", "hash_ids")


@dataclass(frozen=True)
class Arrival:
    """A request: seconds since the trace began, tokens, and the prompt's blocks."""

    seconds: float
    input_length: int
    output_length: int
    blocks: tuple[int, ...]


def read_trace(path: Path, most: int | None = None) -> list[Arrival]:
    """The first ``most`` requests of a file, or all of them, in order of time.

    Raises ConfigError, naming file, line and what is wrong, for a line that is not as above, and
    for a file without requests; OSError for one that cannot be read.
    """
    arrivals: list[Arrival] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if len(arrivals) == most:
                break
            if line.strip():
                try:
                    arrivals.append(_parse(line))
                except (ValueError, RecursionError) as error:  # ConfigError is one
                    raise ConfigError(f"{path}, line {number}: {error}") from None
    if not arrivals:
        raise ConfigError(
            f"{path} holds no request; a line is a JSON object with {', '.join(FIELDS)}"
        )
    return sorted(arrivals, key=lambda arrival: arrival.seconds)


def _parse(line: str) -> Arrival:
    """The request of a line; ConfigError, or what JSON raises, says what is wrong with it."""
    given = json.loads(line)
    if not isinstance(given, dict):
        raise ConfigError(f"a request must be a JSON object, not {line.strip()[:40]}")
    for name in FIELDS:
        if name not in given:
            raise ConfigError(
                f"{name} is missing; there are {', '.join(map(str, given)) or 'none'}"
            )
    when, ids = given["timestamp"], given["hash_ids"]
    if not _is_number(when) or not 0 <= when < 1e15:
        raise ConfigError(f"timestamp must be milliseconds, 0 or more, not {when!r}")
    length = _count("input_length", given["input_length"], 1)
    reply = _count("output_length", given["output_length"], 0)
    if not isinstance(ids, list) or not all(_is_int(block) for block in ids):
        raise ConfigError(f"hash_ids must be a list of ints, not {str(ids)[:40]}")
    wanted = -(-length // BLOCK)
    if len(ids) != wanted:
        raise ConfigError(
            f"hash_ids has {len(ids)} ids; input_length {length} is {wanted} blocks of {BLOCK}"
        )
    return Arrival(when / 1000, length, reply, tuple(ids))


def _count(name: str, value: Any, least: int) -> int:
    if not _is_int(value) or not least <= value < 1 << 31:
        raise ConfigError(f"{name} must be an int of at least {least}, not {value!r}")
    return int(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_int(value) or isinstance(value, float)


class Tokens:
    """Token ids for a trace: equal where blocks are, and different everywhere else.

    Ids are below 2**32; ConfigError for a trace that has more tokens than that.
    """

    def __init__(self, trace: Sequence[Arrival]) -> None:
        known = dict.fromkeys(block for arrival in trace for block in arrival.blocks)
        self._number = {block: at for at, block in enumerate(known)}
        self._replies = 1 << 32
        replies = sum(max(1, arrival.output_length) for arrival in trace)
        if len(known) * BLOCK + replies > self._replies:
            raise ConfigError(
                f"{len(known):,} blocks and {replies:,} tokens of replies are more token ids than "
                "there are; replay fewer requests"
            )

    def of_prompt(self, arrival: Arrival) -> list[int]:
        """The prompt."""
        starts = np.array([self._number[block] for block in arrival.blocks]) * BLOCK
        whole = (starts[:, None] + np.arange(BLOCK)).reshape(-1)
        tokens: list[int] = whole[: arrival.input_length].tolist()
        return tokens

    def of_reply(self, arrival: Arrival) -> list[int]:
        """The reply: ids that nothing else has. At least one, since that is what engines make."""
        count = max(1, arrival.output_length)
        self._replies -= count
        return list(range(self._replies, self._replies + count))


def common_prefixes(trace: Sequence[Arrival]) -> list[int]:
    """For each request, how many leading tokens of its prompt a request before it had, too.

    A dict of prefixes: (prefix, block) -> (longer prefix, most tokens of that block).
    """
    known: dict[tuple[int, int], tuple[int, int]] = {}
    found: list[int] = []
    for arrival in trace:
        prefix, common, goes_on = 0, 0, True
        for at, block in enumerate(arrival.blocks):
            tokens = min(BLOCK, arrival.input_length - at * BLOCK)
            longer, held = known.get((prefix, block), (len(known) + 1, 0))
            common += min(tokens, held) if goes_on else 0
            goes_on = goes_on and held >= BLOCK
            known[prefix, block] = longer, max(tokens, held)
            prefix = longer
        found.append(common)
    return found


def unbounded_hits(trace: Sequence[Arrival]) -> int:
    """Prompt tokens that a cache which forgets nothing would have, one request after the other.

    The last token of a prompt is always computed: its logits are the first of the reply.
    """
    common = common_prefixes(trace)
    return sum(min(n, a.input_length - 1) for n, a in zip(common, trace, strict=True))
