"""Everything at once, at random, in tight pools: each reply is that of the request alone.

Samples, beams, tenants, pins, sessions, cancellations, streamed contexts, host and disk tiers, and
digests that collide. After every step the books balance; in the end nothing is left behind.
"""

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import quire
from quire.errors import CacheFull, ConfigError, RequestError, SessionError
from tiny import random_prompt

MOST_STEPS = 4000  # of one history; a hang shows as more


class Stress:
    """One history; everything follows from ``seed`` and ``backends``."""

    def __init__(
        self,
        directory: Path,
        place: Path,
        seed: int,
        backends: Sequence[str] = ("reference", "native"),
    ) -> None:
        self.random, self.backends = random.Random(seed), backends
        self.directory, self.place, self.seen = directory, place, Counter[str]()
        self.families = [random_prompt(90, self.random.randrange(1000)) for _ in range(2)]
        self.engine = self._engine()
        self.requests: list[quire.Request] = []
        self.saved = False

    def _engine(self) -> quire.Engine:
        draw = self.random
        size = draw.choice([1, 2, 4, 5, 8])
        tiers: dict[str, Any] = {}
        if draw.random() < 0.6:
            tiers["host_cache"] = draw.choice(["100KB", "4MiB", "4MiB"])
        if draw.random() < 0.3:
            tiers |= {"cache_dir": self.place / "store", "disk_cache": "16MiB"}
        cache = quire.CacheConfig(
            page_size=size,
            num_pages=draw.randint(max(4, 28 // size), max(6, 44 // size)),
            prefix_cache=bool(tiers) or draw.random() < 0.8,
            **tiers,
        )
        engine = quire.Engine(
            self.directory,
            backend=draw.choice(self.backends),
            cache=cache,
            max_batch_tokens=draw.choice([3, 7, 13, 40]),
            max_sequences=draw.choice([4, 64, 64]),
        )
        if engine._tiers is not None and draw.random() < 0.9:  # tiny models would never load
            engine._tiers.compute_pace.add = lambda seconds, units: None  # type: ignore[method-assign]
            engine._tiers.compute_pace.seconds = 1e3
        if engine.cache.prefix is not None:
            engine.cache.prefix.digest_bytes = draw.choice([0, 1, 32, 32])
        return engine

    def run(self) -> None:
        draw, todo = self.random, self.random.randint(4, 9)
        steps = 0
        while todo or self.engine.has_work:
            if todo and draw.random() < 0.6:
                todo -= 1
                self._submit()
            elif draw.random() < 0.15:
                self._disturb()
            elif self.engine.has_work:
                self.engine.step()
                steps += 1
                assert len(self.engine._queues.running) <= self.engine.config.max_sequences
            self.engine.cache.check()
            assert steps < MOST_STEPS, "it hangs"
        self._check_nothing_is_left()

    def _submit(self) -> None:
        draw = self.random
        length = draw.randint(1, 45)
        common = draw.randint(0, length)
        prompt = draw.choice(self.families)[:common] + random_prompt(
            length - common, draw.choice([0, 1])
        )
        n = beams = 1
        if draw.random() < 0.3:
            n = draw.randint(2, 4)
        elif draw.random() < 0.25:
            beams = draw.randint(2, 4)
            n = draw.randint(1, beams)
        hot = beams == 1 and draw.random() < 0.2
        params = quire.SamplingParams(
            max_new_tokens=draw.randint(1, 20),
            n=n,
            beam_width=beams,
            temperature=1.0 if hot else 0.0,
            seed=3,
            ignore_eos=True,
        )
        try:
            self.requests.append(
                self.engine.submit(prompt, params, salt=draw.choice(["", "", "a"]))
            )
        except RequestError:
            self.seen["refused"] += 1

    def _disturb(self) -> None:
        draw, engine, path = self.random, self.engine, self.place / "session"
        what = draw.choice(["cancel", "pin", "save", "load", "explain", "logits"])
        try:
            if what == "cancel" and self.requests:
                engine.cancel(draw.choice(self.requests))
            elif what == "pin":
                engine.pin(
                    draw.choice(self.families)[: draw.randint(1, 60)], draw.choice([0.001, 1e3])
                )
            elif what == "save" and self.requests:
                engine.save_session(draw.choice(self.requests), path)
                self.saved = True
            elif what == "load" and self.saved:
                engine.load_session(path, salt=draw.choice(["", "a"]))
            elif what == "explain":
                engine.explain_prefix(draw.choice(self.families)[: draw.randint(1, 60)])
            elif what == "logits":
                engine.logits(draw.choice(self.families)[: draw.randint(1, 20)])
            self.seen[what] += 1
        except (CacheFull, SessionError):
            self.seen[f"no {what}"] += 1

    def _check_nothing_is_left(self) -> None:
        engine = self.engine
        while engine._pins.drop_one():
            pass
        assert engine.cache.sequences == ()
        assert len(engine._replies) == 0
        assert len(engine._searches) == 0
        for usage in engine.status().tiers:
            assert usage.bytes_used <= usage.budget
        engine.cache.clear()
        engine.cache.check()
        if engine.cache.prefix is not None:
            assert engine.cache.prefix.num_nodes == 0
            assert engine.cache.prefix.salts == ()
        assert engine.cache.free_pages == engine.cache.num_pages
        engine.close()


def assert_replies_are_those_of_each_alone(stress: Stress) -> None:
    plain = quire.CacheConfig(num_pages=200, page_size=16, prefix_cache=False)
    backend = stress.engine.backend.name
    for request in stress.requests:
        alone = quire.Engine(stress.directory, backend=backend, cache=plain)
        expected = alone.generate([list(request.prompt_tokens)], request.params)
        assert len(request.completions) == request.params.n
        for completion in request.completions:
            assert completion.error is None
            stress.seen["preempted"] += len(completion.preemptions)
            stress.seen["streamed"] += completion.streamed is not None
            stress.seen["beams"] += request.params.beam_width > 1
            for tier, tokens in completion.cached_tokens_by_tier.items():
                stress.seen[tier] += tokens > 0
            whole = expected[completion.index].token_ids
            if completion.finish_reason == "cancelled" and request.params.beam_width > 1:
                continue  # it was following beams that might not have been the best
            cut = len(completion.token_ids) if completion.finish_reason == "cancelled" else None
            assert completion.token_ids == whole[:cut]


@pytest.mark.parametrize("kind", ["full", "mixed", "sliding"])
@pytest.mark.parametrize("histories", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_anything_at_once_gives_what_each_request_gives_alone(
    models: dict[str, Path], tmp_path: Path, kind: str, histories: int
) -> None:
    seen = Counter[str]()
    for seed in range(histories):
        place = tmp_path / str(seed)
        place.mkdir()
        try:
            stress = Stress(models[kind], place, 1000 * histories + seed)
        except ConfigError:
            continue  # a tier that is too small for the pages
        stress.run()
        assert_replies_are_those_of_each_alone(stress)
        seen += stress.seen
    for what in ("pool", "host", "beams", "preempted", "cancel", "pin", "load", "save"):
        assert seen[what], f"{what} never happened: {seen}"
