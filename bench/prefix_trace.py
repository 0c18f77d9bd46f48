"""Traces of requests with shared prefixes: a generator, and Mooncake's files.

A trace says of each request when it came, how long prompt and reply are, and which blocks of 512
tokens the prompt consists of: equal ids at the same place of an equal beginning are equal tokens.
That is the format of the traces that were published with Mooncake (arXiv:2407.00079): one JSON
object a line,

    {"timestamp": milliseconds, "input_length": tokens, "output_length": tokens,
     "hash_ids": [block, ...]}

with one id for every 512 tokens of the prompt or part of them. Replies have no ids, so what a next
turn repeats of them is not known to be the same; a hit there would come on top.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 512
FIELDS = ("timestamp", "input_length", "output_length", "hash_ids")
LONGEST = 32_768  # tokens of prompt and reply that the generator makes


@dataclass(frozen=True)
class Arrival:
    """A request: seconds since the trace began, tokens, and the prompt's blocks."""

    seconds: float
    input_length: int
    output_length: int
    blocks: tuple[int, ...]


# -- the generator ---------------------------------------------------------------------------

DOCUMENTS, DOCUMENT_BLOCKS, MOST_DOCUMENT_BLOCKS, ZIPF = 200, 6, 32, 1.0
CONVERSATION_GAP, TURN_GAP = 2.0, 30.0  # mean seconds
GOES_ON = 0.6
USER, REPLY = (200, 1.0, 8192), (100, 0.8, 1000)  # median, sigma, most


def synthetic(requests: int, seed: int = 0) -> list[Arrival]:
    """A trace of ``requests`` requests, the same for the same arguments.

    Conversations begin as a Poisson process, one in 2 s. Each stands behind one of 200 documents
    (system prompts, tools, papers) of 1 to 32 blocks, geometric with a mean of 6, chosen with
    Zipf's law (exponent 1). A turn adds what the user says (log-normal, median 200 tokens, sigma 1)
    to what was said before; replies are log-normal (median 100, sigma 0.8, at most 1,000). After a
    reply the conversation goes on with probability 0.6, after 30 s in the mean (exponential), while
    it fits 32,768 tokens. Whole blocks of a conversation keep their ids from turn to turn, an
    unfinished last one has a new id each time, as a digest of its tokens would.
    """
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.geometric(1 / DOCUMENT_BLOCKS, DOCUMENTS), MOST_DOCUMENT_BLOCKS)
    popularity = 1 / np.arange(1, DOCUMENTS + 1) ** ZIPF
    ids = iter(range(1 << 40))
    documents = [[next(ids) for _ in range(length)] for length in lengths]
    arrivals: list[Arrival] = []
    start = 0.0
    while len(arrivals) < 2 * requests:  # late turns of the first ones come after those
        start += rng.exponential(CONVERSATION_GAP)
        document = documents[rng.choice(DOCUMENTS, p=popularity / popularity.sum())]
        arrivals += conversation(rng, start, document, ids)
    arrivals.sort(key=lambda arrival: arrival.seconds)
    return arrivals[:requests]


def conversation(
    rng: np.random.Generator, start: float, document: Sequence[int], ids: Iterable[int]
) -> list[Arrival]:
    """The turns of one conversation behind the blocks of ``document``."""
    fresh = iter(ids)
    turns: list[Arrival] = []
    blocks, length = list(document), len(document) * BLOCK
    while True:
        length += _length(rng, USER)
        reply = _length(rng, REPLY)
        if length + reply > LONGEST:
            return turns
        blocks += [next(fresh) for _ in range(len(blocks), length // BLOCK)]
        unfinished = [next(fresh)] if length % BLOCK else []
        turns.append(Arrival(start, length, reply, (*blocks, *unfinished)))
        length += reply
        start += rng.exponential(TURN_GAP)
        if rng.random() > GOES_ON:
            return turns


def _length(rng: np.random.Generator, of: tuple[int, float, int]) -> int:
    median, sigma, most = of
    return min(most, 1 + int(median * np.exp(sigma * rng.standard_normal())))


# -- files -----------------------------------------------------------------------------------


def read_trace(path: Path, most: int) -> list[Arrival]:
    """At most the first ``most`` requests of a file, in order of time.

    Raises ValueError, naming file, line and what is wrong, for a line that is not as above.
    """
    arrivals: list[Arrival] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if len(arrivals) == most:
                break
            if line.strip():
                try:
                    arrivals.append(_parse(line))
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}, line {number}: {error}") from None
    if not arrivals:
        raise ValueError(f"{path} holds no request")
    return sorted(arrivals, key=lambda arrival: arrival.seconds)


def _parse(line: str) -> Arrival:
    given = json.loads(line)
    if not isinstance(given, dict):
        raise ValueError(f"a request must be a JSON object, not {line.strip()[:40]}")
    for name in FIELDS:
        if name not in given:
            raise ValueError(f"{name} is missing")
    when, ids = given["timestamp"], given["hash_ids"]
    if not _is_number(when) or not 0 <= when < 1e15:
        raise ValueError(f"timestamp must be milliseconds, not {when!r}")
    length = _count("input_length", given["input_length"], 1)
    reply = _count("output_length", given["output_length"], 0)
    if not isinstance(ids, list) or not all(_is_int(block) for block in ids):
        raise ValueError(f"hash_ids must be a list of ints, not {str(ids)[:40]}")
    wanted = -(-length // BLOCK)
    if len(ids) != wanted:
        raise ValueError(
            f"hash_ids has {len(ids)} ids; input_length {length} is {wanted} blocks of {BLOCK}"
        )
    return Arrival(when / 1000, length, reply, tuple(ids))


def _count(name: str, value: Any, least: int) -> int:
    if not _is_int(value) or not least <= value < 1 << 31:
        raise ValueError(f"{name} must be an int of at least {least}, not {value!r}")
    return int(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_int(value) or isinstance(value, float)


# -- what is in a trace ----------------------------------------------------------------------


class Tokens:
    """Token ids for a trace: equal where blocks are, and different everywhere else.

    Ids are below 2**32; ValueError for a trace that has more tokens than that.
    """

    def __init__(self, trace: Sequence[Arrival]) -> None:
        known = dict.fromkeys(block for arrival in trace for block in arrival.blocks)
        self._number = {block: at for at, block in enumerate(known)}
        self._replies = 1 << 32
        replies = sum(max(1, arrival.output_length) for arrival in trace)
        if len(known) * BLOCK + replies > self._replies:
            raise ValueError(
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


def unbounded_hits(trace: Sequence[Arrival]) -> int:
    """Prompt tokens that a cache which forgets nothing would have, one request after the other.

    A dict of prefixes: (prefix, block) -> (longer prefix, most tokens of that block).
    """
    known: dict[tuple[int, int], tuple[int, int]] = {}
    hits = 0
    for arrival in trace:
        prefix, common, goes_on = 0, 0, True
        for at, block in enumerate(arrival.blocks):
            tokens = min(BLOCK, arrival.input_length - at * BLOCK)
            longer, held = known.get((prefix, block), (len(known) + 1, 0))
            common += min(tokens, held) if goes_on else 0
            goes_on = goes_on and held >= BLOCK
            known[prefix, block] = longer, max(tokens, held)
            prefix = longer
        hits += min(common, arrival.input_length - 1)  # the last token is always computed
    return hits
