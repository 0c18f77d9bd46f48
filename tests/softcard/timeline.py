"""Streams, events and graphs of a card in software: what is queued is done when it must be.

CUDA promises an order within a stream and behind events, and nothing else. So what is queued here
is done as late as that allows (``LATE``), at once (``AT_ONCE``), at once but late on the default
stream (``BESIDE``), or at moments drawn by a seed: what comes out right in all of them does not
depend on luck.
"""

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["AT_ONCE", "BESIDE", "LATE", "Event", "Graph", "Stream", "Timeline", "torch_names"]

Work = Callable[[], None]

LATE, AT_ONCE, BESIDE = "late", "once", "beside"
_MOST = 4  # pieces of work that a drawn moment lets a stream do


class Stream:
    """Work in order; as :class:`torch.cuda.Stream`."""

    def __init__(self, timeline: "Timeline") -> None:
        self._timeline = timeline
        self._queue = deque[Work]()
        self.begun = self.done = 0
        timeline.streams.append(self)

    def add(self, work: Work) -> None:
        """Queue ``work``, whoever captures what."""
        with self._timeline.lock:
            self._queue.append(work)
            self.begun += 1

    def reach(self, number: int) -> None:
        """Do what was queued up to ``number``."""
        with self._timeline.lock:
            while self.done < min(number, self.begun):
                work = self._queue.popleft()
                self.done += 1
                work()

    def wait_event(self, event: "Event") -> None:
        """What is queued here from now on comes after ``event``."""
        self._timeline.require_no_capture("waiting for an event")
        stream, number = event.moment
        self.add(lambda: stream.reach(number))

    def wait_stream(self, other: "Stream") -> None:
        """What is queued here from now on comes after all that ``other`` was given."""
        self.wait_event(other.record_event())

    def record_event(self, event: "Event | None" = None) -> "Event":
        """The moment behind all that this stream was given."""
        event = Event(self._timeline) if event is None else event
        event.record(self)
        return event

    def query(self) -> bool:
        """True if all is done."""
        return self.record_event().query()

    def synchronize(self) -> None:
        """The host waits."""
        self.record_event().synchronize()


class Event:
    """As :class:`torch.cuda.Event`; a moment that was never recorded has passed."""

    def __init__(
        self, timeline: "Timeline", enable_timing: bool = False, blocking: bool = False
    ) -> None:
        self._timeline = timeline
        self.moment: tuple[Stream, int] = (timeline.default, 0)

    def record(self, stream: Stream | None = None) -> None:
        """Now is behind all that ``stream``, or the current one, was given."""
        self._timeline.require_no_capture("recording an event")
        stream = self._timeline.current if stream is None else stream
        self.moment = stream, stream.begun

    def query(self) -> bool:
        """Whether it has passed. Who asks often sees the stream go on."""
        self._timeline.require_no_capture("asking for an event")
        stream, number = self.moment
        passed = stream.done >= number
        stream.reach(stream.done + 1)
        return passed

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds until ``end``: made up, since this card does not know time."""
        return 1.0 + max(0, end.moment[1] - self.moment[1])

    def synchronize(self) -> None:
        """The host waits."""
        self._timeline.require_no_capture("waiting for an event")
        stream, number = self.moment
        self._timeline.waits += stream.done < number
        stream.reach(number)


class Graph:
    """As :class:`torch.cuda.CUDAGraph`.

    pool    what graphs of the same pool have in common: any of them may lie where others do
    memory  storage of what was made during the capture: a function that fills it with rubbish, each
    """

    def __init__(self, timeline: "Timeline") -> None:
        self._timeline = timeline
        self.works: list[Work] = []
        self.memory: list[Work] = []
        self.pool: list[Graph] = [self]

    def replay(self) -> None:
        """Queue all of it; what other graphs of the pool have made may be lost."""
        self._timeline.require_no_capture("replaying a graph")
        self._timeline.replays += 1
        self._timeline.queue(self._run)

    def _run(self) -> None:
        for graph in self.pool:
            for spoil in graph.memory:
                spoil()
        for work in self.works:
            work()


class Timeline:
    """All streams of a card. ``policy``: LATE, AT_ONCE, BESIDE, or a seed; else ValueError.

    waits    how often the host waited for what was not done yet
    replays  of graphs
    """

    def __init__(self, policy: str | int = LATE) -> None:
        if isinstance(policy, str) and policy not in (LATE, AT_ONCE, BESIDE):
            raise ValueError(f"{policy!r}: say {LATE}, {AT_ONCE}, {BESIDE} or a number")
        self.lock = threading.RLock()
        self.streams: list[Stream] = []
        self.waits = self.replays = 0
        self._policy = policy
        self._draw = random.Random(policy)
        self._own = threading.local()
        self.default = Stream(self)
        self._captures: list[str] = []  # modes of those under way

    @property
    def current(self) -> Stream:
        """The stream of the calling thread."""
        stream: Stream = getattr(self._own, "stream", self.default)
        return stream

    @contextmanager
    def using(self, stream: Stream) -> Iterator[None]:
        """As :func:`torch.cuda.stream`."""
        before = self.current
        self._own.stream = stream
        try:
            yield
        finally:
            self._own.stream = before

    @property
    def capturing(self) -> Graph | None:
        """The graph that the calling thread captures."""
        graph: Graph | None = getattr(self._own, "graph", None)
        return graph

    @contextmanager
    def capture(
        self, graph: Graph, pool: list[Graph] | None = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        """As :func:`torch.cuda.graph`, which waits for the whole card before."""
        self.synchronize()
        if pool is not None:
            pool.append(graph)
            graph.pool = pool
        self._own.graph = graph
        self._captures.append(capture_error_mode)
        try:
            with self.using(Stream(self)):
                yield
        finally:
            self._own.graph = None
            self._captures.remove(capture_error_mode)

    def queue(self, work: Work) -> None:
        """``work`` comes next in the current stream, or in what is captured."""
        graph = self.capturing
        if graph is not None:
            graph.works.append(work)
            return
        self.current.add(work)
        self.go_on()

    def go_on(self) -> None:
        """Time passes."""
        if self._policy == AT_ONCE:
            self.current.reach(self.current.begun)
        elif self._policy == BESIDE:
            for stream in self.streams[1:]:
                stream.reach(stream.begun)
        elif self._policy != LATE:
            with self.lock:
                stream = self._draw.choice(self.streams)
                stream.reach(stream.done + self._draw.randrange(_MOST))

    def synchronize(self) -> None:
        """The host waits for the whole card."""
        self.require_no_capture("waiting for the card")
        for stream in list(self.streams):
            stream.reach(stream.begun)

    def require_no_capture(self, what: str) -> None:
        """Raise RuntimeError where CUDA refuses ``what``: in a thread that captures."""
        if self.capturing is not None:
            raise RuntimeError(f"CUDA error: {what} is not permitted while a stream is capturing")

    def require_memory_may_grow(self) -> None:
        """Raise RuntimeError where CUDA refuses to allocate: beside a capture of another thread."""
        if self.capturing is None and "global" in self._captures:
            raise RuntimeError("CUDA error: allocating beside a capture whose error mode is global")


def torch_names(timeline: Timeline) -> dict[str, Any]:
    """What stands for the parts of ``torch.cuda`` that queue and wait."""
    return {
        "Stream": lambda *_, **__: Stream(timeline),
        "Event": lambda *args, **named: Event(timeline, *args, **named),
        "CUDAGraph": lambda: Graph(timeline),
        "graph": timeline.capture,
        "graph_pool_handle": list,
        "stream": timeline.using,
        "current_stream": lambda device=None: timeline.current,
        "synchronize": lambda device=None: timeline.synchronize(),
    }
