"""The meter: which tokens are judged, by whom, and that a known loss is measured as what it is."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quire
from quire.analysis import quality, walk
from quire.analysis.candidates import Setting, Track, base_config, open_tracks, with_candidate
from quire.analysis.quality import Measurement, Plan, Report, measure
from quire.analysis.recall import (
    RecallWords,
    distances,
    recall_trial,
    recall_trials_in_prompt,
    recall_words,
)
from quire.analysis.text import documents, held_out, limited, passages
from quire.engine.forced import ForcedText, score_together
from quire.errors import ConfigError, QuireError, RequestError
from quire.models import resolve_model
from tiny import write_llama, write_mixed

TEXTS = {
    "fox": "the quick brown fox jumps over the lazy dog and the other fox, then the dog too. " * 5,
    "dog": "then the other dog jumps over the quick fox and the lazy dog, over and over. " * 3,
}
PLAN = Plan(context=60, recall_trials=0, speed=False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> quire.Engine:
    """An fp32 checkpoint with a tokenizer, on the reference backend."""
    directory = write_llama(tmp_path_factory.mktemp("tiny"), tokenizer=True)
    config = base_config(backend="reference", page_size=8)
    return quire.Engine(directory, backend="reference", cache=config.cache)


@pytest.fixture(scope="module")
def quill() -> quire.Engine:
    return quire.Engine(cache=base_config().cache)


def measured(report: Report, at: int = 0) -> Measurement:
    found = report.candidates[at][1]
    assert isinstance(found, Measurement), found
    return found


def bend(monkeypatch: pytest.MonkeyPatch, format: str, how: Callable[[Any], Any]) -> None:
    """Let engines of a page format give other logits than they computed."""

    def bent(texts: Sequence[ForcedText], tokens: Sequence[int]) -> Any:
        logits = score_together(texts, tokens)
        name = texts[0].cache.layout.shapes[0].key_format.name
        return how(logits) if name == format else logits

    monkeypatch.setattr(walk, "score_together", bent)


# -- passages


@pytest.mark.parametrize("length", [2, 3, 9, 10, 11, 19, 20, 21, 50, 57])
@pytest.mark.parametrize("lead", [[], [7]])
def test_every_token_behind_the_first_half_is_a_target_once(lead: list[int], length: int) -> None:
    document, size = list(range(100, 100 + length)), 20
    found = passages(lead, document, size)
    half = (size - len(lead)) // 2
    targets = [token for passage in found for token in passage.targets]
    assert targets == document[min(half, length // 2) :]
    for passage in found:
        assert len(passage.told) == len(passage.targets)
        assert passage.tokens < size
        whole = [*passage.prompt, *passage.told]
        assert whole[: len(lead)] == lead
        assert [*whole[1:], passage.targets[-1]][-len(passage.targets) :] == list(passage.targets)
        assert whole[len(passage.prompt) + 1 :] == list(passage.targets[:-1])
    for passage in found[1:]:
        assert len(passage.prompt) >= len(lead) + half - 1


def test_a_limit_takes_from_every_document_in_turn() -> None:
    found = [passages([], range(d, d + 60), 20) for d in (100, 200, 300)]
    chosen = limited(found, 45)
    assert sum(len(passage.targets) for passage in chosen) == 45
    assert [passage.prompt[0] // 100 for passage in chosen] == [1, 2, 3, 1, 2]
    assert len(chosen[-1].told) == len(chosen[-1].targets) == 5
    assert limited(found, None) == [passage for document in found for passage in document]


def test_documents_begin_as_the_tokenizer_has_it(quill: quire.Engine, tiny: quire.Engine) -> None:
    assert quill.codec is not None
    assert tiny.codec is not None
    lead, found = documents(quill.codec, {"a": "import os", "b": "x = 1\n"})
    assert (lead, found[0]) == ([0], [699, 606])
    assert documents(tiny.codec, TEXTS)[0] == []
    with pytest.raises(RequestError, match="short has 0 tokens; at least 2"):
        documents(quill.codec, {"short": ""})


def test_the_held_out_modules_are_those_of_the_model_card() -> None:
    card = (resolve_model(None) / "README.md").read_text(encoding="utf-8")
    found = held_out()
    assert len(found) == 14
    assert all(f"`{name}`" in card for name in found)


# -- walking


def test_a_walk_gives_the_logits_of_the_whole_text(tiny: quire.Engine) -> None:
    assert tiny.codec is not None
    lead, found = documents(tiny.codec, TEXTS)
    every = [p for document in found for p in passages(lead, document, 40)]
    exact, [fp16] = open_tracks(tiny, [Setting("fp16")], 40, lanes=3)
    whole = {
        track: [track.engine.logits([*p.prompt, *p.told]) for p in every] for track in (exact, fp16)
    }
    seen = [0] * len(every)
    for told in walk.walk(exact, [fp16], every, 3, Track.note):
        for track, logits in zip((exact, fp16), told.logits, strict=True):
            assert logits is not None
            for row, number in enumerate(told.passages):
                wanted = whole[track][number][len(every[number].prompt) + told.at]
                assert np.array_equal(logits[row], wanted)
        for number in told.passages:
            assert seen[number] == told.at
            seen[number] += 1
    assert seen == [len(passage.told) for passage in every]
    assert exact.tokens == sum(passage.tokens for passage in every)
    assert exact.engine.status().kv.tokens == 0


# -- measuring


def test_lossless_settings_cost_nothing(tiny: quire.Engine) -> None:
    report = measure(tiny, TEXTS, [Setting("fp32")], PLAN)
    for found in (report.exact, measured(report)):
        assert found.summary.perplexity == report.exact.summary.exact_perplexity
        assert found.summary.perplexity_change == 0
        assert (found.summary.kl_mean, found.summary.kl_p99) == (0, 0)
        assert found.summary.top1_agreement == 1
        assert found.compression == 1
    layout = tiny.cache.layout
    assert report.exact.bytes_per_token == layout.token_bytes(0)


@pytest.mark.parametrize(("format", "compression"), [("fp16", 2.0), ("bf16", 2.0)])
def test_a_real_format_costs_what_two_whole_runs_differ_by(
    tiny: quire.Engine, format: str, compression: float
) -> None:
    found = measured(measure(tiny, TEXTS, [Setting(format)], PLAN))
    kl, change = expected(tiny, format, lambda logits: logits)
    assert found.summary.kl_mean == pytest.approx(kl, rel=1e-6)
    assert found.summary.perplexity_change == pytest.approx(change, rel=1e-6, abs=1e-12)
    assert found.compression == compression
    assert found.bytes_per_token_in_pool == pytest.approx(found.bytes_per_token, rel=0.15)


def test_a_known_loss_is_measured_as_what_it_is(
    tiny: quire.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    flatter = lambda logits: (logits * np.float32(0.7)).astype(np.float32)  # noqa: E731
    bend(monkeypatch, "fp16", flatter)
    report = measure(tiny, TEXTS, [Setting("fp16"), Setting("bf16")], PLAN)
    kl, change = expected(tiny, "fp16", flatter)
    found = measured(report).summary
    assert found.kl_mean == pytest.approx(kl, rel=1e-5)
    assert found.perplexity_change == pytest.approx(change, rel=1e-5)
    assert found.kl_mean > 100 * measured(report, 1).summary.kl_mean
    low, high = found.perplexity_change_interval
    assert low < found.perplexity_change < high


def test_turned_round_predictions_agree_nowhere(
    tiny: quire.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    bend(monkeypatch, "fp16", lambda logits: -logits)
    assert measured(measure(tiny, TEXTS, [Setting("fp16")], PLAN)).summary.top1_agreement == 0


def expected(model: quire.Engine, format: str, how: Callable[[Any], Any]) -> tuple[float, float]:
    """Mean KL and change of perplexity from whole logits and textbook formulas in float64."""
    assert model.codec is not None
    lead, found = documents(model.codec, TEXTS)
    kl: list[float] = []
    nats: list[float] = []
    for passage in (p for document in found for p in passages(lead, document, 60)):
        rows = []
        for name in ("auto", format):
            cache = quire.CacheConfig(page_size=8, num_pages=20, kv_format=name)
            engine = model.twin(quire.EngineConfig(backend="reference", cache=cache))
            rows.append(engine.logits([*passage.prompt, *passage.told])[len(passage.prompt) :])
        exact, other = (np.exp(r.astype(np.float64)) for r in (rows[0], how(rows[1])))
        p, q = (r / r.sum(1, keepdims=True) for r in (exact, other))
        kl += (p * np.log(p / q)).sum(1).tolist()
        at = (np.arange(len(p)), list(passage.targets))
        nats += np.log(p[at] / q[at]).tolist()
    return float(np.mean(kl)), float(np.exp(np.mean(nats)) - 1)


def test_windows_are_held_to_what_they_hold(tmp_path: Path) -> None:
    """A layer with a sliding window gives pages back; bytes a token are of what is held."""
    directory = write_mixed(tmp_path, tokenizer=True)
    config = base_config(backend="reference", page_size=4)
    model = quire.Engine(directory, backend="reference", cache=config.cache)
    report = measure(model, TEXTS, [Setting("fp16")], PLAN)
    token = sum(model.cache.layout.token_bytes(group) for group in (0, 1))
    assert token / 2 < report.exact.bytes_per_token < 0.75 * token
    assert measured(report).compression == 2


def test_what_the_engine_refuses_is_the_candidates_error(tiny: quire.Engine) -> None:
    settings = [Setting("int9"), Setting("fp16", "h20:budget=25%"), Setting("fp16")]
    report = measure(tiny, TEXTS, settings, PLAN)
    reasons = [found for _, found in report.candidates]
    assert "unknown page format 'int9'" in str(reasons[0])
    assert "unknown eviction policy 'h20'; did you mean 'h2o'?" in str(reasons[1])
    assert measured(report, 2).setting == Setting("fp16")
    with pytest.raises(ConfigError, match="has no budget"):
        with_candidate(base_config(), "bf16", "h2o")


def test_a_candidate_that_fails_on_the_way_stops_alone(
    tiny: quire.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = iter(range(10**6))

    def broken(logits: Any) -> Any:
        return np.full_like(logits, np.nan) if next(steps) > 5 else logits

    bend(monkeypatch, "fp16", broken)
    report = measure(tiny, TEXTS, [Setting("fp16"), Setting("bf16")], PLAN)
    assert str(report.candidates[0][1]).startswith("fp16: ")
    assert "NaN or infinite" in str(report.candidates[0][1])
    assert measured(report, 1).summary.tokens == report.tokens


def test_an_exact_cache_that_fails_is_an_error(
    tiny: quire.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    bend(monkeypatch, "fp32", lambda logits: np.full_like(logits, np.nan))
    with pytest.raises(QuireError, match=r"the exact cache: .*NaN or infinite"):
        measure(tiny, TEXTS, [Setting("fp16")], PLAN)


def test_two_runs_are_equal_and_lanes_do_not_matter(
    tiny: quire.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measure(tiny, TEXTS, [Setting("fp16")], PLAN)
    assert measure(tiny, TEXTS, [Setting("fp16")], PLAN) == first
    monkeypatch.setattr(quality, "MOST_LANES", 1)
    alone = measure(tiny, TEXTS, [Setting("fp16")], PLAN)
    assert alone.candidates == first.candidates


def test_speeds_are_measured_and_progress_is_told(tiny: quire.Engine) -> None:
    told: list[tuple[str, int, int]] = []
    plan = Plan(context=60, tokens=20, recall_trials=0)
    report = measure(tiny, TEXTS, [Setting("fp16")], plan, lambda *what: told.append(what))
    for found in (report.exact, measured(report)):
        assert found.speed is not None
        assert found.speed.context == 28
        assert found.speed.decode_tokens_per_s > 0
        assert found.speed.attention_bytes_per_s > 0
    assert ("reading the text", 20, 20) in told
    assert ("timing fp16", 1, 2) in told


@pytest.mark.parametrize("context", [39, 97])
def test_a_context_that_cannot_be_is_refused(tiny: quire.Engine, context: int) -> None:
    with pytest.raises(RequestError, match="this model allows 40 to 96"):
        measure(tiny, TEXTS, [Setting("fp16")], Plan(context=context))


def test_a_model_without_a_tokenizer_is_refused(models: dict[str, Path]) -> None:
    model = quire.Engine(models["full"], backend="reference")
    with pytest.raises(RequestError, match="has no tokenizer"):
        measure(model, TEXTS, [Setting("fp16")])


# -- recall

WORDS = RecallWords(1, 2, 3, 4, tuple(range(100, 150)), tuple(range(200, 250)))


@pytest.mark.parametrize("size", [41, 60, 96, 128, 500, 2048, 4096])
@pytest.mark.parametrize("lead", [[], [0]])
def test_an_answer_lies_so_many_tokens_before_its_question(size: int, lead: list[int]) -> None:
    wanted = distances(size)
    assert wanted[0] == 32
    assert wanted[-1] > 0.7 * size - 20
    trial = recall_trial(WORDS, [9] * 5000, (size, lead, wanted), "x")
    whole = [*trial.passage.prompt, *trial.passage.told]
    assert len(whole) == size
    assert whole[: len(lead)] == lead
    assert sorted(trial.asked.values()) == wanted
    values = set()
    for told, distance in trial.asked.items():
        name_at = len(trial.passage.prompt) + told
        assert whole[name_at - 2 : name_at] == [WORDS.hash, WORDS.get]
        value_at = name_at - distance
        name, value = whole[name_at], trial.passage.targets[told]
        line = [WORDS.newline, WORDS.hash, WORDS.set, name, value, WORDS.newline]
        assert whole[value_at - 4 : value_at + 2] == line
        assert whole.count(name) == 2
        values.add(value)
    assert len(values) == len(wanted)
    assert recall_trial(WORDS, [9] * 5000, (size, lead, wanted), "x") == trial
    assert recall_trial(WORDS, [9] * 5000, (size, lead, wanted), "y") != trial


@pytest.mark.parametrize("size", [41, 60, 96, 128, 500, 2048, 4096])
@pytest.mark.parametrize("lead", [[], [0]])
def test_a_question_in_the_prompt_is_asked_there_and_again_after_it(
    size: int, lead: list[int]
) -> None:
    wanted, filler = distances(size), [9] * 5000
    trials = recall_trials_in_prompt(WORDS, filler, (size, lead, wanted), "x")
    assert [list(trial.asked.values()) for trial in trials] == [[each] for each in wanted]
    texts = set()
    for trial in trials:
        prompt, told = trial.passage.prompt, trial.passage.told
        whole = [*prompt, *told]
        assert len(whole) == size
        assert whole[: len(lead)] == lead
        [(at, distance)] = trial.asked.items()
        assert at == len(told) - 1
        name, value = whole[-1], trial.passage.targets[at]
        question = [WORDS.hash, WORDS.get, name]
        assert (list(told), whole[-7:-3]) == (question, [*question, WORDS.newline])
        value_at = len(whole) - 1 - distance
        line = [WORDS.newline, WORDS.hash, WORDS.set, name, value, WORDS.newline]
        assert whole[value_at - 4 : value_at + 2] == line
        assert (whole.count(name), whole.count(value)) == (3, 1)
        assert whole.count(WORDS.get) == 2
        texts.add(tuple(whole[:-7]))
    assert len(texts) == 1
    assert recall_trials_in_prompt(WORDS, filler, (size, lead, wanted), "x") == trials


def test_passages_that_are_too_short_have_no_distances() -> None:
    assert distances(40) == []


def test_quill_recalls_and_a_cache_that_forgot_does_not(
    quill: quire.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    bend(monkeypatch, "fp16", np.zeros_like)
    plan = Plan(context=256, tokens=300, recall_trials=6, speed=False)
    texts = {name: text for name, text in held_out().items() if name in ("bisect", "queue")}
    report = measure(quill, texts, [Setting("fp32"), Setting("fp16")], plan)
    assert report.recall_missing is None
    assert report.exact.recall is not None
    assert list(report.exact.recall) == ["32", "64", "128", "247"]
    assert (report.exact.recall_mean or 0) >= 0.95
    assert measured(report).recall == report.exact.recall
    assert measured(report, 1).recall_mean == 0
    low, high = measured(report, 1).recall_interval or (1.0, 0.0)
    assert low == 0 < high < 0.2
    assert list(report.exact.recall_in_prompt or ()) == list(report.exact.recall)
    assert (report.exact.recall_in_prompt_mean or 0) >= 0.95
    assert measured(report).recall_in_prompt == report.exact.recall_in_prompt
    assert measured(report, 1).recall_in_prompt_mean == 0


def test_a_window_recalls_what_it_holds_and_nothing_else(quill: quire.Engine) -> None:
    """Known beforehand: a VALUE is within the window, or had left it before it was asked for."""
    plan = Plan(context=512, tokens=8, recall_trials=5, speed=False)
    report = measure(quill, held_out(), [Setting("bf16", "window:budget=160,sink=4")], plan)
    found = measured(report)
    assert list(found.recall or ()) == ["32", "64", "128", "256", "503"]
    for recall in (found.recall, found.recall_in_prompt):
        assert recall is not None
        assert [recall[d] for d in ("32", "64")] == [1, 1]
        assert [recall[d] for d in ("256", "503")] == [0, 0]


def test_recall_in_the_prompt_is_what_one_sequence_after_the_other_answers(
    quill: quire.Engine,
) -> None:
    """The same share as from a plain loop that finds question and answer in the text itself.

    Prompts are read in chunks, of which only the last hears the question: some answers are gone.
    """
    evict, size, count = "snapkv:budget=48,window=16", 256, 5
    plan = Plan(context=size, tokens=8, recall_trials=count, speed=False)
    chunked = replace(quill.config, max_batch_tokens=96)
    model = quill.twin(chunked)
    found = measured(measure(model, held_out(), [Setting("bf16", evict)], plan))
    assert quill.codec is not None
    codec, wanted = quill.codec, distances(size)
    words = recall_words(codec, len(wanted))
    assert words is not None
    lead, texts = documents(codec, held_out())
    filler = [token for text in texts for token in text]
    cache = quire.CacheConfig(page_size=32, num_pages=16, prefix_cache=False, evict=evict)
    engine = quill.twin(replace(chunked, cache=cache))
    right = dict.fromkeys(map(str, wanted), 0)
    for i in range(count):
        for trial in recall_trials_in_prompt(words, filler, (size, lead, wanted), f"0/{i}"):
            prompt = codec.decode(list(trial.passage.prompt[len(lead) :]))
            question = prompt.splitlines()[-1]
            name = question.removeprefix("# get ")
            [value] = re.findall(rf"^# set {name} (\w+)$", prompt, re.MULTILINE)
            with engine.forced() as text:
                text.read(trial.passage.prompt)
                for token in codec.encode(question, add_special_tokens=False):
                    [answer] = text.score([token])
            right[str(*trial.asked.values())] += codec.decode([int(answer.argmax())]) == f" {value}"
    assert found.recall_in_prompt == {d: n / count for d, n in right.items()}
    assert 0 < sum(right.values()) < count * len(wanted)


def test_a_question_in_the_prompt_is_what_a_vote_hears(quill: quire.Engine) -> None:
    """With prompts read in one step SnapKV keeps what is asked for; nobody else does."""
    whole = replace(quill.config, max_batch_tokens=512)
    model = quill.twin(whole)
    settings = [Setting("bf16", f"{each}:budget=64") for each in ("snapkv", "window", "knorm")]
    plan = Plan(context=512, tokens=8, recall_trials=4, speed=False)
    report = measure(model, held_out(), settings, plan)
    snapkv, window, knorm = (measured(report, at) for at in range(3))
    assert (snapkv.recall_in_prompt_mean or 0) >= 0.95
    assert (snapkv.recall_mean or 0) < 0.8
    for other in (window, knorm):
        assert (other.recall_in_prompt_mean or 0) < 0.5


def test_bytes_a_token_are_of_the_text_alone(quill: quire.Engine) -> None:
    """A share of a prompt is of each passage's own; texts to recall are not among them."""
    kept = [Setting("bf16", "window:budget=25%")]
    plans = [Plan(context=128, tokens=64, recall_trials=n, speed=False) for n in (0, 2)]
    without, asked = (measured(measure(quill, held_out(), kept, plan)) for plan in plans)
    assert without.bytes_per_token == asked.bytes_per_token
    assert asked.recall is not None


def test_words_are_of_one_token_and_disjoint(quill: quire.Engine) -> None:
    assert quill.codec is not None
    words = recall_words(quill.codec, 8)
    assert words is not None
    assert not {*words.names} & {*words.values}
    line = [words.hash, words.get, words.names[5], words.values[7], words.newline]
    text = quill.codec.decode(line)
    assert text.startswith("# get ")
    assert quill.codec.encode(text, add_special_tokens=False) == line


def test_a_tokenizer_without_the_words_says_so(tiny: quire.Engine) -> None:
    report = measure(tiny, TEXTS, [Setting("fp16")], Plan(context=60, tokens=5, speed=False))
    assert report.recall_missing == "the tokenizer has no single tokens for '# set NAME VALUE'"
    assert measured(report).recall is None
    assert measured(report).recall_in_prompt is None


def test_a_text_shorter_than_a_passage_has_no_recall(quill: quire.Engine) -> None:
    plan = Plan(context=256, tokens=5, speed=False)
    report = measure(quill, {"short": "import os\n" * 20}, [Setting("fp16")], plan)
    assert "the text has" in (report.recall_missing or "")


def test_eviction_is_measured_by_the_tokens_that_were_read(tmp_path: Path) -> None:
    """Half the tokens of a passage are kept: half the bytes for each that was read, and a loss."""
    directory = write_llama(tmp_path, tokenizer=True)
    config = base_config(backend="reference", page_size=4)
    model = quire.Engine(directory, backend="reference", cache=config.cache)
    settings = [Setting("fp32", evict) for evict in ("window:budget=90", "knorm:budget=16")]
    report = measure(model, TEXTS, settings, PLAN)
    large, small = measured(report, 0), measured(report, 1)
    assert large.summary.kl_mean == 0
    assert small.summary.kl_mean > 0
    assert small.compression > large.compression == 1
