"""The cuda backend on a whole card in software: graphs, streams, pinned memory, memory that ends.

What is queued there is done late, at once, or at moments that a seed draws (``softcard.timeline``);
tokens are the same. Under Triton's interpreter, whose kernels compute here.
"""

import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quire
from quire.backends import create_backend
from quire.errors import BackendError, ConfigError
from quire.formats import PAGE_FORMATS
from quire.pages import PageShape
from tiny import random_prompt, write_llama

if os.environ.get("TRITON_INTERPRET") == "1":
    from quire.backends.cuda.transfer import DEPTH
    from softcard.whole import whole_card

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton does not interpret here"
)

PAGE = PageShape(4, 2, 8, 8, PAGE_FORMATS["bf16"], PAGE_FORMATS["bf16"])
slow = pytest.mark.slow
WHEN = ["late", "beside", 0, *(pytest.param(each, marks=slow) for each in ("once", 1, 2))]
LATEST = ["late", *(pytest.param(each, marks=slow) for each in ("once", "beside", 0, 1, 2))]
PARAMS = [
    quire.SamplingParams(max_new_tokens=6, ignore_eos=True),
    quire.SamplingParams(max_new_tokens=4, temperature=0.9, seed=3, ignore_eos=True),
    quire.SamplingParams(max_new_tokens=3, temperature=0.8, top_k=5, seed=1, logprobs=2),
]


def traffic(engine: quire.Engine, seed: int = 0) -> list[Any]:
    """Requests that come in the middle of others', share prefixes, ask for all kinds of tokens."""
    shared, done = random_prompt(13, seed=seed), list[quire.Request]()
    for nth, params in enumerate(PARAMS):
        done.append(engine.submit(shared[: 4 + 4 * nth] + random_prompt(3, seed=nth), params))
        engine.step()
    while engine.has_work:
        engine.step()
    return [(each.completions[0].token_ids, each.completions[0].logprobs) for each in done]


def test_tokens_that_are_drawn_take_what_is_planned(tmp_path: Path) -> None:
    """Rows of logits in float64, in order, and whose they are: more than all else of a step."""
    model = write_llama(tmp_path / "model", vocab_size=30_000)
    with whole_card(total=256 << 20) as card:
        engine = quire.Engine(
            model, backend="cuda", cache=quire.CacheConfig(num_pages=16), max_sequences=8
        )
        began = card.memory.most = card.memory.used
        drawn = quire.SamplingParams(max_new_tokens=2, temperature=1.0, top_p=0.99, seed=1)
        engine.generate([[5 + nth] for nth in range(8)], drawn)
        planned, most = engine.plan.memory.workspace, card.memory.most - began
    tensors = planned.activations + planned.partials + planned.rotary + planned.logits
    assert most > 8 * 30_000 * 24
    assert most <= tensors + planned.sampling


def make(model: Path, backend: str = "cuda-exact", **cache: Any) -> quire.Engine:
    settings = {"page_size": 4, "num_pages": 12} | cache
    return quire.Engine(
        model,
        backend=backend,
        cache=quire.CacheConfig(**settings),
        max_sequences=4,
        max_batch_tokens=24,
    )


@pytest.fixture(scope="module")
def law(models: dict[str, Path]) -> Callable[..., list[Any]]:
    """Tokens of the same traffic, on tensors of the host, where nothing is late."""
    known: dict[str, list[Any]] = {}

    def tokens(kind: str, **cache: Any) -> list[Any]:
        key = f"{kind} {sorted(cache.items())}"
        if key not in known:
            with make(models[kind], **cache) as engine:
                known[key] = traffic(engine)
        return known[key]

    return tokens


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize(("kind", "format"), [("full", "bf16"), ("mixed", "int8")])
def test_no_moment_changes_a_token(
    models: dict[str, Path], law: Callable[..., Any], when: str | int, kind: str, format: str
) -> None:
    with whole_card(policy=when) as card, make(models[kind], kv_format=format) as engine:
        found = traffic(engine)
    assert found == law(kind, kv_format=format)
    assert card.timeline.replays > 2


@pytest.mark.parametrize("when", LATEST)
def test_pages_come_back_from_tiers_as_they_were(
    models: dict[str, Path], law: Callable[..., Any], tmp_path: Path, when: str | int
) -> None:
    """A pool too small for all; host memory and a directory for what it gives up; a restart."""
    tiers = {"host_cache": 20_000, "cache_dir": tmp_path}
    expected = law("full")
    with whole_card(policy=when):
        with make(models["full"], **tiers) as engine:
            assert traffic(engine) == expected
            traffic(engine, seed=1)
            engine.flush()
            assert traffic(engine) == expected
            assert engine.status().tiers[0].hits > 0
        with make(models["full"], **tiers) as engine:
            assert traffic(engine) == expected
            disk = engine.status().tiers[1]
        assert disk.hits > 0
        assert not disk.damaged


@pytest.mark.parametrize("when", LATEST)
def test_a_session_is_saved_and_goes_on(
    models: dict[str, Path], tmp_path: Path, when: str | int
) -> None:
    with whole_card(policy=when):
        engine, path = make(models["full"]), tmp_path / "s.quire"
        request = engine.submit(random_prompt(30), PARAMS[0])
        while engine.has_work:
            engine.step()
        assert engine.save_session(request, path) == 35
        longer = [*random_prompt(30), *request.completions[0].token_ids, 5]
        (expected,) = engine.generate([longer], PARAMS[0])
        other = make(models["full"])
        assert len(other.load_session(path).tokens) == 35
        (found,) = other.generate([longer], PARAMS[0])
    assert found.token_ids == expected.token_ids
    assert found.cached_tokens == 35


def test_a_step_is_one_copy_to_the_card_and_its_tokens_one_back(models: dict[str, Path]) -> None:
    """Whoever makes them; a chunk whose logits nobody wants gives none back."""
    with whole_card() as card, make(models["full"], prefix_cache=False) as engine:
        engine.generate([random_prompt(5)], PARAMS[0])  # frequencies are there now
        for length, chunks in ((9, 1), (30, 2)):
            sent, fetched, replays = card.sent, card.fetched, card.timeline.replays
            engine.generate([random_prompt(length)], PARAMS[0])
            assert card.timeline.replays - replays == 5
            assert card.fetched - fetched == 6
            assert card.sent - sent == chunks + 5


@pytest.mark.parametrize("when", LATEST)
def test_tokens_that_choose_pages_are_replayed_too(
    models: dict[str, Path], when: str | int
) -> None:
    """In one copy a step; behind the prompts what is known of pages is made kernel by kernel.

    Beside one that has nothing to choose from yet, and one that reads all.
    """
    asked = [(30, "quest:budget=12,dense=1"), (5, "quest:budget=12,dense=1"), (7, "none")]
    params = [
        quire.SamplingParams(max_new_tokens=6, ignore_eos=True, evict=evict) for _, evict in asked
    ]

    def replies(engine: quire.Engine) -> list[Any]:
        requests = [
            engine.submit(random_prompt(length, seed=length), each)
            for (length, _), each in zip(asked, params, strict=True)
        ]
        while engine.has_work:
            engine.step()
        return [(r.completions[0].token_ids, r.completions[0].reading) for r in requests]

    cache = {"num_pages": 24, "prefix_cache": False}
    with make(models["full"], **cache) as engine:
        law = replies(engine)
    assert [reading is not None for _, reading in law] == [True, False, False]
    with whole_card(policy=when) as card, make(models["full"], **cache) as engine:
        engine.generate([random_prompt(2)], params[0])  # frequencies are there now
        sent, fetched, replays = card.sent, card.fetched, card.timeline.replays
        assert replies(engine) == law
        steps = 2 + 5
        assert card.timeline.replays - replays == steps - 3
        assert card.sent - sent == steps
        assert card.fetched - fetched == 6


# -- slots and threads ---------------------------------------------------------------------------


@pytest.fixture
def small_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page fills a slot of staging memory."""
    monkeypatch.setattr("quire.backends.cuda.transfer.SLOT", PAGE.bytes_per_page)


@pytest.mark.parametrize("when", WHEN)
def test_a_slot_is_another_pages_when_nothing_moves_through_it(
    when: str | int, small_slots: None
) -> None:
    pages, rng = list(range(2 * DEPTH + 1)), np.random.default_rng(0)
    with whole_card(policy=when):
        pool = create_backend("cuda").pool(PAGE, len(pages))
        mover = pool.mover([[pool]])
        data = rng.integers(0, 256, (len(pages), PAGE.bytes_per_page)).astype(np.uint8)
        incoming = mover.begin_import()
        incoming.put(0, pages, data)
        incoming.end()
        exports = []
        for page in pages:
            exports.append(mover.begin_export(0, [page]))
            pool.import_pages([page], np.zeros_like(data[:1]))
        assert np.concatenate([export.take() for export in exports]).tobytes() == data.tobytes()
        assert not pool.export_pages(pages).any()
        mover.close()


@pytest.mark.parametrize("when", WHEN)
def test_pages_are_loaded_behind_what_read_them(when: str | int) -> None:
    """What was queued before a load, and has not come to its pages yet, finds them as they were."""
    pages, rng = [2, 0, 3], np.random.default_rng(0)
    old, new = rng.integers(0, 256, (2, 3, PAGE.bytes_per_page)).astype(np.uint8)
    with whole_card(policy=when):
        pool = create_backend("cuda").pool(PAGE, 4)
        mover = pool.mover([[pool]])
        pool.import_pages(pages, old)
        seen = pool.pages.rows()[0].clone()
        incoming = mover.begin_import()
        incoming.put(0, pages, new)
        incoming.end()
        assert pool.export_pages(pages).tobytes() == new.tobytes()
        width = seen.shape[1] * seen.element_size()
        assert seen.cpu().numpy()[pages].tobytes() == old[:, :width].tobytes()


@pytest.mark.parametrize("when", LATEST)
def test_steps_are_captured_beside_a_thread_that_moves_pages(
    models: dict[str, Path], when: str | int, small_slots: None
) -> None:
    prompt, failed, over = random_prompt(9), list[BaseException](), threading.Event()
    with whole_card(policy=when), make(models["full"]) as engine:
        (expected,) = make(models["full"]).generate([prompt], PARAMS[0])
        pool = engine.backend.pool(PAGE, 4)
        incoming = pool.mover([[pool]]).begin_import()
        data = np.zeros((2, PAGE.bytes_per_page), np.uint8)

        def move() -> None:
            try:
                while not over.is_set():
                    incoming.put(0, [3, 1], data)
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=move)
        thread.start()
        (found,) = engine.generate([prompt], PARAMS[0])
        over.set()
        thread.join()
    assert not failed
    assert found.token_ids == expected.token_ids


# -- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("buckets", "most"), [((64, 8, 2, 1), 1), ((1, 2, 8, 64), 75 / 64)], ids=["falling", "rising"]
)
def test_captured_steps_keep_one_memory_for_logits(
    tmp_path: Path, buckets: tuple[int, ...], most: float
) -> None:
    """Buckets of sequences and of pages; ``most``: of what the logits of the largest take."""
    model = write_llama(tmp_path, vocab_size=128_256)
    cache = quire.CacheConfig(page_size=1, num_pages=4000, prefix_cache=False)
    params = quire.SamplingParams(max_new_tokens=2, ignore_eos=True)
    with (
        whole_card(computes=False) as card,
        quire.Engine(
            model, backend="cuda", cache=cache, max_sequences=64, max_batch_tokens=4096
        ) as engine,
    ):
        engine.generate([random_prompt(5)], quire.SamplingParams(max_new_tokens=1))
        before = card.memory.held
        for length in (4, 15, 40):
            for count in buckets:
                engine.generate([random_prompt(length)] * count, params)
        shapes = {shape for _, shape, _ in engine.cache.pools[0].graphs}
        kept = card.memory.held - before
    row = 4 * 128_256
    assert sum(row * shape.sequences for shape in shapes) > 3 * row * 64
    assert 64 * row < kept < most * 64 * row + len(shapes) * 50_000, "and integers of each shape"


def test_a_card_too_small_for_the_model_is_refused_with_the_plans_numbers(
    models: dict[str, Path],
) -> None:
    with (
        whole_card(total=1 << 16),
        pytest.raises(ConfigError, match=r"does not fit: weights .* choose"),
    ):
        quire.Engine(models["full"], backend="cuda")


def test_steps_for_which_memory_ends_say_so_and_later_ones_go_on(models: dict[str, Path]) -> None:
    """Somebody else has all that the card has left, but for a little more after each failure."""
    prompt, left, told = random_prompt(12), 0, list[str]()
    with whole_card() as card, make(models["full"]) as engine:
        (expected,) = make(models["full"]).generate([prompt], PARAMS[0])
        request = engine.submit(prompt, PARAMS[0])
        while engine.has_work:
            card.memory.give_back()
            taken = max(0, card.memory.free - left)
            card.memory.used += taken
            try:
                engine.step()
            except BackendError as error:
                told.append(str(error))
                left = 2 * left + 512
            finally:
                card.memory.used -= taken
    assert len(told) > 3
    assert all("Tried to allocate" in each and "lower kv_memory" in each for each in told)
    assert request.completions[0].token_ids == expected.token_ids


@pytest.mark.parametrize("when", LATEST)
def test_a_step_that_fails_while_it_is_captured_leaves_nothing_that_reads_what_is_let_go(
    models: dict[str, Path], when: str | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had launched reads weights and token ids before they are another's."""
    from quire.backends.cuda.backend import CudaBackend

    def ends(*_: Any) -> Any:
        raise BackendError("the head does not fit")

    with whole_card(policy=when) as card:
        engine = make(models["full"])
        monkeypatch.setattr(CudaBackend, "product", ends)  # of steps that are captured
        with pytest.raises(BackendError, match="the head does not fit"):
            engine.generate([random_prompt(3)], PARAMS[0])
        del engine
        gc.collect()
        card.timeline.synchronize()
