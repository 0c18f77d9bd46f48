"""Steps of the cuda backend that begin before the host knows their tokens."""

from pathlib import Path

import pytest

import quire
from quire.backends import backend_status, create_backend
from tiny import random_prompt, tiny_engine, write_llama

STATUS = {status.name: status for status in backend_status()}
if STATUS["cuda"].available:
    import numpy as np
    import torch

    from quire.backends.cuda.device import Device, find_device
    from quire.backends.cuda.graphs import StepGraph
    from quire.backends.cuda.sampling import CudaLogits
    from quire.sampler import HostLogits
    from quire.sampling import Ask, SamplingParams

pytestmark = pytest.mark.skipif(
    not STATUS["cuda"].available, reason=f"cuda: {STATUS['cuda'].detail}"
)


def engine(directory: Path, name: str, **settings: object) -> quire.Engine:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quire.engine.engine.create_backend", lambda *_: create_backend(name))
        return tiny_engine(directory, page_size=16, **settings)


def requests() -> list[tuple[list[int], quire.SamplingParams]]:
    """One that is greedy, one that is drawn with a floor, one that ends by a token."""
    kinds = [{}, {"temperature": 1.0, "seed": 7, "min_p": 0.02}, {"stop_token_ids": range(30)}]
    return [
        (random_prompt(5 + at, at), quire.SamplingParams(max_new_tokens=12 + at, **kind))  # type: ignore[arg-type]
        for at, kind in enumerate(kinds)
    ]


def replies(running: quire.Engine) -> list[list[int]]:
    submitted = [running.submit(*each) for each in requests()]
    while running.has_work:
        running.step()
        running.cache.check()
    return [request.completions[0].token_ids for request in submitted]


@pytest.mark.parametrize(
    ("name", "kv_format"),  # who waits for tokens knows neither
    [
        ("cuda", "auto"),
        ("cuda-exact", "int8"),
        pytest.param("cuda", "int8", marks=pytest.mark.more),
        pytest.param("cuda-exact", "auto", marks=pytest.mark.more),
    ],
)
def test_replies_are_those_of_an_engine_that_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kv_format: str
) -> None:
    directory = write_llama(tmp_path)
    launched, run = [], StepGraph.run

    def watched(self: StepGraph, tokens: object, batch: object) -> CudaLogits:
        launched.append(isinstance(tokens, torch.Tensor))
        return run(self, tokens, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(StepGraph, "run", watched)
    found = replies(engine(directory, name, kv_format=kv_format))
    assert launched.count(True) >= 8
    launched.clear()
    monkeypatch.setattr(CudaLogits, "ahead", lambda self, asked: None)
    assert found == replies(engine(directory, name, kv_format=kv_format))
    assert launched.count(True) == 0


@pytest.mark.parametrize("name", ["cuda", "cuda-exact"])
def test_passes_and_other_engines_between_steps_change_no_token(tmp_path: Path, name: str) -> None:
    """They replay graphs over the memory in which a step's tokens wait for the one behind it."""
    directory = write_llama(tmp_path)
    alone, running = engine(directory, name), engine(directory, name)
    params = quire.SamplingParams(max_new_tokens=14)
    prompts = [random_prompt(5 + at, at) for at in range(2)]
    expected = [list(done.token_ids) for done in alone.generate(prompts, params)]
    requests = [running.submit(prompt, params) for prompt in prompts]
    other = running.twin(running.config)
    other.submit(random_prompt(6, 9), quire.SamplingParams(max_new_tokens=40))
    while running.has_work:
        running.step()
        running.logits(random_prompt(1, 3))
        other.step()
    assert [list(request.completions[0].token_ids) for request in requests] == expected


def test_what_needs_more_than_the_newest_logits_waits() -> None:
    device, rows = find_device(), np.random.default_rng(0).normal(size=(2, 61))
    logits = CudaLogits(device, torch.tensor(rows, dtype=torch.float32, device=device.kind))

    def ask(row: int, **params: object) -> "Ask":
        return Ask(row, SamplingParams(**params), 0.4, [1, 2, 3], 1)  # type: ignore[arg-type]

    some = [{"top_k": 3, "temperature": 1.0}, {"top_p": 0.9, "temperature": 1.0}]
    some += [{"repetition_penalty": 1.1}, {"frequency_penalty": 0.5}, {"logprobs": 0}]
    for params in some:
        assert logits.ahead([ask(0), ask(1, **params)]) is None
    assert logits.ahead([ask(0)]) is None  # another row would have no token
    asked = [ask(0, temperature=1.3), ask(1)]
    ahead = logits.ahead(asked)
    assert ahead is not None
    expected = HostLogits(rows.astype(np.float32)).choose(asked)
    assert ahead.take() == expected == logits.choose(asked)
    assert ahead.tokens.tolist() == [choice.token for choice in expected]


def test_a_row_that_is_not_finite_has_no_token() -> None:
    device = find_device()
    rows = torch.zeros((2, 61), device=device.kind)
    rows[1, 5] = float("nan")
    asked = [Ask(row, SamplingParams(), 0.0, [1, 2, 3], 1) for row in range(2)]
    ahead = CudaLogits(device, rows).ahead(asked)
    assert ahead is not None
    fine, damaged = ahead.take()
    assert fine.token == 0
    assert damaged.token is None
    assert "some logits at position 2 are NaN" in str(damaged.error)
    assert 0 <= int(ahead.tokens[1]) < 61  # the step behind it can look it up


@pytest.mark.gpu
def test_taking_tokens_waits_for_nothing_that_was_queued_behind() -> None:
    device = Device("cuda", hardware=True)
    logits = CudaLogits(device, torch.randn((4, 4096), device="cuda"))
    ahead = logits.ahead([Ask(row, SamplingParams(), 0.0, [1], 1) for row in range(4)])
    assert ahead is not None
    torch.cuda._sleep(2_000_000_000)  # cycles: about a second
    behind = torch.cuda.current_stream().record_event()
    ahead.take()
    assert not behind.query()
