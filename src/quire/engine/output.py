"""The text of a sample as it grows: pieces to show, and stop strings."""

from collections.abc import Sequence

from quire.models import StreamDecoder, TextCodec

__all__ = ["TextStream"]


class TextStream:
    """Token ids to text pieces; holds back what may be the beginning of a stop string.

    Without a codec (a checkpoint without a tokenizer) every piece is empty.
    """

    def __init__(self, codec: TextCodec | None, stop: Sequence[str]) -> None:
        self._decoder = None if codec is None else StreamDecoder(codec)
        self._stop = tuple(stop)
        self._held = ""
        self.text = ""  # all that was given out so far

    def push(self, token_id: int) -> tuple[str, str | None]:
        """(text to show now, the stop string that was met or None)."""
        if self._decoder is None:
            return "", None
        return self._release(self._decoder.push(token_id))

    def flush(self) -> tuple[str, str | None]:
        """The end: what was held back; the last characters may still complete a stop string."""
        if self._decoder is None:
            return "", None
        piece, stopped = self._release(self._decoder.flush())
        if stopped is None:
            self.text += self._held
            piece, self._held = piece + self._held, ""
        return piece, stopped

    def _release(self, new: str) -> tuple[str, str | None]:
        if not self._stop:
            self.text += new
            return new, None
        text = self._held + new
        found = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            at, stop = min(found)
            self._held = ""
            self.text += text[:at]
            return text[:at], stop
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        piece, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += piece
        return piece, None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop`` without completing it."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
