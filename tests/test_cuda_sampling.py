"""Sampling on the device: what engines do with it, and what it moves to the host.

What is chosen is checked in ``conformance/test_choosing.py``. Like ``test_cuda.py``, which starts
them, these tests run on a GPU or under Triton's interpreter.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quire
from conformance import activations
from quire.backends import backend_status, create_backend
from quire.errors import BackendError
from quire.sampler import HostLogits
from quire.sampling import Ask, Choice, SamplingParams
from test_cuda_fused import counted
from tiny import VOCAB, random_prompt, tiny_engine

RUNS = any(status.name == "cuda" and status.available for status in backend_status())
if RUNS:
    from quire.backends.cuda import sampling
    from quire.backends.cuda.device import Device
    from quire.backends.cuda.sampling import MOST, CudaLogits

pytestmark = pytest.mark.skipif(not RUNS, reason="the cuda backend is off")

RULES: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.5, "top_k": 20, "n": 3},
    {"temperature": 1.0, "min_p": 0.1, "repetition_penalty": 1.2, "logprobs": 2},
    {"presence_penalty": 0.5, "frequency_penalty": 0.1, "logprobs": 0},
)


@pytest.fixture(params=["cuda", "cuda-exact"])
def on_cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines made in the test compute with that backend."""
    monkeypatch.setattr(
        "quire.engine.engine.create_backend",
        lambda asked, threads=None: create_backend(request.param),
    )


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what goes to the host."""
    shapes, inner = [], Device.fetch

    def counted(self: Device, tensor: Any) -> Any:
        shapes.append(tuple(tensor.shape))
        return inner(self, tensor)

    monkeypatch.setattr(Device, "fetch", counted)
    return shapes


def served(engine: quire.Engine, rules: Sequence[dict[str, Any]] = RULES) -> list[Any]:
    """Tokens and logprobs of requests of many kinds, side by side."""
    requests = [
        engine.submit(
            random_prompt(4 + 3 * nth, seed=nth),
            SamplingParams(max_new_tokens=5, seed=nth, ignore_eos=True, **rule),
        )
        for nth, rule in enumerate(rules)
    ]
    while engine.has_work:
        engine.step()
    return [(c.token_ids, c.logprobs, c.error) for r in requests for c in r.completions]


def test_an_engine_chooses_what_it_would_from_logits_on_the_host(
    models: dict[str, Path], on_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefills and decodes, forks of a prompt, each draw its own."""
    ours = served(tiny_engine(models["full"], num_pages=60))
    asked = []

    def on_host(self: CudaLogits, asks: Sequence[Ask]) -> list[Choice]:
        asked.append([ask.row for ask in asks])
        return HostLogits(self.host()).choose(asks)

    monkeypatch.setattr(CudaLogits, "choose", on_host)
    law = served(tiny_engine(models["full"], num_pages=60))
    assert any(len(set(rows)) < len(rows) for rows in asked), "no fork chose from a shared row"
    assert [(tokens, error) for tokens, _, error in ours] == [(t, e) for t, _, e in law]
    for (_, found, _), (_, wanted, _) in zip(ours, law, strict=True):
        assert (found is None) == (wanted is None)
        for a, b in zip(found or (), wanted or (), strict=True):
            assert [t for t, _ in a.top] == [t for t, _ in b.top]
            assert a.logprob == pytest.approx(b.logprob, rel=1e-13, abs=1e-15)


def test_no_row_of_logits_goes_to_the_host(
    models: dict[str, Path], on_cuda: None, fetched: list[tuple[int, ...]]
) -> None:
    """Greedy, a key and a token for each row; else a few numbers. One transfer a step."""
    greedy = tiny_engine(models["full"], num_pages=60)
    for length in (3, 9):
        params = SamplingParams(max_new_tokens=4, ignore_eos=True)
        greedy.submit(random_prompt(length), params)
    for _ in range(4):
        greedy.step()
    assert not greedy.has_work
    assert len(fetched) == 4
    assert set(fetched) == {(2, 2)}
    fetched.clear()
    served(tiny_engine(models["full"], num_pages=60))
    # Seven samples at most: the likeliest's key and token, what is chosen, and whether that is
    # certain; and logprobs of two: two logits, a sum, two others.
    assert all(np.prod(shape) <= 7 * 4 + 2 * 5 for shape in fetched)
    assert 2 * VOCAB > 7 * 4 + 2 * 5


def test_rules_of_all_samples_go_over_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Penalties, which logprobs are of, and where tokens go that are drawn ahead, included."""
    backend, copied, inner = create_backend("cuda"), [], Device.to_device
    rows = activations(backend, np.random.default_rng(0).standard_normal((6, 50), np.float32))
    free, *rules = [{"temperature": 1.0}, *({**rule, "n": 1} for rule in RULES)]
    asked = [
        Ask(nth, SamplingParams(**rule), 0.4, [1, 2, 3 + nth], 1)
        for nth, rule in enumerate([free, *rules[1:], free])
    ]

    def counted(self: Device, array: Any) -> Any:
        copied.append(len(array))
        return inner(self, array)

    monkeypatch.setattr(Device, "to_device", counted)
    assert len(backend.to_logits(rows).choose(asked)) == 6
    assert len(copied) == 1
    drawn = [Ask(nth, SamplingParams(**(free if nth % 2 else {})), 0.4, [1], 1) for nth in range(6)]
    ahead = backend.to_logits(rows).ahead(drawn)
    assert ahead is not None
    assert len(ahead.take()) == 6
    assert len(copied) == 2


def test_a_greedy_step_has_its_tokens_before_they_are_asked_for(
    models: dict[str, Path], on_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are part of what is captured and replayed."""
    engine = tiny_engine(models["full"])
    engine.submit([1, 2, 3], SamplingParams(max_new_tokens=4, ignore_eos=True))
    engine.step()

    def never(*args: Any) -> None:
        raise AssertionError("computed beside the graph")

    monkeypatch.setattr(sampling, "best_of", never)
    while engine.has_work:
        engine.step()


def test_logits_that_a_later_step_has_overwritten_are_refused(
    models: dict[str, Path], on_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine(models["full"])
    held: list[CudaLogits] = []
    inner = engine._loaded.model.forward

    def kept(*args: Any) -> Any:
        held.append(inner(*args))  # type: ignore[arg-type]
        return held[-1]

    monkeypatch.setattr(engine._loaded.model, "forward", kept)
    waits = SamplingParams(max_new_tokens=4, ignore_eos=True, logprobs=0)  # none runs ahead
    engine.submit([1, 2, 3], waits)
    for _ in range(3):
        engine.step()
    ask = Ask(0, SamplingParams(), 0.0, [1], 1)
    for call in (held[1].host, lambda: held[1].choose([ask])):
        with pytest.raises(BackendError, match="these logits are gone: a later step"):
            call()
    assert held[2].host().shape == (1, VOCAB)
    engine.step()
    assert held[2].host().shape == (1, VOCAB)  # fetched in time


def test_logits_that_another_graph_may_have_overwritten_are_refused(
    models: dict[str, Path], on_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured steps share memory, also those of other numbers of sequences."""
    engine = tiny_engine(models["full"])
    held: list[CudaLogits] = []
    inner = engine._loaded.model.forward

    def kept(*args: Any) -> Any:
        held.append(inner(*args))  # type: ignore[arg-type]
        return held[-1]

    monkeypatch.setattr(engine._loaded.model, "forward", kept)
    waits = SamplingParams(max_new_tokens=6, ignore_eos=True, logprobs=0)
    engine.submit([1, 2, 3], waits)
    for _ in range(2):
        engine.step()  # the second replays a step of one sequence
    engine.submit([4, 5], waits)
    engine.step()  # launched kernel by kernel
    engine.step()  # replays one of two
    assert held[3].shape[0] == 2
    with pytest.raises(BackendError, match="these logits are gone"):
        held[1].host()


def test_logits_that_a_step_that_failed_may_have_overwritten_are_refused(
    models: dict[str, Path], on_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine(models["full"])
    held: list[CudaLogits] = []
    inner = engine._loaded.model.forward

    def kept(*args: Any) -> Any:
        held.append(inner(*args))  # type: ignore[arg-type]
        return held[-1]

    def fail(*args: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(engine._loaded.model, "forward", kept)
    waits = SamplingParams(max_new_tokens=6, ignore_eos=True, logprobs=0)
    engine.submit([1, 2, 3], waits)
    for _ in range(2):
        engine.step()  # the second replays a step of one sequence
    engine.submit([4, 5], waits)
    engine.step()  # launched kernel by kernel
    assert held[1].row(0).shape == (VOCAB,)
    monkeypatch.setattr("quire.backends.cuda.graphs.best_of", fail)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    with pytest.raises(BackendError, match="these logits are gone"):
        held[1].row(0)


@pytest.mark.parametrize("name", ["cuda", "cuda-exact"])
def test_a_second_round_comes_only_where_the_largest_were_not_enough(
    name: str, fetched: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.random.default_rng(0).standard_normal((2, 3 * MOST)).astype(np.float32)
    rows[0] *= 8
    backend = create_backend(name)
    logits = backend.to_logits(activations(backend, rows))
    rules = [{"top_p": 0.9}, {"top_k": MOST}, {"top_k": 2 * MOST}, {"min_p": 0.01}, {}]
    asked = [
        Ask(row, SamplingParams(temperature=1.0, **rule), 0.4, [1, 2], 1)
        for rule in rules
        for row in (0, 1)
    ]
    rounds = []
    for ask in asked:
        fetched.clear()
        logits.choose([ask])
        rounds.append(len(fetched))
    assert rounds == [1, 2, 1, 1, 2, 2, 1, 1, 1, 1]
    law = HostLogits(rows).choose(asked)
    fetched.clear()
    assert logits.choose(asked) == law
    assert len(fetched) == 2
    monkeypatch.setattr(sampling, "CHUNK", 2 * rows.shape[1])  # two rows at a time
    assert logits.choose(asked) == law


def test_logits_that_tie_only_beside_the_largest_are_chosen_as_ties() -> None:
    """The largest are picked by float32 logits; less the largest of all, tiny ones are equal."""
    rng = np.random.default_rng(0)
    rows = (1e-30 * rng.standard_normal((3, 3 * MOST))).astype(np.float32)
    rows[:, 100] = 1.0
    rows[1, ::2], rows[2, ::700] = -5.0, 0.9
    rules = [{"top_p": 0.5}, {"top_p": 0.002}, {"top_k": 7}, {"top_k": 2, "top_p": 0.9}]
    asked = [
        Ask(row, SamplingParams(temperature=1.0, **rule), draw, [1, 2], 1)
        for row in range(3)
        for rule in rules
        for draw in (0.0, 0.3, 0.77, 0.99)
    ]
    backend = create_backend("cuda")
    chosen = backend.to_logits(activations(backend, rows)).choose(asked)
    assert chosen == HostLogits(rows).choose(asked)
    assert len({choice.token for choice in chosen}) > 8


def test_no_number_of_samples_makes_kernels_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles a kernel for each set of arguments that are multiples of 16, or are not."""
    seen: dict[Any, set[Any]] = {}
    inner = Device.launch

    def recorded(self: Device, kernel: Any, grid: Any, *args: Any, **named: Any) -> None:
        kinds = tuple(a % 16 == 0 if isinstance(a, int) else a.data_ptr() % 16 == 0 for a in args)
        seen.setdefault(kernel, set()).add((kinds, *named.items()))
        inner(self, kernel, grid, *args, **named)

    monkeypatch.setattr(Device, "launch", recorded)
    backend = create_backend("cuda")
    rows = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    rule = SamplingParams(temperature=1.0, top_p=0.5, presence_penalty=1.0, logprobs=1)
    other = SamplingParams(temperature=1.0, min_p=0.1)
    for count in range(1, 6):
        logits = backend.to_logits(activations(backend, rows[:count]))
        asked = [Ask(nth, rule, 0.5, [*range(nth + 3)], 1) for nth in range(count)]
        logits.choose(asked)
        logits.choose([*asked, Ask(0, other, 0.5, [1, 2], 1)])
    assert len(seen) == 8
    assert all(len(kinds) == 1 for kinds in seen.values())


@pytest.mark.parametrize(
    ("temperature", "launched"),
    [(0.0, {}), (1.0, {"weigh_kernel": 1, "draw_kernel": 1, "index_copy_": 1})],
)
def test_tokens_that_run_ahead_take_few_launches_beside_a_graph(
    temperature: float, launched: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which one is the likeliest, and its token, is known from the graph; logits are read once."""
    backend = create_backend("cuda")
    rows = activations(backend, np.random.default_rng(0).standard_normal((4, 50), np.float32))
    logits = CudaLogits(backend.device, rows, sampling.best_of(backend.device, rows))
    params = SamplingParams(temperature=temperature, ignore_eos=True)
    asked = [Ask(nth, params, 0.3, [1, 2], 1) for nth in range(4)]
    with counted(backend, monkeypatch) as found:
        ahead = logits.ahead(asked)
    assert ahead is not None
    ours = {name.partition(".")[0]: count for name, count in found.items()}
    copies = {"clone", "copy_", "_to_copy", "lift_fresh"}  # of rules to the card, and of tokens
    assert {name: count for name, count in ours.items() if name not in copies} == launched
    assert ahead.take() == HostLogits(backend.to_host(rows)).choose(asked)


def test_a_search_and_a_shadow_see_logits_on_the_host(
    models: dict[str, Path], on_cuda: None, fetched: list[tuple[int, ...]]
) -> None:
    engine = tiny_engine(models["full"], num_pages=60, kv_format="int8", shadow=1.0)
    [done] = engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=4, ignore_eos=True))
    shadow = engine.status().shadow
    assert shadow is not None
    assert shadow.kl_tokens == shadow.tokens == len(done.token_ids)
    assert (VOCAB,) in fetched
    fetched.clear()
    params = SamplingParams(max_new_tokens=3, beam_width=2, ignore_eos=True)
    [best] = engine.generate([[4, 5]], params)
    assert len(best.token_ids) == 3
    assert (VOCAB,) in fetched


@pytest.mark.slow
def test_kernels_compile_for_cards_that_are_not_there() -> None:
    script = Path(__file__).parent / "cuda_compile_choosing.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, "80", "90"],
        env={"PATH": "/usr/bin:/bin", "HOME": "/tmp", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
