"""Of its last layer a step computes what somebody reads: all keys and values, and wanted rows."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quire
from checkpoints import VARIETY, write_checkpoint
from quire.backends.reference import ReferenceBackend
from recording import same_bits

FIRST, SECOND = 40, 6  # new tokens of two sequences
WANTED = {
    "none": ([], []),
    "the last of each": ([FIRST - 1], [SECOND - 1]),
    "of one alone": ([], [0, 3]),
    "all but one": (range(1, FIRST), range(SECOND)),
}


def prompt(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 97, length).tolist()


def make(directory: Path, backend: str, kv_format: str = "auto") -> quire.Engine:
    cache = quire.CacheConfig(page_size=32, num_pages=12, kv_format=kv_format)
    return quire.Engine(directory, backend=backend, cache=cache, max_batch_tokens=64)


def run(engine: quire.Engine, first: Sequence[int], second: Sequence[int]) -> Any:
    """Logits of rows of two prefills, one of them behind another; then of the next tokens."""
    one, two, forward = engine.cache.create(), engine.cache.create(), engine._forward.run
    forward([(one, prompt(7, 0), range(7))])
    some = forward([(one, prompt(FIRST, 1), first), (two, prompt(SECOND, 2), second)]).host().copy()
    return some, forward([(one, [5], [0]), (two, [9], [0])]).host()


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
@pytest.mark.parametrize("kv_format", ["auto", "int4:rotated"])
@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("kind", VARIETY)
def test_rows_that_nobody_wants_change_no_bit(
    tmp_path: Path, kind: str, backend: str, kv_format: str, wanted: Any
) -> None:
    """Of the others, and of what attends to their keys and values later: pages are packed, too."""
    if backend == "native":
        pytest.importorskip("quire.backends.native._native")
    model = write_checkpoint(tmp_path, VARIETY[kind])
    logits, after = run(make(model, backend, kv_format), *wanted)
    law, law_after = run(make(model, backend, kv_format), range(FIRST), range(SECOND))
    first, second = wanted
    assert same_bits(logits, law[[*first, *(FIRST + row for row in second)]])
    assert same_bits(after, law_after)


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
@pytest.mark.parametrize("kind", VARIETY)
def test_queries_attention_and_mlp_of_the_last_layer_are_those_of_wanted_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, wanted: Any
) -> None:
    engine = make(write_checkpoint(tmp_path, VARIETY[kind]), "reference")
    params = engine._loaded.model.params  # type: ignore[attr-defined]
    names, found = {id(array): name for name, array in params.items()}, Counter[str]()
    linear, attend = ReferenceBackend.linear, ReferenceBackend.attend

    def multiplied(self: Any, x: Any, weight: Any, bias: Any = None) -> Any:
        found[names[id(weight)]] += len(x)
        return linear(self, x, weight, bias)

    def attended(self: Any, query: Any, pool: Any, *args: Any) -> Any:
        found[f"layers.{engine.cache.pools.index(pool)}.attention"] += len(query)
        return attend(self, query, pool, *args)

    one, two = engine.cache.create(), engine.cache.create()
    monkeypatch.setattr(ReferenceBackend, "linear", multiplied)
    monkeypatch.setattr(ReferenceBackend, "attend", attended)
    first, second = wanted
    engine._forward.run([(one, prompt(FIRST, 1), first), (two, prompt(SECOND, 2), second)])
    last, tokens, rows = len(engine.cache.pools) - 1, FIRST + SECOND, len(first) + len(second)
    for name, count in found.items():
        of_last = name.startswith(f"layers.{last}.") and name[-1] not in "kv"
        assert count == (rows if of_last or "layers" not in name else tokens), name
    assert {f"layers.{last}.{name}" for name in ("k", "v", "up", "down")} <= set(found) or not rows
    assert found[f"layers.{last}.k"] == found["layers.0.attention"] == tokens
