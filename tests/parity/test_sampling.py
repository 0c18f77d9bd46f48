"""``adjust`` against the logits processors of transformers, in the order its generate() has."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from quire import SamplingParams  # noqa: E402
from quire.sampler import adjust  # noqa: E402

VOCAB = 200
Floats = npt.NDArray[np.float64]


def theirs(logits: Floats, tokens: Sequence[int], params: SamplingParams) -> Floats:
    """What transformers makes of float64 logits; it takes a penalty over prompt and reply."""
    steps: list[Any] = []
    if params.repetition_penalty != 1:
        steps.append(transformers.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature not in (0, 1):
        steps.append(transformers.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(transformers.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(transformers.TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(transformers.MinPLogitsWarper(params.min_p))
    scores = transformers.LogitsProcessorList(steps)(
        torch.tensor([list(tokens)]), torch.from_numpy(logits)[None].clone()
    )
    return np.asarray(scores[0].numpy())


def assert_equal(ours: Floats, expected: Floats) -> None:
    """The same tokens are left, with the same logits but for a common constant."""
    assert np.isfinite(ours).tolist() == np.isfinite(expected).tolist()
    left = np.isfinite(ours)
    assert left.any()
    np.testing.assert_allclose(
        ours[left] - ours[left].max(), expected[left] - expected[left].max(), rtol=1e-10, atol=1e-9
    )


def drawn(seed: int) -> tuple[Floats, list[int], list[int]]:
    random = np.random.default_rng(seed)
    logits = random.standard_normal(VOCAB) * random.choice([0.5, 3.0, 20.0])
    prompt = random.integers(0, VOCAB, 30).tolist()
    return logits, prompt, random.integers(0, VOCAB, random.integers(0, 60)).tolist()


@pytest.mark.parametrize(
    "setting",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.6},
        {"temperature": 0.4},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 17},
        {"top_k": VOCAB},
        {"top_k": VOCAB + 5},
        {"top_p": 0.001},
        {"top_p": 0.5},
        {"top_p": 0.99},
        {"min_p": 0.001},
        {"min_p": 0.3},
        {"min_p": 1.0},
    ],
    ids=str,
)
def test_each_setting_alone_matches_transformers(setting: dict[str, Any]) -> None:
    params = SamplingParams(**{"temperature": 1.0, **setting})
    for seed in range(10):
        logits, prompt, reply = drawn(seed)
        assert_equal(adjust(logits, prompt, reply, params), theirs(logits, prompt + reply, params))


@pytest.mark.parametrize("seed", range(60))
def test_combinations_match_transformers_in_its_order(seed: int) -> None:
    random = np.random.default_rng(1000 + seed)
    params = SamplingParams(
        repetition_penalty=float(random.choice([1.0, 1.1, 1.5, 0.8])),
        temperature=float(random.choice([0.3, 0.8, 1.0, 1.7])),
        top_k=int(random.choice([0, 1, 5, 40, 150])),
        top_p=float(random.choice([1.0, 0.97, 0.8, 0.4])),
        min_p=float(random.choice([0.0, 0.02, 0.1, 0.5])),
    )
    logits, prompt, reply = drawn(seed)
    assert_equal(adjust(logits, prompt, reply, params), theirs(logits, prompt + reply, params))


@pytest.mark.parametrize("setting", [{"top_k": 12}, {"min_p": 0.2}, {"repetition_penalty": 1.4}])
def test_ties_are_kept_as_transformers_keeps_them(setting: dict[str, Any]) -> None:
    params = SamplingParams(**{"temperature": 1.0, **setting})
    for seed in range(20):
        logits, prompt, reply = drawn(seed)
        logits = np.round(logits)
        assert_equal(adjust(logits, prompt, reply, params), theirs(logits, prompt + reply, params))


def test_greedy_sees_only_the_penalties() -> None:
    logits, prompt, reply = drawn(3)
    params = SamplingParams(temperature=0.0, repetition_penalty=1.3, top_k=3, top_p=0.2, min_p=0.9)
    only = SamplingParams(temperature=0.0, repetition_penalty=1.3)
    ours = adjust(logits, prompt, reply, params)
    np.testing.assert_allclose(ours, theirs(logits, prompt + reply, only), rtol=1e-12)
