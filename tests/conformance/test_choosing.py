"""Tokens chosen by each backend from its own logits, against sorting and adding up in long double.

A draw that falls where two tokens meet, or a top-p where two shares do, is decided by rounding. So
draws and top-p are put in the middle of what they are to hit, and what is narrower than MARGIN is
not aimed at: sums of at most 10,000 weights in float64 are off by less than 1e-11 of their total.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from conformance import ALL_SUBJECTS, Subject, activations, backend_of
from quire import SamplingParams
from quire.backends import Backend, Logits
from quire.sampling import Ask

MARGIN = 1e-9
Wide = np.longdouble


def logits_of(backend: Backend, rows: np.ndarray) -> Logits:
    """Logits float32 [n, vocab] that this backend holds."""
    return backend.to_logits(activations(backend, rows.astype(np.float32)))


def random_rows(rng: np.random.Generator, count: int, vocab: int) -> np.ndarray:
    """Of many shapes; every other one with many ties, the last one almost flat."""
    rows = rng.standard_normal((count, vocab)) * rng.choice([0.5, 2, 6], (count, 1))
    rows[::2] = np.round(rows[::2] * 4) / 4
    rows[-1] = rng.integers(0, 3, vocab) / 8
    return rows.astype(np.float32)


class Law:
    """What is left of one row, step by step, with sums in long double."""

    def __init__(self, row: np.ndarray, ask: Ask) -> None:
        params = ask.params
        logits = row.astype(np.float64)
        for token in set(ask.tokens) if params.repetition_penalty != 1 else ():
            down = logits[token] < 0
            factor = params.repetition_penalty
            logits[token] = logits[token] * factor if down else logits[token] / factor
        for token, count in Counter(ask.tokens[ask.prompt :]).items():
            logits[token] -= params.frequency_penalty * count
            logits[token] -= params.presence_penalty
        self.greedy = int(np.argmax(logits))
        self.values = (logits - logits.max()) / (params.temperature or 1.0)
        self.order = np.lexsort((np.arange(len(row)), -self.values))
        if 0 < params.top_k < len(row):
            kth = self.values[self.order[params.top_k - 1]]
            self.order = self.order[self.values[self.order] >= kth]

    @property
    def shares(self) -> np.ndarray:
        """Cumulative, of the tokens that are left, in their order."""
        weights = np.exp(self.values[self.order].astype(Wide))
        return np.asarray(np.cumsum(weights) / weights.sum())

    def keep(self, count: int) -> None:
        """The ``count`` likeliest; what top-p does."""
        self.order = self.order[:count]

    def floor(self, min_p: float) -> None:
        """What min-p does."""
        if min_p:
            self.order = self.order[self.values[self.order] >= np.log(min_p)]

    def middles(self) -> list[tuple[int, float]]:
        """(token, the draw in the middle of what it takes) of those that are wide enough."""
        self.order = np.sort(self.order)
        ends = np.concatenate([[Wide(0)], self.shares])
        return [
            (int(token), float((low + high) / 2))
            for token, low, high in zip(self.order, ends[:-1], ends[1:], strict=True)
            if high - low > MARGIN
        ]


def random_params(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "temperature": float(rng.choice([0.0, 0.3, 1.0, 2.5])),
        "top_k": int(rng.choice([0, 0, 1, 7, 60, 2000])),
        "min_p": float(rng.choice([0.0, 0.0, 0.02, 1.0])),
        "repetition_penalty": float(rng.choice([1.0, 1.0, 1.3])),
        "presence_penalty": float(rng.choice([0.0, 0.7])),
        "frequency_penalty": float(rng.choice([0.0, -0.3])),
    }


def random_ask(rng: np.random.Generator, rows: np.ndarray) -> tuple[Ask, int]:
    """Something to choose, and the token that it must be."""
    row, params = int(rng.integers(len(rows))), random_params(rng)
    tokens = rng.integers(0, rows.shape[1], 30).tolist()
    ask = Ask(row, SamplingParams(**params), 0.0, tokens, int(rng.integers(1, 31)))
    law = Law(rows[row], ask)
    if ask.params.temperature == 0:
        return ask, law.greedy
    if rng.random() < 0.7:
        ends = np.concatenate([[Wide(0)], law.shares])
        at = int(rng.integers(len(law.order)))
        if ends[at + 1] - ends[at] > MARGIN:
            params["top_p"] = float((ends[at] + ends[at + 1]) / 2)
            law.keep(at + 1)
    law.floor(ask.params.min_p)
    middles = law.middles()
    token, draw = middles[int(rng.integers(len(middles)))]
    return ask._replace(params=SamplingParams(**params), draw=draw), token


@ALL_SUBJECTS
@pytest.mark.parametrize("vocab", [2, 61, 2048, 5000])
def test_tokens_are_those_of_the_definition(subject: Subject, vocab: int) -> None:
    """Also where the 1,024 largest are not enough, and of rows that several samples share."""
    rng = np.random.default_rng(vocab)
    rows = random_rows(rng, 6, vocab)
    pairs = [random_ask(rng, rows) for _ in range(60)]
    choices = logits_of(backend_of(subject), rows).choose([ask for ask, _ in pairs])
    for (ask, token), choice in zip(pairs, choices, strict=True):
        assert choice == (token, None, None), ask
        assert type(choice.token) is int


@ALL_SUBJECTS
def test_ties_go_to_the_lowest_token(subject: Subject) -> None:
    rows = np.zeros((4, 5000), np.float32)
    rows[0, [4, 2100, 4999]] = 3
    rows[1, [2047, 2048]] = 3
    rows[2], rows[2, 7], rows[2, 3000] = -1, -0.0, 0.0
    logits = logits_of(backend_of(subject), rows)
    greedy = SamplingParams()
    asked = [Ask(row, greedy, 0.0, [1], 1) for row in (0, 1, 2, 3, 2)]
    assert [choice.token for choice in logits.choose(asked)] == [4, 2047, 7, 0, 7]
    # Penalised, it is another path to the same.
    less = SamplingParams(presence_penalty=1.0)
    asked = [Ask(0, less, 0.0, [9, 4], 1), Ask(2, less, 0.0, [9, 7, 7], 1)]
    assert [choice.token for choice in logits.choose(asked)] == [2100, 3000]
    assert logits.choose([]) == []


@ALL_SUBJECTS
def test_what_ties_with_the_last_of_top_k_stays_and_top_p_takes_the_lowest(
    subject: Subject,
) -> None:
    """5,000 equal tokens: more than are put in order at first."""
    logits = logits_of(backend_of(subject), np.ones((1, 5000), np.float32))

    def chosen(draw: float, **params: Any) -> int | None:
        ask = Ask(0, SamplingParams(temperature=0.7, **params), draw, [1], 1)
        return logits.choose([ask])[0].token

    at = (np.array([0, 1700, 4999]) + 0.5) / 5000
    assert [chosen(draw, top_k=5) for draw in at] == [0, 1700, 4999]
    # 2,500.5 shares: the 2,501 lowest tokens are kept.
    assert [chosen(draw, top_p=2500.5 / 5000) for draw in at] == [0, 850, 2500]
    assert [chosen(draw, top_p=2500.5 / 5000, top_k=5) for draw in at] == [0, 850, 2500]
    assert [chosen(draw, min_p=1.0) for draw in at] == [0, 1700, 4999]


@ALL_SUBJECTS
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_fails_alone(subject: Subject, bad: float) -> None:
    rows = random_rows(np.random.default_rng(1), 3, 2500)
    rows[1, [3, 2400]] = bad
    backend, rules = backend_of(subject), [{}, {"temperature": 1.0, "top_p": 0.5}, {"logprobs": 2}]
    # Weights may not hold such numbers everywhere; logits may.
    good = logits_of(backend, rows[[0, 2]]).choose(
        [Ask(row, SamplingParams(**rule), 0.4, [5, 6, 7], 2) for rule in rules for row in (0, 1)]
    )
    both = logits_of(backend, rows).choose(
        [Ask(row, SamplingParams(**rule), 0.4, [5, 6, 7], 2) for rule in rules for row in (0, 1, 2)]
    )
    assert [both[at] for at in (0, 2, 3, 5, 6, 8)] == good
    for choice in both[1::3]:
        assert (choice.token, choice.logprobs) == (None, None)
        assert "2 of 2500 logits at position 2 are NaN or infinite" in str(choice.error)


@ALL_SUBJECTS
@pytest.mark.parametrize("vocab", [61, 3000])
def test_logprobs_are_of_the_models_own_distribution(subject: Subject, vocab: int) -> None:
    rows = random_rows(np.random.default_rng(2), 3, vocab)
    logits = logits_of(backend_of(subject), rows)
    wanted = [None, 0, 1, 5, 10**12]
    rules: Sequence[dict[str, Any]] = (
        {"logprobs": most, "temperature": heat, "top_k": top_k, "presence_penalty": heat}
        for most in wanted
        for heat, top_k in ((0.0, 0), (1.5, 0), (0.5, 9))
    )
    asked = [
        Ask(row, SamplingParams(**rule), 0.3, [1, 2, 3], 1) for rule in rules for row in range(3)
    ]
    for ask, choice in zip(asked, logits.choose(asked), strict=True):
        most = ask.params.logprobs
        if most is None:
            assert choice.logprobs is None
            continue
        wide = rows[ask.row].astype(Wide)
        law = (wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())).astype(float)
        best = sorted(range(vocab), key=lambda token: (-law[token], token))[:most]
        assert choice.logprobs is not None
        assert choice.logprobs.token_id == choice.token
        assert [token for token, _ in choice.logprobs.top] == best
        found = [choice.logprobs.logprob, *(value for _, value in choice.logprobs.top)]
        np.testing.assert_allclose(found, law[[choice.token, *best]], rtol=1e-13, atol=1e-15)


@ALL_SUBJECTS
def test_a_choice_does_not_depend_on_its_company(subject: Subject) -> None:
    """Bit for bit, logprobs too, whatever the draws and top-p are."""
    rng = np.random.default_rng(3)
    rows = random_rows(rng, 5, 4500)
    asked = []
    for nth in range(30):
        params = random_params(rng) | {"logprobs": nth % 4, "top_p": float(rng.uniform(0.05, 1))}
        tokens = rng.integers(0, 4500, 20).tolist()
        asked.append(Ask(nth % 5, SamplingParams(**params), float(rng.random()), tokens, 9))
    backend = backend_of(subject)
    together = logits_of(backend, rows).choose(asked)
    for ask, choice in list(zip(asked, together, strict=True))[::4]:
        alone = logits_of(backend, rows[ask.row : ask.row + 1])
        assert alone.choose([ask._replace(row=0)]) == [choice]


@ALL_SUBJECTS
def test_logits_can_be_fetched(subject: Subject) -> None:
    rows = random_rows(np.random.default_rng(4), 3, 70)
    logits = logits_of(backend_of(subject), rows)
    logits.wait()
    assert logits.shape == (3, 70)
    assert logits.row(1).tobytes() == rows[1].tobytes()
    assert logits.host().tobytes() == rows.tobytes()
    assert logits.row(2).tobytes() == rows[2].tobytes()
    assert logits.host() is logits.host()
