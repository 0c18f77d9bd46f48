"""What may be asked of sampling, and what it gives; ``sampler.py`` says how."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from quire.config import settings
from quire.errors import ConfigError, RequestError
from quire.evict_choice import parse_eviction

__all__ = ["Ask", "Choice", "SamplingParams", "Seen", "TokenLogprob"]


def _number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    ok = isinstance(value, int | float) and not isinstance(value, bool)
    if not ok or not low <= value <= high or (open_low and value == low):  # type: ignore[operator]
        left = "above" if open_low else "from"
        raise RequestError(f"{name} must be a number {left} {low:g} to {high:g}, not {value!r}")


def _integer(name: str, value: object, low: int, high: int | None = None) -> None:
    ok = isinstance(value, int) and not isinstance(value, bool)
    if not ok or value < low or (high is not None and value > high):  # type: ignore[operator]
        limit = "" if high is None else f" and at most {high}"
        raise RequestError(f"{name} must be an int of at least {low}{limit}, not {value!r}")


def _items(name: str, value: object) -> tuple[Any, ...]:
    if not isinstance(value, Iterable):
        raise RequestError(f"{name} must be a list, not {value!r}")
    return tuple(value)


@settings
class SamplingParams:
    """How to choose tokens. Applied in the order of this list; defaults change nothing.

    repetition_penalty  > 1 makes tokens of prompt and reply less likely (CTRL, arXiv:1909.05858)
    presence_penalty    subtracted from the logit of every token that is in the reply
    frequency_penalty   subtracted once for every time the token is in the reply
    temperature         0 is greedy; else logits are divided by it
    top_k               keep the k most likely tokens; 0 keeps all
    top_p               keep the smallest set with at least this probability (arXiv:1904.09751)
    min_p               keep tokens at least this likely relative to the best (arXiv:2407.01082)

    beam_width          above 1: follow so many continuations and give back the ``n`` best
                        (transformers' ``num_beams``); needs temperature 0 and nothing that bends
                        the logits
    length_penalty      a beam's score is its log-probability over its length to this power
    n                   samples of one prompt
    seed                of the random stream; None draws one and reports it in the result. The
                        stream is keyed by (seed, sample, position), so that company in the batch
                        never changes a sample
    max_new_tokens      upper limit; the model's context is another
    stop                strings that end the text; they are not part of it
    stop_token_ids      token ids that end it, beside the checkpoint's EOS
    ignore_eos          go on after the checkpoint's EOS
    logprobs            None, or how many alternatives to report with each token's logprob, which
                        are of the model's own distribution, before anything above
    evict               what is dropped, or not read, when the request outgrows a budget of tokens,
                        such as ``"window:budget=512"``, or ``"none"``; None is the engine's
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    beam_width: int = 1
    length_penalty: float = 1.0
    n: int = 1
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    evict: str | None = None

    def __post_init__(self) -> None:
        _integer("max_new_tokens", self.max_new_tokens, 1)
        _number("temperature", self.temperature, 0, 100)
        _integer("top_k", self.top_k, 0)
        _number("top_p", self.top_p, 0, 1, open_low=True)
        _number("min_p", self.min_p, 0, 1)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _number("presence_penalty", self.presence_penalty, -100, 100)
        _number("frequency_penalty", self.frequency_penalty, -100, 100)
        _integer("n", self.n, 1, 1024)
        if self.seed is not None:
            _integer("seed", self.seed, 0, 2**64 - 1)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos must be True or False, not {self.ignore_eos!r}")
        _integer("beam_width", self.beam_width, 1, 64)
        _number("length_penalty", self.length_penalty, -100, 100)
        stop = (self.stop,) if isinstance(self.stop, str) else _items("stop", self.stop)
        if not all(isinstance(text, str) and text for text in stop):
            raise RequestError(f"stop must hold strings that are not empty, not {self.stop!r}")
        object.__setattr__(self, "stop", stop)
        stop_tokens = _items("stop_token_ids", self.stop_token_ids)
        for token in stop_tokens:
            _integer("a stop token id", token, 0)
        object.__setattr__(self, "stop_token_ids", stop_tokens)
        if self.evict is not None:
            try:
                parse_eviction(self.evict)
            except ConfigError as error:
                raise RequestError(f"evict: {error}") from None
        if self.beam_width > 1:
            self._require_plain_search()

    @functools.cached_property
    def is_plain(self) -> bool:
        """True if the next token is the likeliest one, whatever the reply so far."""
        return self.temperature == 0 and self.bends_nothing

    @functools.cached_property
    def bends_nothing(self) -> bool:
        """True without penalties, which look at the reply so far."""
        return self.repetition_penalty == 1 and (
            self.presence_penalty == self.frequency_penalty == 0
        )

    def _require_plain_search(self) -> None:
        """Refuse what a beam search would have to ignore."""
        plain = SamplingParams()
        names = (
            *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty"),
            *("frequency_penalty", "stop", "logprobs"),
        )
        for name in names:
            if getattr(self, name) != getattr(plain, name):
                raise RequestError(
                    f"beam_width {self.beam_width} cannot be combined with {name} "
                    f"{getattr(self, name)!r}; leave {name} at {getattr(plain, name)!r}"
                )
        if self.n > self.beam_width:
            raise RequestError(
                f"a search that follows {self.beam_width} beams cannot give back n = {self.n}"
            )


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log-probability of a chosen token, and of the ``logprobs`` most likely ones."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Seen:
    """The tokens whose logits penalties change, each once, and how often each is in the reply.

    Made of what there is, it follows the reply: a token costs the same after many as after few.
    """

    def __init__(self, prompt: Sequence[int], reply: Sequence[int]) -> None:
        self._ids = np.unique(np.asarray([*prompt, *reply], dtype=np.int64))
        self._counts = np.zeros(len(self._ids), np.int64)
        told, counts = np.unique(np.asarray(reply, dtype=np.int64), return_counts=True)
        self._counts[np.searchsorted(self._ids, told)] = counts
        self._size, self._replied = len(self._ids), len(reply)
        self._places: dict[int, int] | None = None  # of each id; most are made for one choice

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """Token ids, in no order."""
        return self._ids[: self._size]

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """How often each is in the reply; 0 if it is in the prompt alone."""
        return self._counts[: self._size]

    def follow(self, tokens: Sequence[int], prompt: int) -> None:
        """The reply is now ``tokens`` behind the first ``prompt``: as before, and more."""
        if self._places is None:
            self._places = {token: nth for nth, token in enumerate(self._ids.tolist())}
        for token in tokens[prompt + self._replied :]:
            place = self._places.setdefault(token, self._size)
            if place == len(self._ids):
                more = np.zeros(max(16, place), np.int64)
                self._ids = np.concatenate([self._ids, more])
                self._counts = np.concatenate([self._counts, more])
            if place == self._size:
                self._ids[place], self._size = token, place + 1
            self._counts[place] += 1
            self._replied += 1


class Ask(NamedTuple):
    """The next token of one sample, to be chosen from a row of logits.

    row      of the logits; several samples may share one
    params   how to choose, and how many logprobs to report
    draw     in [0, 1); decides unless greedy
    tokens   prompt and reply so far
    prompt   how many of ``tokens`` are the prompt
    seen     what penalties change, where somebody has kept it; else it is made of ``tokens``
    """

    row: int
    params: SamplingParams
    draw: float
    tokens: Sequence[int]
    prompt: int
    seen: Seen | None = None


class Choice(NamedTuple):
    """A token and, if asked for, its logprobs; or why there is none, and then no token."""

    token: int | None
    logprobs: TokenLogprob | None = None
    error: str | None = None
