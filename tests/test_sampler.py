"""The sampler against loops and formulas written here, and the random stream against Philox."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire import QuireError, SamplingParams
from quire.sampler import adjust, choose, logprobs_of, seen_of, uniform

ALMOST_ONE = float(np.nextafter(1.0, 0.0))
WORD = 2**64

Floats = npt.NDArray[np.float64]


def float32(values: Sequence[float]) -> npt.NDArray[np.float32]:
    return np.asarray(values, dtype=np.float32)


def softmax(logits: Sequence[float]) -> Floats:
    wide = np.asarray(logits, np.float64)
    weights = np.exp(wide - wide.max())
    return weights / weights.sum()


def some_logits(seed: int, size: int = 50, scale: float = 3.0) -> npt.NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


# -- the random stream


def philox(key: Sequence[int], counter: Sequence[int]) -> list[int]:
    """Philox 4x64 with 10 rounds (Salmon et al., 2011) in Python's ints."""
    k, c = list(key), list(counter)
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * c[0], WORD)
        high1, low1 = divmod(0xCA5A826395121157 * c[2], WORD)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B97F4A7C15) % WORD, (k[1] + 0xBB67AE8584CAA73B) % WORD]
    return c


def test_the_philox_of_these_tests_gives_the_published_answer() -> None:
    """The first line of kat_vectors of the authors' library, Random123."""
    assert philox([0, 0], [0, 0, 0, 0]) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**63 - 1, 2**63 + 5, 2**64 - 1])
@pytest.mark.parametrize("sample", [0, 1, 7])
@pytest.mark.parametrize("position", [0, 1, 62, 63, 64, 4096, 2**31 + 65])
def test_uniform_is_philox_keyed_by_seed_and_sample_at_the_position(
    seed: int, sample: int, position: int
) -> None:
    # NumPy steps the counter before the first block; a double has the upper 53 bits of a word.
    word = philox([seed, sample], [position + 1, 0, 0, 0])[0]
    assert uniform(seed, sample, position) == (word >> 11) * 2.0**-53


def test_uniform_has_no_state() -> None:
    places = [(seed, sample, at) for seed in (3, 4) for sample in (0, 1) for at in range(20)]
    forwards = {place: uniform(*place) for place in places}
    np.random.default_rng(0).random(5)
    assert {place: uniform(*place) for place in reversed(places)} == forwards
    assert len(set(forwards.values())) == len(places)


# -- greedy


def test_greedy_takes_the_lowest_of_tied_tokens() -> None:
    logits = float32([1, 5, -2, 5, 5])
    for draw in (0.0, 0.5, ALMOST_ONE):
        assert choose(logits, [0], [], SamplingParams(), draw) == 1


@pytest.mark.parametrize("seed", range(5))
def test_greedy_takes_the_most_likely_token(seed: int) -> None:
    logits = some_logits(seed)
    best = max(range(50), key=lambda token: logits[token])
    # Without a temperature nothing is drawn, so what would narrow a draw changes nothing.
    params = SamplingParams(top_k=3, top_p=0.1, min_p=0.5)
    assert choose(logits, [0], [], params, 0.9) == best


def test_greedy_applies_the_penalties() -> None:
    logits = float32([4.0, 3.5, 1.0])
    assert choose(logits, [2], [0], SamplingParams(presence_penalty=1.0), 0) == 1
    assert choose(logits, [2], [0], SamplingParams(presence_penalty=0.4), 0) == 0
    assert choose(logits, [0], [], SamplingParams(repetition_penalty=1.2), 0) == 1


# -- adjust


def penalised(
    logits: Sequence[float], prompt: Sequence[int], reply: Sequence[int], params: SamplingParams
) -> list[float]:
    out = [float(value) for value in logits]
    for token in range(len(out)):
        if token in prompt or token in reply:
            if out[token] < 0:
                out[token] *= params.repetition_penalty
            else:
                out[token] /= params.repetition_penalty
    for token, count in Counter(reply).items():
        out[token] -= params.presence_penalty + count * params.frequency_penalty
    return out


tokens_of_ten = st.lists(st.integers(0, 9), max_size=12)


@given(
    logits=st.lists(st.floats(-50, 50), min_size=10, max_size=10),
    prompt=tokens_of_ten.filter(bool),
    reply=tokens_of_ten,
    repetition=st.floats(0.5, 2),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
)
@settings(deadline=None, max_examples=150)
def test_penalties_match_a_plain_loop(
    logits: list[float],
    prompt: list[int],
    reply: list[int],
    repetition: float,
    presence: float,
    frequency: float,
) -> None:
    params = SamplingParams(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency
    )
    given_logits = np.asarray(logits, np.float64)
    found = adjust(given_logits, prompt, reply, params)
    np.testing.assert_allclose(
        found, penalised(logits, prompt, reply, params), rtol=1e-12, atol=1e-12
    )
    assert given_logits.tolist() == logits  # the argument is not changed


def test_presence_and_frequency_count_the_reply_and_not_the_prompt() -> None:
    params = SamplingParams(presence_penalty=1.0, frequency_penalty=0.25)
    found = adjust(np.zeros(4), [0, 0, 1], [2, 2, 1], params)
    assert found.tolist() == [0, -1.25, -1.5, 0]


@given(prompt=tokens_of_ten, replies=st.lists(tokens_of_ten, max_size=5))
@settings(deadline=None, max_examples=100)
def test_what_penalties_change_is_kept_while_the_reply_grows(
    prompt: list[int], replies: list[list[int]]
) -> None:
    params = SamplingParams(repetition_penalty=1.5)
    tokens = [*prompt, *(replies[0] if replies else [])]
    seen = seen_of(prompt, tokens[len(prompt) :], params)
    assert seen is not None
    for more in replies:
        tokens += more
        for _ in range(2):  # a step may be repeated
            seen.follow(tokens, len(prompt))
            counts = Counter(tokens[len(prompt) :])
            found = dict(zip(seen.ids.tolist(), seen.counts.tolist(), strict=True))
            assert found == {token: counts[token] for token in {*tokens}}
            assert len(seen.ids) == len(found)


def kept(logits: Floats, params: SamplingParams) -> set[int]:
    """Tokens that can be drawn: temperature, top-k, top-p, min-p in that order, in plain loops."""
    left = dict(enumerate(logits / params.temperature))
    if params.top_k:
        kth = sorted(left.values(), reverse=True)[min(params.top_k, len(left)) - 1]
        left = {token: value for token, value in left.items() if value >= kth}
    if params.top_p < 1:
        probabilities = dict(zip(left, softmax(list(left.values())), strict=True))
        total, nucleus = 0.0, {}
        for token in sorted(left, key=lambda t: (-left[t], t)):
            if total >= params.top_p:
                break
            nucleus[token] = left[token]
            total += probabilities[token]
        left = nucleus
    if params.min_p:
        probabilities = dict(zip(left, softmax(list(left.values())), strict=True))
        best = max(probabilities.values())
        left = {t: v for t, v in left.items() if probabilities[t] >= params.min_p * best}
    return set(left)


@pytest.mark.parametrize("seed", range(30))
def test_what_is_left_to_draw_matches_plain_loops(seed: int) -> None:
    random = np.random.default_rng(seed)
    params = SamplingParams(
        temperature=float(random.uniform(0.3, 2)),
        top_k=int(random.choice([0, 1, 5, 20, 50, 1000])),
        top_p=float(random.choice([1.0, 0.95, 0.7, 0.3, 0.01])),
        min_p=float(random.choice([0.0, 0.01, 0.2, 1.0])),
    )
    logits = some_logits(seed).astype(np.float64)
    found = adjust(logits, [0], [], params)
    assert set(np.flatnonzero(np.isfinite(found)).tolist()) == kept(logits, params)
    left = np.isfinite(found)
    expected = softmax((logits / params.temperature)[left])
    np.testing.assert_allclose(softmax(found[left]), expected, rtol=1e-9)


def test_top_k_keeps_all_that_tie_with_the_last() -> None:
    params = SamplingParams(temperature=1.0, top_k=2)
    found = adjust(np.array([3.0, 2.0, 2.0, 1.0]), [0], [], params)
    assert np.isfinite(found).tolist() == [True, True, True, False]


def test_top_p_takes_the_lowest_of_tied_tokens() -> None:
    logits = np.tile([1.0, 2.0, 0.0], 100)
    ten = 9.5 * softmax(logits.tolist())[1]  # crossed by the tenth of the most likely
    found = adjust(logits, [0], [], SamplingParams(temperature=1.0, top_p=float(ten)))
    assert np.flatnonzero(np.isfinite(found)).tolist() == list(range(1, 30, 3))


def test_top_p_keeps_the_token_that_crosses_and_no_more() -> None:
    logits = np.log([0.5, 0.25, 0.125, 0.125])
    for top_p, count in [(0.4, 1), (0.6, 2), (0.8, 3), (0.99, 4)]:
        found = adjust(logits, [0], [], SamplingParams(temperature=1.0, top_p=top_p))
        assert np.isfinite(found).sum() == count


# -- draws


def deviation_bound(draws: int, probability: float, events: int) -> float:
    """Bernstein: ``events`` binomial counts all stay this close to their means but for 1e-9."""
    spread = math.log(2 * events / 1e-9)
    return math.sqrt(2 * draws * probability * (1 - probability) * spread) + spread / 3


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.6, top_k=5),
        SamplingParams(temperature=1.7, top_p=0.8),
    ],
)
def test_many_draws_follow_the_adjusted_distribution(params: SamplingParams) -> None:
    logits, draws = some_logits(1, size=12, scale=1.5), 8000
    left = kept(logits.astype(np.float64), params)
    scaled = logits.astype(np.float64) / params.temperature
    masked = np.where([token in left for token in range(12)], scaled, -np.inf)
    counts = Counter(
        choose(logits, [0], [], params, uniform(5, 0, position)) for position in range(draws)
    )
    for token, probability in enumerate(softmax(masked.tolist())):
        allowed = deviation_bound(draws, probability, 12) if probability else 0
        assert abs(counts[token] - draws * probability) <= allowed


def test_equal_steps_of_the_draw_share_out_exactly_by_probability() -> None:
    logits = float32(np.log([0.5, 0.25, 0.125, 0.125]))
    params = SamplingParams(temperature=1.0)
    tokens = [choose(logits, [0], [], params, (i + 0.5) / 800) for i in range(800)]
    assert Counter(tokens) == {0: 400, 1: 200, 2: 100, 3: 100}


@pytest.mark.parametrize("seed", range(5))
def test_top_k_one_is_greedy(seed: int) -> None:
    logits = some_logits(seed)
    greedy = choose(logits, [1, 2], [3], SamplingParams(), 0.0)
    for draw in (0.0, 0.3, ALMOST_ONE):
        params = SamplingParams(temperature=2.0, top_k=1)
        assert choose(logits, [1, 2], [3], params, draw) == greedy


@given(
    seed=st.integers(0, 10_000),
    draw=st.one_of(st.sampled_from([0.0, 5e-324, 0.5, ALMOST_ONE]), st.floats(0, ALMOST_ONE)),
    temperature=st.floats(0.05, 10),
    top_k=st.integers(0, 12),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 1),
)
@settings(deadline=None, max_examples=300)
def test_a_removed_token_is_never_drawn(
    seed: int, draw: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = some_logits(seed, size=10, scale=6.0)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    token = choose(logits, [0], [], params, draw)
    assert np.isfinite(adjust(logits.astype(np.float64), [0], [], params)[token])


def test_the_first_and_last_draw_take_the_first_and_last_token_that_is_left() -> None:
    logits = float32([-9, 2, 1, 2.5, -9, -9])
    params = SamplingParams(temperature=1.0, top_k=3)
    assert choose(logits, [0], [], params, 0.0) == 1
    assert choose(logits, [0], [], params, ALMOST_ONE) == 3


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300, 1e-308, 5e-324])
def test_a_tiny_temperature_is_greedy_and_does_not_overflow(temperature: float) -> None:
    logits = float32([-3e38, 10, 11, 3e38, -50])
    params = SamplingParams(temperature=temperature, top_p=0.9, min_p=0.1, top_k=4)
    for draw in (0.0, 0.5, ALMOST_ONE):
        assert choose(logits, [0], [], params, draw) == 3


@pytest.mark.parametrize(
    "extremes",
    [
        {"temperature": 100.0},
        {"top_p": 5e-324},
        {"min_p": 5e-324},
        {"repetition_penalty": 100.0, "presence_penalty": 100.0, "frequency_penalty": -100.0},
        {"repetition_penalty": 5e-324},
        {"repetition_penalty": 1e-300, "temperature": 0.0},
    ],
    ids=str,
)
def test_every_accepted_parameter_leaves_something_finite_to_draw(
    extremes: dict[str, float],
) -> None:
    """A value that cannot be served must be refused by SamplingParams, not fail in a step."""
    try:
        params = SamplingParams(**{"temperature": 1.0, **extremes})
    except QuireError:
        return
    logits = float32([-3e38, 10, 11, 3e38, -50, 0])
    chosen = choose(logits, [0, 1, 3], [1, 1, 3, 4], params, 0.5)
    adjusted = adjust(logits.astype(np.float64), [0, 1, 3], [1, 1, 3, 4], params)
    assert not np.isnan(adjusted).any()
    assert np.isfinite(adjusted[chosen])


# -- logprobs and damage


@pytest.mark.parametrize("scale", [0.1, 5.0, 1e4, 1e37])
def test_logprobs_are_the_float64_log_softmax_of_the_models_own_logits(scale: float) -> None:
    logits = some_logits(3, scale=scale)
    wide = logits.astype(np.longdouble)
    expected = wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
    # What narrows or bends the draw does not change what is reported.
    params = SamplingParams(logprobs=4, temperature=2.0, top_k=2, repetition_penalty=3.0)
    chosen = choose(logits, [1, 2, 3], [4], params, 0.7)
    reported = logprobs_of(chosen, logits, 4)
    assert reported.token_id == chosen
    np.testing.assert_allclose(reported.logprob, float(expected[chosen]), rtol=1e-13)
    best = sorted(range(50), key=lambda token: (-logits[token], token))[:4]
    assert [token for token, _ in reported.top] == best
    values = [value for _, value in reported.top]
    np.testing.assert_allclose(values, expected[best].astype(float), rtol=1e-13, atol=1e-15)


def test_the_number_of_alternatives_is_as_asked() -> None:
    logits = some_logits(0, size=6)
    for asked, given_back in [(0, 0), (1, 1), (6, 6), (10**12, 6)]:
        assert len(logprobs_of(0, logits, asked).top) == given_back


@pytest.mark.parametrize("top_p", [0.1, 0.9, 0.999, 1 - 1e-9])
@pytest.mark.parametrize("levels", [3, 40, 10**6])
def test_a_nucleus_of_a_large_vocabulary_is_that_of_sorting_all_of_it(
    top_p: float, levels: int
) -> None:
    # Few levels make many ties, which go to the lower token id.
    rng = np.random.default_rng(levels)
    logits = float32(np.floor(rng.normal(0, 3, 20_000) * levels) / levels)
    kept = np.isfinite(
        adjust(logits.astype(np.float64), [0], [], SamplingParams(top_p=top_p, temperature=1.0))
    )
    order = sorted(range(logits.size), key=lambda token: (-logits[token], token))
    weights = np.exp(logits.astype(np.longdouble) - logits.max())
    before = np.cumsum(weights[order]) / weights.sum()
    expected = set(order[: int((before < top_p).sum()) + 1])
    assert set(np.flatnonzero(kept).tolist()) == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_damaged_logits_are_refused_with_their_number_and_position(
    bad: float, temperature: float
) -> None:
    logits = some_logits(0)
    logits[[7, 9]] = bad
    with pytest.raises(QuireError, match="2 of 50 logits at position 4 are NaN or infinite"):
        choose(logits, [1, 2, 3], [4, 5], SamplingParams(temperature=temperature), 0.5)
