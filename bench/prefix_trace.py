"""A generator of traces with shared prefixes, and their text form.

What a trace is stands in :mod:`quire.analysis.trace`.

    python bench/prefix_trace.py REQUESTS [--seed N] > FILE
"""

import argparse
import json
from collections.abc import Iterable, Sequence

import numpy as np

from quire.analysis.trace import BLOCK, Arrival

LONGEST = 32_768  # tokens of prompt and reply that the generator makes

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


def lines(trace: Sequence[Arrival]) -> str:
    """A trace as :func:`quire.analysis.trace.read_trace` reads it; times in whole milliseconds."""
    numbers = {
        block: at for at, block in enumerate(dict.fromkeys(b for a in trace for b in a.blocks))
    }
    rows = (
        {
            "timestamp": round(1000 * arrival.seconds),
            "input_length": arrival.input_length,
            "output_length": arrival.output_length,
            "hash_ids": [numbers[block] for block in arrival.blocks],
        }
        for arrival in trace
    )
    return "".join(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    """Print a trace."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("requests", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(lines(synthetic(options.requests, options.seed)), end="")


if __name__ == "__main__":
    main()
