"""Beam search gives the continuations and scores that transformers' own gives.

In float64, where two candidates never come so near that rounding decides: transformers runs the
checkpoint in float64, Quire's pure search gets the same logits; and the engine's whole way, in
float32 with pages that are forked and copied, gives the same tokens.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quire
from checkpoints import MIXED_WINDOWS, tiny_config, write_with_transformers
from quire.engine.beam import BeamSearch
from quire.errors import RequestError
from tiny import tiny_engine, write_llama

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

NEW = 12
CASES = [(2, 1.0), (3, 0.0), (4, 2.0), (5, -1.0), (3, 0.5)]
STOPS = [(), (7,), (3, 11, 40)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "full": write_with_transformers(root / "full", tiny_config("llama")),
        "mixed": write_with_transformers(root / "mixed", tiny_config("qwen2", **MIXED_WINDOWS)),
    }


def random_prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 40, length).tolist()


def theirs(directory: Path, prompt: list[int], width: int, penalty: float, stops: Any) -> Any:
    """(token ids, score) of every beam that transformers gives back, best first."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        num_beams=width,
        num_return_sequences=width,
        length_penalty=penalty,
        early_stopping=False,
        do_sample=False,
        max_new_tokens=NEW,
        eos_token_id=list(stops) or None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    beams = []
    for row, score in zip(out.sequences.tolist(), out.sequences_scores.tolist(), strict=True):
        tokens = row[len(prompt) :]
        ends = [at + 1 for at, token in enumerate(tokens) if token in stops]
        beams.append((tuple(tokens[: ends[0]] if ends else tokens), score))
    return beams


@pytest.mark.parametrize("stops", STOPS, ids=str)
@pytest.mark.parametrize(("width", "penalty"), CASES)
def test_the_search_is_that_of_transformers(
    models: dict[str, Path], width: int, penalty: float, stops: tuple[int, ...]
) -> None:
    prompt = random_prompt(9, seed=width)
    model = transformers.AutoModelForCausalLM.from_pretrained(models["full"], dtype=torch.float64)
    search = BeamSearch(width, penalty, set(stops), NEW)
    while search.live:
        rows = []
        for beam in search.live:
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *beam.tokens]])).logits[0, -1]
            rows.append(logits.numpy())
        search.advance(rows)
    expected = theirs(models["full"], prompt, width, penalty, stops)
    assert [beam.tokens for beam in search.ended] == [tokens for tokens, _ in expected]
    np.testing.assert_allclose(
        [beam.score for beam in search.ended], [score for _, score in expected], rtol=1e-6
    )


@pytest.mark.parametrize("kind", ["full", "mixed"])
@pytest.mark.parametrize("stops", STOPS, ids=str)
@pytest.mark.parametrize(("width", "penalty"), CASES)
def test_the_engine_finds_the_same_beams_on_shared_pages(
    models: dict[str, Path], kind: str, width: int, penalty: float, stops: tuple[int, ...]
) -> None:
    prompt = random_prompt(21, seed=100 + width)
    expected = theirs(models[kind], prompt, width, penalty, stops)
    params = quire.SamplingParams(
        max_new_tokens=NEW,
        beam_width=width,
        length_penalty=penalty,
        n=width,
        stop_token_ids=stops,
        ignore_eos=True,
    )
    engine = tiny_engine(models[kind], page_size=4, num_pages=64, max_batch_tokens=3)
    request = engine.submit(prompt, params)
    other = engine.submit(random_prompt(30, seed=1), quire.SamplingParams(max_new_tokens=20))
    while engine.has_work:
        engine.step()
        engine.cache.check()
    found = request.completions
    assert [c.token_ids for c in found] == [tokens for tokens, _ in expected]
    np.testing.assert_allclose(
        [c.score for c in found], [score for _, score in expected], rtol=1e-4
    )
    reasons = ["stop" if tokens[-1] in stops else "length" for tokens, _ in expected]
    assert [c.finish_reason for c in found] == reasons
    assert other.finished
    assert engine.cache.sequences == ()
    assert engine.cache.free_pages == engine.cache.num_pages


def test_beams_survive_preemption(models: dict[str, Path]) -> None:
    params = quire.SamplingParams(max_new_tokens=NEW, beam_width=3, n=3, ignore_eos=True)
    prompt = random_prompt(21, seed=5)
    [*alone] = tiny_engine(models["full"], page_size=4).generate([prompt], params)
    engine = tiny_engine(models["full"], page_size=4, num_pages=24)
    long = quire.SamplingParams(max_new_tokens=30, ignore_eos=True)
    first = engine.submit(random_prompt(60, seed=6), long)
    request = engine.submit(prompt, params)
    while engine.has_work:
        engine.step()
        engine.cache.check()
    assert engine.status().preemptions
    assert first.finished
    assert [c.token_ids for c in request.completions] == [c.token_ids for c in alone]


def test_what_a_search_cannot_be_combined_with_is_refused(
    models: dict[str, Path], tmp_path: Path
) -> None:
    for setting in ({"temperature": 0.5}, {"logprobs": 2}, {"stop": "x"}, {"top_k": 3}):
        with pytest.raises(RequestError, match=f"cannot be combined with {next(iter(setting))}"):
            quire.SamplingParams(beam_width=2, **setting)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="cannot give back n = 3"):
        quire.SamplingParams(beam_width=2, n=3)
    wide = quire.SamplingParams(beam_width=4, max_new_tokens=20)
    with pytest.raises(RequestError, match="4 beams do not fit 2 sequences"):
        tiny_engine(models["full"], max_sequences=2).submit([1, 2], wide)
    with pytest.raises(RequestError, match="in 4 beams need"):
        tiny_engine(models["full"], page_size=4, num_pages=8).submit([1, 2], wide)
    engine = tiny_engine(write_llama(tmp_path, tokenizer=True))
    with pytest.raises(RequestError, match="beam_width 4"):
        engine.stream([1, 2], wide)


def test_a_search_can_be_cancelled(models: dict[str, Path]) -> None:
    engine = tiny_engine(models["full"], page_size=4)
    request = engine.submit(
        random_prompt(9), quire.SamplingParams(beam_width=3, n=2, max_new_tokens=30)
    )
    for _ in range(5):
        engine.step()
    engine.cancel(request)
    assert request.finished
    assert {c.finish_reason for c in request.completions} == {"cancelled"}
    assert not engine.has_work
    assert engine.cache.free_pages == engine.cache.num_pages
