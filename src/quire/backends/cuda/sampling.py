"""Choosing tokens where their logits are: only tokens, and logprobs that are asked for, come back.

What is chosen is the definition's (``quire/sampler.py``), in float64 as it is, of all samples at
once. Of a greedy step all that the host waits for is two numbers a row. Of others the adjusted
logits are written down once; where top-k or top-p removes tokens, the MOST largest are put in
order, and the whole vocabulary, in a second round, of rows for which these were not enough.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from quire.backends.cuda.choosing import (
    best_kernel,
    cut_kernel,
    draw_kernel,
    keys_kernel,
    mass_kernel,
    spread_kernel,
    token_kernel,
    weigh_kernel,
)
from quire.backends.cuda.device import Device
from quire.backends.cuda.memory import tells_of_memory
from quire.backends.cuda.stored import power_of_two
from quire.errors import BackendError, QuireError
from quire.sampler import likeliest, not_finite, seen_by
from quire.sampling import Ask, Choice, TokenLogprob

__all__ = ["CudaAhead", "CudaLogits", "best_of"]

Array = npt.NDArray[Any]
Tensor = Any

BLOCK = 2048  # words of a part
MOST = 1024  # tokens that are put in order where that may be enough
CHUNK = 1 << 23  # float64 numbers, and about four times as many bytes more, at a time
BAD = 2**63 - 1  # the key of a row with numbers that are not finite
LOW = 2**31 - 1


def best_of(device: Device, rows: Tensor) -> Tensor:
    """The largest key (``choosing.py``) of each of logits float32 [n, vocab], and its token.

    int64 [n, 2].
    """
    count, vocab = rows.shape
    parts, out = _parts(vocab), device.empty((count, 2), torch.int64)
    best = device.empty((count, parts), torch.int64)
    device.launch(best_kernel, (parts, count), best, rows, vocab, parts, BLOCK=BLOCK)
    device.launch(token_kernel, (count,), out, best, parts, PARTS=power_of_two(parts))
    return out


@tells_of_memory
class CudaLogits:
    """Logits float32 [n, vocab] on the device: see :class:`quire.backends.base.Logits`.

    best    what :func:`best_of` gives for them, where that is known
    stale   whether another step has been computed over them
    """

    def __init__(
        self,
        device: Device,
        rows: Tensor,
        best: Tensor | None = None,
        stale: Callable[[], bool] | None = None,
    ) -> None:
        self.device, self._rows, self._best, self._stale = device, rows, best, stale
        self._host: npt.NDArray[np.float32] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(n, vocab)."""
        count, vocab = self._rows.shape
        return count, vocab

    def host(self) -> npt.NDArray[np.float32]:
        """All of them, fetched once; waits for them."""
        if self._host is None:
            self._require_there()
            self._host = self.device.to_host(self._rows).numpy()
        return self._host

    def row(self, nth: int) -> npt.NDArray[np.float32]:
        """One of them; waits for all."""
        if self._host is not None:
            return self._host[nth]
        self._require_there()
        row: npt.NDArray[np.float32] = self.device.to_host(self._rows[nth]).numpy()
        return row

    def wait(self) -> None:
        """Until all that was queued before is done."""
        self.device.wait(self.device.mark())

    def choose(self, asked: Sequence[Ask]) -> list[Choice]:
        """All at once, in one transfer; in two where the MOST largest were not enough."""
        self._require_there()
        if self._best is None:
            self._best = best_of(self.device, self._rows)
        if all(ask.params.is_plain and ask.params.logprobs is None for ask in asked):
            return self._greedy(asked)
        chosen = self._round(asked, whole=False)
        again = [nth for nth, choice in enumerate(chosen) if choice is None]
        if again:
            second = self._round([asked[nth] for nth in again], whole=True)
            for nth, choice in zip(again, second, strict=True):
                chosen[nth] = choice
        return [choice for choice in chosen if choice is not None]

    def ahead(self, asked: Sequence[Ask]) -> "CudaAhead | None":
        """Where one round is enough: greedy tokens, and drawn ones that nothing narrows to a few.

        Not with logprobs or penalties, which ask for more than the newest logits.
        """
        drawn = [nth for nth, ask in enumerate(asked) if ask.params.temperature]
        if len(asked) != len(self._rows) or not all(map(_needs_no_host, asked)):
            return None
        self._require_there()
        if self._best is None:
            self._best = best_of(self.device, self._rows)
        both, stale = self._best, self._stale
        if drawn:
            draws = self._draws([asked[nth] for nth in drawn])
            [at], sent = self._send([drawn], draws)
            chosen, _ = self._drawn(draws, sent, whole=False)
            both, stale = both.clone(), None  # the likeliest may be asked for again
            both[:, 1].index_copy_(0, at, chosen)
        return CudaAhead(self.device, both, self.device.fetch(both), stale, asked)

    def _require_there(self) -> None:
        if self._stale is not None and self._stale():
            raise BackendError(
                "these logits are gone: a later step was computed in their place; choose from "
                "them, or take host(), before the next step"
            )

    def _greedy(self, asked: Sequence[Ask]) -> list[Choice]:
        """The likeliest of each row."""
        best = self.device.to_host(self._best).tolist()
        return [
            self._damaged(ask) if best[ask.row][0] == BAD else Choice(best[ask.row][1])
            for ask in asked
        ]

    def _damaged(self, ask: Ask) -> Choice:
        """What the definition says of a row that is not finite."""
        try:
            likeliest(self.row(ask.row), len(ask.tokens) - 1)
        except QuireError as error:
            return Choice(None, None, str(error))
        raise BackendError(f"row {ask.row} of logits changed while tokens were chosen from it")

    # -- what is not greedy ------------------------------------------------------------------

    def _round(self, asked: Sequence[Ask], *, whole: bool) -> list[Choice | None]:
        """A choice for each; None where more has to be put in order, unless ``whole`` is."""
        assert self._best is not None
        bent = [nth for nth, ask in enumerate(asked) if not ask.params.is_plain]
        told = [nth for nth, ask in enumerate(asked) if ask.params.logprobs is not None]
        draws = self._draws([asked[nth] for nth in bent])
        listed = [ask.row for ask in asked]
        (rows, bent_there, told_there), sent = self._send([listed, bent, told], draws)
        drawn, certain = self._drawn(draws, sent, whole)
        chosen = self._best[:, 1].index_select(0, rows).index_copy_(0, bent_there, drawn)
        most = max((asked[nth].params.logprobs or 0 for nth in told), default=0)
        spread = self._spread(
            rows.index_select(0, told_there), chosen.index_select(0, told_there), most
        )
        certain = torch.ones_like(drawn) if certain is None else certain
        best, tokens, sure, *about = _fetched(self.device, [self._best, chosen, certain, *spread])
        sure_of = dict(zip(bent, sure.tolist(), strict=True))
        logprobs = dict(zip(told, _logprobs(*about), strict=True))
        choices: list[Choice | None] = []
        for nth, (ask, token) in enumerate(zip(asked, tokens.tolist(), strict=True)):
            if best[ask.row, 0] == BAD:
                choices.append(self._damaged(ask))
            elif not sure_of.get(nth, True):
                choices.append(None)
            elif nth in logprobs:
                choices.append(Choice(token, logprobs[nth].of(token, ask.params.logprobs)))
            else:
                choices.append(Choice(token))
        return choices

    def _draws(self, asked: Sequence[Ask]) -> list["_Draws"]:
        """How tokens that are not greedy are drawn, as many at a time as there is memory for."""
        vocab = self.shape[1]
        most = max(1, CHUNK // vocab)
        return [_Draws.of(asked[at : at + most], vocab) for at in range(0, len(asked), most)]

    def _send(
        self, lists: Sequence[Sequence[int]], draws: Sequence["_Draws"]
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Lists of int64, and the arrays of each of ``draws``, to the device in one copy."""
        first = [np.asarray(numbers, np.int64) for numbers in lists]
        arrays = [*first, *(array for each in draws for array in each.arrays)]
        there = iter(self.device.all_to_device(arrays))
        return [next(there) for _ in first], [[next(there) for _ in d.arrays] for d in draws]

    def _drawn(
        self, draws: Sequence["_Draws"], sent: Sequence[Sequence[Tensor]], whole: bool
    ) -> tuple[Tensor, Tensor | None]:
        """int64 [a] twice: the tokens of what is not greedy, and whether they are certain.

        None where nothing of any row is cut off: then all are.
        """
        if not draws:
            return self.device.empty((0,), torch.int64), None
        pairs = [self._draw(*each, whole) for each in zip(draws, sent, strict=True)]
        if len(pairs) == 1:
            return pairs[0]
        drawn, certain = zip(*pairs, strict=True)
        if all(each is None for each in certain):
            return torch.cat(drawn), None
        known = [torch.ones_like(t) if c is None else c for t, c in pairs]
        return torch.cat(drawn), torch.cat(known)

    def _draw(
        self, draws: "_Draws", sent: Sequence[Tensor], whole: bool
    ) -> tuple[Tensor, Tensor | None]:
        device, vocab = self.device, self.shape[1]
        rows, _, _, _, temperature, floor, draw, *bends = sent
        count, narrow, parts = len(draws.rows), draws.narrow, _parts(vocab)
        values, peaks = self._values(rows, bends)
        sums = device.empty((count, parts), torch.float64)
        grid, sizes = (parts, count), (vocab, parts)
        read = self._rows, rows, self._best, peaks, temperature
        bent = bool(bends[3:])
        device.launch(weigh_kernel, grid, sums, values, *read, *sizes, BENT=bent, BLOCK=BLOCK)
        cuts: list[Tensor] = [temperature, rows]  # not looked at
        certain: Tensor | None = None
        if narrow:
            *cuts, certain = self._cut(draws, sent, values, sums, whole=whole)
        cut = {"CUT": narrow > 0, "BLOCK": BLOCK}
        if narrow or draws.has_floors:
            device.launch(mass_kernel, grid, sums, values, floor, *cuts, *sizes, **cut)
        chosen = device.empty((count,), torch.int64)
        left = chosen, sums, values, draw, floor, *cuts, *sizes
        device.launch(draw_kernel, (count,), *left, PARTS=power_of_two(parts), **cut)
        return chosen, certain

    def _cut(
        self, draws: "_Draws", sent: Sequence[Tensor], values: Tensor, sums: Tensor, *, whole: bool
    ) -> list[Tensor]:
        """Where top-k and top-p cut rows off, float64 and int64 [a]; which are certain, int64 [a].

        As ``cut_kernel`` has it. Of values float64 [a, vocab] and the sums of their parts.
        """
        rows, narrowed, top_k, top_p, _, _, draw, *bends = sent
        (count, vocab), parts = values.shape, sums.shape[1]
        cuts = [torch.full_like(draw, -np.inf), torch.full_like(rows, vocab), torch.ones_like(rows)]
        some = values if draws.narrow == count else values.index_select(0, narrowed)
        most = vocab if whole else min(MOST, vocab)
        plain = most < vocab and not bends[3:]
        by = self._picked(rows.index_select(0, narrowed), draws) if plain else some
        ordered, tokens = _in_order(some, most, by)
        args = *cuts, sums, ordered, tokens, narrowed, top_k, top_p, vocab, parts, most
        every = {"PARTS": power_of_two(parts), "BLOCK": min(MOST, power_of_two(vocab))}
        self.device.launch(cut_kernel, (draws.narrow,), *args, **every)
        return cuts

    def _picked(self, rows: Tensor, draws: "_Draws") -> Tensor:
        """Logits of ``rows``, those of ``draws`` that are narrowed: as they are if all are."""
        if draws.narrow == len(self._rows) and draws.rows == list(range(len(self._rows))):
            return self._rows
        return self._rows.index_select(0, rows)

    def _values(self, rows: Tensor, bends: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """float64 [a, vocab] of rows ``rows`` [a] as penalties leave them, and the largest of each.

        Where there are none, room for the first, and nothing to look at: ``weigh_kernel`` reads the
        logits themselves.
        """
        factors, changed = bends[:3], bends[3:]
        if not changed:
            return self.device.empty((len(rows), self.shape[1]), torch.float64), factors[0]
        values = self._rows.index_select(0, rows).double()
        _bend(values, changed, factors)
        return values, values.amax(1)

    # -- logprobs ----------------------------------------------------------------------------

    def _spread(self, rows: Tensor, tokens: Tensor, most: int) -> list[Tensor]:
        """Of rows [t]: float64 sums of exp over parts [t, parts], float64 logits of the likeliest
        token and of ``tokens`` [t, 2], and the ``most`` largest keys [t, most], in order.
        """
        assert self._best is not None
        device, vocab, count = self.device, self.shape[1], len(rows)
        if not count:
            return []
        parts, most = _parts(vocab), min(most, vocab)
        likeliest = self._best[:, 1].index_select(0, rows)
        both = self._rows[rows[:, None], torch.stack((likeliest, tokens), 1)].double()
        sums, keys = device.empty((count, parts), torch.float64), []
        args = sums, self._rows, rows, both[:, 0].contiguous(), vocab, parts
        device.launch(spread_kernel, (parts, count), *args, BLOCK=BLOCK)
        for some in rows.split(max(1, CHUNK // vocab)) if most else ():
            known = device.empty((len(some), vocab), torch.int64)
            grid = parts, len(some)
            device.launch(keys_kernel, grid, known, self._rows, some, vocab, BLOCK=BLOCK)
            keys.append(torch.topk(known, most, dim=1).values)
        return [sums, both, torch.cat(keys) if keys else device.empty((count, 0), torch.int64)]


@dataclass(frozen=True)
class CudaAhead:
    """See :class:`quire.backends.base.Ahead`.

    there    keys and tokens int64 [n, 2], on the device
    fetched  waits for the same on the host
    stale    whether another step has been computed over ``there``, if one may be
    """

    device: Device
    there: Tensor
    fetched: Callable[[], Tensor]
    stale: Callable[[], bool] | None
    asked: Sequence[Ask]

    @property
    def tokens(self) -> Tensor:
        """See :class:`quire.backends.base.Ahead`; int64 [n], on the device.

        A pass between the steps, or another engine's step, may have overwritten what a graph gave:
        then the host's copy goes back.
        """
        if self.stale is not None and self.stale():
            return self.device.to_device(self.fetched().numpy()[:, 1])
        return self.there[:, 1]

    def take(self) -> list[Choice]:
        """See :class:`quire.backends.base.Ahead`."""
        chosen = zip(self.asked, self.fetched().tolist(), strict=True)
        return [_gone(ask) if key == BAD else Choice(token) for ask, (key, token) in chosen]


def _gone(ask: Ask) -> Choice:
    """Of a row that is not finite, which another step was computed over since."""
    return Choice(None, None, not_finite("some", len(ask.tokens) - 1))


def _needs_no_host(ask: Ask) -> bool:
    params = ask.params
    free = params.temperature == 0 or (params.top_k == 0 and params.top_p == 1)
    return free and params.logprobs is None and params.bends_nothing


class _Rule(NamedTuple):
    """How one token is drawn, as the kernels take it. Values are those of ``weigh_kernel``.

    Of penalised logits the largest, which is 0 there, is what no value below a floor of 0 and a
    draw of 0 leave.
    """

    top_k: int
    top_p: float
    temperature: float
    floor: float
    draw: float
    repetition: float
    frequency: float
    presence: float

    @classmethod
    def of(cls, ask: Ask, vocab: int) -> "_Rule":
        params = ask.params
        bend = params.repetition_penalty, params.frequency_penalty, params.presence_penalty
        if params.temperature == 0:
            return cls(0, 1.0, 1.0, 0.0, 0.0, *bend)
        floor = float(np.log(params.min_p)) if params.min_p > 0 else -np.inf
        top_k = params.top_k if params.top_k < vocab else 0
        return cls(top_k, params.top_p, params.temperature, floor, ask.draw, *bend)


@dataclass(frozen=True)
class _Draws:
    """How tokens are drawn from some rows of logits, together.

    rows     of the logits
    narrow   how many of them top-k or top-p narrow
    arrays   int64 and float64, as they go to the device: rows, which are narrowed, the columns of
             :class:`_Rule`, and what penalties change, if they do
    """

    rows: list[int]
    narrow: int
    has_floors: bool
    arrays: list[Array]

    @classmethod
    def of(cls, asked: Sequence[Ask], vocab: int) -> "_Draws":
        """Of all that ask, from rows of ``vocab`` logits."""
        rules = [_Rule.of(ask, vocab) for ask in asked]
        narrow = [nth for nth, rule in enumerate(rules) if rule.top_k or rule.top_p < 1]
        columns, rows = list(zip(*rules, strict=True)), [ask.row for ask in asked]
        arrays = [
            *(np.asarray(n, np.int64) for n in (rows, narrow, columns[0])),
            *(np.asarray(n, np.float64) for n in columns[1:]),
            *_bends(asked, vocab),
        ]
        return cls(rows, len(narrow), any(rule.floor > -np.inf for rule in rules), arrays)


@dataclass(frozen=True)
class _Spread:
    """What logprobs of one row are made of: log of the sum of exp, and logits less the largest."""

    log_total: float
    own: float
    top: tuple[tuple[int, float], ...]

    def of(self, token: int, alternatives: int | None) -> TokenLogprob:
        pairs = tuple((t, x - self.log_total) for t, x in self.top[: alternatives or 0])
        return TokenLogprob(token, self.own - self.log_total, pairs)


def _logprobs(*about: Array) -> list[_Spread]:
    """From what ``CudaLogits._spread`` gives: one for each of its rows."""
    if not about:
        return []
    sums, both, keys = about
    order = (keys >> 32).astype(np.int32)
    top = (order ^ ((order >> 31) & LOW)).view(np.float32).astype(np.float64) - both[:, :1]
    tokens = LOW - (keys & LOW)
    return [
        _Spread(float(total), float(own), tuple(zip(ids, logits, strict=True)))
        for total, own, ids, logits in zip(
            np.log(sums.sum(1)), both[:, 1] - both[:, 0], tokens.tolist(), top.tolist(), strict=True
        )
    ]


def _bends(asked: Sequence[Ask], vocab: int) -> list[Array]:
    """What penalties change in [a, vocab]: places int64 [m], and how often the token is in the
    reply, int64 [m].
    """
    seen = [seen_by(ask) for ask in asked]
    places = [nth * vocab + each.ids for nth, each in enumerate(seen) if each is not None]
    if not places:
        return []
    counts = [each.counts for each in seen if each is not None]
    return [np.concatenate(places), np.concatenate(counts)]


def _bend(values: Tensor, bends: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    """Apply penalties to values [a, vocab], in their place.

    bends     what :func:`_bends` found
    factors   float64 [a] of the repetition, the frequency and the presence penalty
    """
    places, counts = bends
    rows = places // values.shape[1]
    repetition, frequency, presence = (each.index_select(0, rows) for each in factors)
    at = values.view(-1).index_select(0, places)
    at = torch.where(at < 0, at * repetition, at / repetition)
    at = at - frequency * counts - presence * (counts > 0)
    values.view(-1).index_copy_(0, places, at)


def _in_order(values: Tensor, count: int, by: Tensor) -> tuple[Tensor, Tensor]:
    """The ``count`` largest of values [s, vocab], the largest first, ties in order of token id.

    And whose they are. Of those that tie with the last one any may be missing. They are picked by
    ``by`` [s, vocab], which has the order of ``values``, though fewer may tie, and may be narrower.
    """
    if count == values.shape[1]:
        ordered, tokens = torch.sort(values, dim=1, descending=True, stable=True)
        return ordered, tokens
    tokens, _ = torch.sort(torch.topk(by, count, dim=1, sorted=False).indices, dim=1)
    ordered, by_value = torch.sort(values.gather(1, tokens), dim=1, descending=True, stable=True)
    return ordered, tokens.gather(1, by_value)


def _fetched(device: Device, tensors: Sequence[Tensor]) -> list[Array]:
    """Copies of int64 and float64 tensors on the host, in one transfer."""
    flat = [tensor.contiguous().view(-1).view(torch.int64) for tensor in tensors]
    here = device.to_host(torch.cat(flat)).numpy()
    out, first = [], 0
    for tensor in tensors:
        part = here[first : first + tensor.numel()].reshape(tuple(tensor.shape))
        out.append(part if tensor.dtype == torch.int64 else part.view(np.float64))
        first += tensor.numel()
    return out


def _parts(vocab: int) -> int:
    return -(-vocab // BLOCK)
