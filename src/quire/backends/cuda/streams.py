"""Streams beside the one that computes, and what waits for what.

Streams are CUDA's own: work on one of them is done in order, and beside that of the others unless
an event stands between. Another thread than the one that computes may use the streams beside. While
that one captures a graph nobody hands work over: torch tells the driver that other threads are no
part of the capture (``capture_error_mode="thread_local"``; with its default, ``"global"``, memory
that another thread asks for in between would fail and take the capture with it), and a lock keeps
the two apart so that nothing depends on it.
"""

import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch

__all__ = ["Event", "Streams"]

Work = Callable[[], None]


class Event(Protocol):
    """A moment in a stream; of torch's events what is used here."""

    def query(self) -> bool:
        """True if all before it is done."""

    def synchronize(self) -> None:
        """Wait for that."""


class _Done:
    """The event of what was done at once."""

    def query(self) -> bool:
        """See :class:`Event`."""
        return True

    def synchronize(self) -> None:
        """See :class:`Event`."""


class Streams:
    """Two streams beside the one that computes: ``"down"`` to the host and ``"up"`` from it.

    Without hardware what is to be run is run at once, in whatever stream.

    submitting   held while work is handed over beside the steps, and while a graph is captured
    """

    def __init__(self, hardware: bool) -> None:
        self.submitting = threading.RLock()
        self._beside = {way: torch.cuda.Stream() for way in ("down", "up")} if hardware else {}

    def now(self) -> Event:
        """Behind all that the computing stream was given. By the thread that drives steps."""
        return _recorded(torch.cuda.current_stream()) if self._beside else _Done()

    def run(self, way: str, after: Event, work: Work) -> Event:
        """Queue what ``work`` launches on a stream beside, behind ``after``; the event behind it.

        By any thread. The event is behind all of it also where :meth:`run` has raised before.
        """
        with self.submitting:
            if not self._beside:
                work()
                return _Done()
            stream = self._beside[way]
            stream.wait_event(after)
            with torch.cuda.stream(stream):
                work()
            return _recorded(stream)

    def join(self, event: Event) -> None:
        """What the computing stream is given from now on waits for ``event``; the host does not."""
        if self._beside:
            torch.cuda.current_stream().wait_event(event)


def _recorded(stream: Any) -> Event:
    event = torch.cuda.Event(blocking=True)  # a thread that waits for it sleeps
    event.record(stream)
    return event
