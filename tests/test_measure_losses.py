"""Divergences, intervals and budgets against independent formulas."""

import math
from typing import Any

import numpy as np
import pytest

from quire.analysis.candidates import Setting
from quire.analysis.divergence import kl_divergence, log_softmax, require_finite
from quire.analysis.losses import Losses, Summary, bootstrap, wilson
from quire.analysis.pareto import FEW_TOKENS, front, recommend
from quire.analysis.quality import Measurement
from quire.errors import QuireError


def logits(rows: int, vocab: int, seed: int = 0, scale: float = 3.0) -> np.ndarray[Any, Any]:
    random = np.random.default_rng(seed)
    return (scale * random.standard_normal((rows, vocab))).astype(np.float32)


# -- divergences


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4, 8e37])
def test_log_softmax_is_that_of_exact_sums(shift: float) -> None:
    rows = logits(5, 40) + np.float32(shift)
    for row, found in zip(rows, log_softmax(rows), strict=True):
        top = float(row.max())
        total = math.fsum(math.exp(float(x) - top) for x in row)
        wanted = [float(x) - top - math.log(total) for x in row]
        assert np.allclose(found, wanted, rtol=1e-13, atol=1e-13)


def test_kl_divergence_is_the_sum_in_other_words() -> None:
    """As cross-entropy less entropy, in exact sums."""
    one, other = log_softmax(logits(6, 50, 1)), log_softmax(logits(6, 50, 2))
    for p, q, found in zip(one, other, kl_divergence(one, other), strict=True):
        cross = -math.fsum(math.exp(a) * b for a, b in zip(p, q, strict=True))
        entropy = -math.fsum(math.exp(a) * a for a in p)
        assert found == pytest.approx(cross - entropy, rel=1e-12)


def test_small_divergences_are_not_lost_in_rounding() -> None:
    """Adding eps * d to the logits costs eps² Var(d) / 2, to second order."""
    base, nudge = logits(1, 200).astype(np.float64), np.random.default_rng(9).standard_normal(200)
    one = base - base.max()
    one -= np.log(np.exp(one).sum())
    p = np.exp(one[0])
    variance = (p * nudge**2).sum() - (p * nudge).sum() ** 2
    for eps in (1e-3, 1e-5):
        bent = one + eps * nudge
        bent -= np.log(np.exp(bent).sum())
        [found] = kl_divergence(one, bent)
        assert found == pytest.approx(eps**2 * variance / 2, rel=1e-2)


def test_equal_predictions_diverge_by_nothing_and_impossible_tokens_do_not_count() -> None:
    one = log_softmax(logits(3, 30))
    assert (kl_divergence(one, one) == 0).all()
    half, whole = np.log([[0.5, 0.5, 1e-300]]), np.log([[0.5, 0.25, 0.25]])
    assert kl_divergence(half, whole)[0] == pytest.approx(0.5 * math.log(2))
    with np.errstate(divide="ignore"):
        never = np.log(np.array([[0.5, 0.5, 0.0]]))
    assert kl_divergence(never, whole)[0] == pytest.approx(0.5 * math.log(2))
    assert kl_divergence(whole, never)[0] == math.inf


def test_logits_that_are_no_numbers_are_refused_by_name() -> None:
    rows = logits(4, 9)
    require_finite(rows, "int2")
    rows[2, 3], rows[2, 4] = np.nan, np.inf
    with pytest.raises(QuireError, match="int2: 2 of 9 logits after token 2"):
        require_finite(rows, "int2")


# -- losses


def test_a_summary_is_what_the_formulas_say() -> None:
    lengths, vocab = [70, 33, 40], 25
    exact, other = logits(sum(lengths), vocab, 3), logits(sum(lengths), vocab, 4)
    targets = np.random.default_rng(5).integers(0, vocab, sum(lengths))
    losses, starts = Losses(lengths), np.cumsum([0, *lengths])
    for at in range(max(lengths)):  # as walk tells them: all passages that are long enough
        active = tuple(i for i, length in enumerate(lengths) if at < length)
        rows = [int(starts[i]) + at for i in active]
        losses.add((active, at), log_softmax(exact[rows]), other[rows], targets[rows].tolist())
    found = losses.summary()

    def softmax(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        weights = np.exp(rows.astype(np.float64))
        return np.asarray(weights / weights.sum(1, keepdims=True))

    p, q = softmax(exact), softmax(other)
    every = np.arange(len(targets))
    kl = (p * np.log(p / q)).sum(1)
    assert found.tokens == 143
    assert found.exact_perplexity == pytest.approx(np.prod(p[every, targets] ** (-1 / 143)))
    assert found.perplexity == pytest.approx(np.prod(q[every, targets] ** (-1 / 143)))
    assert found.perplexity_change == pytest.approx(found.perplexity / found.exact_perplexity - 1)
    assert (found.kl_mean, found.kl_p99) == pytest.approx((kl.mean(), np.percentile(kl, 99)))
    assert found.top1_agreement == (exact.argmax(1) == other.argmax(1)).mean()
    for value, (low, high) in (
        (found.perplexity_change, found.perplexity_change_interval),
        (found.kl_mean, found.kl_mean_interval),
        (found.top1_agreement, found.top1_agreement_interval),
    ):
        assert low < value < high
    assert losses.summary() == found


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Of 200 texts of independent losses with mean 0.3, about 190 intervals hold 0.3."""
    random, held = np.random.default_rng(1), 0
    starts = np.array([0, 1500, 3000])
    for _ in range(200):
        low, high = bootstrap(0.3 + random.standard_normal(3000), starts)
        held += low <= 0.3 <= high
    assert 180 <= held <= 199


def test_losses_that_come_in_runs_widen_the_interval() -> None:
    random = np.random.default_rng(2)
    alone, starts = random.standard_normal(6400), np.array([0, 6400])
    runs = np.repeat(random.standard_normal(200), 32)
    low, high = bootstrap(alone, starts)
    wide_low, wide_high = bootstrap(runs, starts)
    assert wide_high - wide_low > 3 * (high - low)


def test_an_interval_of_a_few_tokens_is_still_one() -> None:
    assert bootstrap(np.array([0.5]), np.array([0, 1])) == (0.5, 0.5)
    low, high = bootstrap(np.array([0.0, 1.0, 0.0]), np.array([0, 2, 3]))
    assert 0 <= low < high <= 1


@pytest.mark.parametrize("trials", [1, 7, 40])
def test_wilson_ends_solve_its_equation(trials: int) -> None:
    """Wilson's ends are the shares p for which the estimate lies 1.96 standard errors away."""
    for right in range(trials + 1):
        share = right / trials
        low, high = wilson(right, trials)
        assert 0 <= low <= share <= high <= 1
        for end in (low, high):
            error = math.sqrt(end * (1 - end) / trials)
            assert abs(end - share) == pytest.approx(1.959964 * error, abs=1e-6)


# -- the budget and the front


def made(
    name: str, size: float, change: float, spread: float = 0.0, tokens: int = 10**5
) -> Measurement:
    summary = Summary(
        tokens=tokens,
        perplexity=10 * (1 + change),
        exact_perplexity=10,
        perplexity_change=change,
        perplexity_change_interval=(change - spread, change + spread),
        kl_mean=abs(change),
        kl_mean_interval=(0, 1),
        kl_p99=1,
        top1_agreement=1,
        top1_agreement_interval=(1, 1),
    )
    return Measurement(Setting(name), size, size, 2048 / size, summary, *([None] * 7))  # type: ignore[arg-type]


SIZES = [made("int8", 1056, 0.0004), made("int4", 640, 0.008, 0.004), made("int2", 384, 0.4)]


@pytest.mark.parametrize(
    ("budget", "name"), [(0.01, None), (0.1, "int8"), (1, "int4"), (2, "int4"), (50, "int2")]
)
def test_the_smallest_under_the_budget_is_taken(budget: float, name: str | None) -> None:
    found = recommend(SIZES, budget)
    assert (found.chosen and found.chosen.setting.name) == name
    assert found.judged_by == "the estimate"
    assert ("No setting stays under" if name is None else f"Take {name}: ") in found.describe()


def test_of_few_tokens_the_upper_end_is_judged() -> None:
    few = [made(m.setting.name, m.bytes_per_token, 0.008, 0.004, FEW_TOKENS - 1) for m in SIZES]
    found = recommend(few, 1)
    assert found.chosen is None
    assert "upper end of the 95 % interval, since tokens are few" in found.describe()
    assert recommend(few, 1.3).chosen is few[2]


def test_a_recommendation_that_saves_nothing_says_so() -> None:
    assert "is fp32, which saves nothing" in recommend([made("fp32", 4096, 0.0)], 1).describe()
    assert "1.94 times as much context" in recommend(SIZES, 0.1).describe()


def test_of_equal_sizes_the_better_is_taken() -> None:
    same = [made("fp8", 1056, 0.004), made("int8", 1056, 0.0004)]
    chosen = recommend(same, 1).chosen
    assert chosen is same[1]


def test_the_front_leaves_out_what_is_beaten() -> None:
    beaten = [made("fp8", 1056, 0.004), made("fp16", 2048, 0.001), made("same", 640, 0.008)]
    exact = made("bf16", 2048, 0.0)
    names = [each.setting.name for each in front([*beaten, exact, *SIZES])]
    assert names == ["int2", "same", "int8", "bf16"]
