"""Engines over formats that pack whole pages: no route changes a bit, and nothing is packed twice.

A query sees its own page and the first one as they were appended, every other page packed: that
depends on its place alone. What that gives is compared with arithmetic in tests/conformance.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quire
from quire.analysis.candidates import Setting, open_tracks
from quire.batch import PagedBatch
from quire.cache import Reservation
from quire.errors import ConfigError, RequestError
from recording import Recorder, same_bits
from tiny import WRITERS, random_prompt

SIZE = 32
SHORT = quire.SamplingParams(max_new_tokens=5, ignore_eos=True)
ONE = quire.SamplingParams(max_new_tokens=1, ignore_eos=True)
FORMATS = (
    *("int4", "int2", "k=int8,v=int4", "int4+int8@first,last", "k=int4,v=bf16+int2@last"),
    "int4:rotated+int8@first",
)
SOME = ("int4", "k=int8,v=int2", "int4+int8@first", "int2:rotated")
KINDS = ("full", "mixed")  # with a window that is longer than a page

some_formats = pytest.mark.parametrize("kv_format", SOME)
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models with a context of several pages; three layers, so that first and last are not all."""
    root = tmp_path_factory.mktemp("long")
    sizes = {"max_position_embeddings": 320, "num_hidden_layers": 3}
    window = {"sliding_window": 45}
    return {
        "full": WRITERS["full"](root / "full", **sizes),
        "mixed": WRITERS["mixed"](root / "mixed", **sizes, **window),
        "sliding": WRITERS["sliding"](root / "sliding", **sizes, **window),
    }


BACKEND = {"name": "reference"}  # of the test in hand


@pytest.fixture(autouse=True, params=["reference", "native"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(BACKEND, "name", request.param)
    return str(request.param)


def engine_with(directory: Path, num_pages: int = 24, **settings: Any) -> quire.Engine:
    """An engine that takes its model for slow, so that it loads what it can."""
    limits = {"max_batch_tokens": 50} | {
        name: settings.pop(name) for name in list(settings) if name.startswith("max_")
    }
    cache = quire.CacheConfig(num_pages=num_pages, **settings)
    engine = quire.Engine(directory, backend=BACKEND["name"], cache=cache, **limits)
    if engine._tiers is not None:
        engine._tiers.compute_pace.add = lambda seconds, units: None  # type: ignore[method-assign]
        engine._tiers.compute_pace.seconds = 1e3
    return engine


def cold(directory: Path, tokens: list[int], kv_format: str) -> np.ndarray:
    """Logits of every position, in one go, on an engine that shares nothing."""
    engine = engine_with(directory, kv_format=kv_format, prefix_cache=False, max_batch_tokens=512)
    return engine.logits(tokens)


def assert_warm_is_cold(directory: Path, recorder: Recorder) -> None:
    assert recorder.rows
    alone: dict[Any, np.ndarray] = {}
    kv_format = recorder.engine.config.cache.kv_format
    for sample, position, logits in recorder.rows:
        if sample not in alone:
            alone[sample] = cold(directory, sample.tokens, kv_format)
        assert same_bits(logits, alone[sample][position]), position


def assert_settled(engine: quire.Engine) -> None:
    engine.cache.check()
    assert engine.cache.free_pages == engine.cache.num_pages


# -- the exactness law ---------------------------------------------------------------------------


@pytest.mark.parametrize("kv_format", FORMATS)
@every_kind
def test_logits_are_the_same_bits_in_any_chunks(
    long: dict[str, Path], kind: str, kv_format: str, backend: str
) -> None:
    tokens = random_prompt(170, seed=5)
    law = cold(long[kind], tokens, kv_format)
    for chunk in (1, 7, 32, 33, 100):
        engine = engine_with(long[kind], kv_format=kv_format, max_batch_tokens=chunk)
        assert same_bits(engine.logits(tokens), law), chunk
    plain = engine_with(long[kind], kv_format="bf16", page_size=SIZE).logits(tokens)
    # Native adds what a query sees in its own page to what it sees in the first.
    alike = 2 * SIZE if backend == "reference" else SIZE
    assert same_bits(law[:alike], plain[:alike]) == ("int8" not in kv_format)
    assert not same_bits(law[2 * SIZE :], plain[2 * SIZE :]), "nothing was packed"


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("kind", [*KINDS, "sliding"])
def test_any_schedule_computes_the_bits_of_each_request_alone(
    long: dict[str, Path], kind: str, seed: int
) -> None:
    """Company, chunks, hits, forks, preemptions and cancellations at random."""
    random = np.random.default_rng(seed)
    engine = engine_with(
        long[kind],
        int(random.integers(7, 13)),
        kv_format=str(random.choice(FORMATS)),
        max_batch_tokens=int(random.choice([3, 17, 32, 64, 200])),
        max_sequences=int(random.choice([2, 4, 9])),
    )
    recorder = Recorder(engine, all_rows=bool(random.random() < 0.7))
    base, todo, requests = random_prompt(100, seed), 6, []
    others: list[int] = []
    while todo or engine.has_work:
        if todo and (random.random() < 0.3 or not engine.has_work):
            todo -= 1
            shared = base[: int(random.integers(0, 100))]
            prompt = [*shared, *random_prompt(int(random.integers(1, 90)), seed * 9 + todo)]
            params = quire.SamplingParams(
                max_new_tokens=int(random.integers(1, 40)),
                temperature=0.8,
                seed=todo,
                n=int(random.choice([1, 1, 2])),
                ignore_eos=True,
            )
            requests.append(engine.submit(prompt, params))
        running = [s.sequence for s in engine._queues.running if s.sequence is not None]
        if (
            running
            and random.random() < 0.1
            and len(others) < 2
            and min(engine.cache.free_pages) > 4
        ):
            others.append(engine.cache.fork(running[random.integers(len(running))]))
        if others and random.random() < 0.3:
            engine.cache.release(others.pop())
        if requests and random.random() < 0.02:
            engine.cancel(requests[int(random.integers(len(requests)))])
        engine.step()
        engine.cache.check()
    for sequence in others:
        engine.cache.release(sequence)
    assert_settled(engine)
    assert_warm_is_cold(long[kind], recorder)


@some_formats
@every_kind
def test_hits_forks_and_preemptions_change_no_bit(
    long: dict[str, Path], kind: str, kv_format: str
) -> None:
    engine = engine_with(long[kind], 7, kv_format=kv_format, max_batch_tokens=40, max_sequences=6)
    recorder = Recorder(engine, all_rows=True)
    params = quire.SamplingParams(max_new_tokens=60, n=2, temperature=1.0, seed=3, ignore_eos=True)
    base = random_prompt(75, seed=4)
    requests = [engine.submit([*base, *random_prompt(5, seed=i)], params) for i in range(3)]
    while engine.has_work:
        engine.step()
        engine.cache.check()
    assert engine.status().preemptions
    assert any(c.cached_tokens for r in requests for c in r.completions)
    assert_warm_is_cold(long[kind], recorder)
    assert_settled(engine)


@some_formats
def test_a_hit_ends_before_a_packed_page_and_inside_an_open_one(
    long: dict[str, Path], kv_format: str
) -> None:
    tokens = random_prompt(150, seed=1)
    engine = engine_with(long["full"], kv_format=kv_format)
    engine.generate([tokens], ONE)
    for shared, hit in (
        (20, 20),
        (32, 32),
        (40, 32),
        (100, 96),
        (128, 128),
        (140, 140),
        (149, 149),
    ):
        recorder = Recorder(engine, all_rows=True)
        [done] = engine.generate([[*tokens[:shared], *random_prompt(6, seed=shared + 7)]], ONE)
        assert abs(done.cached_tokens - hit) <= 1, shared  # the next token may be equal, too
        assert_warm_is_cold(long["full"], recorder)
        engine._forward.run = recorder._inner  # type: ignore[method-assign]
    explained = engine.explain_prefix([*tokens[:90], 60, 59, 58, 57])
    assert explained.cached_tokens == 64
    assert "in the middle of a page that is packed" in str(explained)


@some_formats
@every_kind
def test_a_session_goes_on_with_the_same_bits(
    long: dict[str, Path], kind: str, kv_format: str, tmp_path: Path
) -> None:
    for length in (20, 33, 92, 129):
        engine = engine_with(long[kind], kv_format=kv_format)
        request = engine.submit(random_prompt(length, seed=1), SHORT)
        while engine.has_work:
            engine.step()
        path = tmp_path / "talk.quire"
        engine.save_session(request, path)
        tokens = request.samples[0].tokens
        other = engine_with(long[kind], kv_format=kv_format)
        assert other.load_session(path).tokens == tuple(tokens[:-1])
        other.cache.check()
        recorder = Recorder(other, all_rows=True)
        [done] = other.generate([[*tokens, *random_prompt(40, seed=2)]], SHORT)
        assert done.cached_tokens == len(tokens) - 1
        assert_warm_is_cold(long[kind], recorder)
        assert engine_with(long[kind], kv_format="int8").load_session(path).reason is not None


@some_formats
@every_kind
def test_tiers_give_back_the_same_bits(
    long: dict[str, Path], kind: str, kv_format: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"kv_format": kv_format, "cache_dir": tmp_path / "store"}
    first, other = random_prompt(170, seed=1), random_prompt(250, seed=2)
    with engine_with(long[kind], 8, host_cache="4MiB", **settings) as engine:
        engine.generate([first], ONE)
        engine.generate([other], ONE)  # takes every packed page of the pool
        recorder = Recorder(engine, all_rows=True)
        [again] = engine.generate([[*first, *random_prompt(3, seed=3)]], SHORT)
        assert again.cached_tokens_by_tier["host"] >= SIZE
        assert_warm_is_cold(long[kind], recorder)
    with engine_with(long[kind], 24, max_sequences=1, **settings) as engine:
        recorder = Recorder(engine, all_rows=True)
        [again] = engine.generate([[*first, *random_prompt(3, seed=5)]], SHORT)
        assert again.cached_tokens_by_tier == {"pool": 0, "host": 0, "disk": 160}
        assert_warm_is_cold(long[kind], recorder)
        assert_settled(engine)


def test_a_load_of_more_pages_than_there_are_open_ones_is_done_in_one_go(
    long: dict[str, Path], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"kv_format": "int4", "cache_dir": tmp_path / "store"}
    tokens = random_prompt(290, seed=1)
    with engine_with(long["full"], **settings) as engine:
        engine.generate([tokens], ONE)
    with engine_with(long["full"], 9, max_sequences=1, **settings) as engine:
        assert engine.cache.num_pages[1] < 9
        [done] = engine.generate([tokens], SHORT)
        assert done.cached_tokens_by_tier["disk"] == 288


def test_a_step_that_fails_leaves_pages_as_they_were(
    long: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that had packed a page: the next try packs it again, from the same numbers."""
    engine = engine_with(long["full"], kv_format="int4", max_batch_tokens=40)
    recorder, failed = Recorder(engine, all_rows=True), []
    request = engine.submit(random_prompt(120, seed=1), SHORT)
    forward = engine._loaded.model.forward

    def fail(tokens: Any, batch: PagedBatch, *rest: Any) -> Any:
        logits = forward(tokens, batch, *rest)
        if len(batch.groups[-1].open.seal_to) and len(failed) < 2:
            failed.append(batch)
            raise RuntimeError("no more")
        return logits

    monkeypatch.setattr(engine._loaded.model, "forward", fail)
    while engine.has_work:
        before = engine.cache.free_pages
        try:
            engine.step()
        except RuntimeError:
            assert len(engine.cache.sequences) == 1
            assert before == engine.cache.free_pages or len(failed) == 1  # it was admitted then
        engine.cache.check()
    assert len(failed) == 2
    assert len(request.completions[0].token_ids) == 5
    assert_warm_is_cold(long["full"], recorder)


# -- packed once ---------------------------------------------------------------------------------


@some_formats
@every_kind
def test_a_packed_page_never_changes(long: dict[str, Path], kind: str, kv_format: str) -> None:
    """Not by its own sequence, by forks, by hits or by others that come and go."""
    engine = engine_with(long[kind], 16, kv_format=kv_format, max_batch_tokens=40)
    seals: list[int] = []
    reserve = engine.cache.reserve

    def counted(chunks: Any) -> Reservation:
        reservation = reserve(chunks)
        seals.extend(reservation.batch.groups[-1].open.seal_to.tolist())
        return reservation

    engine.cache.reserve = counted  # type: ignore[method-assign]
    params = quire.SamplingParams(max_new_tokens=70, n=2, temperature=1.0, seed=3, ignore_eos=True)
    request = engine.submit(random_prompt(90, seed=4), params)
    seen: dict[int, dict[int, bytes]] = {}
    while engine.has_work:
        engine.step()
        for sample in request.samples:
            if sample.sequence is None:
                continue
            first, pages = engine.cache.page_tables(sample.sequence)[-1]
            own = seen.setdefault(sample.index, {})
            for number, page in enumerate(pages, first):
                if not engine.cache.raw.is_open(len(engine.cache.layout.groups) - 1, page):
                    data = engine.cache.raw.read(len(engine.cache.layout.groups) - 1, [page])
                    assert own.setdefault(number, data.tobytes()) == data.tobytes()
    assert not engine.status().preemptions
    assert sorted(seen[0]) == sorted(seen[1]) == [1, 2, 3]
    assert len(seals) == 1 + 2 * 2  # the page that both share, then each its own


# -- what it takes -------------------------------------------------------------------------------


def arrays_of(pool: Any) -> list[np.ndarray]:
    """All that a pool keeps numbers in."""
    if BACKEND["name"] == "reference":
        return [*pool.key, *pool.value, *pool.open_key, *pool.open_value]
    kinds = {id(stored): stored for stored in (pool._pages, pool._open)}
    return [array for stored in kinds.values() for array in stored.arrays]


def test_bytes_are_counted_exactly(long: dict[str, Path]) -> None:
    engine = engine_with(long["full"], 20, kv_format="int4+int8@first", max_sequences=3)
    layout, [packed, opened] = engine.cache.layout, engine.cache.num_pages
    held = sum(array.nbytes for pool in engine.cache.pools for array in arrays_of(pool))
    assert held == engine.status().kv.pool_bytes
    int8, int4 = 2 * 2 * (6 + 2) * SIZE, 2 * 6 * SIZE // 2 + 2 * 6 * 4 + 2 * (3 + 4) * SIZE
    bf16 = 2 * 2 * 6 * 2 * SIZE
    assert layout.area_bytes == (int8 + 2 * int4, int8 + 2 * bf16)
    assert (packed, opened) == (20, min(50 // SIZE + 3 * 3 + 0, 20 // 2 + 3))
    sequence = engine.cache.create()
    engine._forward.prefill(sequence, random_prompt(100, seed=1))
    usage = engine.cache.usage(sequence)
    assert usage.allocated_bytes == 2 * layout.area_bytes[0] + 2 * layout.area_bytes[1]
    assert usage.used_bytes == 2 * layout.area_bytes[0] + 36 * layout.area_bytes[1] // SIZE
    assert engine.cache.allocated_bytes(sequence) == usage.allocated_bytes
    seen = 64 * layout.area_bytes[0] + (32 + 5) * layout.area_bytes[1]
    assert layout.seen_bytes(100) == seen // SIZE
    assert engine.status().lossy == ("layer 0: int8 pages", "layers 1-2: int4 pages")


def test_a_budget_is_kept_and_holds_more_tokens(long: dict[str, Path]) -> None:
    tokens = {}
    for kv_format in ("bf16", "int8", "int4", "int2"):
        cache = quire.CacheConfig(kv_format=kv_format, kv_memory="512KiB", page_size=SIZE)
        engine = quire.Engine(
            long["full"], backend="reference", cache=cache, max_sequences=2, max_batch_tokens=64
        )
        tokens[kv_format] = engine.cache.num_pages[0] * SIZE
        pool = engine.status().kv.pool_bytes
        assert (512 << 10) - 2 * engine.cache.layout.area_bytes[-1] < pool <= 512 << 10
    assert tokens["int2"] > tokens["int4"] > tokens["int8"] > tokens["bf16"]


def test_a_small_pool_serves_what_it_takes_and_refuses_what_it_can_never(
    long: dict[str, Path],
) -> None:
    engine = engine_with(long["full"], 3, kv_format="int4", max_batch_tokens=512)
    params = quire.SamplingParams(max_new_tokens=9, ignore_eos=True)
    done = engine.generate([random_prompt(110, seed=i) for i in range(4)], params)
    assert [len(each.token_ids) for each in done] == [9] * 4
    fits = quire.SamplingParams(max_new_tokens=50, ignore_eos=True)
    assert len(engine.generate([random_prompt(110)], fits)[0].token_ids) == 50
    with pytest.raises(RequestError, match="need 4 pages of 32 tokens"):
        engine.submit(random_prompt(110), quire.SamplingParams(max_new_tokens=51))
    beams = quire.SamplingParams(max_new_tokens=9, beam_width=2)
    with pytest.raises(RequestError, match="need 6 open pages"):
        engine.submit(random_prompt(50), beams)


@every_kind
def test_a_beam_search_finds_what_it_finds_with_room(long: dict[str, Path], kind: str) -> None:
    found = []
    for pages in (40, 12):
        engine = engine_with(long[kind], pages, kv_format="int4")
        params = quire.SamplingParams(max_new_tokens=40, beam_width=3, n=3, ignore_eos=True)
        searches = [engine.submit(random_prompt(50, seed=s), params) for s in (1, 2)]
        while engine.has_work:
            engine.step()
            engine.cache.check()
        found.append([[c.token_ids for c in search.completions] for search in searches])
    assert found[0] == found[1]


# -- refused -------------------------------------------------------------------------------------


def test_eviction_is_refused_with_the_reason(long: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"cannot be dropped from int4 pages \(layer 1\)"):
        engine_with(long["full"], kv_format="int4+int8@first", evict="window:budget=64")
    engine = engine_with(long["full"], kv_format="int4")
    with pytest.raises(RequestError, match="cannot be dropped from int4 pages"):
        engine.submit([1, 2], quire.SamplingParams(evict="window:budget=64"))


def test_a_context_larger_than_the_pool_is_refused_with_the_reason(long: dict[str, Path]) -> None:
    engine = engine_with(long["full"], 4, kv_format="int4", host_cache="8MiB")
    with pytest.raises(RequestError, match="int4 pages, which are packed in the pool, cannot be"):
        engine.submit(random_prompt(250), ONE)


def test_exported_arrays_show_both_kinds_of_pages(long: dict[str, Path]) -> None:
    tokens = random_prompt(100, seed=8)
    found = []
    for kv_format in ("int4", "bf16"):
        engine = engine_with(long["full"], kv_format=kv_format, page_size=SIZE, prefix_cache=False)
        sequence = engine.cache.create()
        engine._forward.prefill(sequence, tokens)
        found.append(engine.cache.to_arrays(sequence, "BSHD").layers[0])
        engine.cache.truncate(sequence, 20)  # open pages alone
        assert engine.cache.to_arrays(sequence).layers[0].key.dtype == found[-1].key.dtype
    for mine, theirs in zip(
        (found[0].key, found[0].value), (found[1].key, found[1].value), strict=True
    ):
        assert mine.dtype == np.float32
        same = [
            bool((mine[0, a:b] == theirs[0, a:b].astype(np.float32)).all())
            for a, b in pairwise((0, 32, 64, 96, 100))
        ]
        assert same == [True, False, False, True]


def test_the_meter_counts_pages_of_both_kinds(long: dict[str, Path]) -> None:
    model = engine_with(long["mixed"], page_size=SIZE)
    _, [track] = open_tracks(model, [Setting("int4")], 100, 1)
    assert track.error is None
    with track.engine.forced() as text:
        text.read(random_prompt(100, seed=1))
        track.note(text)
        assert track.stored_bytes == text.usage.allocated_bytes
        assert track.used_bytes == text.usage.used_bytes < track.stored_bytes
