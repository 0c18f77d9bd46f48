"""Pages of the cuda backend on their way: streams, staging memory, and what waits for what.

Streams are a test's: what is queued beside the computing stream is done when the test says so, or
when somebody waits for it, the host or that stream. Bookkeeping beyond the backend is in
``test_moving.py``. The last tests are for a GPU's own streams.
"""

import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quire
import test_tier_engine
from quire.backends import create_backend
from quire.errors import BackendError
from quire.format_choice import parse_formats
from quire.pages import PageShape
from test_cuda import ON_A_CARD, RUNS, STATUS
from test_tier_engine import ONE, SHORT, engine_with, run
from tiny import random_prompt

if RUNS:
    import torch

    from quire.backends.cuda import transfer
    from quire.backends.cuda.streams import Streams

pytestmark = pytest.mark.skipif(not RUNS, reason=f"cuda: {STATUS['cuda'].detail}")
interpreted = pytest.mark.skipif(ON_A_CARD, reason="the streams are a test's")


class Told:
    """An event of a late stream. ``late.waits`` counts when the host waited in vain for others."""

    def __init__(self, late: "Late", way: str, number: int) -> None:
        self.late, self.way, self.number = late, way, number

    def query(self) -> bool:
        return self.late.done[self.way] >= self.number

    def synchronize(self) -> None:
        if not self.query():
            self.late.waits += 1
        self.late.tell(self.way, self.number)


class Late:
    """See :class:`quire.backends.cuda.streams.Streams`."""

    def __init__(self) -> None:
        self.submitting = threading.RLock()
        self.queued = {way: deque[Callable[[], None]]() for way in ("down", "up")}
        self.begun, self.done = {"down": 0, "up": 0}, {"down": 0, "up": 0}
        self.waits = self.joins = 0

    def now(self) -> Any:
        return Told(self, "down", 0)  # the computing stream is never late

    def run(self, way: str, after: Any, work: Callable[[], None]) -> Told:
        with self.submitting:
            assert after.query()
            self.queued[way].append(work)
            self.begun[way] += 1
            return Told(self, way, self.begun[way])

    def join(self, event: Told) -> None:
        self.joins += 1
        self.tell(event.way, event.number)

    def tell(self, way: str, number: int) -> None:
        """The stream has come to where ``number`` were done."""
        with self.submitting:
            while self.done[way] < number:
                self.queued[way].popleft()()
                self.done[way] += 1


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[Late]:
    """Engines made in the test compute with ``cuda-exact`` on late streams; those, newest last."""
    made: list[Late] = []

    def create(asked: str, threads: int | None = None) -> Any:
        backend = create_backend("cuda-exact")
        made.append(Late())
        backend.device.streams = made[-1]
        return backend

    monkeypatch.setattr("quire.engine.engine.create_backend", create)
    return made


@pytest.fixture
def prompt_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines made in the test compute with ``cuda-exact`` on what streams it has."""
    monkeypatch.setattr(
        "quire.engine.engine.create_backend",
        lambda asked, threads=None: create_backend("cuda-exact"),
    )


class Pools:
    """Pools of two layers, full of random bytes, and their mover on late streams."""

    def __init__(self, *formats: str, dim: int = 6, opened: int = 0) -> None:
        backend = create_backend("cuda")
        if not ON_A_CARD:
            backend.device.streams = Late()
        self.late: Any = backend.device.streams
        pairs = [parse_formats(name).of_layers(1, "bf16")[0] for name in formats]
        shapes = [PageShape(32, 2, dim, dim, *pair) for pair in pairs]
        self.pools = [backend.pool(shape, 8, opened) for shape in shapes]
        self.rng = np.random.default_rng(0)
        for page in range(8 + opened):
            self.overwrite(page)
        self.mover = self.pools[0].mover([self.pools])

    def overwrite(self, page: int) -> None:
        """By the stream that computes."""
        for pool in self.pools:
            bytes_ = pool.export_pages([page]).shape[1]
            pool.import_pages([page], self.rng.integers(0, 256, (1, bytes_)).astype(np.uint8))

    def held(self, pages: list[int]) -> np.ndarray:
        """What pages hold now."""
        return np.concatenate([pool.export_pages(pages) for pool in self.pools], axis=1)


KINDS = [  # formats of the layers, head size, open pages
    (("bf16", "bf16"), 6, 0),
    (("int8", "k=fp32,v=fp8"), 5, 0),  # rows that are no multiple of a word
    (("int4", "bf16"), 8, 3),  # open pages apart in one layer, behind the others in the other
    (("k=int2,v=int4", "k=int8,v=int2"), 32, 3),
]


@pytest.mark.parametrize(("formats", "dim", "opened"), KINDS)
def test_moved_pages_are_those_that_pools_export(
    formats: tuple[str, ...], dim: int, opened: int
) -> None:
    pools = Pools(*formats, dim=dim, opened=opened)
    for pages, other in ([[5, 0, 3], [1, 2, 7]], [[8, 10], [9, 8]])[: 1 + (opened > 0)]:
        expected = pools.held(pages)
        taken = pools.mover.begin_export(0, pages).take()
        assert taken.tobytes() == expected.tobytes()
        incoming = pools.mover.begin_import()
        incoming.put(0, other, list(taken))
        incoming.end()
        assert pools.held(other).tobytes() == expected.tobytes()
    if opened:
        with pytest.raises(BackendError, match="both kinds"):
            pools.mover.begin_export(0, [1, 8])


@interpreted
def test_a_page_overwritten_after_it_was_read_arrives_as_it_was() -> None:
    pools = Pools("bf16", "int8")
    expected = pools.held([4, 2])
    export = pools.mover.begin_export(0, [4, 2])
    for page in (4, 2):
        pools.overwrite(page)
    assert not export.ready
    pools.late.tell("down", 1)
    assert export.ready
    assert pools.late.waits == 0
    assert export.take().tobytes() == expected.tobytes()
    assert pools.held([4, 2]).tobytes() != expected.tobytes()


@interpreted
def test_events_stand_between_what_must_come_first_and_what_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A page is gathered before the copy's event, and an import begins behind all that was."""
    pools, told = Pools("bf16"), list[str]()
    late, device = pools.late, pools.mover.device
    now, start, launch = late.now, late.run, device.launch

    def run(way: str, after: Any, work: Callable[[], None]) -> Told:
        told.append(f"{way} behind {moments.index(after)}")
        return start(way, after, work)

    def moment() -> Any:
        told.append("now")
        moments.append(now())
        return moments[-1]

    def launched(*args: Any, **named: Any) -> None:
        told.append("launch")
        launch(*args, **named)

    moments: list[Any] = []
    monkeypatch.setattr(late, "now", moment)
    monkeypatch.setattr(late, "run", run)
    monkeypatch.setattr(device, "launch", launched)
    pools.mover.begin_export(0, [1])
    assert told == ["launch", "now", "down behind 0"]
    told.clear()
    incoming = pools.mover.begin_import()
    pools.mover.begin_export(0, [3])
    rows = np.zeros((1, pools.pools[0].shape.bytes_per_page), np.uint8)
    incoming.put(0, [2], rows)
    assert told == ["now", "launch", "now", "down behind 2", "up behind 1"]
    incoming.end()
    assert told[5:] == ["launch"]


@interpreted
def test_without_free_staging_memory_the_oldest_export_leaves_its_own() -> None:
    pools = Pools("bf16")
    expected = [pools.held([page]) for page in range(8)]
    exports = [pools.mover.begin_export(0, [page]) for page in range(8)]
    assert pools.late.waits == 8 - transfer.DEPTH
    assert [export.ready for export in exports] == [True] * 4 + [False] * 4
    for page in range(8):
        pools.overwrite(page)
    taken = [exports[at].take().copy() for at in (6, 0, 7, 1, 5, 2, 4, 3)]
    order = [6, 0, 7, 1, 5, 2, 4, 3]
    assert [t.tobytes() for t in taken] == [expected[at].tobytes() for at in order]
    again = [pools.mover.begin_export(0, [page]) for page in range(transfer.DEPTH)]
    assert len({id(export._slot) for export in again}) == transfer.DEPTH


@interpreted
def test_pages_that_are_put_are_there_for_whoever_comes_after_the_end() -> None:
    pools = Pools("bf16", "fp8")
    source, before = pools.held([0, 1, 2]), pools.held([5, 6, 7])
    incoming = pools.mover.begin_import()
    rows = [row.copy() for row in source]
    thread = threading.Thread(target=incoming.put, args=(0, [5, 6, 7], rows))
    thread.start()
    thread.join()
    for row in rows:
        row[:] = 0  # they were copied
    assert pools.held([5, 6, 7]).tobytes() == before.tobytes()
    incoming.end()
    assert (pools.late.waits, pools.late.joins) == (0, 1)
    assert pools.held([5, 6, 7]).tobytes() == source.tobytes()


@interpreted
def test_more_is_put_than_staging_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "SLOT", 1)
    pools = Pools("bf16", "bf16")  # a slot is a page now
    assert pools.mover.piece(0, 0) == 1
    source = pools.held(list(range(8)))
    first, second = pools.mover.begin_import(), pools.mover.begin_import()
    threads = [
        threading.Thread(target=first.put, args=(0, [7, 6, 5, 4], source[:4])),
        threading.Thread(target=second.put, args=(0, [3, 2, 1, 0], source[4:])),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first.end()
    second.end()
    assert pools.late.waits == 8 - transfer.DEPTH
    assert pools.held([7, 6, 5, 4, 3, 2, 1, 0]).tobytes() == source.tobytes()
    with pytest.raises(BackendError, match="2 pages of"):
        pools.mover.begin_export(0, [0, 1])


@interpreted
def test_what_fails_on_the_way_leaves_no_slot_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    pools = Pools("bf16")
    source = pools.held([0, 1])

    def broken(*args: Any, **named: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB. GPU 0 is full")

    for _ in range(2 * transfer.DEPTH):
        with monkeypatch.context() as patch:
            patch.setattr(transfer._Rows, "move", broken)
            with pytest.raises(BackendError, match="begin export: Tried to allocate 2 MiB"):
                pools.mover.begin_export(0, [3])
        with monkeypatch.context() as patch:
            patch.setattr(transfer._Slot, "rows", broken)
            incoming = pools.mover.begin_import()
            with pytest.raises(torch.OutOfMemoryError):
                incoming.put(0, [3], source[:1])
            incoming.end()
    assert pools.mover.begin_export(0, [0, 1]).take().tobytes() == source.tobytes()
    incoming = pools.mover.begin_import()
    incoming.put(0, [3, 4], source)
    incoming.end()
    assert pools.held([3, 4]).tobytes() == source.tobytes()


@interpreted
def test_closing_waits_for_what_moves() -> None:
    pools = Pools("bf16")
    pools.mover.begin_export(0, [0])
    incoming = pools.mover.begin_import()
    incoming.put(0, [1], pools.held([2]))
    incoming.end()
    pools.mover.close()
    assert pools.late.done == pools.late.begun


def test_a_slot_holds_a_page_that_is_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "SLOT", 1 << 10)
    pools = Pools("fp32", "fp32", dim=48)
    assert pools.held([0]).nbytes > 1 << 10
    assert pools.mover.begin_export(0, [6]).take().tobytes() == pools.held([6]).tobytes()


# -- engines -------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("kind", ["full", pytest.param("mixed", marks=pytest.mark.slow)])
def test_hits_are_those_of_the_reference_and_tokens_those_without_tiers(
    models: dict[str, Path], kind: str, late: list[Late], tmp_path: Path
) -> None:
    def told(**tiers: Any) -> tuple[list[Any], list[Any]]:
        tokens, hits = [], []
        with engine_with(models[kind], **tiers) as engine:
            for seed in (1, 2, 1):
                done = run(engine, random_prompt(36 + seed, seed=seed), SHORT)
                tokens.append(done.token_ids)
                hits.append(done.cached_tokens_by_tier)
        return tokens, hits

    tokens, hits = told(host_cache="4MiB", cache_dir=tmp_path / "late")
    assert late[0].begun["down"] > 3
    assert late[0].begun["up"] > 0
    assert late[0].done == late[0].begun
    assert hits[-1]["host"] + hits[-1]["disk"] >= 12
    assert told()[0] == tokens
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quire.engine.engine.create_backend", lambda *a: create_backend("reference"))
        assert told(host_cache="4MiB", cache_dir=tmp_path / "law")[1] == hits


@interpreted
def test_a_load_is_cancelled_and_an_engine_closed_while_copies_are_on_their_way(
    models: dict[str, Path], late: list[Late], tmp_path: Path
) -> None:
    prompt = random_prompt(38, seed=4)
    with engine_with(models["full"], num_pages=24, cache_dir=tmp_path) as engine:
        expected = run(engine, prompt, SHORT).token_ids
    engine = engine_with(models["full"], num_pages=24, cache_dir=tmp_path)
    request = engine.submit(prompt, ONE)
    engine._loads.start(engine._queues.waiting.copy())
    load = request.samples[0].load
    assert load is not None
    load.finished.wait()
    assert late[-1].done["up"] < late[-1].begun["up"]
    engine.cancel(request)
    assert late[-1].done == late[-1].begun  # ordered before whatever its pages are used for next
    engine.cache.check()
    assert engine.cache.sequences == ()
    assert run(engine, prompt, SHORT).token_ids == expected
    engine.submit(random_prompt(30, seed=5), SHORT)
    while late[-1].done == late[-1].begun:
        engine.step()
    engine.close()
    assert late[-1].done == late[-1].begun
    with engine_with(models["full"], num_pages=24, cache_dir=tmp_path) as engine:
        assert run(engine, prompt, SHORT).token_ids == expected


@interpreted
def test_packed_pages_and_open_ones_come_back(
    models: dict[str, Path], late: list[Late], tmp_path: Path
) -> None:
    prompt = random_prompt(75, seed=7)
    settings: dict[str, Any] = {"kv_format": "int4", "page_size": 32, "num_pages": 4}
    with engine_with(models["full"], cache_dir=tmp_path, **settings) as engine:
        expected = run(engine, prompt, SHORT).token_ids
    with engine_with(models["full"], cache_dir=tmp_path, **settings) as engine:
        again = run(engine, prompt, SHORT)
        assert again.token_ids == expected
        assert again.cached_tokens_by_tier["disk"] == 64
        assert late[-1].begun["up"] == 2  # the first page is open, the other packed


def test_a_restart_finds_its_prefixes_on_disk(
    models: dict[str, Path], prompt_streams: None, tmp_path: Path
) -> None:
    test_tier_engine.test_a_restart_finds_its_prefixes_on_disk(models, "mixed", tmp_path)


@pytest.mark.slow
def test_preempted_samples_are_swapped(models: dict[str, Path], prompt_streams: None) -> None:
    test_tier_engine.test_preempted_samples_are_swapped_and_not_computed_again(models)


@interpreted
def test_sessions_move_as_tiers_do(
    models: dict[str, Path], late: list[Late], tmp_path: Path
) -> None:
    prompt = random_prompt(21, seed=6)
    engine = engine_with(models["full"], kv_format="int8")
    request = engine.submit(prompt, SHORT)
    while not request.finished:
        engine.step()
    saved = engine.save_session(request, tmp_path / "session")
    assert late[-1].begun["down"] > 0
    engine = engine_with(models["full"], kv_format="int8")
    assert len(engine.load_session(tmp_path / "session").tokens) == saved
    assert late[-1].begun["up"] > 0
    again = run(engine, prompt, SHORT)
    assert again.cached_tokens_by_tier["pool"] == 20
    assert again.token_ids == request.completions[0].token_ids


# -- a GPU's streams -----------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not ON_A_CARD, reason="streams are a GPU's")
def test_pages_go_down_and_up_while_the_device_computes() -> None:
    """Pages are overwritten behind each export; products run on the computing stream meanwhile."""
    pools = Pools("bf16", "int8", dim=128)
    assert isinstance(pools.late, Streams)
    busy = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    for turn in range(50):
        pages = [(turn + at) % 8 for at in range(3)]
        expected = pools.held(pages)
        for _ in range(20):
            busy = (busy @ busy).clamp_(-1, 1)
        export = pools.mover.begin_export(0, pages)
        for page in pages:
            pools.overwrite(page)
        taken = export.take().copy()
        assert taken.tobytes() == expected.tobytes()
        incoming = pools.mover.begin_import()
        for _ in range(20):
            busy = (busy @ busy).clamp_(-1, 1)
        thread = threading.Thread(target=incoming.put, args=(0, pages, list(taken)))
        thread.start()
        thread.join()
        incoming.end()
        assert pools.held(pages).tobytes() == expected.tobytes()
    pools.mover.close()


@pytest.mark.gpu
@pytest.mark.skipif(not ON_A_CARD, reason="streams are a GPU's")
def test_the_host_waits_neither_for_the_step_nor_for_the_copy() -> None:
    pools = Pools("bf16", dim=128)
    pools.mover.begin_export(0, [0]).take()
    busy = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(50):
        busy = (busy @ busy).clamp_(-1, 1)
    export = pools.mover.begin_export(0, [1])
    incoming = pools.mover.begin_import()
    incoming.put(0, [2], np.zeros((1, pools.pools[0].shape.bytes_per_page), np.uint8))
    incoming.end()
    assert not export.ready  # tens of milliseconds of products are before it
    torch.cuda.synchronize()
    assert export.ready
    assert not pools.held([2]).any()


@pytest.mark.gpu
@pytest.mark.skipif(not ON_A_CARD, reason="graphs are a GPU's")
def test_graphs_are_captured_while_a_thread_moves_pages(models: dict[str, Path]) -> None:
    """A step of each length class is captured beside imports that never stop."""
    pools, over = Pools("bf16", dim=128), threading.Event()
    data = np.zeros((2, pools.pools[0].shape.bytes_per_page), np.uint8)
    incoming = pools.mover.begin_import()
    failed: list[BaseException] = []

    def move() -> None:
        try:
            while not over.is_set():
                incoming.put(0, [3, 4], data)
        except BaseException as error:
            failed.append(error)

    expected = []
    for beside in (False, True):
        thread = threading.Thread(target=move)
        if beside:
            thread.start()
        cache = quire.CacheConfig(num_pages=64)
        engine = quire.Engine(models["full"], backend="cuda-exact", cache=cache)
        prompts = [random_prompt(5 + seed, seed=seed) for seed in range(5)]
        done = engine.generate(prompts, quire.SamplingParams(max_new_tokens=20, ignore_eos=True))
        expected.append([each.token_ids for each in done])
        if beside:
            over.set()
            thread.join()
    incoming.end()
    torch.cuda.synchronize()
    assert not failed
    assert expected[0] == expected[1]
