"""Steps that begin before the host knows the tokens of the one before, on a device that is made up.

The made-up device computes with the reference backend and keeps the tokens that it chose to itself
until it is asked. What must come out is what an engine gives that waits for every token.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import quire
from quire.backends.reference import ReferenceBackend
from quire.engine.request import Status
from quire.errors import BackendError
from quire.sampler import HostLogits
from quire.sampling import Ask, Choice
from tiny import VOCAB, random_prompt, tiny_engine, write_llama, write_mixed


class Device(ReferenceBackend):
    """Chooses tokens where they are computed; ``queued`` steps' tokens nobody has asked for."""

    replays = True

    def __init__(self) -> None:
        super().__init__()
        self.queued = self.most_queued = self.launched = 0
        self.fails_in = -1  # steps until one cannot be launched
        self.interrupted = False  # the next wait for tokens is

    def to_logits(self, x: Any) -> HostLogits:
        return DeviceLogits(x, self)

    def embed(self, table: Any, ids: Sequence[int]) -> Any:
        if isinstance(ids, Hidden):
            self.launched += 1
            self.fails_in -= 1
            if self.fails_in == 0:
                raise BackendError("no memory on the device")
            return super().embed(table, ids.reveal())
        return super().embed(table, ids)


class Hidden:
    """Tokens that only the device knows: as many as there are, but none of them."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def reveal(self) -> Sequence[int]:
        return self._tokens


class DeviceLogits(HostLogits):
    """What needs the history of a reply is for the host, as on a GPU."""

    def __init__(self, rows: Any, device: Device) -> None:
        super().__init__(rows)
        self._device = device

    def ahead(self, asked: Sequence[Ask]) -> "Chosen | None":  # type: ignore[override]
        assert [ask.row for ask in asked] == list(range(self.shape[0]))
        if any(ask.params.logprobs is not None for ask in asked):
            return None
        return Chosen(self.choose(asked), self._device)


class Chosen:
    def __init__(self, choices: list[Choice], device: Device) -> None:
        self._choices, self._device = choices, device
        device.queued += 1
        device.most_queued = max(device.most_queued, device.queued)

    @property
    def tokens(self) -> Hidden:
        return Hidden([0 if choice.token is None else choice.token for choice in self._choices])

    def take(self) -> list[Choice]:
        self._device.queued -= 1
        if self._device.interrupted:
            self._device.interrupted = False
            raise KeyboardInterrupt
        return self._choices


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("ahead"), tokenizer=True)


@pytest.fixture
def device() -> Device:
    return Device()


def engine_on(device: Device, directory: Path, **settings: Any) -> quire.Engine:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quire.engine.engine.create_backend", lambda *_: device)
        return tiny_engine(directory, **settings)


waits = tiny_engine  # an engine that waits for every token


def greedy(tokens: int = 20, **more: Any) -> quire.SamplingParams:
    return quire.SamplingParams(max_new_tokens=tokens, ignore_eos=True, **more)


def run(engine: quire.Engine, *asked: tuple[list[int], quire.SamplingParams]) -> list[Any]:
    """Replies to requests that come at the same time; the cache is checked at every step."""
    requests = [engine.submit(prompt, params) for prompt, params in asked]
    while engine.has_work:
        engine.step()
        engine.cache.check()
    return [replies(request) for request in requests]


def replies(request: quire.Request) -> list[Any]:
    return [(c.token_ids, c.text, c.finish_reason, c.stop_reason) for c in request.completions]


def test_the_device_computes_the_next_step_before_tokens_are_taken(
    device: Device, directory: Path
) -> None:
    engine = engine_on(device, directory)
    asked = [(random_prompt(9, seed), greedy()) for seed in range(3)]
    found = run(engine, *asked)
    assert found == run(waits(directory), *asked)
    assert device.most_queued == 2
    assert device.launched == 20 - 1  # every step but that of the prompts


@pytest.mark.parametrize("kv_format", ["auto", "int8", "int4"])
def test_every_kind_of_cache(device: Device, tmp_path: Path, kv_format: str) -> None:
    directory = write_mixed(tmp_path, max_position_embeddings=256)
    asked = [(random_prompt(40 + seed, seed), greedy(70)) for seed in range(2)]
    settings: dict[str, Any] = {"kv_format": kv_format}
    if kv_format == "int4":
        settings |= {"page_size": 32}
    found = run(engine_on(device, directory, **settings), *asked)
    assert found == run(waits(directory, **settings), *asked)
    assert device.launched > 60


@pytest.mark.parametrize("others", ["quest:budget=12,dense=1", "lsh:budget=12,dense=1", "none"])
def test_pages_are_chosen_for_tokens_that_the_host_does_not_know(
    device: Device, tmp_path: Path, others: str
) -> None:
    """What they read is told, and none of it is taken for exact later."""
    directory = write_llama(tmp_path, num_hidden_layers=3)
    policies = ["quest:budget=12,dense=1", others, others]
    prompts = [random_prompt(14 + 5 * seed, seed) for seed in range(3)]
    done = []
    for engine in (engine_on(device, directory), waits(directory)):
        requests = [
            engine.submit(prompt, greedy(evict=policy))
            for prompt, policy in zip(prompts, policies, strict=True)
        ]
        while engine.has_work:
            engine.step()
            engine.cache.check()
        first = requests[0].completions[0]
        [after] = engine.generate([[*prompts[0], *first.token_ids, 3]], greedy(3))
        known = engine.status().reading
        assert known is not None
        reading = [request.completions[0].reading for request in requests]
        done.append((list(map(replies, requests)), reading, known, after.token_ids))
        done[-1] += (after.cached_tokens,)
    assert done[0] == done[1]
    assert done[0][1][0].steps == 19
    assert device.launched == 19 + 2


def test_tokens_are_drawn_with_the_numbers_of_their_own_positions(
    device: Device, directory: Path
) -> None:
    asked = [
        (random_prompt(5, 1), greedy(temperature=1.0, seed=3)),
        (random_prompt(6, 2), greedy(temperature=2.0, seed=2**64 - 1, top_p=0.9, top_k=7)),
        (random_prompt(7, 3), greedy(15)),
    ]
    assert run(engine_on(device, directory), *asked) == run(waits(directory), *asked)
    assert device.launched


def stopping(directory: Path) -> list[tuple[list[int], quire.SamplingParams]]:
    """Requests that end by a token, and by a text, in the middle of what they would give."""
    prompts = [random_prompt(6, seed) for seed in range(4)]
    whole = [
        waits(directory).generate([prompt], greedy(30, temperature=1.5, seed=seed))[0]
        for seed, prompt in enumerate(prompts)
    ]
    params = []
    for seed, reply in enumerate(whole):
        stop: dict[str, Any] = {}
        if seed % 2:
            stop["stop_token_ids"] = [reply.token_ids[7 + seed]]
        elif len(reply.text) > 6:
            stop["stop"] = [reply.text[5:7]]
        params.append(greedy(30, temperature=1.5, seed=seed, **stop))
    return list(zip(prompts, params, strict=True))


def test_a_sample_that_ends_leaves_nothing_behind(device: Device, directory: Path) -> None:
    asked = stopping(directory)
    engine = engine_on(device, directory, prefix_cache=False)
    found = run(engine, *asked)
    assert found == run(waits(directory), *asked)
    assert {reply[0][2] for reply in found} >= {"stop"}
    assert engine.cache.free_pages == engine.cache.num_pages
    assert device.launched


def test_what_a_reply_left_in_the_prefix_cache_is_what_it_would_have_been(
    device: Device, directory: Path
) -> None:
    """Also behind a stop token, whose keys and values the device had computed already."""
    engine = engine_on(device, directory)
    for prompt, params in stopping(directory):
        [completion] = engine.generate([prompt], params)
        more = [*prompt, *completion.token_ids, 5, 7]
        [warm] = engine.generate([more], greedy(8))
        [cold] = waits(directory, prefix_cache=False).generate([more], greedy(8))
        assert warm.token_ids == cold.token_ids
        assert warm.cached_tokens >= len(prompt)


def test_logprobs_wait_for_the_host(device: Device, directory: Path) -> None:
    asked = [(random_prompt(4, 1), greedy(6, logprobs=2)), (random_prompt(4, 2), greedy(6))]
    assert run(engine_on(device, directory), *asked) == run(waits(directory), *asked)
    assert device.launched == 0


def test_requests_that_come_meanwhile_begin_at_once(device: Device, directory: Path) -> None:
    engine = engine_on(device, directory)
    first = engine.submit(random_prompt(5, 1), greedy())
    for _ in range(6):
        engine.step()
    second = engine.submit(random_prompt(5, 2), greedy())
    engine.step()  # brings the token that was on its way
    engine.step()
    assert len(second.samples[0].new_tokens) == 1
    while engine.has_work:
        engine.step()
    alone = run(waits(directory), (random_prompt(5, 1), greedy()))
    assert [replies(first)] == alone
    assert [replies(second)] == run(waits(directory), (random_prompt(5, 2), greedy()))


def test_a_full_engine_runs_ahead_while_others_wait(device: Device, directory: Path) -> None:
    asked = [(random_prompt(5, seed), greedy(12 + seed)) for seed in range(5)]
    assert run(engine_on(device, directory, max_sequences=2), *asked) == run(
        waits(directory), *asked
    )
    assert device.launched > 10


def test_samples_of_one_prompt(device: Device, directory: Path) -> None:
    asked = (random_prompt(6, 1), greedy(10, n=3, temperature=1.0, seed=5))
    assert run(engine_on(device, directory), asked) == run(waits(directory), asked)
    assert device.launched
    assert run(engine_on(device, directory, max_sequences=2), asked) == run(waits(directory), asked)


def test_beams_and_dropped_tokens_wait_for_the_host(device: Device, directory: Path) -> None:
    for params in (greedy(8, beam_width=2), greedy(12, evict="window:budget=8")):
        asked = (random_prompt(14, 1), params)
        assert run(engine_on(device, directory), asked) == run(waits(directory), asked)
    assert device.launched == 0


def test_where_pages_run_out_somebody_gives_way(device: Device, directory: Path) -> None:
    """The step that does not fit is not launched; then the scheduler decides, as ever."""
    asked = [(random_prompt(9, seed), greedy(24)) for seed in range(3)]
    engine = engine_on(device, directory, num_pages=16)
    assert run(engine, *asked) == run(waits(directory), *asked)
    assert engine.status().preemptions > 0
    assert device.launched


def test_cancelled_samples_are_forgotten(device: Device, directory: Path) -> None:
    engine = engine_on(device, directory, prefix_cache=False)
    gone, kept = (engine.submit(random_prompt(5, seed), greedy()) for seed in range(2))
    for _ in range(5):
        engine.step()
    engine.cancel(gone)
    assert len(gone.completions[0].token_ids) == 5
    while engine.has_work:
        engine.step()
        engine.cache.check()
    assert [replies(kept)] == run(waits(directory), (random_prompt(5, 1), greedy()))
    again = engine.submit(random_prompt(5, 3), greedy(4))
    for _ in range(2):
        engine.step()
    engine.cancel(again)
    assert not engine.has_work
    [last] = engine.generate([random_prompt(5, 4)], greedy(3))
    [expected] = waits(directory).generate([random_prompt(5, 4)], greedy(3))
    assert last.token_ids == expected.token_ids
    assert engine.cache.free_pages == engine.cache.num_pages


def test_a_step_that_cannot_be_launched_loses_no_token(device: Device, directory: Path) -> None:
    engine = engine_on(device, directory)
    request = engine.submit(random_prompt(5, 1), greedy())
    for _ in range(4):
        engine.step()
    device.fails_in, had = 1, len(request.samples[0].new_tokens)
    with pytest.raises(BackendError, match="no memory on the device"):
        engine.step()
    engine.cache.check()
    assert len(request.samples[0].new_tokens) == had
    engine.step()
    assert len(request.samples[0].new_tokens) == had + 1
    while engine.has_work:
        engine.step()
    assert [replies(request)] == run(waits(directory), (random_prompt(5, 1), greedy()))
    assert not request.completions[0].preemptions


def test_an_interrupted_wait_computes_the_samples_again(device: Device, directory: Path) -> None:
    engine = engine_on(device, directory)
    request = engine.submit(random_prompt(5, 1), greedy())
    for _ in range(4):
        engine.step()
    device.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.cache.check()
    while engine.has_work:
        engine.step()
        engine.cache.check()
    assert [replies(request)] == run(waits(directory), (random_prompt(5, 1), greedy()))
    assert "interrupted" in request.completions[0].preemptions[0]


def test_logits_that_are_not_finite_end_one_sample(device: Device, tmp_path: Path) -> None:
    directory = write_llama(tmp_path)
    engine = engine_on(device, directory)
    prompts = [random_prompt(5, seed) for seed in range(2)]
    expected = run(waits(directory), *[(prompt, greedy()) for prompt in prompts])
    requests = [engine.submit(prompt, greedy()) for prompt in prompts]
    for _ in range(4):
        engine.step()
    inner = DeviceLogits.choose

    def damaged(self: DeviceLogits, asked: Sequence[Ask]) -> list[Choice]:
        self._rows[0] = np.nan
        return inner(self, asked)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceLogits, "choose", damaged)
        engine.step()
    while engine.has_work:
        engine.step()
        engine.cache.check()
    assert requests[0].completions[0].finish_reason == "error"
    assert "NaN" in str(requests[0].completions[0].error)
    assert replies(requests[1]) == expected[1]


def test_other_uses_of_the_engine_between_steps(device: Device, directory: Path) -> None:
    engine = engine_on(device, directory)
    request = engine.submit(random_prompt(5, 1), greedy())
    for _ in range(5):
        engine.step()
    text = random_prompt(12, 9)
    assert np.array_equal(engine.logits(text), waits(directory).logits(text))
    with engine.forced() as forced:
        forced.score(text[:3])
    saved = directory / "some.session"
    assert engine.save_session(request, saved) == 5 + 5 - 1
    while engine.has_work:
        engine.step()
    assert [replies(request)] == run(waits(directory), (random_prompt(5, 1), greedy()))
    assert waits(directory).load_session(saved).reason is None


@given(data=st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_traffic(data: st.DataObject, directory: Path) -> None:
    """Requests, cancellations and steps in any order: each reply is that of the request alone."""
    engine = engine_on(
        Device(),
        directory,
        num_pages=data.draw(st.integers(12, 40)),
        max_sequences=data.draw(st.integers(1, 4)),
        max_batch_tokens=data.draw(st.integers(3, 40)),
    )
    asked: list[tuple[quire.Request, list[int], quire.SamplingParams]] = []
    for _ in range(data.draw(st.integers(1, 30))):
        match data.draw(st.sampled_from(["submit", "step", "step", "step", "cancel"])):
            case "submit":
                prompt = random_prompt(data.draw(st.integers(1, 12)), data.draw(st.integers(0, 3)))
                params = quire.SamplingParams(
                    max_new_tokens=data.draw(st.integers(1, 12)),
                    temperature=data.draw(st.sampled_from([0.0, 1.0])),
                    seed=data.draw(st.integers(0, 3)),
                    stop_token_ids=data.draw(st.lists(st.integers(0, VOCAB - 1), max_size=12)),
                )
                asked.append((engine.submit(prompt, params), prompt, params))
            case "step":
                engine.step()
                engine.cache.check()
            case "cancel" if asked:
                engine.cancel(data.draw(st.sampled_from(asked))[0])
    while engine.has_work:
        engine.step()
        engine.cache.check()
    for request, prompt, params in asked:
        assert request.samples[0].status is Status.FINISHED
        [completion] = request.completions
        [alone] = waits(directory).generate([prompt], params)
        if completion.finish_reason == "cancelled":
            assert alone.token_ids[: len(completion.token_ids)] == completion.token_ids
        else:
            assert completion.token_ids == alone.token_ids
            assert completion.finish_reason == alone.finish_reason
