"""Ways of keeping a cache side by side, and several devices: counted by hand."""

import pytest

from quire.analysis.catalogue import known_model
from quire.analysis.hardware import known_hardware
from quire.analysis.memory import (
    Load,
    Share,
    kv_layout,
    most_context,
    most_requests,
    plan_memory,
)
from quire.analysis.plan import Asked, make_plan, timing_of
from quire.analysis.roofline import Roof
from quire.analysis.strategies import prefill_peaks, strategies
from quire.errors import ConfigError

GIB = 1 << 30


def test_strategies_of_llama_2_7b_by_hand() -> None:
    found = strategies(known_model("llama-2-7b"), Load(1024, 4), 256)
    token = 2 * 32 * 4096  # numbers
    expected = {
        ("contiguous", "fp32"): 4 * 4096 * token * 4,
        ("contiguous", "fp16"): 4 * 4096 * token * 2,
        ("paged", "fp16"): 4 * 1024 * token * 2,
        ("paged", "int8"): 4 * 1024 * 2 * 32 * 32 * (128 + 2),
        ("window or eviction, 256 tokens", "fp16"): 4 * (256 + 16) * token * 2,
        ("eviction, 256 tokens", "int8"): 4 * (256 + 16) * 2 * 32 * 32 * (128 + 2),
    }
    taken = {(each.name, each.kv_format): each for each in found}
    for key, count in expected.items():
        assert taken[key].kv_bytes == count
        assert taken[key].saving == pytest.approx(1 - count / expected["contiguous", "fp32"])
    assert taken["paged", "int4"].kv_bytes < taken["paged", "int8"].kv_bytes
    assert len({each.gives for each in found}) > 3


def test_a_budget_above_the_context_evicts_nothing() -> None:
    found = strategies(known_model("llama-2-7b"), Load(1024), 100_000)
    assert found[5].kv_bytes == found[2].kv_bytes


def test_scores_of_a_prefill_by_hand() -> None:
    whole, chunks, tiles = prefill_peaks(known_model("llama-3-8b"), 8192, 512, threads=2)
    assert whole.score_bytes == 32 * 8192 * 8192 * 4
    assert chunks.score_bytes == 32 * 512 * 8192 * 4
    assert tiles.score_bytes == 2 * 96 * 256 * 4
    assert str(whole) == "whole prompt: 8 GiB"


def test_each_of_several_devices_holds_its_share() -> None:
    shape = known_model("llama-3-70b")
    layout, load = kv_layout(shape), Load(8192)
    half, budget = Share(0.5, 0.5), 80 * GIB
    assert most_requests(shape, layout, load, budget) == 0
    found = most_requests(shape, layout, load, budget, share=half)
    made = plan_memory(shape, layout, Load(8192, found))
    assert made.weight_bytes / 2 + made.kv / 2 + made.workspace.total <= budget
    more = plan_memory(shape, layout, Load(8192, found + 1))
    assert more.weight_bytes / 2 + more.kv / 2 + more.workspace.total > budget
    assert most_context(shape, layout, Load(1, 2), budget, share=half) == 8192


def asked(**changes: object) -> Asked:
    given: dict[str, object] = {
        "shape": known_model("llama-3-8b"),
        "load": Load(4096, 2),
        "hardware": known_hardware("h100"),
        "budget": 70 * GIB,
        **changes,
    }
    return Asked(**given)  # type: ignore[arg-type]


def test_timing_of_a_plan_adds_up_to_its_steps() -> None:
    """A replay's decode step and its prefill take what the plan says they take."""
    hardware = known_hardware("h100")
    made = make_plan(asked(), Roof(hardware))
    timing = timing_of(made, Roof(hardware))
    seen = made.deployment.layout.seen_bytes(4095)
    step = timing.step_seconds + timing.byte_seconds * seen
    assert step == pytest.approx(made.speed.decode[1].seconds, rel=1e-3)
    prefill = 8 * timing.step_seconds + 4096 * timing.prefill_seconds
    assert prefill == pytest.approx(made.speed.prefill.seconds, rel=0.05)


def test_a_plan_past_the_context_or_without_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match="9,000 tokens is past the 8,192 of llama-3-8b"):
        asked(load=Load(9000))
    with pytest.raises(ConfigError, match="a budget of 0 bytes holds nothing"):
        asked(budget=0)
