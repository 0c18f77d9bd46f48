"""The text of one sample, piece by piece."""

from collections.abc import Callable, Iterator

from quire.engine.output import TextStream
from quire.engine.request import Request
from quire.errors import QuireError

__all__ = ["Pieces"]


class Pieces(Iterator[str]):
    """What :meth:`Engine.stream` returns: a cursor into the text of a request's only sample.

    Others may step the engine between two pieces; nothing is lost.
    """

    def __init__(
        self,
        request: Request,
        text: TextStream,
        step: Callable[[], object],
        cancel: Callable[[Request], None],
    ) -> None:
        self._request, self._text, self._step, self._cancel = request, text, step, cancel
        self._given = 0

    def __next__(self) -> str:
        while not (piece := self._text.text[self._given :]):
            if self._request.finished:
                error = self._request.completions[0].error
                if error is not None:
                    raise QuireError(error)
                raise StopIteration
            try:
                self._step()
            except BaseException:
                self.close()
                raise
        self._given += len(piece)
        return piece

    def close(self) -> None:
        """Cancel the request."""
        self._cancel(self._request)
        self._given = len(self._text.text)

    def __del__(self) -> None:
        self.close()
