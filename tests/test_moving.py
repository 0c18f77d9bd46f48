"""Pages on their way between pool and tiers: what is known of them, found and waited for.

Here the device is a test's: copies are begun at once and arrive when the test says so, or when
somebody waits for them. What the cuda backend's own streams do is in ``test_cuda_streams.py``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quire
from quire.backends.reference_pool import ReferencePool
from quire.cache.tiers import HostTier
from quire.errors import QuireError
from quire.pages import Groups, PlainMover
from recording import Recorder, assert_warm_is_cold
from test_tier_engine import ONE, SHORT, engine_with, run
from tiny import random_prompt


class Late:
    """An export that has arrived when the mover's clock says so, or when it is waited for."""

    def __init__(self, mover: "LateMover", data: np.ndarray) -> None:
        self.mover, self.data, self.taken = mover, data, False

    @property
    def ready(self) -> bool:
        return self.mover.arrived

    def take(self) -> np.ndarray:
        assert not self.taken
        assert self is self.mover.sent[0], "the oldest is taken first"
        self.mover.waits += not self.ready
        self.taken = True
        self.mover.sent.pop(0)
        return self.data


class LateImport:
    """Writes nothing before its end; keeps what ``put`` copied."""

    def __init__(self, mover: "LateMover") -> None:
        self.mover, self.puts, self.ended = mover, list[Any](), False

    def put(self, group: int, pages: Sequence[int], data: Sequence[np.ndarray]) -> None:
        assert not self.ended
        self.puts.append((group, list(pages), [np.array(row) for row in data]))

    def end(self) -> None:
        self.ended = True
        for group, pages, rows in self.puts:
            if pages:
                self.mover.plain.put(group, pages, np.stack(rows))
        self.mover.imports.remove(self)


class LateMover:
    """See :class:`quire.pages.PageMover`."""

    def __init__(self, groups: Groups, depth: int, piece: int) -> None:
        self.plain, self.depth, self._piece = PlainMover(groups), depth, piece
        self.arrived, self.waits, self.closed = False, 0, False
        self.sent, self.begun = list[Late](), 0
        self.imports = list[LateImport]()

    def piece(self, group: int, page: int) -> int:
        return self._piece

    def begin_export(self, group: int, pages: Sequence[int]) -> Late:
        assert 0 < len(pages) <= self._piece
        assert len(self.sent) < self.depth
        self.begun += 1
        self.sent.append(Late(self, self.plain.begin_export(group, pages).take()))
        return self.sent[-1]

    def begin_import(self) -> LateImport:
        self.imports.append(LateImport(self))
        return self.imports[-1]

    def close(self) -> None:
        assert not self.sent
        assert not self.imports
        self.closed = True


@pytest.fixture
def movers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[LateMover]:
    """The movers of the reference engines that are made, the newest last."""
    depth, piece = getattr(request, "param", (64, 3))
    made: list[LateMover] = []

    def mover(pool: ReferencePool, groups: Groups) -> LateMover:
        made.append(LateMover(groups, depth, piece))
        return made[-1]

    monkeypatch.setattr(ReferencePool, "mover", mover)
    return made


def until_something_is_sent(engine: quire.Engine, prompt: list[int]) -> quire.Request:
    request = engine.submit(prompt, SHORT)
    while not engine._tiers._sent:  # type: ignore[union-attr]
        engine.step()
        assert not request.finished
    return request


def finish(engine: quire.Engine, request: quire.Request) -> quire.Completion:
    while not request.finished:
        engine.step()
    engine.cache.check()
    return request.completions[0]


def test_pages_on_their_way_are_found_and_counted(
    models: dict[str, Path], movers: list[LateMover]
) -> None:
    engine = engine_with(models["full"], host_cache="4MiB")
    first, other = random_prompt(38, seed=1), random_prompt(42, seed=2)
    run(engine, first, ONE)
    request = until_something_is_sent(engine, other)
    [usage] = engine.status().tiers
    sent = sum(len(each.records) for each in engine._tiers._sent)  # type: ignore[union-attr]
    assert (usage.stored, usage.pages) == (0, sent)
    assert usage.queued == sent * engine.cache.layout.page_bytes(0)
    assert movers[0].waits == 0
    found = engine.explain_prefix(first).cached_tokens_by_tier
    assert found["pool"] + found["host"] == 36
    assert found["host"] >= 4 * sent
    [usage] = engine.status().tiers
    assert (usage.queued, usage.pages) == (0, usage.stored)
    finish(engine, request)
    recorder = Recorder(engine, all_rows=True)
    again = run(engine, [*first, *random_prompt(3, seed=3)], SHORT)
    assert again.cached_tokens_by_tier["host"] >= 12
    assert_warm_is_cold(models["full"], recorder)


@pytest.mark.parametrize("kind", ["full", "mixed"])
@pytest.mark.parametrize("movers", [(64, 3), (1, 1), (2, 100)], indirect=True)
def test_hits_and_tokens_are_those_of_pages_that_move_at_once(
    models: dict[str, Path], kind: str, movers: list[LateMover], tmp_path: Path
) -> None:
    def told(**tiers: Any) -> list[tuple[Any, Any]]:
        told = []
        with engine_with(models[kind], **tiers) as engine:
            for seed in (1, 2, 1, 3, 1, 2):
                done = run(engine, random_prompt(38 + seed, seed=seed), SHORT)
                told.append((done.token_ids, done.cached_tokens_by_tier))
        return told

    late = told(host_cache="4MiB", cache_dir=tmp_path / "late")
    assert movers[0].begun > 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReferencePool, "mover", lambda pool, groups: PlainMover(groups))
        assert told(host_cache="4MiB", cache_dir=tmp_path / "plain") == late
    assert [tokens for tokens, _ in told()] == [tokens for tokens, _ in late]


def test_nobody_waits_for_what_will_arrive_in_time(
    models: dict[str, Path], movers: list[LateMover]
) -> None:
    engine = engine_with(models["full"], host_cache="4MiB")
    run(engine, random_prompt(38, seed=1), ONE)
    request = until_something_is_sent(engine, random_prompt(42, seed=2))
    movers[0].arrived = True
    finish(engine, request)
    assert movers[0].waits == 0
    [usage] = engine.status().tiers
    assert usage.stored == usage.pages > 0


@pytest.mark.parametrize("movers", [(2, 1)], indirect=True)
def test_where_no_memory_is_free_the_oldest_is_waited_for(
    models: dict[str, Path], movers: list[LateMover]
) -> None:
    engine = engine_with(models["full"], host_cache="4MiB")
    first = random_prompt(38, seed=1)
    run(engine, first, ONE)
    request = engine.submit(random_prompt(42, seed=2), SHORT)
    for _ in range(3):
        engine.step()
        assert len(movers[0].sent) <= 2
    assert movers[0].begun > 2
    assert movers[0].waits == movers[0].begun - len(movers[0].sent)
    finish(engine, request)
    [usage] = engine.status().tiers
    assert usage.stored == movers[0].begun  # a page each, and none was lost
    assert usage.dropped == 0


@pytest.mark.parametrize("movers", [(64, 100)], indirect=True)
def test_a_step_gives_up_all_its_pages_in_one_go(
    models: dict[str, Path], movers: list[LateMover]
) -> None:
    """Of several sequences too: each export is a launch for a device."""
    engine = engine_with(models["full"], num_pages=20, host_cache="4MiB")
    for seed in (1, 2):
        run(engine, random_prompt(38, seed=seed), ONE)
    requests = [engine.submit(random_prompt(6, seed=seed), SHORT) for seed in (3, 4)]
    engine.step()  # 13 tokens
    assert [len(each.records) for each in engine._tiers._sent] == [3]  # type: ignore[union-attr]
    for request in requests:
        finish(engine, request)
    [usage] = engine.status().tiers
    assert usage.stored > 3


def test_the_last_step_leaves_nothing_on_its_way(
    models: dict[str, Path], movers: list[LateMover], tmp_path: Path
) -> None:
    """Nobody may step again for long, and what is to be on disk would not be."""
    engine = engine_with(models["full"], num_pages=24, cache_dir=tmp_path)
    run(engine, random_prompt(38, seed=1), ONE)
    assert movers[0].begun
    assert not movers[0].sent
    engine.flush()
    assert engine.status().tiers[0].stored == 9
    engine.close()


def test_flush_and_close_wait_for_what_is_on_its_way(
    models: dict[str, Path], movers: list[LateMover], tmp_path: Path
) -> None:
    prompt = random_prompt(38, seed=1)
    engine = engine_with(models["full"], num_pages=24, cache_dir=tmp_path)
    request = until_something_is_sent(engine, prompt)
    engine.flush()
    assert not movers[0].sent
    stored = engine.status().tiers[0].stored
    assert stored > 0
    while not movers[0].sent:
        engine.step()
    assert not request.finished
    engine.close()
    assert movers[0].closed
    with engine_with(models["full"], num_pages=24, cache_dir=tmp_path) as engine:
        assert engine.explain_prefix(prompt).cached_tokens_by_tier["disk"] > 4 * stored


def test_a_page_that_is_given_up_twice_is_sent_once(
    models: dict[str, Path], movers: list[LateMover]
) -> None:
    """It was computed again, because nobody takes it from the tier, before it arrived there."""
    engine = engine_with(models["full"], eager=False, host_cache="4MiB")
    engine._tiers._paces["host"].add(1e6, 1)  # type: ignore[union-attr]
    keys: list[bytes] = []
    put = HostTier.put

    def recorded(tier: HostTier, record: Any, payload: Any) -> bool:
        keys.append(record.key)
        return put(tier, record, payload)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostTier, "put", recorded)
        requests = [engine.submit(random_prompt(38, seed=seed), ONE) for seed in (1, 2, 1, 2, 1, 2)]
        for request in requests:
            finish(engine, request)
    assert len(keys) == len(set(keys)) > 9


def test_a_step_that_fails_loses_nothing_that_is_on_its_way(
    models: dict[str, Path], movers: list[LateMover], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_with(models["full"], host_cache="4MiB")
    first, other = random_prompt(38, seed=1), random_prompt(42, seed=2)
    run(engine, first, ONE)
    request = engine.submit(other, SHORT)
    model = engine._loaded.model

    def broken(*args: Any) -> Any:
        raise QuireError("the device is out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", broken)
        for _ in range(3):
            with pytest.raises(QuireError, match="out of memory"):
                engine.step()
            engine.cache.check()
    assert movers[0].sent
    assert engine.explain_prefix(first).cached_tokens == 36
    expected = run(engine_with(models["full"], 40), other, SHORT).token_ids
    assert finish(engine, request).token_ids == expected


def test_loaded_pages_are_nobodys_before_their_copies_are_ordered(
    models: dict[str, Path], movers: list[LateMover], tmp_path: Path
) -> None:
    """What is put is in the pages when the load was taken in, and a cancelled load's too."""
    prompt = random_prompt(38, seed=1)
    with engine_with(models["mixed"], num_pages=24, cache_dir=tmp_path) as engine:
        expected = run(engine, prompt, SHORT).token_ids
    with engine_with(models["mixed"], num_pages=24, cache_dir=tmp_path) as engine:
        request = engine.submit(prompt, SHORT)
        engine.step()
        engine.cancel(request)
        assert not movers[-1].imports  # none is open when its pages can be another's
        engine.cache.check()
        again = run(engine, prompt, SHORT)
        assert again.token_ids == expected
        assert again.cached_tokens_by_tier["disk"] + again.cached_tokens_by_tier["pool"] == 36
        assert not movers[-1].imports
