"""A long run of states as a few hundred points, each of which was so at some moment."""

from dataclasses import dataclass, replace

__all__ = ["MOST_POINTS", "Moment", "Timeline"]

MOST_POINTS = 512


@dataclass(frozen=True, slots=True)
class Moment:
    """A cache and its queues from ``seconds`` on. Held, cached and free bytes are the whole pool.

    held_bytes    pages of the sequences, shared ones once
    waste_bytes   slots of those that hold no token
    cached_bytes  pages of no sequence that are kept for prompts that begin as theirs did
    free_bytes    all others
    """

    seconds: float
    held_bytes: int
    waste_bytes: int
    cached_bytes: int
    free_bytes: int
    running: int
    waiting: int


class Timeline:
    """At most ``most`` points of equal width over all states that were added.

    A point has the bytes of that moment in its bin at which sequences held most, so that they add
    up, and the most that ran and that waited in it, which may have been at other moments. When
    there are too many bins, each two become one: nothing has to be known of the end.
    """

    def __init__(self, most: int = MOST_POINTS) -> None:
        self._most = most
        self._bins: list[Moment] = []
        self._start = self._width = 0.0

    def add(self, moment: Moment, end: float) -> None:
        """``moment`` lasted until ``end``. Moments come in order of time and leave no gap."""
        if not self._bins:
            self._start, self._bins = moment.seconds, [moment]
        if end <= self._start:  # nothing took time so far
            self._bins = [_joined(self._bins[0], moment)]
            return
        if not self._width:
            self._width = (end - self._start) / self._most
        while end > self._start + self._most * self._width:
            self._halve()
        first = self._bin(moment.seconds)
        for at in range(first, max(first, self._bin(end, before=True)) + 1):
            if at < len(self._bins):
                self._bins[at] = _joined(self._bins[at], moment)
            else:
                self._bins.append(moment)

    def points(self) -> tuple[Moment, ...]:
        """The bins, each with the time at which it begins."""
        return tuple(
            replace(moment, seconds=self._start + at * self._width)
            for at, moment in enumerate(self._bins)
        )

    def _bin(self, seconds: float, *, before: bool = False) -> int:
        """The bin of a time; of the time just ``before`` it, which a bin's end still belongs to."""
        exact = (seconds - self._start) / self._width
        at = int(exact)
        return min(self._most - 1, at - 1 if before and at == exact else at)

    def _halve(self) -> None:
        pairs = zip(self._bins[::2], [*self._bins[1::2], self._bins[-1]], strict=False)
        self._bins = [_joined(one, other) for one, other in pairs]
        self._width *= 2


def _joined(one: Moment, other: Moment) -> Moment:
    most = other if other.held_bytes > one.held_bytes else one
    running, waiting = max(one.running, other.running), max(one.waiting, other.waiting)
    if (most.running, most.waiting) == (running, waiting):
        return most
    return replace(most, running=running, waiting=waiting)
