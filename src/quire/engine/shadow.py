"""Shadows: a share of finished requests, read again with the exact cache, to watch a loss live.

A shadow is teacher-forced over the tokens that its request produced, so that both caches are asked
the same question at every position: would the exact cache have chosen another token here, and how
far apart are the two predictions? It runs in chunks between the steps of other requests, in a pool
that is made for it and let go after it. Not shadowed: requests that were cancelled or failed, beam
searches (their tokens are not choices) and contexts that do not fit the memory it may take.
"""

import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quire.analysis.divergence import kl_divergence, log_softmax
from quire.backends import Logits
from quire.engine.forced import ForcedText
from quire.engine.request import Request, Sample
from quire.errors import QuireError
from quire.sampler import choose, uniform

__all__ = ["OpenedShadow", "Shadow", "ShadowUsage", "is_chosen"]

KEPT_BYTES = 64 * 2**20  # of the lossy run's logits, over all shadows
MOST_PENDING = 64
ROWS_BYTES = 16 * 2**20  # of exact logits at a time


@dataclass(frozen=True)
class ShadowUsage:
    """What shadows found since the engine started.

    share       of requests that are chosen
    requests    samples that were read again
    pending     samples that are still to be
    skipped     chosen samples that could not be: cancelled, failed, searched, too large or too many
    tokens      positions that were compared
    diverged    positions at which the exact cache would have chosen another token, with the same
                sampling and the same draw
    kl_tokens   positions whose whole prediction was compared: all of them, unless the memory for
                logits was full
    kl_mean     mean KL(exact || cache) of those, in nats; None before the first
    bytes       memory that shadows hold now: logits kept and the exact pool
    bytes_peak  the most they held
    last_error  why the last sample that could not be read again could not
    """

    share: float
    requests: int = 0
    pending: int = 0
    skipped: int = 0
    tokens: int = 0
    diverged: int = 0
    kl_tokens: int = 0
    kl_mean: float | None = None
    bytes: int = 0
    bytes_peak: int = 0
    last_error: str | None = None


@dataclass(frozen=True)
class OpenedShadow:
    """An exact cache for one sample: a sequence in it, and the bytes of its pool."""

    text: ForcedText
    pool_bytes: int


class Shadow:
    """The shadows of one engine.

    share      of requests, 0 to 1
    most       tokens of a chunk
    open_exact opens an exact cache for so many tokens; a QuireError if it may not
    """

    def __init__(self, share: float, most: int, open_exact: Callable[[int], OpenedShadow]) -> None:
        self._share, self._most, self._open_exact = share, most, open_exact
        self._pending: deque[Sample] = deque()
        self._kept: dict[Sample, dict[int, npt.NDArray[np.float32]]] = {}
        self._opened: OpenedShadow | None = None
        self._kept_bytes = self._peak = 0
        self._requests = self._skipped = self._tokens = self._diverged = self._kl_tokens = 0
        self._kl_sum = 0.0
        self._last_error: str | None = None

    @property
    def pending(self) -> bool:
        """True while samples are to be read again."""
        return bool(self._pending)

    @property
    def usage(self) -> ShadowUsage:
        """Counters at this moment."""
        return ShadowUsage(
            share=self._share,
            requests=self._requests,
            pending=len(self._pending),
            skipped=self._skipped,
            tokens=self._tokens,
            diverged=self._diverged,
            kl_tokens=self._kl_tokens,
            kl_mean=self._kl_sum / self._kl_tokens if self._kl_tokens else None,
            bytes=self._bytes,
            bytes_peak=self._peak,
            last_error=self._last_error,
        )

    def note(self, sample: Sample, logits: Logits, row: int) -> None:
        """Keep the row of logits from which a sample's next token is chosen."""
        size = 4 * logits.shape[1]
        room = self._kept_bytes + size <= KEPT_BYTES
        if not room or not is_chosen(sample.request, self._share):
            return
        rows = self._kept.setdefault(sample, {})
        if len(sample.tokens) not in rows:
            self._kept_bytes += size
        rows[len(sample.tokens)] = logits.row(row).copy()
        self._peak = max(self._peak, self._bytes)

    def finished(self, sample: Sample, *, whole: bool) -> None:
        """Queue a sample that ended if its request is chosen; ``whole``: neither cut nor failed."""
        if not is_chosen(sample.request, self._share):
            return
        searched = sample.request.params.beam_width > 1
        possible = whole and not searched and sample.stream is None and sample.new_tokens
        if possible and len(self._pending) < MOST_PENDING:
            self._pending.append(sample)
        else:
            self._skipped += 1
            self._forget(sample)

    def step(self) -> None:
        """Read one chunk of the sample whose turn it is.

        An error of Quire's ends that shadow and is kept in the usage: to watch is never worth a
        request that is running.
        """
        if not self._pending:
            return
        sample = self._pending[0]
        try:
            if self._opened is None:
                self._opened = self._open_exact(len(sample.tokens) - 1)
                self._peak = max(self._peak, self._bytes)
            if self._advance(sample, self._opened.text):
                self._end(sample)
                self._requests += 1
        except QuireError as error:
            self._end(sample)
            self._skipped += 1
            self._last_error = str(error)

    def drop(self) -> None:
        """Give up what is pending, and all memory."""
        while self._pending:
            self._end(self._pending[0])
            self._skipped += 1

    # -- inside ------------------------------------------------------------------------------

    @property
    def _bytes(self) -> int:
        return self._kept_bytes + (0 if self._opened is None else self._opened.pool_bytes)

    def _advance(self, sample: Sample, text: ForcedText) -> bool:
        """Read the next chunk; True when all was read."""
        done, prompt = text.usage.tokens, len(sample.request.prompt_tokens)
        if done < prompt - 1:
            text.read(sample.tokens[done : min(done + self._most, prompt - 1)])
            return False
        rows = min(self._most, max(1, ROWS_BYTES // (4 * text.vocab_size)))
        fed = sample.tokens[done : min(done + rows, len(sample.tokens) - 1)]
        self._compare(sample, done + 1, text.score(fed))
        return done + len(fed) >= len(sample.tokens) - 1

    def _compare(self, sample: Sample, first: int, exact: npt.NDArray[np.float32]) -> None:
        """Compare what led to tokens ``first`` and on with exact logits [tokens, vocab]."""
        request, kept = sample.request, self._kept.get(sample, {})
        for position, row in enumerate(exact, first):
            reply = sample.tokens[len(request.prompt_tokens) : position]
            greedy = request.params.temperature == 0
            draw = 0.0 if greedy else uniform(request.seed, sample.index, position)
            token = choose(row, request.prompt_tokens, reply, request.params, draw)
            self._tokens += 1
            self._diverged += token != sample.tokens[position]
            if position in kept:
                both = log_softmax(np.stack([row, kept[position]]))
                self._kl_sum += float(kl_divergence(both[:1], both[1:])[0])
                self._kl_tokens += 1

    def _end(self, sample: Sample) -> None:
        if self._opened is not None:
            self._opened.text.close()
            self._opened = None
        self._pending.remove(sample)
        self._forget(sample)

    def _forget(self, sample: Sample) -> None:
        rows = self._kept.pop(sample, {})
        self._kept_bytes -= sum(row.nbytes for row in rows.values())


def is_chosen(request: Request, share: float) -> bool:
    """Whether a request is among the share: by a hash of its number and its seed, not by time.

    The seed counts only if it was given; one that was drawn would be another in every run.
    """
    key = f"{request.arrival} {request.params.seed}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") < share * 2**64
