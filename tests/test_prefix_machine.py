"""The prefix cache against lists of tokens, over long random histories.

What is stored for a token here is a digest of its whole prefix and its salt, so that a page that
came from another prompt, another tenant or another place is always seen. The pool is kept nearly
full, tenants draw from few tokens so that prompts meet often, and in some histories lookups use one
byte of a digest or none, so that nearly all of them collide.
"""

import zlib
from collections import Counter
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from caches import Windows, cache_over, layout_of
from quire.backends.reference import ReferencePool
from quire.cache import KVCache, PrefixQuery
from quire.cache.prefix import PrefixIndex
from quire.cache.truncating import shortest
from quire.errors import CacheFull

Array = npt.NDArray[Any]


def prefix_cache(
    page_size: int,
    num_pages: int,
    windows: Windows = (None,),
    digest_bytes: int = 32,
    format: str = "fp32",
) -> KVCache:
    """A cache that shares prefixes."""
    cache = cache_over(layout_of(page_size, windows, format), num_pages, identity=b"tests")
    assert cache.prefix is not None
    cache.prefix.digest_bytes = digest_bytes
    return cache


def index_of(cache: KVCache) -> PrefixIndex:
    assert cache.prefix is not None
    return cache.prefix


def fingerprints(tokens: list[int], salt: str) -> list[int]:
    """For each token a number below 2**22 that depends on the salt and all tokens up to it."""
    digest, out = zlib.crc32(salt.encode()), []
    for token in tokens:
        digest = zlib.crc32(token.to_bytes(4, "little"), digest)
        out.append(digest % 2**22)
    return out


def write_prefix(cache: KVCache, sequence: int, tokens: list[int], new: int, salt: str) -> None:
    """Reserve, write and commit the last ``new`` of ``tokens``."""
    reservation = cache.reserve([(sequence, new)])
    marks = np.asarray(fingerprints(tokens, salt)[len(tokens) - new :], np.float32)
    for layer, pool in enumerate(cache.pools):
        assert isinstance(pool, ReferencePool)
        tables = reservation.batch.groups[reservation.batch.group_of_layer[layer]]
        numbers = marks[:, None, None] + np.float32(layer)
        shape = pool.shape
        pool.store(
            tables.slots,
            np.tile(numbers, (1, shape.num_kv_heads, shape.key_dim)),
            np.tile(numbers, (1, shape.num_kv_heads, shape.value_dim)),
        )
        pool.seal(tables.open.seal_from, tables.open.seal_to)
    cache.commit(reservation, [tokens[len(tokens) - new :]])


def assert_is_prefix(cache: KVCache, sequence: int, tokens: list[int], salt: str) -> None:
    """Every number that a next token of ``sequence`` could see belongs to exactly ``tokens``."""
    assert cache.length(sequence) == len(tokens)
    marks = np.asarray(fingerprints(tokens, salt), np.float32)
    for layer, kv in enumerate(cache.to_arrays(sequence, "BSHD").layers):
        expected = marks[kv.start :] + layer
        assert (kv.key[0] == expected[:, None, None]).all()
        if cache.layout.packs[0]:  # equal numbers of a group are packed as their bf16 is
            expected = expected.astype(ml_dtypes.bfloat16).astype(np.float32)
        assert (kv.value[0] == expected[:, None, None]).all()


class History:
    """Sequences of several tenants that begin, go on, fork, go back and end at random."""

    def __init__(self, cache: KVCache, seed: int) -> None:
        self.cache, self.random = cache, np.random.default_rng(seed)
        self.live: dict[int, tuple[list[int], str]] = {}
        self.told: list[tuple[list[int], str]] = []  # prompts that were ever held
        self.seen = Counter[str]()

    def pick(self) -> int:
        return list(self.live)[int(self.random.integers(len(self.live)))]

    def new_tokens(self, most: int) -> list[int]:
        return self.random.integers(0, 3, self.random.integers(1, most)).tolist()

    def begin(self) -> None:
        """Admit a prompt that often begins as another did, perhaps another tenant's."""
        tokens: list[int] = []
        salt = str(self.random.choice(["", "a", "b"]))
        if self.told and self.random.random() < 0.8:
            old, old_salt = self.told[int(self.random.integers(len(self.told)))]
            tokens = old[: int(self.random.integers(len(old) + 1))]
            salt = old_salt if self.random.random() < 0.7 else salt
        tokens = tokens + self.new_tokens(12)
        match = self.cache.match(PrefixQuery(tokens, salt), len(tokens) - 1)
        choices = match.choices()
        match = choices[int(self.random.integers(len(choices)))]
        cost = self.cache.cost(match, len(tokens) - match.tokens)
        if any(c > f for c, f in zip(cost, self.cache.free_pages, strict=True)):
            return
        sequence = self.cache.create(match)
        assert_is_prefix(self.cache, sequence, tokens[: match.tokens], salt)
        # What the match said it would cost is enough, whatever must be evicted for it.
        write_prefix(self.cache, sequence, tokens, len(tokens) - match.tokens, salt)
        self.live[sequence] = (tokens, salt)
        self.seen["hit"] += match.tokens > 0
        self.seen["partial"] += match.partial is not None and not match.takes
        self.seen["taken"] += match.takes

    def go_on(self) -> None:
        sequence = self.pick()
        tokens, salt = self.live[sequence]
        new = self.new_tokens(7)
        try:
            write_prefix(self.cache, sequence, [*tokens, *new], len(new), salt)
        except CacheFull:
            self.seen["full"] += 1
            return
        self.live[sequence] = ([*tokens, *new], salt)

    def fork(self) -> None:
        sequence = self.pick()
        self.live[self.cache.fork(sequence)] = self.live[sequence]

    def go_back(self) -> None:
        sequence = self.pick()
        tokens, salt = self.live[sequence]
        least = max(0, shortest(self.cache.layout, self.cache._sequences[sequence]))
        length = int(self.random.integers(min(least, len(tokens)), len(tokens) + 1))
        size = self.cache.layout.page_size
        if self.cache.layout.packs[0] and size < length < len(tokens) // size * size:
            length = length // size * size  # the tokens of a packed page cannot be parted
        if length < least:
            return
        self.cache.truncate(sequence, length)
        self.live[sequence] = (tokens[:length], salt)
        if not length:
            self.end(sequence)

    def end(self, sequence: int) -> None:
        tokens, salt = self.live.pop(sequence)
        self.cache.release(sequence)
        if tokens:
            self.told = [*self.told[-60:], (tokens, salt)]

    def step(self) -> None:
        before = len(index_of(self.cache).evicted)
        draw = self.random.random()
        if not self.live or (draw < 0.35 and len(self.live) < 7):
            self.begin()
        elif draw < 0.65:
            self.go_on()
        elif draw < 0.72 and len(self.live) < 7:
            self.fork()
        elif draw < 0.82:
            self.go_back()
        else:
            self.end(self.pick())
        self.seen["evicted"] += len(index_of(self.cache).evicted) > before
        self.cache.check()
        assert set(self.cache.sequences) == set(self.live)


PACKED = "k=fp32,v=int4"
SETUPS: list[tuple[int, int, Windows, int, str]] = [
    (1, 23, (None,), 32, "fp32"),
    (4, 12, (None,), 32, "fp32"),
    (4, 12, (None,), 1, "fp32"),
    (4, 12, (None,), 0, "fp32"),
    (3, 14, (None, 5), 32, "fp32"),
    (4, 11, (6, 6), 32, "fp32"),
    (2, 20, (None, 3, 8), 1, "fp32"),
    (1, 20, (1,), 32, "fp32"),
    (64, 3, (None,), 32, "fp32"),
    (4, 12, (None,), 32, PACKED),
    (4, 12, (None,), 0, PACKED),
    (3, 14, (None, 5), 32, PACKED),
    (4, 11, (6, 6), 32, PACKED),
    (2, 20, (None, 3, 8), 1, PACKED),
    (1, 20, (None,), 32, PACKED),
]


@pytest.mark.parametrize(("page_size", "num_pages", "windows", "digest_bytes", "format"), SETUPS)
@pytest.mark.parametrize("steps", [1500, pytest.param(12_000, marks=pytest.mark.slow)])
def test_no_sequence_ever_holds_a_token_of_another(
    page_size: int, num_pages: int, windows: Windows, digest_bytes: int, format: str, steps: int
) -> None:
    cache = prefix_cache(page_size, num_pages, windows, digest_bytes, format)
    history = History(cache, seed=page_size * 1000 + num_pages)
    for at in range(steps):
        history.step()
        if at % 7 == 0:
            for sequence, (tokens, salt) in history.live.items():
                assert_is_prefix(cache, sequence, tokens, salt)
    never = {"partial", "taken"} if page_size == 1 else set[str]()
    never |= {"full"} if windows == (1,) else set()  # which needs a page a sequence
    for kind in {"hit", "partial", "taken", "full", "evicted"} - never:
        assert history.seen[kind], kind
    for sequence in list(history.live):
        history.end(sequence)
    cache.check()
    assert cache.free_pages == cache.num_pages
