"""The engine end to end on tiny random checkpoints: requests in, tokens and text out."""

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import quire
from quire import CacheConfig, Completion, Engine, SamplingParams
from quire.errors import BackendError, CacheFull, ConfigError, QuireError, RequestError
from quire.sampler import HostLogits
from tiny import (
    END,
    VOCAB,
    WINDOW,
    random_prompt,
    tiny_engine,
    write_llama,
    write_mixed,
    write_sliding,
)

CONTEXT = 96  # max_position_embeddings of the tiny checkpoints
PAGE = 4 * 2 * 2 * 6 * 4  # bytes in one layer: 4 tokens, K and V, 2 heads of 6 numbers, fp32

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def llama(root: Path) -> Path:
    """Token ids only: no tokenizer."""
    return write_llama(root / "llama")


@pytest.fixture(scope="module")
def mixed(root: Path) -> Path:
    return write_mixed(root / "mixed")


@pytest.fixture(scope="module")
def text_model(root: Path) -> Path:
    return write_llama(root / "text", tokenizer=True)


def greedy(new: int = 8, **others: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=new, **others)


def sampled(new: int = 8, **others: Any) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": new, "temperature": 1.0, "seed": 7, **others})


def alone(directory: Path, prompt: Sequence[int] | str, params: SamplingParams) -> Completion:
    """The first sample of a request that has an engine for itself."""
    return tiny_engine(directory).generate([prompt], params)[0]


def run_all(engine: Engine) -> list[quire.StepOutput]:
    outputs = []
    while engine.has_work:
        outputs += engine.step()
        engine.cache.check()
    return outputs


def assert_idle(engine: Engine) -> None:
    """Nothing is queued and every page is free."""
    assert not engine.has_work
    assert engine.cache.free_pages == engine.cache.num_pages
    assert engine.cache.sequences == ()
    engine.cache.check()


def script(patch: Patch, engine: Engine, prompt: int, reply: Sequence[int]) -> None:
    """Make the model say ``reply`` after every prompt of ``prompt`` tokens, whatever they are."""

    def forward(tokens: Sequence[int], batch: Any, pools: Any, rows: Sequence[int]) -> HostLogits:
        logits = np.zeros((len(rows), engine.model_config.vocab_size), np.float32)
        for i, row in enumerate(rows):
            at = int(batch.positions[row]) - prompt + 1
            logits[i, reply[min(at, len(reply) - 1)]] = 9
        return HostLogits(logits)

    patch.setattr(engine._loaded.model, "forward", forward)


def say(patch: Patch, engine: Engine, text: str) -> list[int]:
    """Make the model say ``text`` after the prompt ``[1]``, in single bytes; the token ids."""
    assert engine.codec is not None
    reply = [i for char in text for i in engine.codec.encode(char)]
    script(patch, engine, 1, reply)
    return reply


def wrap_forward(
    patch: Patch, engine: Engine, around: Callable[[Callable[[], Any], Any, Any], Any]
) -> None:
    """``around(compute, batch, rows)`` in place of the model's forward."""
    model = engine._loaded.model
    inner = model.forward

    def forward(tokens: Any, batch: Any, pools: Any, rows: Any) -> Any:
        return around(lambda: inner(tokens, batch, pools, rows), batch, rows)

    patch.setattr(model, "forward", forward)


# -- generate


def test_a_prompt_may_be_a_list_ids_an_array_or_text(text_model: Path) -> None:
    engine = tiny_engine(text_model)
    assert engine.codec is not None
    ids = engine.codec.encode("the fox")
    expected = engine.generate([ids], greedy())[0]
    forms: list[Any] = ["the fox", ["the fox"], ids, tuple(ids), np.array(ids), [np.array(ids)]]
    for form in forms:
        (done,) = engine.generate(form, greedy())
        assert (done.token_ids, done.text) == (expected.token_ids, expected.text)
    assert expected.text == engine.codec.decode(expected.token_ids)
    assert expected.prompt_tokens == len(ids)


def test_results_come_in_the_order_of_the_prompts(llama: Path) -> None:
    prompts = [random_prompt(length, seed=length) for length in (30, 1, 12, 5, 21)]
    done = tiny_engine(llama, max_sequences=2, max_batch_tokens=16).generate(prompts, greedy())
    assert [completion.prompt_tokens for completion in done] == [30, 1, 12, 5, 21]
    for prompt, completion in zip(prompts, done, strict=True):
        assert completion.token_ids == alone(llama, prompt, greedy()).token_ids


def test_text_and_ids_mix_and_no_prompts_give_no_results(text_model: Path) -> None:
    engine = tiny_engine(text_model)
    assert len(engine.generate(["the", [1, 2, 3]], greedy(2))) == 2
    assert engine.generate([], greedy()) == []
    assert_idle(engine)


def test_greedy_generation_is_a_loop_over_logits(mixed: Path) -> None:
    """With the penalties, written out, over the tokens that they are for."""
    engine, prompt = tiny_engine(mixed), random_prompt(12)
    params = greedy(20, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3)
    tokens = list(prompt)
    for _ in range(20):
        row = engine.logits(tokens)[-1].astype(float).tolist()
        for token in set(tokens):
            row[token] = row[token] * 1.3 if row[token] < 0 else row[token] / 1.3
        for token in tokens[len(prompt) :]:
            row[token] -= 0.3
        for token in set(tokens[len(prompt) :]):
            row[token] -= 0.4
        tokens.append(int(np.argmax(row)))
    assert engine.generate([prompt], params)[0].token_ids == tuple(tokens[len(prompt) :])


def test_logprobs_are_those_of_the_models_own_distribution(llama: Path) -> None:
    engine, prompt = tiny_engine(llama), random_prompt(6)
    (done,) = engine.generate([prompt], sampled(5, logprobs=3, top_k=5, temperature=2.0))
    assert done.logprobs is not None
    assert len(done.logprobs) == 5
    logits = engine.logits([*prompt, *done.token_ids]).astype(np.float64)
    for at, (token, entry) in enumerate(zip(done.token_ids, done.logprobs, strict=True), start=5):
        row = logits[at] - np.log(np.exp(logits[at]).sum())
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(row[token], abs=1e-12)
        assert [i for i, _ in entry.top] == np.argsort(-row)[:3].tolist()
    assert engine.generate([prompt], greedy(2))[0].logprobs is None


def test_n_samples_have_indexes_and_streams_of_their_own(llama: Path) -> None:
    prompt = random_prompt(5)
    three = tiny_engine(llama).generate([prompt, [1]], sampled(12, n=3))
    assert [completion.index for completion in three] == [0, 1, 2, 0, 1, 2]
    assert [completion.prompt_tokens for completion in three] == [5, 5, 5, 1, 1, 1]
    assert len({completion.token_ids for completion in three[:3]}) == 3
    two = tiny_engine(llama).generate([prompt], sampled(12, n=2))
    assert [c.token_ids for c in two] == [c.token_ids for c in three[:2]]
    others = tiny_engine(llama).generate([prompt], sampled(12, n=2, seed=8))
    assert not {c.token_ids for c in others} & {c.token_ids for c in two}


def test_a_seed_that_was_drawn_is_reported_and_repeats_the_sample(llama: Path) -> None:
    engine = tiny_engine(llama)
    first, second = engine.generate([[1, 2], [1, 2]], sampled(16, seed=None))
    assert first.seed != second.seed
    assert first.token_ids != second.token_ids
    again = alone(llama, [1, 2], sampled(16, seed=first.seed))
    assert (again.token_ids, again.seed) == (first.token_ids, first.seed)


def test_seeds_that_differ_in_their_lowest_bit_differ_in_their_samples(llama: Path) -> None:
    seeds = [2**64 - 1, 2**64 - 2, 2**63 + 1, 2**63]
    done = [alone(llama, [1, 2], sampled(16, seed=seed)) for seed in seeds]
    assert len({completion.token_ids for completion in done}) == len(seeds)


# -- joining and leaving


def test_a_request_joins_half_way_and_leaves_its_pages(llama: Path) -> None:
    engine = tiny_engine(llama)
    long, short = random_prompt(9), random_prompt(6, seed=1)
    first = engine.submit(long, greedy(20))
    for _ in range(4):
        assert [output.request for output in engine.step()] == [first]
    second = engine.submit(short, greedy(3))
    assert engine.status().waiting == 1
    together = engine.step()
    assert [output.request for output in together] == [first, second]
    assert (engine.status().running, engine.status().waiting) == (2, 0)
    while not second.finished:
        engine.step()
    held = math.ceil((9 + len(first.samples[0].new_tokens) - 1) / 4)
    assert engine.cache.free_pages == (64 - held,)
    assert not first.finished
    run_all(engine)
    assert_idle(engine)
    assert first.completions[0].token_ids == alone(llama, long, greedy(20)).token_ids
    assert second.completions[0].token_ids == alone(llama, short, greedy(3)).token_ids


def test_steps_report_every_token_and_the_completion_with_the_last(text_model: Path) -> None:
    engine = tiny_engine(text_model)
    request = engine.submit("the lazy dog", sampled(9, n=2))
    assert not request.finished
    outputs = run_all(engine)
    assert request.finished
    for index, completion in enumerate(request.completions):
        mine = [output for output in outputs if output.index == index]
        assert tuple(output.token_id for output in mine) == completion.token_ids
        assert "".join(output.text for output in mine) == completion.text
        assert [output.completion for output in mine] == [None] * 8 + [completion]
    assert engine.step() == []


def test_a_long_prompt_is_prefilled_in_chunks_while_others_decode(llama: Path) -> None:
    engine = tiny_engine(llama, max_batch_tokens=8)
    running = engine.submit([1, 2], greedy(30))
    engine.step()
    prompt = random_prompt(50)
    late = engine.submit(prompt, greedy(4))
    for step in range(1, 9):
        outputs = engine.step()
        # Seven of the eight tokens are left for the prompt: 50 take eight steps.
        assert [o.request for o in outputs] == ([running] if step < 8 else [running, late])
    run_all(engine)
    assert late.completions[0].token_ids == alone(llama, prompt, greedy(4)).token_ids


def test_no_more_sequences_run_than_asked_and_the_rest_wait_in_order(llama: Path) -> None:
    engine = tiny_engine(llama, max_sequences=2)
    requests = [engine.submit([i], greedy(3)) for i in range(5)]
    order = []
    while engine.has_work:
        order += [output.request for output in engine.step() if output.completion]
        assert engine.status().running <= 2
    assert order == requests


def test_a_pool_too_small_for_all_preempts_and_gives_the_tokens_of_each_alone(
    mixed: Path,
) -> None:
    engine = tiny_engine(mixed, num_pages=9)
    prompts = [random_prompt(8, seed) for seed in range(5)]
    requests = [engine.submit(prompt, sampled(20, seed=i)) for i, prompt in enumerate(prompts)]
    while engine.has_work:
        engine.step()
        engine.cache.check()
        # Who gave way comes back before those who arrived later.
        running = [sample.request.arrival for sample in engine._queues.running]
        waiting = [sample.request.arrival for sample in engine._queues.waiting]
        assert running + waiting == sorted(running + waiting)
    assert_idle(engine)
    done = [request.completions[0] for request in requests]
    for i, (prompt, completion) in enumerate(zip(prompts, done, strict=True)):
        assert completion.token_ids == alone(mixed, prompt, sampled(20, seed=i)).token_ids
    reasons = [reason for completion in done for reason in completion.preemptions]
    assert len(reasons) == engine.status().preemptions > 0
    assert done[0].preemptions == ()  # the oldest never gives way
    for completion, request in zip(done, requests, strict=True):
        for reason in completion.preemptions:
            assert "gave way" in reason
            assert f"request {request.arrival}," not in reason


def test_status_counts_bytes(llama: Path) -> None:
    engine = tiny_engine(llama)
    engine.submit([1, 2, 3, 4, 5], greedy())
    engine.step()
    kv = engine.status().kv
    assert (kv.allocated_bytes, kv.pool_bytes, kv.tokens) == (2 * 2 * PAGE, 64 * 2 * PAGE, 5)


# -- cancel


def test_cancelling_frees_pages_and_keeps_what_was_generated(llama: Path) -> None:
    engine = tiny_engine(llama, max_sequences=1)
    running, waiting = engine.submit([1, 2], greedy(20)), engine.submit([3], greedy(20))
    for _ in range(3):
        engine.step()
    engine.cancel(waiting)
    assert waiting.completions[0].finish_reason == "cancelled"
    assert waiting.completions[0].token_ids == ()
    assert waiting.completions[0].ttft_s is None
    engine.cancel(running)
    (done,) = running.completions
    assert done.finish_reason == "cancelled"
    assert done.token_ids == alone(llama, [1, 2], greedy(3)).token_ids
    assert_idle(engine)
    engine.cancel(running)  # a second time changes nothing
    assert running.completions == [done]


def test_cancelling_one_request_does_not_disturb_another(llama: Path) -> None:
    engine = tiny_engine(llama)
    kept, dropped = engine.submit([1, 2], greedy(12)), engine.submit([3, 4], greedy(12, n=2))
    engine.step()
    engine.cancel(dropped)
    run_all(engine)
    assert kept.completions[0].token_ids == alone(llama, [1, 2], greedy(12)).token_ids
    assert [c.finish_reason for c in dropped.completions] == ["cancelled", "cancelled"]


def test_cancelling_a_finished_request_changes_nothing(llama: Path) -> None:
    engine = tiny_engine(llama)
    request = engine.submit([1], greedy(2))
    run_all(engine)
    before = request.completions
    engine.cancel(request)
    assert request.completions == before
    assert before[0].finish_reason == "length"


def test_cancelled_text_has_what_was_held_back(text_model: Path, monkeypatch: Patch) -> None:
    engine = tiny_engine(text_model)
    say(monkeypatch, engine, "one STand")
    request = engine.submit([1], greedy(20, stop="STOP"))
    for _ in range(6):
        engine.step()
    engine.cancel(request)
    assert request.completions[0].text == "one ST"


# -- the end of a sample


@pytest.mark.parametrize("stop", ["STOP", ["zz", "STOP"], "O", "two STOP thr", "e"])
def test_a_stop_string_ends_the_text_before_it(
    text_model: Path, monkeypatch: Patch, stop: str | list[str]
) -> None:
    text = "one two STOP three"
    words = [stop] if isinstance(stop, str) else stop
    found = min((text.index(word), word) for word in words if word in text)
    engine = tiny_engine(text_model)
    reply = say(monkeypatch, engine, text)
    (done,) = engine.generate([[1]], greedy(40, stop=stop))
    assert done.text == text[: found[0]]
    assert (done.finish_reason, done.stop_reason) == ("stop", found[1])
    # Characters here are single bytes, so the tokens end where the stop string does.
    assert done.token_ids == tuple(reply[: found[0] + len(found[1])])
    assert_idle(engine)


def test_no_part_of_a_stop_string_is_streamed(text_model: Path, monkeypatch: Patch) -> None:
    engine = tiny_engine(text_model)
    say(monkeypatch, engine, "a STONE, no STOP here")
    pieces = list(engine.stream([1], greedy(40, stop="STOP")))
    assert "".join(pieces) == "a STONE, no "
    shown = ""
    for piece in pieces:
        shown += piece
        assert "a STONE, no ".startswith(shown)


def test_a_stop_string_that_a_merged_token_holds_is_cut(
    text_model: Path, monkeypatch: Patch
) -> None:
    engine = tiny_engine(text_model)
    assert engine.codec is not None
    reply = engine.codec.encode("the fox the dog")
    assert len(reply) < len("the fox the dog")
    script(monkeypatch, engine, 1, reply)
    (done,) = engine.generate([[1]], greedy(len(reply), stop="he d"))
    assert (done.text, done.stop_reason) == ("the fox t", "he d")


def test_a_stop_string_at_the_limit_of_new_tokens_still_counts(
    text_model: Path, monkeypatch: Patch
) -> None:
    engine = tiny_engine(text_model)
    say(monkeypatch, engine, "abcd")
    (done,) = engine.generate([[1]], greedy(3, stop="bc"))
    assert (done.text, done.finish_reason, done.stop_reason) == ("a", "stop", "bc")
    (held,) = engine.generate([[1]], greedy(3, stop="cd"))
    assert (held.text, held.finish_reason, held.stop_reason) == ("abc", "length", None)


def test_stop_strings_need_a_tokenizer(llama: Path) -> None:
    """Without one they could only be ignored, and nothing is ignored in silence."""
    engine = tiny_engine(llama)
    with pytest.raises(RequestError, match=r"stop.*tokenizer"):
        engine.submit([1], greedy(stop="x"))
    assert_idle(engine)


def test_a_stop_token_ends_the_sample_and_is_not_in_the_text(
    text_model: Path, monkeypatch: Patch
) -> None:
    engine = tiny_engine(text_model)
    reply = say(monkeypatch, engine, "one.two")
    (done,) = engine.generate([[1]], greedy(40, stop_token_ids=[reply[3], 299]))
    assert (done.text, done.finish_reason, done.stop_reason) == ("one", "stop", reply[3])
    assert done.token_ids == tuple(reply[:4])


def test_a_stop_token_releases_what_was_held_back(text_model: Path, monkeypatch: Patch) -> None:
    engine = tiny_engine(text_model)
    reply = say(monkeypatch, engine, "a ST.")
    params = greedy(40, stop="STOP", stop_token_ids=[reply[-1]])
    assert "".join(engine.stream([1], params)) == "a ST"
    assert engine.generate([[1]], params)[0].text == "a ST"


def test_eos_ends_a_sample_unless_it_is_ignored(root: Path) -> None:
    free = alone(write_llama(root / "free"), [5, 6, 7], greedy(24))
    eos = free.token_ids[10]
    first = free.token_ids.index(eos)
    for given_as in (eos, [eos, VOCAB - 1]):
        directory = write_llama(root / "eos", eos_token_id=given_as)
        done = alone(directory, [5, 6, 7], greedy(24))
        assert done.token_ids == free.token_ids[: first + 1]
        assert (done.finish_reason, done.stop_reason) == ("stop", eos)
        ignoring = alone(directory, [5, 6, 7], greedy(24, ignore_eos=True))
        assert ignoring.token_ids == free.token_ids
        assert (ignoring.finish_reason, ignoring.stop_reason) == ("length", None)


def test_eos_text_is_not_shown(root: Path, monkeypatch: Patch) -> None:
    engine = tiny_engine(write_llama(root / "end", tokenizer=True, eos_token_id=END))
    assert engine.codec is not None
    reply = [*engine.codec.encode("the end"), END]
    script(monkeypatch, engine, 1, reply)
    (done,) = engine.generate([[1]], greedy(40))
    assert (done.text, done.token_ids, done.stop_reason) == ("the end", tuple(reply), END)


@pytest.mark.parametrize("new", [1, 2, 17])
def test_max_new_tokens_is_kept(llama: Path, new: int) -> None:
    done = alone(llama, [1, 2, 3], greedy(new))
    assert (done.new_tokens, len(done.token_ids), done.finish_reason) == (new, new, "length")


@pytest.mark.parametrize("prompt", [CONTEXT - 6, CONTEXT - 1])
def test_the_end_of_the_context_is_a_limit_of_length(llama: Path, prompt: int) -> None:
    done = alone(llama, random_prompt(prompt), greedy(50))
    assert (done.new_tokens, done.finish_reason) == (CONTEXT - prompt, "length")


# -- stream


@pytest.mark.parametrize("seed", range(6))
def test_pieces_join_to_the_text_of_the_completion(text_model: Path, seed: int) -> None:
    """A random model says broken UTF-8, too."""
    params = sampled(40, temperature=1.5, seed=seed)
    engine = tiny_engine(text_model)
    pieces = list(engine.stream("the fox", params))
    done = alone(text_model, "the fox", params)
    assert "".join(pieces) == done.text
    assert all(pieces)
    assert done.text == engine.codec.decode(done.token_ids) if engine.codec else False
    assert_idle(engine)


def test_characters_are_never_split_between_pieces(text_model: Path, monkeypatch: Patch) -> None:
    engine = tiny_engine(text_model)
    text = "x🦊é☃y"
    reply = say(monkeypatch, engine, text)
    assert len(reply) > len(text)
    assert list(engine.stream([1], greedy(len(reply)))) == list(text)


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_closing_the_iterator_cancels_and_frees_pages(text_model: Path, taken: int) -> None:
    engine = tiny_engine(text_model)
    pieces = engine.stream("the fox", sampled(60))
    for _ in range(taken):
        next(pieces)
    assert isinstance(pieces, Iterator)
    pieces.close()  # type: ignore[attr-defined]
    assert_idle(engine)


@pytest.mark.parametrize("taken", [0, 2])
def test_an_iterator_that_nobody_holds_is_cancelled(text_model: Path, taken: int) -> None:
    engine = tiny_engine(text_model)
    pieces = engine.stream("the fox", sampled(60))
    for _ in range(taken):
        next(pieces)
    del pieces
    gc.collect()
    assert_idle(engine)


def test_two_streams_at_once_each_get_all_of_their_text(text_model: Path) -> None:
    engine = tiny_engine(text_model)
    prompts = ["the fox", "a dog"]
    streams = [engine.stream(prompt, sampled(20)) for prompt in prompts]
    texts = ["", ""]
    live = [0, 1]
    while live:
        for i in list(live):
            piece = next(streams[i], None)
            if piece is None:
                live.remove(i)
            else:
                texts[i] += piece
    assert texts == [alone(text_model, prompt, sampled(20)).text for prompt in prompts]
    assert_idle(engine)


def test_a_stream_loses_nothing_to_a_generate_between_its_pieces(text_model: Path) -> None:
    engine = tiny_engine(text_model)
    pieces = engine.stream("the fox", sampled(20))
    text = next(pieces)
    engine.generate(["a dog"], sampled(5))
    text += "".join(pieces)
    assert text == alone(text_model, "the fox", sampled(20)).text


def test_stream_refuses_several_samples_and_bad_prompts_at_once(text_model: Path) -> None:
    engine = tiny_engine(text_model)
    with pytest.raises(RequestError, match="n is 3"):
        engine.stream("the", sampled(n=3))
    with pytest.raises(RequestError, match="empty"):
        engine.stream([])
    assert_idle(engine)


def test_stream_refuses_a_checkpoint_without_a_tokenizer(llama: Path) -> None:
    engine = tiny_engine(llama)
    with pytest.raises(RequestError, match=r"no tokenizer; use submit\(\)"):
        engine.stream([1, 2])
    assert_idle(engine)


# -- logits


def test_logits_have_a_row_for_every_token_in_float32(mixed: Path) -> None:
    engine, tokens = tiny_engine(mixed), random_prompt(23)
    logits = engine.logits(tokens)
    assert (logits.shape, logits.dtype) == ((23, VOCAB), np.float32)
    for chunk in (1, 5, 22):
        chunked = tiny_engine(mixed, max_batch_tokens=chunk).logits(tokens)
        assert chunked.tobytes() == logits.tobytes()
    assert engine.logits(random_prompt(CONTEXT)).shape == (CONTEXT, VOCAB)
    assert_idle(engine)


def test_logits_of_too_many_tokens_for_the_free_pages_change_nothing(llama: Path) -> None:
    engine = tiny_engine(llama, num_pages=8, max_batch_tokens=8)
    request = engine.submit(random_prompt(10), greedy(12))
    engine.step()
    engine.step()
    free, sequences = engine.cache.free_pages, engine.cache.sequences
    with pytest.raises(CacheFull, match=r"need \d+ pages of 4 tokens .* of 8 are free"):
        engine.logits(random_prompt(30))
    assert (engine.cache.free_pages, engine.cache.sequences) == (free, sequences)
    engine.cache.check()
    run_all(engine)
    expected = alone(llama, random_prompt(10), greedy(12))
    assert request.completions[0].token_ids == expected.token_ids


def test_logits_beside_running_requests_do_not_disturb_them(llama: Path) -> None:
    engine = tiny_engine(llama)
    request = engine.submit([1, 2, 3], greedy(10))
    expected = tiny_engine(llama).logits([4, 5, 6])
    while engine.has_work:
        assert engine.logits([4, 5, 6]).tobytes() == expected.tobytes()
        engine.step()
    assert request.completions[0].token_ids == alone(llama, [1, 2, 3], greedy(10)).token_ids


# -- what is refused


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty; give at least one token"),
        (random_prompt(CONTEXT), f"{CONTEXT} tokens.* context of {CONTEXT}; shorten it by 1"),
        (random_prompt(CONTEXT + 9), f"{CONTEXT + 9} tokens.*shorten it by 10"),
        ([1, 2, VOCAB], f"token 2 of the prompt is {VOCAB}; ids of this model are 0 to 60"),
        ([-1], "token 0 of the prompt is -1"),
        ([1, True], "token 1 of the prompt is True"),
        ([1.0, 2], r"token 0 of the prompt is 1\.0"),
        ([np.float64(3)], "token 0 of the prompt is"),
        ([float("nan")], "token 0 of the prompt is nan"),
        ([1, None], "token 1 of the prompt is None"),
        ([1, "a"], "token 1 of the prompt is 'a'"),
        ([10**30], "token 0 of the prompt is 1000"),
        ("text", "has no tokenizer, so prompts must be lists of token ids"),
    ],
    ids=lambda part: str(part)[:20],
)
def test_a_prompt_that_cannot_be_served_is_refused_and_nothing_is_queued(
    llama: Path, prompt: Any, message: str
) -> None:
    engine = tiny_engine(llama)
    with pytest.raises(RequestError, match=message):
        engine.submit(prompt, greedy())
    assert_idle(engine)


@pytest.mark.parametrize("prompt", [None, 5, 2.5, [[1, 2], 3], [1.5, 2.5]], ids=str)
def test_what_is_no_prompt_at_all_is_refused_and_not_a_crash(llama: Path, prompt: Any) -> None:
    engine = tiny_engine(llama)
    with pytest.raises(RequestError):
        engine.generate(prompt, greedy(1))
    assert_idle(engine)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_new_tokens": 3}, "params must be SamplingParams, not {'max_new_tokens': 3}"),
        (3, "params must be SamplingParams, not 3"),
        ([greedy(1)], "2 prompts and 1 SamplingParams; give one a prompt, or one for all"),
        ([greedy(1), 3], "params must be SamplingParams, not 3"),
    ],
    ids=str,
)
def test_what_are_no_sampling_params_is_refused(llama: Path, params: Any, message: str) -> None:
    engine = tiny_engine(llama)
    with pytest.raises(RequestError, match=message):
        engine.generate([[1, 2], [3]], params)
    with pytest.raises(RequestError, match="params must be SamplingParams, not"):
        engine.submit([1, 2], params)
    assert_idle(engine)


def test_each_prompt_may_have_params_of_its_own(llama: Path) -> None:
    each = [greedy(3), sampled(12, seed=5)]
    done = tiny_engine(llama).generate([[1, 2], [3]], each)
    for prompt, params, completion in zip([[1, 2], [3]], each, done, strict=True):
        assert completion.token_ids == alone(llama, prompt, params).token_ids


def test_one_bad_prompt_refuses_the_whole_call(llama: Path) -> None:
    engine = tiny_engine(llama)
    with pytest.raises(RequestError, match="token 1 of the prompt is 999"):
        engine.generate([[1, 2], [3, 999], [4]], greedy())
    assert_idle(engine)


def test_an_empty_text_is_refused_or_begins_with_bos(root: Path, text_model: Path) -> None:
    with pytest.raises(RequestError, match="the prompt is empty"):
        tiny_engine(text_model).submit("")
    with_bos = tiny_engine(write_llama(root / "bos", tokenizer=True, bos_token_id=END))
    assert with_bos.submit("").prompt_tokens == (END,)


def test_text_that_is_not_unicode_is_refused(text_model: Path) -> None:
    with pytest.raises(RequestError, match="character 1 is a lone surrogate"):
        tiny_engine(text_model).submit("a\udcff")


def test_logits_refuse_what_submit_refuses_but_take_the_whole_context(llama: Path) -> None:
    engine = tiny_engine(llama)
    for prompt in ([], [VOCAB], random_prompt(CONTEXT + 1)):
        with pytest.raises(RequestError):
            engine.logits(prompt)
    assert_idle(engine)


def test_a_stop_token_outside_the_vocabulary_is_refused(llama: Path) -> None:
    with pytest.raises(RequestError, match=f"stop token id {VOCAB} .* vocabulary of {VOCAB}"):
        tiny_engine(llama).submit([1], greedy(stop_token_ids=[1, VOCAB]))


@pytest.mark.parametrize(("new", "need"), [(9, 5), (70, 20), (10**9, 24)])
def test_a_request_that_can_never_fit_is_refused_with_the_numbers(
    llama: Path, new: int, need: int
) -> None:
    engine = tiny_engine(llama, num_pages=4)
    message = f"9 prompt tokens and up to {new} new .* {need} pages of 4 .* the pool has 4"
    with pytest.raises(RequestError, match=message):
        engine.submit(random_prompt(9), greedy(new))
    assert_idle(engine)


def test_a_request_whose_tokens_exactly_fit_is_served(llama: Path) -> None:
    # 9 + 8 tokens, the last of which is never fed back: 16 slots, 4 pages.
    engine = tiny_engine(llama, num_pages=4)
    (done,) = engine.generate([random_prompt(9)], greedy(8))
    assert done.token_ids == alone(llama, random_prompt(9), greedy(8)).token_ids
    assert done.kv_bytes_peak == 4 * 2 * PAGE


def test_every_one_of_many_requests_that_exactly_fit_is_served(mixed: Path) -> None:
    engine = tiny_engine(mixed, num_pages=4)
    done = engine.generate([random_prompt(9, seed) for seed in range(4)], greedy(8))
    assert [completion.finish_reason for completion in done] == ["length"] * 4
    assert_idle(engine)


# -- steps that fail


@pytest.mark.parametrize("failing", range(6))
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_step_that_fails_leaves_things_so_that_the_next_one_repeats_it(
    mixed: Path, monkeypatch: Patch, failing: int, error: type[BaseException]
) -> None:
    prompts = [random_prompt(7, seed) for seed in range(3)]
    engine = tiny_engine(mixed, num_pages=9, max_batch_tokens=8)
    calls = 0

    def around(compute: Callable[[], Any], batch: Any, rows: Any) -> Any:
        nonlocal calls
        calls += 1
        logits = compute()  # the pool was written to by the time it fails
        if calls == failing + 1:
            raise error("broken")
        return logits

    wrap_forward(monkeypatch, engine, around)
    requests = [engine.submit(prompt, sampled(12, seed=i)) for i, prompt in enumerate(prompts)]
    for _ in range(failing):
        engine.step()
    tokens = [list(sample.tokens) for request in requests for sample in request.samples]
    lengths = {s: engine.cache.length(s) for s in engine.cache.sequences}
    with pytest.raises(error, match="broken"):
        engine.step()
    engine.cache.check()
    assert [list(s.tokens) for request in requests for s in request.samples] == tokens
    after = {s: engine.cache.length(s) for s in engine.cache.sequences}
    found = {sample.sequence: sample.computed for r in requests for sample in r.samples}
    assert all(after[s] == lengths.get(s, found[s]) for s in after)  # admitted ones have their hit
    run_all(engine)
    for i, (prompt, request) in enumerate(zip(prompts, requests, strict=True)):
        expected = alone(mixed, prompt, sampled(12, seed=i))
        assert request.completions[0].token_ids == expected.token_ids
    assert_idle(engine)


def test_generate_that_is_interrupted_cancels_what_it_submitted(
    llama: Path, monkeypatch: Patch
) -> None:
    engine = tiny_engine(llama)
    other = engine.submit([9], greedy(30))

    def around(compute: Callable[[], Any], batch: Any, rows: Any) -> Any:
        if len(batch.positions) < 5:
            raise KeyboardInterrupt
        return compute()

    wrap_forward(monkeypatch, engine, around)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1, 2, 3], [4, 5]], greedy())
    assert (engine.status().running, engine.status().waiting) == (1, 0)
    monkeypatch.undo()
    run_all(engine)
    assert other.completions[0].token_ids == alone(llama, [9], greedy(30)).token_ids


def poison(patch: Patch, engine: Engine, position: int, value: float) -> None:
    """Damage the logits of the token at ``position`` of every sequence that is that long."""

    def around(compute: Callable[[], Any], batch: Any, rows: Any) -> Any:
        logits = compute().host().copy()
        for i, row in enumerate(rows):
            if batch.positions[row] == position:
                logits[i, 3] = value
        return HostLogits(logits)

    wrap_forward(patch, engine, around)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_damaged_logits_end_that_sample_and_no_other(
    llama: Path, monkeypatch: Patch, value: float
) -> None:
    engine = tiny_engine(llama)
    poison(monkeypatch, engine, 12, value)
    bad, good = engine.generate([random_prompt(10), [1, 2]], greedy(9))
    assert bad.finish_reason == "error"
    assert bad.error is not None
    assert "1 of 61 logits at position 12 are NaN or infinite" in bad.error
    assert bad.token_ids == alone(llama, random_prompt(10), greedy(3)).token_ids
    assert (good.finish_reason, good.error) == ("length", None)
    assert good.token_ids == alone(llama, [1, 2], greedy(9)).token_ids
    assert_idle(engine)


def test_damaged_logits_of_all_beams_end_their_search_and_nothing_else(
    llama: Path, monkeypatch: Patch
) -> None:
    engine = tiny_engine(llama)
    poison(monkeypatch, engine, 12, np.nan)
    bad = engine.submit(random_prompt(10), greedy(9, beam_width=3, n=2))
    good = engine.submit([1, 2], greedy(9))
    run_all(engine)
    assert [completion.finish_reason for completion in bad.completions] == ["error"] * 2
    assert all("at position 12 are NaN" in str(c.error) for c in bad.completions)
    assert good.completions[0].token_ids == alone(llama, [1, 2], greedy(9)).token_ids
    assert_idle(engine)


def test_a_stream_that_ends_in_an_error_raises_it_after_its_text(
    text_model: Path, monkeypatch: Patch
) -> None:
    engine = tiny_engine(text_model)
    say(monkeypatch, engine, "one STand")
    poison(monkeypatch, engine, 6, np.nan)
    pieces = engine.stream([1], greedy(20, stop="STOP"))
    shown: list[str] = []
    with pytest.raises(QuireError, match="position 6 are NaN"):
        shown.extend(pieces)  # keeps what came before
    assert "".join(shown) == "one ST"
    assert_idle(engine)


# -- what is measured


def test_kv_bytes_at_the_peak_are_pages_times_bytes(llama: Path, mixed: Path) -> None:
    # 9 + 8 tokens keep 16: 4 pages in each of 2 layers.
    assert alone(llama, random_prompt(9), greedy(8)).kv_bytes_peak == 4 * 2 * PAGE
    # One layer has 4 pages; the other, with a window of 7, has 3 while the 13th is computed.
    assert alone(mixed, random_prompt(9), greedy(8)).kv_bytes_peak == (4 + 3) * PAGE
    # One token more crosses into a fifth page, while the windowed layer has 3.
    assert alone(mixed, random_prompt(9), greedy(9)).kv_bytes_peak == (5 + 3) * PAGE


def test_times_and_counts_are_reported(llama: Path) -> None:
    done = alone(llama, [1, 2, 3], greedy(5))
    assert (done.prompt_tokens, done.cached_tokens, done.new_tokens) == (3, 0, 5)
    assert done.ttft_s is not None
    assert done.ttft_s > 0
    assert done.decode_tokens_per_s is not None
    assert done.decode_tokens_per_s > 0
    single = alone(llama, [1, 2, 3], greedy(1))
    assert single.ttft_s is not None
    assert single.decode_tokens_per_s is None


def test_a_sliding_window_stops_growing(root: Path) -> None:
    engine = tiny_engine(write_sliding(root / "sliding"), num_pages=8)
    request = engine.submit(random_prompt(3), greedy(80))
    held = []
    while engine.has_work:
        engine.step()
        held.append(8 - engine.cache.free_pages[0])
    most = (WINDOW - 2) // 4 + 2  # a window that begins with the last token of a page
    assert max(held) == most
    assert set(held[10:-1]) <= {most, most - 1}
    assert request.completions[0].kv_bytes_peak == most * 2 * PAGE
    assert request.completions[0].new_tokens == 80


def test_a_prompt_longer_than_the_pool_is_served_through_a_window(root: Path) -> None:
    directory = write_sliding(root / "sliding")
    prompt = random_prompt(60)
    (done,) = tiny_engine(directory, num_pages=3).generate([prompt], greedy(12))
    assert done.token_ids == alone(directory, prompt, greedy(12)).token_ids


# -- settings


def test_an_unknown_option_names_the_nearest(llama: Path) -> None:
    with pytest.raises(ConfigError, match="'max_batch_token'; did you mean 'max_batch_tokens'"):
        Engine(llama, max_batch_token=3)
    with pytest.raises(ConfigError, match="'pagesize'; did you mean 'page_size'"):
        CacheConfig(**{"pagesize": 3})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_batch_tokens": 0}, ConfigError, "max_batch_tokens must be an int of at least 1"),
        ({"max_sequences": 1.5}, ConfigError, r"max_sequences must be an int .* not 1\.5"),
        ({"cache": {"page_size": 4}}, ConfigError, "cache must be a CacheConfig"),
        ({"backend": "refrence"}, BackendError, "'refrence'; did you mean 'reference'"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_used_are_refused(
    llama: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Engine(llama, **options)


def test_a_wrong_page_format_is_refused_before_anything_is_loaded(root: Path) -> None:
    with pytest.raises(ConfigError, match="'fp61'; did you mean 'fp16'"):
        Engine(root / "missing", cache=CacheConfig(kv_format="fp61"))


def test_memory_below_one_page_is_refused_with_the_numbers(llama: Path) -> None:
    page = 16 * 2 * 2 * 6 * 4 * 2
    with pytest.raises(ConfigError, match=rf"{page - 1} bytes\) is below one page.*{page} bytes"):
        Engine(llama, cache=CacheConfig(kv_memory=page - 1))
    assert Engine(llama, cache=CacheConfig(kv_memory=page)).cache.num_pages == (1,)
    many = Engine(llama, cache=CacheConfig(kv_memory=str(7 * page + 5)))
    assert many.cache.num_pages == (7,)
    assert many.status().kv.pool_bytes == 7 * page


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_pages_are_kept_in_the_format_asked_for(root: Path, dtype: str) -> None:
    directory = write_llama(root / dtype, dtype=dtype)
    peaks = {}
    for kv_format in ("auto", "fp32", "bf16", "fp16"):
        engine = tiny_engine(directory, kv_format=kv_format)
        found = {shape.key_format.name for shape in engine.cache.layout.shapes}
        assert found == {dtype if kv_format == "auto" else kv_format}
        peaks[kv_format] = engine.generate([random_prompt(9)], greedy(8))[0].kv_bytes_peak
    assert peaks["fp32"] == 2 * peaks["bf16"] == 2 * peaks["fp16"] == 8 * PAGE
    assert peaks["auto"] == peaks[dtype]


def test_a_whole_page_is_a_contiguous_cache(mixed: Path) -> None:
    whole = tiny_engine(mixed, page_size="whole", num_pages=2, prefix_cache=False)
    assert whole.cache.layout.page_size == CONTEXT
    prompts = [random_prompt(20), random_prompt(3, seed=1), random_prompt(70, seed=2)]
    done = whole.generate(prompts, greedy(10))
    paged = tiny_engine(mixed).generate(prompts, greedy(10))
    assert [c.token_ids for c in done] == [c.token_ids for c in paged]
    assert {c.kv_bytes_peak for c in done} == {2 * PAGE * CONTEXT // 4}
    assert_idle(whole)


def test_progress_is_told_while_loading(llama: Path) -> None:
    told: list[tuple[str, int, int]] = []
    cache = CacheConfig(num_pages=1)
    Engine(llama, cache=cache, progress=lambda *facts: told.append(facts))
    assert [done for _, done, _ in told] == list(range(1, len(told) + 1))
    assert told[-1][1] == told[-1][2] == 2 * 9 + 3  # tensors of the tiny Llama


# -- what a decode step reads


@pytest.mark.parametrize("tied", [False, True])
def test_decode_bytes_are_the_weights_and_what_the_token_sees(root: Path, tied: bool) -> None:
    directory = write_llama(root / f"read-{tied}", tie_word_embeddings=tied)
    with safe_open(directory / "model.safetensors", framework="numpy") as file:
        stored = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
    if tied:
        stored.pop("lm_head.weight", None)  # the same again, never loaded
    else:
        stored.pop("model.embed_tokens.weight")  # a step reads single rows of it
    engine = tiny_engine(directory)
    for context in (0, 5, 40):
        kept = engine.decode_bytes(context) - sum(stored.values())
        per_token = sum(
            2 * shape.num_kv_heads * shape.key_dim * shape.key_format.dtype.itemsize
            for shape in engine.cache.layout.shapes
        )
        assert kept == (context + 1) * per_token


def test_a_windowed_token_reads_no_more_than_its_window(root: Path) -> None:
    engine = tiny_engine(write_sliding(root / "read-sliding"))
    weights = engine.decode_bytes(0) - engine.cache.layout.token_bytes(0)
    for context, seen in ((2, 3), (WINDOW - 1, WINDOW), (WINDOW, WINDOW), (60, WINDOW)):
        kept = engine.decode_bytes(context) - weights
        assert kept == seen * engine.cache.layout.token_bytes(0)
